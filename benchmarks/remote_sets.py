"""Sets read from an S3 server on this machine: how soon the first batch is there, cold and warm, and how fast all of it.

    python benchmarks/remote_sets.py [SHARDS] [TOKENS]

Needs moto's server and boto3 (`pip install 'sftdata[scale]'`). SHARDS of 64 rows, of TOKENS each. The server is
Python and takes most of the time of a cold read; warm starts are in processes of their own, beside those that open the folder.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.remote_stores import KEYS, Counter, s3_server
from tests.train_sets import make_set

FIRST = """
import sys, time
began = time.perf_counter()
from sftdata.set.opened import open_set
opened = open_set(sys.argv[1])
opened.take(range(8))
print(time.perf_counter() - began, len(opened._mapped))
"""


def first_batch(place: str) -> tuple[float, int]:
    """Return the seconds and the shards that the first 8 rows take in a fresh process."""
    done = subprocess.run([sys.executable, "-c", FIRST, place], capture_output=True, text=True, check=True)
    seconds, shards = done.stdout.split()
    return float(seconds), int(shards)


def main(shards: int = 1000, tokens: int = 512) -> None:
    """Measure and print."""
    import boto3

    import sftdata
    from sftdata.set.opened import open_set

    with tempfile.TemporaryDirectory() as name, s3_server(Path(name, "log")) as port:
        counter = Counter(port)
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{counter.port}"}
        os.environ |= {"SFTDATA_CACHE": f"{name}/cache"}
        folder, url = (
            make_set(Path(name, "set"), rows=shards * 64, shards=shards, max_length=tokens),
            "s3://bucket/set",
        )
        boto3.client("s3").create_bucket(Bucket="bucket")
        began = time.perf_counter()
        size = sftdata.push(folder, url).bytes
        print(f"push: {size / 1e6:.0f} MB in {time.perf_counter() - began:.1f} s")
        seconds, opened = first_batch(url)
        print(f"cold, first 8 rows of {shards:,} shards: {seconds:.2f} s, {opened} shards")
        places = [str(folder), url] * 7
        taken = [first_batch(place)[0] for place in places]
        local, warm = statistics.median(taken[::2]), statistics.median(taken[1::2])
        print(
            f"warm start: {warm * 1e3:.0f} ms, the folder {local * 1e3:.0f} ms: {(warm - local) * 1e3:+.0f} ms"
        )
        sent, began = counter.sent, time.perf_counter()
        for _ in open_set(url).batches():
            pass
        seconds = time.perf_counter() - began
        print(
            f"all of it: {(counter.sent - sent) / 1e6 / seconds:.0f} MB/s; {(counter.sent - sent) / size:.3f} of its bytes"
        )
        counter.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
