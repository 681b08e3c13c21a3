"""The rows of a set, one shard at a time: mapped, or gathered from the files of other sets.

`SetFiles` opens the rows and the rest of any set; nothing above it knows which kind it is. A row by index
is one copy, made when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from sftdata.batches import Float32, Int32, Int64, PackedRows, offsets_of
from sftdata.set.extents import read_packs, read_rest_extents
from sftdata.set.held import TokenFiles, open_token_files
from sftdata.set.images import IMAGES, HasPictures, StoredPictures, read_images
from sftdata.set.index import REST, RestRows, beside_name, read_rest
from sftdata.set.local import plain_file
from sftdata.set.manifest import Manifest
from sftdata.set.shards import PICTURES, ShardInfo, read_shard

Array = TypeVar("Array", Int32, Int64, Float32)


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
        images: int32[K], pictures of the documents, end to end, as numbers in the sidecar of the shard.
        image_counts: int32[S], how many each segment has; None, as `images`, in a set without pictures.
    """

    input_ids: Int32
    labels: Int32
    seq_lengths: Int32
    examples: Int64
    loss_weights: Float32 | None
    images: Int32 | None = None
    image_counts: Int32 | None = None

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
        self._pictures = _picture_edges(batches)

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
        lengths, examples = batch.seq_lengths[segments], batch.example_ids[segments]
        pictures = _pictures_of(batch, self._pictures, index, segments)
        return PackedRow(ids, labels, lengths, examples, weights, *pictures)


def _picture_edges(batches: Sequence[HasPictures]) -> list[Int64]:
    """Return where the pictures of each segment begin, int64[S + 1] for each record batch; none without."""
    return [offsets_of(batch.image_counts) for batch in batches if batch.image_counts is not None]


def _pictures_of(
    batch: HasPictures, edges: Sequence[Int64], index: int, segments: slice
) -> tuple[Int32, Int32] | tuple[()]:
    """Return the pictures of a row, and how many each of its segments has; nothing without pictures."""
    if batch.images is None or batch.image_counts is None:
        return ()
    first, last = edges[index][[segments.start, segments.stop]].tolist()
    return batch.images[first:last], batch.image_counts[segments]


class FoundRow(NamedTuple):
    """A row by index: where its tokens lie, as for `TokenFiles.gather`, its documents and their pictures."""

    runs: Int32
    first_weights: Float32 | None
    seq_lengths: Int32
    examples: Int64
    images: Int32 | None = None
    image_counts: Int32 | None = None


