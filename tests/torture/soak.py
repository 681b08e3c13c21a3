"""A long run on a real disk, killed on the way again and again: `python -m tests.torture.soak [GIGABYTES] [FOLDER]`.

Ends with figures, or with an AssertionError; what it wrote is removed either way.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from sftdata.set.manifest import read_manifest
from sftdata.set.verify import verify
from tests.torture.runs import WORDS, Command, look

KILLS = 6
WORKERS = 2
DISK_PER_BYTE = 6  # the rows, and their ids and labels
BLOCK_ROWS = 20_000


def main() -> None:
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 4) * 1e9)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=sys.argv[2] if len(sys.argv) > 2 else None))
    try:
        free = shutil.disk_usage(folder).free
        assert free > size * DISK_PER_BYTE, (
            f"{folder}: {free >> 30} GiB free, {size * DISK_PER_BYTE >> 30} wanted"
        )
        soak(folder, size)
    finally:
        shutil.rmtree(folder)


def soak(folder: Path, size: int) -> None:
    begun = time.monotonic()
    rows = write_rows(folder / "rows.jsonl", size)
    print(
        f"wrote {size / 1e9:.1f} GB, {rows.total():,} rows, {rows['bad']:,} of them broken, in {time.monotonic() - begun:.0f} s"
    )
    watch, output, rng, begun = Watch(), folder / "set", random.Random(0), time.monotonic()
    for kill in range(1, KILLS + 1):
        command, done = start(folder), slices(output)
        while command.process.poll() is None and slices(output) < max(
            done + 1, kill * size // (8 << 20) // (KILLS + 1)
        ):
            watch.look_at(command.process.pid)
        time.sleep(rng.random())
        assert command.process.poll() is None, command.process.stderr and command.process.stderr.read()
        done = slices(output)
        command.kill()
        _, said = command.process.communicate()
        assert look(output) is None
        print(f"kill {kill}: {done} slices done; {resumed(said)}", flush=True)
    command, done = start(folder), slices(output)
    while command.process.poll() is None:
        watch.look_at(command.process.pid)
    code, said = command.finish()
    assert code == 0, said
    assert resumed(said).startswith(f"Resuming: {done}/"), said
    print(
        f"finished in {time.monotonic() - begun:.0f} s, {KILLS} kills and the plans made again included; {resumed(said)}"
    )
    check(output, rows)
    print(
        f"peak memory: {watch.largest >> 10} MiB the largest process, {watch.together >> 10} MiB all together"
    )


def write_rows(path: Path, size: int) -> Counter[str]:
    """Write seeded chats until the file is large enough, one in a thousand broken; count both."""
    rng, rows = random.Random(1), Counter[str]()
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) for _ in range(5000)]
    with path.open("w") as lines:
        while lines.tell() < size:
            block = []
            for _ in range(BLOCK_ROWS):
                number, turns = rows.total(), rng.choices(sentences, k=8)
                good = number % 1000 != 7
                rows["good" if good else "bad"] += 1
                row = [
                    {"role": role if good else "bot", "content": f"{number} {text} {more}"}
                    for role, text, more in zip(("user", "assistant") * 2, turns[:4], turns[4:], strict=True)
                ]
                block.append(json.dumps({"messages": row}))
            lines.write("\n".join(block) + "\n")
    return rows


def start(folder: Path) -> Command:
    more = ["--max-length", "2048", "--max-rejects", "1%", "--set", "slice_bytes=8388608"]
    return Command(folder / "rows.jsonl", folder / "set", WORKERS, flags=more)


def slices(output: Path) -> int:
    """Return how many slices are committed."""
    return len(list((output.with_name("set.partial") / "slices").glob("[0-9]*[0-9].json")))


def resumed(said: str) -> str:
    found = re.search(r"Resuming: .*", said)
    return found.group() if found else "begun anew"


class Watch:
    """Peak memory of the processes of a group, KiB."""

    def __init__(self) -> None:
        self.largest = self.together = 0

    def look_at(self, group: int) -> None:
        together = 0
        for process in os.listdir("/proc"):
            with suppress(OSError, ValueError):
                if process.isdigit() and os.getpgid(int(process)) == group:
                    status = Path("/proc", process, "status").read_text()
                    sizes = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB", status, re.M))
                    self.largest = max(self.largest, int(sizes.get("VmHWM", 0)))
                    together += int(sizes.get("VmRSS", 0))
        self.together = max(self.together, together)
        time.sleep(0.2)


def check(output: Path, rows: Counter[str]) -> None:
    """Hold the set against what was written, and against itself."""
    begun, ledger = time.monotonic(), read_manifest(output).ledger
    report = verify(output)
    report.raise_if_broken()
    seconds = time.monotonic() - begun
    assert ledger.rows_in == rows.total()
    assert (
        sum(ledger.rows_rejected.values())
        == rows["bad"]
        == sum(1 for _ in (output / "rejects.jsonl").open("rb"))
    )
    assert ledger.rows_kept == rows["good"]
    assert ledger.tokens_in == ledger.tokens_trained + ledger.tokens_context + sum(ledger.tokens_cut.values())
    print(
        f"kept {ledger.rows_kept:,} rows, {ledger.tokens:,} tokens, {report.bytes / 1e9:.1f} GB, every row accounted for"
    )
    print(f"verified in {seconds:.0f} s, {report.bytes / seconds / 1e9:.2f} GB/s")
    assert sorted(os.listdir(output.parent)) == ["rows.jsonl", "set"]


if __name__ == "__main__":
    main()
