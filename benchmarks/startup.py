"""Time what one waits for before any work: `--help`, a 100-row prepare, and the same again.

python benchmarks/startup.py [--rounds 7] [--json]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.rounds)
    print(
        json.dumps(result, indent=2)
        if options.json
        else "\n".join(
            f"{name:>24} {wall:6.2f} s wall {cpu:6.2f} s cpu" for name, (wall, cpu) in result.items()
        )
    )


def measure(work: Path, rounds: int) -> dict[str, tuple[float, float]]:
    """Return medians of (wall, cpu) seconds of whole processes."""
    rows = work / "rows.jsonl"
    chats = (ROOT / "examples/conversations.jsonl").read_text().splitlines()
    rows.write_text("\n".join((chats * 3)[:100]) + "\n")
    prepare = ["prepare", str(rows), "-t", str(ROOT / "examples/tokenizer"), "-o", str(work / "set")]
    times: dict[str, list[tuple[float, float]]] = {"--help": [], "prepare 100 rows": [], "the same again": []}
    run(prepare)  # resolves the tokenizer once
    for _ in range(rounds):
        times["--help"].append(run(["--help"]))
        shutil.rmtree(work / "set")
        times["prepare 100 rows"].append(run(prepare))
        times["the same again"].append(run(prepare))
    return {
        name: (statistics.median(wall for wall, _ in runs), statistics.median(cpu for _, cpu in runs))
        for name, runs in times.items()
    }


def run(arguments: list[str]) -> tuple[float, float]:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "sftdata", *arguments], check=True, capture_output=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(wall, 3), round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3)


if __name__ == "__main__":
    main()
