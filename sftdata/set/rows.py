"""The rows of a set, one shard at a time: mapped, or gathered from the files of other sets.

`SetFiles` opens the rows and the rest of any set; nothing above it knows which kind it is. A row by index
is one copy, made when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from sftdata.batches import IGNORE_INDEX, Float32, Int32, Int64, PackedRows, offsets_of
from sftdata.set.extents import AS_STORED, GIVEN, Extents, Packs, read_packs, read_rest_extents
from sftdata.set.held import TokenFiles, Tokens, open_token_files
from sftdata.set.index import REST, RestRows, beside_name, read_rest
from sftdata.set.manifest import Manifest
from sftdata.set.shards import ShardInfo, read_shard
from sftdata.set.store import plain_file


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A stretch of one example in a packed row.

    Attributes:
        example_id: the input row it comes from.
        input_ids, labels: int32[T], views of the row.
    """

    example_id: int
    input_ids: Int32
    labels: Int32


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row of a set; every array is read-only: a view of the shard, or gathered.

    Attributes:
        input_ids: int32[T].
        labels: int32[T], -100 where not trained.
        seq_lengths: int32[S], lengths of the documents and of padding, in order.
        examples: int64[S], input row behind each document, -1 for padding.
        loss_weights: float32[T], above 0 where trained, 0 elsewhere; None in a set without weights.
    """

    input_ids: Int32
    labels: Int32
    seq_lengths: Int32
    examples: Int64
    loss_weights: Float32 | None

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order, without the padding."""
        start = 0
        for length, example in zip(self.seq_lengths.tolist(), self.examples.tolist(), strict=True):
            if example >= 0:
                yield Document(
                    example, self.input_ids[start : start + length], self.labels[start : start + length]
                )
            start += length


class Shard(Protocol):
    """Packed rows by number, and as columns, a record batch at a time."""

    @property
    def batches(self) -> Iterable[PackedRows]:
        """The rows, in order."""

    def __len__(self) -> int: ...

    def row(self, row: int) -> PackedRow:
        """Return one of them."""


class MappedShard:
    """The record batches of one mapped shard."""

    def __init__(self, batches: list[PackedRows]) -> None:
        self.batches = batches
        self._ends = list(accumulate(map(len, batches)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, row: int) -> PackedRow:
        """Return a row, as views."""
        index = bisect_right(self._ends, row)
        batch = self.batches[index]
        row -= self._ends[index] - len(batch)
        tokens = slice(batch.row_offsets[row], batch.row_offsets[row + 1])
        segments = slice(batch.segment_offsets[row], batch.segment_offsets[row + 1])
        weights = None if batch.loss_weights is None else batch.loss_weights[tokens]
        ids, labels = batch.input_ids[tokens], batch.labels[tokens]
        return PackedRow(ids, labels, batch.seq_lengths[segments], batch.example_ids[segments], weights)


class IndexedShard:
    """The rows of one file of packs, gathered from the files of the bases.

    Args:
        path: of the file.
        weighted: whether its set has weights.
        files: of the bases.
    """

    def __init__(self, path: Path, weighted: bool, files: TokenFiles) -> None:
        packs = read_packs(path, weighted)
        self._parts = [_Indexed(path, part, files, weighted) for part in packs]
        self._ends = list(accumulate(map(len, packs)))

    @property
    def batches(self) -> Iterator[PackedRows]:
        """The rows, in order, gathered a record batch at a time."""
        for part in self._parts:
            yield part.rows(0, len(part.packs))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, row: int) -> PackedRow:
        """Return a row, gathered."""
        index = bisect_right(self._ends, row)
        part = self._parts[index]
        row -= self._ends[index] - len(part.packs)
        ids, labels, weights = part.tokens(row, row + 1)
        first, last = part.packs.segment_offsets[row : row + 2].tolist()
        return PackedRow(
            ids, labels, part.packs.seq_lengths[first:last], part.packs.example_ids[first:last], weights
        )


