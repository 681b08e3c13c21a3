"""Slices of sets that tests write themselves: documents of which every token is in the rows, or a part in the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int64, PackedRows, PackPlan, TokenBatch, offsets_of
from sftdata.set.index import Placed, write_slice
from sftdata.set.shards import ShardInfo
from sftdata.set.store import SetFile

Written = tuple[tuple[ShardInfo, ...], tuple[SetFile, ...]]
NOTHING: Written = ((), ())
_NONE = np.zeros(0, np.int64)
NO_REST = PackPlan(np.zeros(1, np.int64), _NONE, _NONE, _NONE)


def write_whole(
    folder: Path, number: int, tokens: TokenBatch, example_ids: Int64, packs: PackPlan, rows: PackedRows,
    row_length: int | None,
) -> Written:  # fmt: skip
    """Write documents that the rows hold whole."""
    placed = Placed(tokens, example_ids, packs, NO_REST, [])
    return write_slice(folder, number, placed, rows, row_length, None)


def write_rows(folder: Path, number: int, rows: PackedRows, row_length: int | None) -> Written:
    """Write packed rows each of whose segments is a document of its own, with no label on its first token."""
    document = rows.example_ids >= 0
    batch = TokenBatch(
        rows.input_ids,
        rows.labels != IGNORE_INDEX,
        offsets_of(rows.seq_lengths),
        rows.example_ids,
        rows.loss_weights,
    ).select(document)
    inside = np.diff(offsets_of(document)[rows.segment_offsets])
    of = np.arange(len(batch))
    packs = PackPlan(offsets_of(inside), of, np.zeros_like(of), batch.lengths)
    return write_whole(folder, number, batch, batch.row, packs, rows, row_length)
