"""What it costs to bring a set up to date, beside preparing it anew. Bar: the changed part alone + 10% of the whole + 0.5 s.

    python benchmarks/append.py [--rounds 3] [--copies 1] [--only top,1%] [--json]

The chats of prepare.py, changed in one way each round; every entry is a whole command, and the set must have the digest of
preparing anew. Seconds are of the processor and of the clock, the best of the rounds; `part` prepares the changed rows alone.
With several copies each has its number in every row, so that no two slices hold the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from prepare import MAX_LENGTH, write_rows

from sftdata.set.manifest import read_manifest

Lines = list[bytes]
_REUSED = re.compile(r"(\d+) of (\d+) slices reused")


class Change(NamedTuple):
    """A change of the input: the lines before and after it, and those that are new."""

    before: Lines
    after: Lines
    new: Lines


def appended(percent: float) -> Callable[[Lines], Change]:
    def change(lines: Lines) -> Change:
        kept = len(lines) - max(1, int(len(lines) * percent / (100 + percent)))
        return Change(lines[:kept], lines, lines[kept:])

    return change


def put_in(share: float) -> Callable[[Lines], Change]:
    def change(lines: Lines) -> Change:
        place, new = int(len(lines) * share), lines[-1:]
        return Change(lines[:-1], [*lines[:place], *new, *lines[place:-1]], new)

    return change


def taken_out(lines: Lines) -> Change:
    half = len(lines) // 2
    return Change(lines, [*lines[:half], *lines[half + 1 :]], lines[:1])


CHANGES: dict[str, Callable[[Lines], Change]] = {
    "append 1%": appended(1),
    "append 5%": appended(5),
    "append 12.5%": appended(12.5),
    "a line at the top": put_in(0),
    "a line in the middle": put_in(0.5),
    "a line taken out": taken_out,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--only", default="", help="changes whose name holds one of these")
    parser.add_argument("--folder", help="where to work, instead of the temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = [name for name in CHANGES if any(part in name for part in options.only.split(","))]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), wanted, options.rounds, options.copies)
    print(json.dumps(found, indent=2) if options.json else "\n".join(map(line_of, found)))


def measure(folder: Path, names: list[str], rounds: int, copies: int) -> list[dict[str, Any]]:
    """Return a row of figures for each change."""
    rows = folder / "rows.jsonl"
    _, tokenizer = write_rows(rows, 1)
    once = rows.read_bytes().splitlines(keepends=True)
    lines = [b'{"copy": %d, ' % copy + line[1:] if copy else line for copy in range(copies) for line in once]
    found = []
    for name in names:
        change = CHANGES[name](lines)
        times: dict[str, list[tuple[float, float]]] = {"whole": [], "part": [], "update": []}
        for _ in range(rounds):
            said = one_round(folder, tokenizer, change, times)
        best = {key: [min(pair[axis] for pair in pairs) for axis in (0, 1)] for key, pairs in times.items()}
        bars = [best["part"][axis] + 0.1 * best["whole"][axis] + 0.5 for axis in (0, 1)]
        figures = {key: {"processor": cpu, "clock": wall} for key, (cpu, wall) in best.items()}
        reused = _REUSED.search(said)
        assert reused is not None, said
        found.append(
            {"change": name, "reused": int(reused[1]), "slices": int(reused[2])}
            | figures
            | {"bar": {"processor": bars[0], "clock": bars[1]}}
        )
    return found


def one_round(
    folder: Path, tokenizer: str, change: Change, times: dict[str, list[tuple[float, float]]]
) -> str:
    """Prepare the part, the old set, its update and the new set; return what the update said."""
    rows, part = folder / "rows.jsonl", folder / "part.jsonl"
    for name in ("set", "anew", "part"):
        shutil.rmtree(folder / name, ignore_errors=True)
    part.write_bytes(b"".join(change.new))
    times["part"].append(command(part, tokenizer, folder / "part")[0])
    rows.write_bytes(b"".join(change.before))
    command(rows, tokenizer, folder / "set")
    rows.write_bytes(b"".join(change.after))
    spent, said = command(rows, tokenizer, folder / "set")
    times["update"].append(spent)
    times["whole"].append(command(rows, tokenizer, folder / "anew")[0])
    digests = [read_manifest(folder / name).digest for name in ("set", "anew")]
    assert digests[0] == digests[1], digests
    return said


def command(rows: Path, tokenizer: str, output: Path) -> tuple[tuple[float, float], str]:
    """Run `prepare`; return seconds of the processor and of the clock, and what it said."""
    words = ["prepare", rows, "-t", tokenizer, "-o", output, "--max-length", MAX_LENGTH, "--workers", 2]
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sftdata", *map(str, words)], check=True, capture_output=True, text=True
    )
    wall, after = time.monotonic() - began, os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return (spent, wall), done.stderr


def line_of(row: dict[str, Any]) -> str:
    """Return the figures in words."""
    figures = "  ".join(
        f"{key} {row[key]['processor']:6.2f} {row[key]['clock']:6.2f}"
        for key in ("whole", "part", "update", "bar")
    )
    return f"{row['change']:22} {row['reused']:4} of {row['slices']} reused  {figures}"


if __name__ == "__main__":
    main()
