"""What planning costs: side by side with older code, the share of a run at 64 cores, and the memory of a terabyte.

    python benchmarks/planning.py [--beside FOLDER] [--repeat 5]

`--beside` is a folder with the package `sftdata` of an older commit (`git archive COMMIT sftdata | tar x -C FOLDER`), whose plan
is timed in turns with this one. Times are processor seconds of one process, the least of the repetitions.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FILES = ("jsonl", "csv", "json", "indented.json")
CORES, RANGE, TERABYTE = 64, 64 << 20, 10**12
COPIES = 5  # of the chats, whose ranges are timed
PREPARE = 24e6  # bytes a second and core, as of docs/scale.md

TIMED = """
import sys, time
sys.path.insert(0, sys.argv[1])
try:
    from sftdata.sources.source import open_source, plan_source
except ImportError:  # of the first version
    from sftdata.read.source import open_source, plan_source
source = open_source(sys.argv[2])
started = time.process_time()
plan_source(source, 0, 1 << 20)
print(time.process_time() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder))
        for path in paths:
            compare(path, [here, *([options.beside.resolve()] if options.beside else [])], options.repeat)
        share(paths[0], options.repeat)
    print(
        subprocess.run(
            [sys.executable, __file__, "memory"], check=True, capture_output=True, text=True
        ).stdout,
        end="",
    )


def write_files(folder: Path) -> list[Path]:
    """Write the chats of prepare.py as JSON lines, a CSV and arrays."""
    from prepare import write_rows

    paths = [folder / f"chats.{name}" for name in FILES]
    write_rows(paths[0], 1)
    rows = [json.loads(line) for line in paths[0].read_bytes().split(b"\n") if line]
    with paths[1].open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *(last_turns(row["messages"]) for row in rows)])
    paths[2].write_text(json.dumps(rows))
    paths[3].write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    return paths


def last_turns(messages: list[dict[str, str]]) -> tuple[str, str]:
    return messages[-2]["content"] if len(messages) > 1 else "", messages[-1]["content"]


def compare(path: Path, packages: list[Path], repeat: int) -> None:
    seconds: dict[Path, list[float]] = {package: [] for package in packages}
    for _ in range(repeat):
        for package in packages:
            command = [sys.executable, "-c", TIMED, str(package), str(path)]
            found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=path.parent)
            seconds[package].append(float(found.stdout))
    best = [min(seconds[package]) for package in packages]
    size = path.stat().st_size
    beside = (
        f", before {size / best[1] / 1e9:.3f} GB/s: {best[1] / best[0]:.2f} times" if len(best) > 1 else ""
    )
    print(f"{path.name:22s} {size / 1e6:5.1f} MB: {size / best[0] / 1e9:.3f} GB/s{beside}")


def share(path: Path, repeat: int) -> None:
    """Time ranges, and their join, of one file; project the share of the plan where 64 cores do both."""
    from sftdata.sources.ranges import Sizes, join, scan, stretches_of
    from sftdata.sources.source import open_source

    path.write_bytes(path.read_bytes() * COPIES)
    source, sizes = open_source(str(path)), Sizes(1 << 20)
    stretches = stretches_of(source, sizes)
    scans, joins = list[float](), list[float]()
    for _ in range(repeat):
        started = time.process_time()
        marks = [scan(sizes, stretch) for stretch in stretches]
        scanned = time.process_time()
        join(source, marks, sizes)
        scans.append(scanned - started)
        joins.append(time.process_time() - scanned)
    size = path.stat().st_size
    scan_rate = size / min(scans)
    joined = min(joins) / len(stretches) * (TERABYTE / RANGE)  # in one process, whatever the cores
    total = TERABYTE / PREPARE / CORES
    work = (TERABYTE / scan_rate + joined) / (TERABYTE / PREPARE)
    wall = max(TERABYTE / scan_rate / CORES, joined)  # ranges are joined as they come in
    print(
        f"ranges: scanned at {scan_rate / 1e9:.2f} GB/s a core, joined in {min(joins) / len(stretches) * 1e3:.2f} ms each;"
        f" 1 TB on {CORES} cores: {wall:.0f} s of planning beside {total:.0f} s, {work:.1%} of the processor time"
    )


def peak_mb() -> float:
    """Return the peak of this process, not of those before it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def memory() -> None:
    """Join the marks of a terabyte of JSON lines, and cut it into tasks; print the peak of this process."""
    from unittest.mock import patch

    from sftdata.sources import ranges
    from sftdata.sources.borders import LineBoundaries
    from sftdata.sources.chunks import Source
    from sftdata.sources.marks import Marks
    from sftdata.tasks import cut_tasks

    rng, grain = np.random.default_rng(0), 64 << 10
    count, rows = RANGE // grain, RANGE // grain * 64

    def made() -> Iterator[Marks]:
        for start in range(0, TERABYTE, RANGE):
            positions = start + np.sort(rng.integers(0, RANGE, count))
            positions[0], positions[-1] = (
                start,
                start + RANGE,
            )  # as if a row ended at each border: nothing is read
            records = np.linspace(0, rows, count).astype(np.int64)
            contents = rng.integers(0, 256, (count - 1, 16), np.uint8)
            blocks = rng.bytes(8 * (RANGE >> 16))
            yield Marks(start, start + RANGE, positions, records, records * 0, contents, b"0" * 16, blocks)

    def at_border(join: ranges._Join, at: int) -> Iterator[bytes]:
        while join._reach():
            yield b""

    def begun(self: LineBoundaries, block: bytes) -> None:
        self.end = self.positions[-1]

    before = peak_mb()
    started = time.process_time()
    with patch.object(ranges._Join, "_blocks", at_border), patch.object(LineBoundaries, "add", begun):
        plan = ranges.join(Source("chats.jsonl", "jsonl"), made(), ranges.Sizes(1 << 20))
    tasks = cut_tasks([plan], 8 << 20)
    print(
        f"memory: {len(plan.chunks):,} chunks, {len(tasks):,} tasks of 1 TB: {peak_mb():,.0f} MB at most, {before:,.0f} MB of"
        f" them before; joined and cut in {time.process_time() - started:.0f} s"
    )


if __name__ == "__main__":
    memory() if sys.argv[1:] == ["memory"] else main()