class IndexedShard:
    """The rows of one file of packs, gathered from the files of the bases.

    Args:
        path: of the file.
        manifest: of its set.
        files: of the bases.
    """

    def __init__(self, path: Path, manifest: Manifest, files: TokenFiles) -> None:
        self._packs = read_packs(path, manifest.weighted, manifest.pictured)
        self._runs = [files.find(path, packs.extents) for packs in self._packs]
        self._files = files
        self._ends = list(accumulate(map(len, self._packs)))
        self._pictures = _picture_edges(self._packs)

    @property
    def batches(self) -> Iterator[PackedRows]:
        """The rows, in order, gathered a record batch at a time."""
        for packs, runs in zip(self._packs, self._runs, strict=True):
            ids, labels, weights = self._files.gather(runs, packs.extents.first_weights)
            yield PackedRows(
                ids, labels, packs.extents.token_offsets(),
                packs.seq_lengths, packs.example_ids, packs.segment_offsets, weights,
                packs.images, packs.image_counts,
            )  # fmt: skip

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, row: int) -> PackedRow:
        """Return a row, gathered."""
        found = self.find(row)
        ids, labels, weights = self._files.gather(found.runs, found.first_weights)
        return PackedRow(
            ids, labels, found.seq_lengths, found.examples, weights, found.images, found.image_counts
        )

    def find(self, row: int) -> FoundRow:
        """Return where a row lies."""
        index = bisect_right(self._ends, row)
        packs = self._packs[index]
        row -= self._ends[index] - len(packs)
        first, last = packs.extents.row_offsets[row : row + 2].tolist()
        start, stop = packs.segment_offsets[row : row + 2].tolist()
        weights = packs.extents.first_weights
        return FoundRow(
            self._runs[index][:, first:last],
            None if weights is None else weights[first:last],
            packs.seq_lengths[start:stop],
            packs.example_ids[start:stop],
            *_pictures_of(packs, self._pictures, index, slice(start, stop)),
        )


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
            return IndexedShard(path, self._manifest, self.bases)
        of = self._manifest
        return MappedShard(read_shard(path, of.max_length, of.weighted, of.pictured))

    def pictures(self, number: int) -> StoredPictures | None:
        """Return the pictures of a slice; None where it has none.

        Raises:
            IntegrityError: the sidecar is missing, or is not what the manifest says.
        """
        file, bases = self._files.get(beside_name(IMAGES, number)), self.bases
        if file is None:
            return None
        return read_images(plain_file(self._folder, file), None if bases is None else bases.pictures)

    def take(self, places: Sequence[tuple[Shard, int]]) -> PackedRows:
        """Return rows, by shard and number there, as columns that are copied once."""
        rows: Sequence[PackedRow | FoundRow]
        pictures: dict[str, Int32] = {}
        if self.bases is None:
            rows = mapped = [shard.row(row) for shard, row in places]
            ids, labels = _joined([row.input_ids for row in mapped]), _joined([row.labels for row in mapped])
            weights = _weights([row.loss_weights for row in mapped])
        else:
            rows = found = [shard.find(row) for shard, row in places if isinstance(shard, IndexedShard)]
            runs = np.concatenate([row.runs for row in found], axis=1)
            weights = _weights([row.first_weights for row in found])
            ids, labels, weights = self.bases.gather(runs, weights)
        for name in PICTURES if self._manifest.pictured else ():
            pictures[name] = _joined([getattr(row, name) for row in rows])
        seq_lengths = _joined([row.seq_lengths for row in rows])
        examples = _joined([row.examples for row in rows])
        segments = offsets_of([len(row.examples) for row in rows])
        return PackedRows(
            ids,
            labels,
            offsets_of(seq_lengths)[segments],
            seq_lengths,
            examples,
            segments,
            weights,
            **pictures,
        )

    def rest(self, number: int) -> list[RestRows]:
        """Return the rest of a slice, a record batch each; none where it has none.

        Raises:
            IntegrityError: a file is missing, or is not what a manifest says.
        """
        file, weighted = self._files.get(beside_name(REST, number)), self._manifest.weighted
        if file is None:
            return []
        path, bases = plain_file(self._folder, file), self.bases
        pictured = self._manifest.pictured
        return (
            read_rest(path, weighted, pictured)
            if bases is None
            else list(_gather_rest(path, bases, weighted, pictured))
        )


def _joined(columns: Sequence[Array]) -> Array:
    """Lay columns end to end; a single one stays a view."""
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _weights(columns: Sequence[Float32 | None]) -> Float32 | None:
    """Lay weights end to end; None in a set without them."""
    weights = [column for column in columns if column is not None]
    return _joined(weights) if weights else None


def _gather_rest(path: Path, files: TokenFiles, weighted: bool, pictured: bool) -> Iterator[RestRows]:
    """Gather the stretches of a rest by index, with all their labels."""
    for part in read_rest_extents(path, weighted, pictured):
        runs = files.find(path, part.extents)
        ids, labels, weights = files.gather(runs, part.extents.first_weights)
        offsets, reasons = part.extents.token_offsets(), list(part.reasons)
        yield RestRows(
            ids, labels, offsets, part.example_ids, part.offset, reasons, weights,
            part.images, part.image_counts,
        )  # fmt: skip
