"""How time and memory grow: one and two workers, one to twenty times the input.

    python benchmarks/scaling.py [--copies 1,5,20] [--workers 1,2] [--json]

Each line is one whole `sftdata prepare` of the chats of prepare.py, repeated. Peak memory is that of the largest process, and of
all of them together (proportional set size, sampled); 2 workers / 1 worker is a ratio of wall times, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from prepare import MAX_LENGTH, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", default="1,5")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for copies in map(int, options.copies.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            rows, tokenizer = write_rows(Path(folder) / "chats.jsonl", copies)
            for workers in map(int, options.workers.split(",")):
                results.append(
                    {"copies": copies, "rows": rows, "workers": workers}
                    | measure(Path(folder), tokenizer, workers)
                )
                print(results[-1], file=sys.stderr)
    print(json.dumps(results, indent=2) if options.json else "\n".join(map(line, results)))


def line(result: dict[str, Any]) -> str:
    speed, memory = f"{result['tokens_per_second'] / 1e6:5.2f} M tokens/s", f"{result['largest_mb']:,.0f} MB"
    return (
        f"{result['copies']:>3}x {result['rows']:>9,} rows, {result['workers']} workers: {result['seconds']:7.2f} s, {speed},"
        f" largest process {memory}, all {result['all_mb']:,.0f} MB, written / size {result['written_ratio']:.3f}"
    )


def measure(work: Path, tokenizer: str, workers: int) -> dict[str, Any]:
    """Run once; return seconds, tokens a second and peak memory."""
    output = work / "set"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "sftdata",
        "prepare",
        str(work / "chats.jsonl"),
        "-t",
        tokenizer,
        "-o",
        str(output),
        "--json",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--max-length", str(MAX_LENGTH), "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    written = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock
    memory = Memory(process.pid)
    stdout, _ = process.communicate()
    seconds = time.perf_counter() - started
    memory.stop()
    written = 512 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - written)
    ledger = json.loads(stdout)["ledger"]
    size = sum(path.stat().st_size for path in output.glob("shard-*.arrow"))
    return {
        "seconds": round(seconds, 2),
        "tokens_per_second": ledger["tokens_in"] / seconds,
        "largest_mb": memory.largest / 1e6,
        "all_mb": memory.together / 1e6,
        "written_ratio": written / max(size, 1),
    }


class Memory:
    """Sample the peak memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        self.pid, self.largest, self.together = pid, 0.0, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the sampling."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            sizes = [self._read(pid) for pid in self._family()]
            self.largest = max([self.largest, *(rss for rss, _ in sizes)])
            self.together = max(self.together, sum(pss for _, pss in sizes))

    def _family(self) -> list[int]:
        family, new = [self.pid], [self.pid]
        while new:
            children = [int(child) for pid in new for child in self._children(pid)]
            family += children
            new = children
        return family

    @staticmethod
    def _children(pid: int) -> list[str]:
        try:
            return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []

    def _read(self, pid: int) -> tuple[float, float]:
        try:
            fields = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            )
            return int(fields["Rss"].split()[0]) * 1024.0, int(fields["Pss"].split()[0]) * 1024.0
        except (OSError, KeyError, ValueError):
            return 0.0, 0.0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
