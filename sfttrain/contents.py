"""What the rows of a set hold: parts of documents, from the index alone, and what each row counts for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int64, PackedRows, count_between, offsets_of
from sftdata.choosing import Measure
from sftdata.set.index import INDEX, beside_name, read_index, slice_number
from sftdata.set.local import fetch, plain_file
from sftdata.set.opened import ShardSet


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """The parts of documents in the rows of a set, in order.

    Attributes:
        rows: how many rows there are; under `unpack` each part is one.
        row: int64[P], the row of each part.
        example: int64[P], example id of its document.
        tokens: int64[P], its tokens.
        trained: int64[P], those that are trained; never its first, which nothing predicts.
    """

    rows: int
    row: Int64
    example: Int64
    tokens: Int64
    trained: Int64

    def amounts(self, measure: Measure) -> Int64:
        """int64[rows], what each row counts for."""
        if measure == "rows":
            return np.ones(self.rows, np.int64)
        part = self.tokens if measure == "tokens" else self.trained
        return np.bincount(self.row, part, self.rows).astype(np.int64)


def read_contents(opened: ShardSet, unpack: bool = False) -> Contents:
    """Return what the rows of a set hold.

    Args:
        unpack: rows are single documents, as `data.TrainingRows` hands them out.

    Raises:
        SftError: a file of the set cannot be read.
    """
    read = _from_index if opened.manifest.format_version > 1 else _from_rows
    row, example, tokens, trained = (np.concatenate(column) for column in zip(*read(opened), strict=True))
    if unpack:
        row = np.arange(len(row))
    return Contents(len(row) if unpack else len(opened), row, example, tokens, trained)


def _from_index(opened: ShardSet) -> list[tuple[Int64, ...]]:
    parts, first = [], 0
    files = {file.name: file for file in opened.manifest.files}
    indexes = [
        files[beside_name(INDEX, cast(int, slice_number(shard.name)))] for shard in opened.manifest.shards
    ]
    fetch(opened.folder, indexes)
    for shard, file in zip(opened.manifest.shards, indexes, strict=True):
        index = read_index(plain_file(opened.folder, file), opened.manifest.weighted)
        here = ~index.rest
        columns = (index.example_ids, index.length, index.trained)
        parts.append(
            (index.row[here] + np.int64(first), *(column[here].astype(np.int64) for column in columns))
        )
        first += shard.rows
    return parts


def _from_rows(opened: ShardSet) -> list[tuple[Int64, ...]]:
    """Count what sets of version 1, which have no index, hold."""
    parts, first = [], 0
    for rows in opened.batches():
        parts.append(_counted(rows, first))
        first += len(rows)
    return parts


def _counted(rows: PackedRows, first: int) -> tuple[Int64, ...]:
    segments = np.flatnonzero(rows.example_ids >= 0)
    row = np.searchsorted(rows.segment_offsets, segments, side="right") - 1 + first
    offsets = offsets_of(rows.seq_lengths)
    begins, ends = offsets[segments], offsets[segments + 1]
    trained = count_between(np.flatnonzero(rows.labels != IGNORE_INDEX), begins + 1, ends)
    return row, rows.example_ids[segments], ends - begins, trained
