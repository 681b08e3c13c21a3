"""What building a set in an object store costs, against a folder: time, and the processor time of the client.

    python benchmarks/stores.py [--megabytes 75] [--runs 3] [--json]

The store is moto's S3 server, a process of its own on 127.0.0.1 (`pip install 'sftdata[scale]'`). Chats are drawn
from a seed; 75 MB of them make a set of 200 MB. Runs on folder and store take turns, each one command, with two
workers; the figures are medians. The server's own time, which a real store would not take from this machine, is
given too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.remote_stores import KEYS, s3_server  # noqa: E402
from tests.torture.runs import write_chats  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=75, help="of input")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name) / "log") as port:
        endpoint = f"http://127.0.0.1:{port}"
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": endpoint}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
        found = measure(Path(name), options.megabytes, options.runs)
    print(
        json.dumps(found) if options.json else "\n".join(f"{key:28} {value}" for key, value in found.items())
    )


def measure(folder: Path, megabytes: int, runs: int) -> dict[str, float]:
    sample = write_chats(folder / "sample.jsonl", 1000, seed=1)
    data = write_chats(folder / "in.jsonl", round(1000 * megabytes * 1e6 / sample.stat().st_size))
    times: dict[str, list[tuple[float, float]]] = {"folder": [], "store": []}
    for number in range(runs + 1):
        for kind, output in (("folder", str(folder / f"set{number}")), ("store", f"s3://bucket/set{number}")):
            times[kind].append(build(data, output))
    size = sum(path.stat().st_size for path in (folder / "set0").rglob("*") if path.is_file())
    wall, cpu = (
        {kind: statistics.median(run[which] for run in times[kind][1:]) for kind in times} for which in (0, 1)
    )
    return {
        "set, MB": round(size / 1e6, 1),
        "folder, s": round(wall["folder"], 2),
        "store, s": round(wall["store"], 2),
        "speed, store to folder": round(wall["folder"] / wall["store"], 2),
        "folder, CPU s": round(cpu["folder"], 2),
        "store, CPU s of the client": round(cpu["store"], 2),
        "CPU, store to folder": round(cpu["store"] / cpu["folder"], 2),
    }


def build(data: Path, output: str) -> tuple[float, float]:
    """Return the seconds of a build, and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    settings = {
        "inputs": str(data),
        "tokenizer": str(ROOT / "examples/tokenizer"),
        "output": output,
        "workers": 2,
    }
    settings |= {"max_length": 2048, "max_rejects": "50%"}
    command = [sys.executable, "-c", f"import sftdata; sftdata.prepare(**{settings!r})"]
    subprocess.run(command, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
