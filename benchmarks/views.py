"""What a view costs: planning, writing, beside preparing the same set anew, and planning millions of documents.

    python benchmarks/views.py [--rounds 3] [--documents 10000000] [--json]

The base are the chats of prepare.py. Times are of the processor, the best of the rounds; `view` and `prepare` are whole
commands, one process each, and must give one digest. The many documents are an index alone, drawn from a seed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from prepare import write_rows

from sftdata.batches import offsets_of
from sftdata.set.manifest import SourceInfo, read_manifest
from sftdata.views.documents import Located, join_segments
from sftdata.views.order import pack_whole
from sftdata.views.plan import _ledger, _passes, _stretches, plan_views
from sftdata.views.recipe import ViewConfig
from sftdata.views.select import Choice, limit_documents
from sftdata.views.write import write_slice

SLICE = 100_000  # documents of one, in the index of many


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure_chats(Path(folder), options.rounds)
    found |= measure_many(options.documents)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{k:40}{v}" for k, v in found.items()))


def measure_chats(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure views of the chats to another length."""
    rows, tokenizer = write_rows(folder / "chats.jsonl", 1)
    prepare = ["prepare", folder / "chats.jsonl", "-t", tokenizer, "--workers", "1", "--max-length"]
    command(*prepare, 2048, "-o", folder / "base")
    spent: dict[str, list[float]] = {"prepare": [], "view": [], "plan": [], "write": [], "index": []}
    for number in range(rounds):
        spent["prepare"].append(command(*prepare, 1024, "-o", folder / f"made-{number}"))
        view = folder / f"view-{number}"
        spent["view"].append(command("view", folder / "base", "-o", view, "--max-length", 1024, "--write"))
        spent["index"].append(command("view", folder / "base", "-o", f"{view}-index", "--max-length", 1024))
        assert read_manifest(view).digest == read_manifest(folder / f"made-{number}").digest
        config = ViewConfig(
            sets=(str(folder / "base"),), output=folder / "unused", max_length=1024, write=True
        )
        begin = time.process_time()
        plan = plan_views(config)[0]
        middle = time.process_time()
        (folder / "shards").mkdir(exist_ok=True)
        size = sum(write_slice(plan, part, folder / "shards").shards[0].bytes for part in plan.slices)
        spent["plan"].append(middle - begin)
        spent["write"].append(time.process_time() - middle)
    best = {name: min(times) for name, times in spent.items()}
    return {
        "rows": rows,
        "plan, s": round(best["plan"], 3),
        "written, MB/s a core": round(size / 1e6 / best["write"]),
        "view --write / prepare, processor time": round(best["view"] / best["prepare"], 3),
        "view by index / prepare, the same": round(best["index"] / best["prepare"], 3),
    }


def command(*arguments: object) -> float:
    """Run a command of sftdata; return the processor seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "sftdata", *map(str, arguments)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_many(count: int) -> dict[str, Any]:
    """Measure the planning of many documents, packed together at 8,192 tokens."""
    parts = [draw_slice(number, min(SLICE, count - number * SLICE)) for number in range(-(-count // SLICE))]
    tokens = sum(int(part.length.sum()) for part in parts)
    config = ViewConfig(sets=("many",), output=Path("none"), max_length=8192, packing="bfd")
    begin = time.process_time()
    choice = Choice.of(
        join_segments(Located.join(parts), (), "many"),
        (SourceInfo(name="many", bytes=None, xxh3="", rows=count, first_id=0),),
    )
    limited = limit_documents(choice, 8192, "truncate")
    kept, rest = _stretches(config, choice, limited, _passes(choice)[1])
    slices = pack_whole(config, choice, kept, rest)[2]
    ledger = _ledger(config, (), choice, limited, kept, rest)
    spent, slots = time.process_time() - begin, 8192 * sum(len(part.packs) for part in slices)
    assert ledger.rows_kept == count
    return {
        "documents of an index": count,
        "planned, s": round(spent, 2),
        "largest memory, GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "full": f"{tokens / slots:.3%}",
    }


def draw_slice(number: int, count: int) -> Located:
    """Draw the index of one slice, as it is when it has been read."""
    rng, same = np.random.default_rng(number), np.zeros(count, np.int32)
    length = np.minimum(rng.lognormal(5.3, 1.0, count) + 5, 8000).astype(np.int32)
    return Located(
        example_id=number * SLICE + np.arange(count), block=same + np.int32(number), length=length, offset=same,
        start=offsets_of(length)[:-1], trained=length // 3, first_label=np.zeros(count, np.bool_),
        first_weight=np.ones(count, np.float32), shard=same + np.int32(number),
        document=rng.integers(1, 2**64, (count, 2), np.uint64), prompt=rng.integers(1, 2**64, count, np.uint64),
    )  # fmt: skip


if __name__ == "__main__":
    main()
