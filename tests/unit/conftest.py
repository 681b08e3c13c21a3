"""Finished sets of seeded random tokens, built through the real stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sftdata.batches import TokenBatch
from sftdata.pack import Strategy, gather, plan_packs
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, SetFile, SourceInfo, TokenizerInfo, write_manifest
from sftdata.set.store import write_atomic
from tests.whole_slices import write_whole

VOCAB, PAD = 1000, 0


def random_tokens(lengths: list[int], seed: int = 0) -> TokenBatch:
    """Seeded ids from 1 to 999, about half of them trained."""
    rng = np.random.default_rng(seed)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    total = int(offsets[-1])
    ids = rng.integers(1, VOCAB, total).astype(np.int32)
    return TokenBatch(ids, rng.random(total) < 0.5, offsets, np.arange(len(lengths)))


SetBuilder = Callable[..., Manifest]


@pytest.fixture
def build_set(tmp_path: Path) -> SetBuilder:
    """Build a set at `tmp_path / "set"`: one shard for each list of example lengths, one source for each shard."""

    def build(
        slices: list[list[int]], max_length: int = 32, strategy: Strategy = "bfd", folder: Path | None = None
    ) -> Manifest:
        folder = folder or tmp_path / "set"
        folder.mkdir()
        constant = strategy != "none"
        ledger, shards, files, sources, first_id = Ledger(), [], [], [], 0
        for index, lengths in enumerate(slices):
            tokens, ids = random_tokens(lengths, seed=index), np.arange(first_id, first_id + len(lengths))
            row_length = max_length if constant else None
            packs = plan_packs(tokens.lengths, max_length, strategy)
            rows = gather(tokens, ids, packs, row_length, PAD)
            made, beside = write_whole(folder, index, tokens, ids, packs, rows, row_length)
            shards += made
            files += beside
            counts = Ledger(rows_in=len(lengths), rows_kept=len(lengths), tokens_in=sum(lengths))
            counts.count_lengths(tokens.lengths)
            counts.count_packed(rows, max_length if constant else None, {f"part-{index}.jsonl": first_id})
            ledger.merge(counts)
            sources.append(
                SourceInfo(
                    name=f"part-{index}.jsonl", bytes=99, xxh3="0" * 32, rows=len(lengths), first_id=first_id
                )
            )
            first_id += len(lengths)
        rejects = write_atomic(folder / "rejects.jsonl", lambda sink: sink.write(b""))
        manifest = Manifest(
            settings={"inputs": ["data/*.jsonl"], "max_length": max_length, "packing": strategy},
            tokenizer=TokenizerInfo(
                name="toy", sha256="a" * 64, vocab_size=VOCAB, eos_id=1, pad_id=PAD, bos_id=None
            ),
            sources=tuple(sources),
            ledger=ledger,
            shards=tuple(shards),
            files=(
                *files,
                SetFile(name="rejects.jsonl", bytes=rejects.bytes, xxh3=rejects.xxh3, sha256=rejects.sha256),
            ),
        )
        return write_manifest(folder, manifest)

    return build
