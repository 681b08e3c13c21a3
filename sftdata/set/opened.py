"""A finished set, opened for reading: the manifest at once, each shard when it is first looked into."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

from sftdata.batches import Float32, Int32, Int64, PackedRows
from sftdata.errors import IntegrityError, SftError, need, place
from sftdata.set.manifest import MANIFEST_NAME, Manifest, SourceInfo, read_manifest
from sftdata.set.shards import ShardInfo, read_batches, read_shard, refuse_unlawful, shard_schema
from sftdata.set.store import plain_file

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A stretch of one example in a packed row.

    Attributes:
        example_id: the input row it comes from.
        input_ids, labels: int32[T], views of the shard.
    """

    example_id: int
    input_ids: Int32
    labels: Int32


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One row of a set; every array is a read-only view of the shard.

    Attributes:
        input_ids: int32[T].
        labels: int32[T], -100 where not trained.
        seq_lengths: int32[S], lengths of the documents, padding last.
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


class ShardSet(Sequence[PackedRow]):
    """The packed rows of a set, as a sequence that costs nothing until it is read.

    A shard is checked when it is first mapped, and stays mapped. Where another set has taken the place of
    this one by then, that is an error: its rows would come under the manifest of this one.

    Attributes:
        folder: where the set lies.
        manifest: what it is.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, lawful: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lawful = lawful
        self._seen: tuple[int, ...] | None = None
        self._ends = list(accumulate(shard.rows for shard in manifest.shards))
        self._mapped: dict[int, _Mapped] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...

    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        """Return a row, or a list of rows for a slice.

        Raises:
            IndexError: there is no such row.
            IntegrityError: the shard is missing or is not what the manifest says.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        shard = bisect_right(self._ends, row)
        return self._shard(shard).row(row - self._ends[shard] + self.manifest.shards[shard].rows)

    def __reduce__(self) -> tuple[object, ...]:
        """Send the set to another process without what is mapped here."""
        return partial(ShardSet, lawful=self._lawful), (self.folder, self.manifest)

    def __repr__(self) -> str:
        ledger = self.manifest.ledger
        return (
            f"<ShardSet {str(self.folder)!r}: {len(self):,} rows, {ledger.documents:,} documents,"
            f" {ledger.tokens:,} tokens, {ledger.tokens_trained:,} of them trained,"
            f" max_length {self.manifest.max_length}>"
        )

    def batches(self) -> Iterator[PackedRows]:
        """Yield the columns of the set, one record batch after the other, as views of the shards."""
        for index in range(len(self.manifest.shards)):
            yield from self._shard(index).batches

    def arrow(self) -> pa.Table:
        """Return the set as a memory-mapped Arrow table."""
        import pyarrow as pa

        shape = self.manifest.max_length, self.manifest.weighted
        self.hold()
        batches = [
            batch
            for shard in self.manifest.shards
            for batch in read_batches(plain_file(self.folder, shard), *shape)
        ]
        self.refuse_replaced()
        return pa.Table.from_batches(batches, shard_schema(*shape))

    def polars(self) -> pl.DataFrame:
        """Return the set as a polars frame."""
        found: pl.DataFrame = need("polars", "notebooks", "a frame was asked for").DataFrame(self.arrow())
        return found

    def origin(self, example_id: int) -> tuple[str, int]:
        """Return the source and the 1-based line (record, element, row) that an example comes from.

        Raises:
            KeyError: no source holds that example.
        """
        source = self._source(example_id)
        return source.name, example_id - source.first_id + 1

    def place(self, example_id: int) -> str:
        """Return the same in words.

        Raises:
            KeyError: no source holds that example.
        """
        return place(*self.origin(example_id), self._source(example_id).unit)

    def _source(self, example_id: int) -> SourceInfo:
        sources = self.manifest.sources
        index = bisect_right(sources, example_id, key=lambda source: source.first_id) - 1
        while index >= 0 and not sources[index].rows:  # an empty file shares its first id with the next one
            index -= 1
        if index < 0 or example_id >= sources[index].first_id + sources[index].rows:
            raise KeyError(f"no source of {self.folder} holds example {example_id}")
        return sources[index]

    def hold(self) -> None:
        """Map every shard, so that the bytes stay these whatever is put in the place of the set.

        Raises:
            IntegrityError: a shard is not what the manifest says, its rows break a law, or it was replaced.
        """
        for index in range(len(self.manifest.shards)):
            self._shard(index)
        self._lawful = True

    def refuse_replaced(self) -> None:
        """Refuse to go on where another set lies in the folder by now; call it after reading from there.

        Raises:
            IntegrityError: naming both digests.
        """
        path = self.folder / MANIFEST_NAME
        try:
            found = path.stat()
            state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
            if state == self._seen:
                return
            digest = read_manifest(self.folder).digest
        except (OSError, SftError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise IntegrityError(
                f"{self.folder}: gone while it was in use: {reason}.", "open the set again."
            ) from None
        if digest != self.manifest.digest:
            opened = self.manifest.digest[:12]
            what = f"{self.folder}: replaced while it was in use: opened as {opened}, now {digest[:12]}."
            raise IntegrityError(what, "open the set again, and write new sets beside those in use.")
        self._seen = state

    def _shard(self, index: int) -> _Mapped:
        if index not in self._mapped:
            self.refuse_replaced()  # first, or what is missing for that reason would be called damaged
            info = self.manifest.shards[index]
            path = plain_file(self.folder, info)
            mapped = _Mapped(path, info, read_shard(path, self.manifest.max_length, self.manifest.weighted))
            if not self._lawful:
                refuse_unlawful(path, mapped.batches, self.manifest)
            self.refuse_replaced()
            self._mapped[index] = mapped
        return self._mapped[index]


class _Mapped:
    """The record batches of one mapped shard."""

    def __init__(self, path: Path, info: ShardInfo, batches: list[PackedRows]) -> None:
        self.batches = batches
        self._ends = list(accumulate(len(batch) for batch in batches))
        rows = self._ends[-1] if self._ends else 0
        if rows != info.rows:
            raise IntegrityError(
                f"{path}: {rows} rows; the manifest says {info.rows}.", "run `sftdata verify`."
            )

    def row(self, row: int) -> PackedRow:
        index = bisect_right(self._ends, row)
        batch = self.batches[index]
        row -= self._ends[index] - len(batch)
        tokens = slice(batch.row_offsets[row], batch.row_offsets[row + 1])
        segments = slice(batch.segment_offsets[row], batch.segment_offsets[row + 1])
        weights = None if batch.loss_weights is None else batch.loss_weights[tokens]
        ids, labels = batch.input_ids[tokens], batch.labels[tokens]
        return PackedRow(ids, labels, batch.seq_lengths[segments], batch.example_ids[segments], weights)


def open_set(folder: str | Path) -> ShardSet:
    """Open a finished set; only its manifest is read.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: its manifest is damaged.
    """
    folder = Path(folder)
    return ShardSet(folder, read_manifest(folder))
