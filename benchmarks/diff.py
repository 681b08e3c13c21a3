"""What `sftdata diff` costs between two sets of a million documents.

    python benchmarks/diff.py [--documents 1000000] [--json]

The documents are drawn from a seed, 20 to 60 tokens each. The other set has another answer in 1 of 100, other labels in
1 of 500, lacks 1 of 300 and has as many new ones; `moved` has one more document before all others, so that every line
moves. Times are of the processor, of the whole command, one process each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from sftdata.batches import Int64, PackPlan, TokenBatch, offsets_of
from sftdata.pack import gather, plan_packs
from sftdata.set.index import Placed, write_slice
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, SourceInfo, TokenizerInfo, write_manifest

TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "tokenizer"
ROW, SLICE = 2048, 1 << 16
NONE = np.zeros(0, np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = draw(options.documents)
        write_set(folder / "base", base, np.arange(options.documents))
        changed, lines = change(base)
        write_set(folder / "changed", changed, lines)
        moved = TokenBatch.join([base.pick(np.array([7])), changed])
        write_set(folder / "moved", moved, np.append(0, lines + 1))
        for name in ("base", "changed", "moved"):
            found[f"base and {name}, s"] = round(command(folder / "base", folder / name), 2)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{k:24}{v}" for k, v in found.items()))


def draw(count: int) -> TokenBatch:
    """Draw documents: a prompt of half the tokens, and an answer."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(20, 60, count)
    offsets = offsets_of(lengths)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    ids = rng.integers(5, 1000, offsets[-1]).astype(np.int32)
    return TokenBatch(ids, place >= np.repeat(lengths // 2, lengths), offsets, np.arange(count))


def change(base: TokenBatch) -> tuple[TokenBatch, Int64]:
    """Change some documents; return them with their lines."""
    ids, trained, number = base.input_ids.copy(), base.trained.copy(), np.arange(len(base))
    last = base.offsets[1:] - 1
    ids[last[number % 100 == 1]] ^= 1
    trained[last[number % 500 == 2]] = False
    stays = number % 300 != 3
    more = draw(int((~stays).sum()))
    more = replace(more, input_ids=more.input_ids[::-1].copy())
    lines = np.append(number[stays], len(base) + np.arange(len(more)))
    return TokenBatch.join([replace(base, input_ids=ids, trained=trained).select(stays), more]), lines


def write_set(folder: Path, documents: TokenBatch, lines: Int64) -> None:
    """Write a set of one source, from documents and the lines they come from."""
    folder.mkdir()
    (folder / "tokenizer").symlink_to(TOKENIZER)
    ledger, shards, files = Ledger(rows_in=len(documents), rows_kept=len(documents)), [], []
    ledger.tokens_in = int(documents.offsets[-1])
    for number, first in enumerate(range(0, len(documents), SLICE)):
        which = np.arange(first, min(first + SLICE, len(documents)))
        part, ids = documents.pick(which), lines[which]
        packs = plan_packs(part.lengths, ROW, "bfd")
        rows = gather(part, ids, packs, ROW, 0)
        placed = Placed(part, ids, packs, PackPlan(np.zeros(1, np.int64), NONE, NONE, NONE), [])
        written = write_slice(folder, number, placed, rows, ROW, None)
        shards += written[0]
        files += written[1]
        ledger.count_packed(rows, ROW, {"lines.jsonl": 0})
    rows_there = int(lines[-1]) + 1
    facts = {"vocab_size": 1024, "eos_id": 2, "pad_id": 0, "bos_id": None}
    manifest = Manifest(
        settings={"max_length": ROW, "packing": "bfd", "overlong": "truncate"},
        tokenizer=TokenizerInfo(name="tiny", sha256="a" * 64, **facts),
        sources=(SourceInfo(name="lines.jsonl", bytes=9, xxh3="0" * 32, rows=rows_there, first_id=0),),
        ledger=ledger,
        shards=tuple(shards),
        files=tuple(files),
    )
    write_manifest(folder, manifest)


def command(*sets: Path) -> float:
    """Run `sftdata diff`; return the processor seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "sftdata", "diff", *map(str, sets)], capture_output=True)
    if done.returncode > 1:
        raise RuntimeError(done.stderr.decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