class _Indexed:
    """One record batch of rows by index."""

    def __init__(self, path: Path, packs: Packs, files: TokenFiles, weighted: bool) -> None:
        self.packs = packs
        self._runs = _Runs(path, packs.extents, files, weighted)
        self._offsets = packs.extents.row_offsets

    def rows(self, first: int, last: int) -> PackedRows:
        """Return some of the rows as columns."""
        ids, labels, weights = self.tokens(first, last)
        packs = self.packs
        offsets = packs.segment_offsets[first : last + 1]
        segments = slice(offsets[0], offsets[-1])
        before = offsets_of(packs.seq_lengths[segments])
        return PackedRows(
            ids, labels, before[offsets - offsets[0]],
            packs.seq_lengths[segments], packs.example_ids[segments], offsets - offsets[0], weights,
        )  # fmt: skip

    def tokens(self, first: int, last: int) -> Tokens:
        """Return the tokens of some of the rows."""
        return self._runs.tokens(*self._offsets[first : last + 1 : last - first].tolist())


class _Runs:
    """The extents of one record batch, found in the files of the bases.

    Args:
        path: of the file that names them.
        extents: of the record batch.
        files: of the bases.
        weighted: whether the set has weights.
    """

    def __init__(self, path: Path, extents: Extents, files: TokenFiles, weighted: bool) -> None:
        self._extents, self._files, self._weighted = extents, files, weighted
        self._found = files.find(path, extents.file, extents.start, extents.length)
        self._mended: list[int] = np.flatnonzero(extents.first_label != AS_STORED).tolist()

    def tokens(self, first: int, last: int) -> Tokens:
        """Return the tokens of extents `first` to `last`, end to end; read-only."""
        block, start, stop = (column[first:last].tolist() for column in self._found)
        runs = block, start, stop
        ids, labels = self._files.gather(runs)
        weights = self._files.gather_weights(runs) if self._weighted else None
        some = slice(bisect_left(self._mended, first), bisect_left(self._mended, last))
        if some.start < some.stop:
            self._mend(first, last, self._mended[some], (ids, labels, weights))
        ids.flags.writeable = labels.flags.writeable = False
        if weights is not None:
            weights.flags.writeable = False
        return ids, labels, weights

    def _mend(self, first: int, last: int, mended: list[int], tokens: Tokens) -> None:
        """Give and take the labels of first tokens that their files have otherwise."""
        ids, labels, weights = tokens
        which = np.array(mended)
        at = offsets_of(self._extents.length[first:last])[which - first]
        given = self._extents.first_label[which] == GIVEN
        labels[at] = np.where(given, ids[at], IGNORE_INDEX)
        if weights is not None and self._extents.first_weights is not None:
            weights[at] = np.where(given, self._extents.first_weights[which], 0)


class SetFiles:
    """Rows and rest of a set, slice by slice.

    Args:
        folder: of the set.
        manifest: of the set.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._files = {file.name: file for file in manifest.files}

    @cached_property
    def bases(self) -> TokenFiles | None:
        """The files of the bases of a view by index; None for a set of its own.

        Raises:
            IntegrityError: a base is gone, or is another set by now.
        """
        return open_token_files(self._folder, self._manifest) if self._manifest.by_index else None

    def rows(self, info: ShardInfo) -> Shard:
        """Open the rows of a shard, or of a file of packs.

        Raises:
            IntegrityError: a file is missing, or is not what a manifest says.
        """
        path = plain_file(self._folder, info)
        if self.bases is not None:
            return IndexedShard(path, self._manifest.weighted, self.bases)
        return MappedShard(read_shard(path, self._manifest.max_length, self._manifest.weighted))

    def rest(self, number: int) -> list[RestRows]:
        """Return the rest of a slice, a record batch each; none where it has none.

        Raises:
            IntegrityError: a file is missing, or is not what a manifest says.
        """
        file, weighted = self._files.get(beside_name(REST, number)), self._manifest.weighted
        if file is None:
            return []
        path, bases = plain_file(self._folder, file), self.bases
        return read_rest(path, weighted) if bases is None else list(_gather_rest(path, bases, weighted))


def _gather_rest(path: Path, files: TokenFiles, weighted: bool) -> Iterator[RestRows]:
    """Gather the stretches of a rest by index, with all their labels."""
    for part in read_rest_extents(path, weighted):
        ids, labels, weights = _Runs(path, part.extents, files, weighted).tokens(0, len(part.extents))
        offsets, reasons = part.extents.token_offsets(), list(part.reasons)
        yield RestRows(ids, labels, offsets, part.example_ids, part.offset, reasons, weights)
