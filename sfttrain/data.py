"""Sets on disk -> rows by number -> batches a model takes. Nothing is tokenized, nothing is copied before the batch.

A batch holds `input_ids`, `labels` and `position_ids` that restart at every document, and for variable-length attention
the documents' cumulative lengths. It never holds an attention mask: with one, transformers no longer keeps documents apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from sftdata.batches import Int32, Int64, PackedRows
from sftdata.shardset.manifest import Manifest, read_manifest
from sftdata.shardset.shards import read_shard
from sfttrain.order import FILLER

Batch = dict[str, Any]


class Row(NamedTuple):
    """One row: int32[L] ids, int32[L] labels, int32[S] document lengths that sum to L."""

    input_ids: Int32
    labels: Int32
    seq_lengths: Int32


class OpenSet(NamedTuple):
    """A finished set: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.manifest.max_length is not None


def open_set(folder: Path) -> OpenSet:
    """Read a set's manifest; no shard is opened yet.

    Raises:
        UsageError: the folder is no finished set.
        IntegrityError: its manifest is damaged.
    """
    return OpenSet(folder, read_manifest(folder))


class _Shard:
    """One shard, mapped at its first use."""

    def __init__(self, path: Path, max_length: int | None, unpack: bool) -> None:
        self._path, self._max_length, self._unpack = path, max_length, unpack
        self._parts: list[tuple[int, PackedRows, Int64]] | None = None

    def __getitem__(self, index: int) -> Row:
        if self._parts is None:
            self._parts = self._open()
        first, rows, order = self._parts[bisect_right(self._parts, index, key=lambda part: part[0]) - 1]
        return _document(rows, int(order[index - first])) if self._unpack else _row(rows, index - first)

    def _open(self) -> list[tuple[int, PackedRows, Int64]]:
        parts, first = [], 0
        for rows in read_shard(self._path, self._max_length):
            documents = np.flatnonzero(rows.example_ids >= 0)
            parts.append((first, rows, documents))
            first += len(documents) if self._unpack else len(rows)
        return parts


def _row(rows: PackedRows, index: int) -> Row:
    tokens = slice(rows.row_offsets[index], rows.row_offsets[index + 1])
    segments = slice(rows.segment_offsets[index], rows.segment_offsets[index + 1])
    return Row(rows.input_ids[tokens], rows.labels[tokens], rows.seq_lengths[segments])


def _document(rows: PackedRows, segment: int) -> Row:
    """Return one document of a packed row as a row of its own."""
    row = int(np.searchsorted(rows.segment_offsets, segment, side="right")) - 1
    lengths = rows.seq_lengths[rows.segment_offsets[row] : segment + 1]
    stop = int(rows.row_offsets[row] + lengths.sum(dtype=np.int64))
    tokens = slice(stop - int(lengths[-1]), stop)
    return Row(rows.input_ids[tokens], rows.labels[tokens], lengths[-1:])


class TrainingRows(Dataset[Row]):
    """Rows of one or more sets, by number; `FILLER` gives a fully masked row.

    Args:
        sets: opened sets.
        unpack: hand out every document alone, for models that packing would leak through.
    """

    def __init__(self, sets: Sequence[OpenSet], unpack: bool = False) -> None:
        infos = [(opened, info) for opened in sets for info in opened.manifest.shards]
        self._shards = [_Shard(opened.folder / info.name, opened.manifest.max_length, unpack) for opened, info in infos]
        counts = [info.documents if unpack else info.rows for _, info in infos]
        self._offsets = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self.sizes = [sum(i.documents if unpack else i.rows for i in opened.manifest.shards) for opened in sets]

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> Row:
        if index == FILLER:
            return Row(np.zeros(2, np.int32), np.full(2, -100, np.int32), np.array([2], np.int32))
        shard = bisect_right(self._offsets, index) - 1
        return self._shards[shard][index - self._offsets[shard]]


class Collator:
    """Turn rows into a batch.

    Args:
        flatten: lay all rows end to end in one row [1, T] with cumulative lengths, as variable-length attention wants;
            otherwise [B, L], shorter rows padded at the end.
    """

    def __init__(self, flatten: bool) -> None:
        self.flatten = flatten

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return int64 `input_ids`, `labels`, `position_ids`, and when flattened the `cu_seq_lens` of both sides."""
        return _flattened(rows) if self.flatten else _padded(rows)


def _flattened(rows: Sequence[Row]) -> Batch:
    lengths = np.concatenate([row.seq_lengths for row in rows])
    ends = np.cumsum(lengths, dtype=np.int64)
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    labels[ends - lengths] = -100  # no document is asked for by the end of the one before
    cumulative = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(np.concatenate([row.input_ids for row in rows]).astype(np.int64))[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions(lengths))[None],
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _padded(rows: Sequence[Row]) -> Batch:
    width = max(len(row.input_ids) for row in rows)
    input_ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), -100, np.int64)
    position_ids = np.empty((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = row.input_ids
        labels[index, :length] = row.labels
        # The tail lengthens the last document: behind every real token, causal attention cannot see it.
        lengths = row.seq_lengths.astype(np.int64)
        lengths[-1] += width - length
        position_ids[index] = positions(lengths)
    labels[:, 0] = -100
    columns = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def positions(lengths: Int32 | Int64) -> Int64:
    """int64[sum(lengths)], counting from 0 in every document.

    >>> positions(np.array([3, 2])).tolist()
    [0, 1, 2, 0, 1]
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - lengths, lengths)
