"""Run every CPU benchmark, in under ten minutes, and put their figures as dated rows on top of RESULTS.md.

python benchmarks/all.py [--only prepare,pack]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS = (
    ("prepare", "--rounds 1"), ("scaling", "--copies 1,5"), ("views", "--rounds 2"), ("reading", "--rounds 3"), ("diff", ""),
    ("steps", ""), ("pack", "--repeats 1"), ("masks", ""), ("startup", "--rounds 3"), ("train_step", "--rounds 3 --steps 1"),
    ("train_step", "--startup"), ("document_log", ""), ("pictures", "--rows 24"),
    ("mixtures", "--recipes 6"), ("browse", ""),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="comma-separated names")
    chosen = set(filter(None, parser.parse_args().only.split(",")))
    rows = [run(name, arguments) for name, arguments in RUNS if not chosen or name in chosen]
    write(rows)


def run(name: str, arguments: str) -> str:
    """Run one benchmark; return its row: what it printed, in one cell."""
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments.split()]
    print("==", name, arguments, flush=True)
    begun = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - begun
    print(done.stdout, end="", flush=True)
    printed = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    result = (
        "; ".join(printed).replace("|", "/")
        if done.returncode == 0
        else f"failed with exit code {done.returncode}"
    )
    return f"| `{f'{name} {arguments}'.strip()}` | {result} | {seconds:.0f} s |"


def write(rows: list[str]) -> None:
    """Put a dated table before the newest one."""
    path = HERE / "RESULTS.md"
    intro, mark, older = path.read_text(encoding="utf-8").partition("\n## ")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    load = f"load {os.getloadavg()[2]:.1f} over the last 15 minutes"
    title = (
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores, {memory} GB, no GPU used"
    )
    title += f", Python {platform.python_version()}, {commit.stdout.strip() or 'no commit'}, {load}"
    table = "\n".join([f"\n## {title}\n", "| run | figures | took |", "|---|---|---|", *rows, ""])
    path.write_text(intro + table + mark + older, encoding="utf-8")


if __name__ == "__main__":
    main()
