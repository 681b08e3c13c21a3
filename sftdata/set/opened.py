"""A finished set, opened for reading: the manifest at once, each shard when it is first looked into."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, overload

from sftdata.batches import PackedRows
from sftdata.errors import IntegrityError, need, place
from sftdata.output import counted
from sftdata.set.held import Watch
from sftdata.set.images import StoredPictures
from sftdata.set.index import slice_number
from sftdata.set.laws import refuse_unlawful
from sftdata.set.local import fetch_beside, local_folder, named, origin, still_there
from sftdata.set.manifest import Manifest, SourceInfo, read_manifest
from sftdata.set.rows import PackedRow, SetFiles, Shard
from sftdata.set.shards import as_batch, shard_schema

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa


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
        self._mirrors = origin(folder) is not None
        self._after: dict[int, Sequence[int]] = {}
        self._watch = Watch(folder, manifest.digest)
        self._files = SetFiles(folder, manifest)
        self._ends = list(accumulate(shard.rows for shard in manifest.shards))
        self._mapped: dict[int, Shard] = {}
        self._stored: dict[int, StoredPictures | None] = {}

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
        shard, row = self._place(self._number(index))
        return shard.row(row)

    def take(self, rows: Sequence[int]) -> PackedRows:
        """Return one row or more as columns, in the order of these numbers.

        Raises:
            IndexError: there is no such row.
            IntegrityError: a shard is missing or is not what the manifest says.
        """
        every = range(len(self))
        return self._files.take([self._place(every[row]) for row in rows])

    def _number(self, index: SupportsIndex) -> int:
        """Return the number of a row, which may be counted from the end."""
        try:
            return range(len(self))[index]
        except IndexError:
            raise IndexError(f"{named(self.folder)}: no row {index}; the set has {len(self):,}") from None
        except TypeError:
            what = f"{named(self.folder)}: found {index!r:.80}; expected the number of a row"
            raise TypeError(f"{what}, whose columns are attributes: [0].input_ids") from None

    def _place(self, row: int) -> tuple[Shard, int]:
        """Return the shard of a row, and its number there."""
        shard = bisect_right(self._ends, row)
        return self._shard(shard), row - self._ends[shard] + self.manifest.shards[shard].rows

    def __reduce__(self) -> tuple[object, ...]:
        """Send the set to another process without what is mapped here."""
        return partial(ShardSet, lawful=self._lawful), (self.folder, self.manifest)

    def __fspath__(self) -> str:
        """Return the folder or the URL of the set, so that it is taken wherever one is."""
        return named(self.folder)

    def __repr__(self) -> str:
        ledger = self.manifest.ledger
        return (
            f"<ShardSet {named(self.folder)!r}: {counted(len(self), 'row')},"
            f" {counted(ledger.documents, 'document')}, {counted(ledger.tokens, 'token')},"
            f" {ledger.tokens_trained:,} of them trained, max_length {self.manifest.max_length}>"
        )

    def stored_pictures(self, row: int) -> StoredPictures | None:
        """Return the pictures of the shard that holds a row; None where it has none.

        Raises:
            IntegrityError: the sidecar is missing, or is not what the manifest says.
        """
        shard = self.manifest.shards[bisect_right(self._ends, row)]
        number = slice_number(shard.name)
        if self.manifest.vision is None or number is None:
            return None
        if number not in self._stored:
            self._stored[number] = self._files.pictures(number)
        return self._stored[number]

    def expect(self, shards: Sequence[int], ahead: int = 2) -> None:
        """Say in what order shards are needed; of a set behind a URL they are fetched before.

        Args:
            shards: by number, each once.
            ahead: how many before the one that is read.
        """
        if self._mirrors:
            self._after = {one: shards[at + 1 : at + 1 + ahead] for at, one in enumerate(shards)}

    def batches(self) -> Iterator[PackedRows]:
        """Yield the columns of the set, one record batch after the other."""
        self.expect(range(len(self.manifest.shards)))
        for index in range(len(self.manifest.shards)):
            yield from self._shard(index).batches

    def arrow(self) -> pa.Table:
        """Return the set as an Arrow table: memory-mapped, but for a view by index, which is gathered."""
        import pyarrow as pa

        manifest = self.manifest
        schema = shard_schema(manifest.max_length, manifest.weighted, manifest.pictured)
        self.hold()
        batches = [as_batch(rows, 0, len(rows), schema) for rows in self.batches()]
        return pa.Table.from_batches(batches, schema)

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
            raise KeyError(f"no source of {named(self.folder)} holds example {example_id}")
        return sources[index]

    def hold(self) -> None:
        """Map every shard, so that the bytes stay these whatever is put in the place of the set.

        Raises:
            IntegrityError: a shard is not what the manifest says, its rows break a law, or it was replaced.
        """
        for index in range(len(self.manifest.shards)):
            self._shard(index)
        self._lawful = True

    def require_bases(self) -> None:
        """Refuse a view by index without the sets that hold its tokens; else that is found at its first row.

        Raises:
            IntegrityError: one is gone, or is another set by now.
        """
        _ = self._files.bases

    def refuse_replaced(self) -> None:
        """Refuse to go on where another set lies in the folder by now; call it after reading from there.

        Raises:
            IntegrityError: naming both digests.
        """
        self._watch.refuse_replaced()

    def _shard(self, index: int) -> Shard:
        if index not in self._mapped or (self._mirrors and not still_there(self._path(index))):
            self._mapped[index] = self._map(index)
        return self._mapped[index]

    def _path(self, index: int) -> Path:
        return self.folder / self.manifest.shards[index].name

    def _map(self, index: int) -> Shard:
        """Map a shard; of a mirror, let go of those that had to make room for it."""
        self.refuse_replaced()  # first, or what is missing for that reason would be called damaged
        info, path = self.manifest.shards[index], self._path(index)
        mapped = self._files.rows(info)
        fetch_beside(self.folder, [self.manifest.shards[one] for one in self._after.get(index, ())])
        if self._mirrors:
            self._mapped = {other: held for other, held in self._mapped.items() if self._path(other).exists()}
        if len(mapped) != info.rows:
            what = f"{path}: {counted(len(mapped), 'row')}; the manifest says {info.rows}."
            raise IntegrityError(what, "run `sftdata verify`.")
        if not self._lawful:
            refuse_unlawful(path, mapped.batches, self.manifest)
        self.refuse_replaced()
        return mapped


def open_set(folder: str | PathLike[str]) -> ShardSet:
    """Open a finished set; only its manifest is read.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: its manifest is damaged.
    """
    folder = local_folder(folder)
    return ShardSet(folder, read_manifest(folder))
