"""How even steps of equal work are, how full rows are in every order, and what both cost: three mixes of lengths.

    python benchmarks/steps.py [--model config.json] [--json]

Documents are lengths alone, drawn from a seed: chats at 4K, chats and reasoning at 32K, chats, reasoning and traces of
agents at 128K. Work is that of the model; max/mean is over the ranks of a step, averaged over the steps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sftdata.batches import Int64, offsets_of
from sftdata.set.manifest import SourceInfo
from sftdata.views.documents import Located, join_segments
from sftdata.views.order import Stretches, pack_whole, read_steps
from sftdata.views.recipe import ViewConfig
from sftdata.views.select import Choice

KINDS = {"chats": (5.6, 1.0), "reasoning": (8.6, 0.8), "agents": (9.9, 0.9)}  # of the logarithm of a length
MIXES = {
    "chats, 4K": (4096, {"chats": 400_000}),
    "chats and reasoning, 32K": (32_768, {"chats": 200_000, "reasoning": 30_000}),
    "chats, reasoning, agents, 128K": (131_072, {"chats": 300_000, "reasoning": 60_000, "agents": 20_000}),
}
ORDERS: list[dict[str, Any]] = [
    {}, {"order": "shuffled"}, {"order": "length"}, {"order": "trained"}, {"order": "sources"}, {"order": "windows"},
    {"steps_for": "8x4"}, {"pad_to_multiple_of": 16}, {"pad_to_multiple_of": 64},
]  # fmt: skip
SHARES = ("8x1", "8x2", "8x4", "64x1", "64x2", "64x4")
SLICE_TOKENS = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {name: measure(name, options.model) for name in MIXES}
    print(
        json.dumps(found, indent=2)
        if options.json
        else "\n".join(f"{k}: {v}" for part in found.values() for k, v in part.items())
    )


def draw(name: str) -> tuple[Choice, int]:
    """Draw the documents of a mix: one source a kind, in random order within it, trained by a third or more."""
    length, kinds = MIXES[name]
    rng = np.random.default_rng(1)
    parts = [np.clip(rng.lognormal(*KINDS[kind], count), 16, length) for kind, count in kinds.items()]
    lengths = np.concatenate(parts).astype(np.int32)
    count, same = len(lengths), np.zeros(len(lengths), np.int32)
    trained = (lengths * rng.uniform(0.05, 0.95, count)).astype(np.int32)
    shard = (offsets_of(lengths)[:-1] // SLICE_TOKENS).astype(np.int32)
    documents = join_segments(
        Located(
            example_id=np.arange(count), block=same, length=lengths, offset=same, start=offsets_of(lengths)[:-1], trained=trained,
            first_label=np.zeros(count, np.bool_), first_weight=np.ones(count, np.float32), shard=shard,
            document=np.ones((count, 2), np.uint64), prompt=np.ones(count, np.uint64),
        ),
        (), name,
    )  # fmt: skip
    edges = offsets_of([len(part) for part in parts]).tolist()
    sources = tuple(
        SourceInfo(name=kind, bytes=None, xxh3="", rows=len(part), first_id=first)
        for kind, part, first in zip(kinds, parts, edges, strict=False)
    )
    return Choice.of(documents, sources), length


def measure(name: str, model: Path | None) -> dict[str, str]:
    """Measure one mix in every order, and for every number of ranks and rows."""
    choice, length = draw(name)
    every: Int64 = np.arange(len(choice.documents))
    lengths = choice.documents.lengths
    kept = Stretches(
        every, choice.documents.ids, np.zeros_like(every), lengths, np.full(len(every), "", object)
    )
    rest = kept.take(every[:0])
    found = {}
    for settings in [*ORDERS, *({"steps_for": text} for text in SHARES)]:
        config = ViewConfig(sets=("many",), output=Path("none"), max_length=length, packing="bfd", **settings)
        if config.steps_for is not None:
            config = config.model_copy(update={"model": model})
        dealt = read_steps(config)
        begin = time.process_time()
        slices = pack_whole(config, choice, kept, rest, dealt)[2]
        spent = time.process_time() - begin
        rows = sum(len(part.packs) for part in slices)
        said = dealt[1][-1] if dealt else ""
        key = f"{name}, {' '.join(map(str, settings.values())) or 'as-is'}"
        found[key] = f"{rows:,} rows, {lengths.sum() / rows / length:.3%} full, {spent:.2f} s. {said}"
    return found


if __name__ == "__main__":
    main()
