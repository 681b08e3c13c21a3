"""Every document of a set as a few columns by example id, from its indexes: what filters look at.

A document is a place in the columns, its example id, so that a source is a stretch of them, and nothing is
ever sorted. Filters go through them in blocks that fit into the cache; a set of ten million documents takes
some hundred megabytes, and none of its tokens is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sftdata.batches import Int32, Int64
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.index import INDEX, Segments, read_index, slice_number
from sftdata.set.ledger import length_bins
from sftdata.set.local import fetch, named, plain_file
from sftdata.set.store import SetFile
from sftdata.show.view import ShownSet

UInt8 = npt.NDArray[np.uint8]

IN_ROWS, BESIDE = 1, 2
"""Bits of `Catalog.state`: something of the document is in rows, or beside them: cut or dropped."""

SHARES = 16  # bars of the histogram of trained shares: their edges are exact in binary
_BLOCK = 1 << 15
_LONGEST = 1 << 31
_EIGHTHS = 3  # bits of a mantissa: eight bins for each doubling, as in the ledger
_BIASED = 1023 << _EIGHTHS


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where tokens of a document lie.

    Attributes:
        example_id: of the document.
        slice: number of the slice.
        rest: whether they are beside the rows.
        row: of the shard, or of the rest.
        start: first token in that row; of the rest, a row is one stretch.
        offset: the same token, counted in the document.
        length: tokens.
    """

    example_id: int
    slice: int
    rest: bool
    row: int
    start: int
    offset: int
    length: int


class Catalog:
    """The documents of a set by example id; N is one more than the largest.

    Attributes:
        shards: the set.
        length: int32[N], tokens of the whole document.
        trained: int32[N], trained tokens of it, the first token aside, as a view counts them.
        state: uint8[N], `IN_ROWS` and `BESIDE`; 0 where there is no document.
        length_bin: uint8[N], number of the bin of its length, see `bin_starts`.
        share_bin: uint8[N], sixteenths of it that are trained, rounded down; 15 where all is.
        sources: first and last example id, and index in the manifest, of each source that has rows.
    """

    def __init__(self, shards: ShownSet) -> None:
        manifest = shards.manifest
        if manifest.format_version == 1:
            raise UsageError(
                f"{named(shards.folder)}: made in format version 1, without an index to browse by.",
                "prepare it again with this version.",
            )
        self.shards = shards
        rows = sum(source.rows for source in manifest.sources)
        self.length, self.trained = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self.state = np.zeros(rows, np.uint8)
        self.sources = [
            (source.first_id, source.first_id + source.rows, index)
            for index, source in enumerate(manifest.sources)
            if source.rows
        ]
        # The index of each slice, and the ids that it begins and ends with:
        self._files = [file for file in manifest.files if file.name.startswith(f"{INDEX}-")]
        self._slice = np.zeros(rows, np.min_scalar_type(len(self._files)))  # clean memory is dear
        fetch(shards.folder, self._files)
        self._pieces: list[tuple[Int64, Int32, Int32, UInt8]] = []
        self._spans = [self._add(number, self._read(file)) for number, file in enumerate(self._files)]
        self._join_pieces()
        shards.refuse_replaced()
        self.length_bin, self.share_bin = np.empty(rows, np.uint8), np.empty(rows, np.uint8)
        for block in blocks_of(rows):
            self.length_bin[block] = bins_of(self.length[block])
            self.share_bin[block] = shares_of(self.trained[block], self.length[block])

    def __len__(self) -> int:
        return len(self.length)

    def _read(self, file: SetFile) -> Segments:
        """Read an index; it is let go when it has been looked at, since its hashes are most of it."""
        path = plain_file(self.shards.folder, file)
        return read_index(path, self.shards.manifest.weighted, mapped=False)

    def _add(self, number: int, index: Segments) -> tuple[int, int]:
        """Take in the index of a slice; return the first and the last id that it names."""
        ids = index.example_ids
        span = (int(ids.min()), int(ids.max())) if len(ids) else (0, -1)
        if span[0] < 0 or span[1] >= len(self) or index.length.min(initial=0) < 0:
            raise IntegrityError(
                f"{named(self.shards.folder)}: {self._files[number].name} names other documents.",
                "restore the file, or repeat the command that made the set, with --overwrite.",
            )
        self._slice[ids] = number
        state = index.rest + np.uint8(IN_ROWS)  # IN_ROWS, BESIDE
        self.length[ids], self.trained[ids], self.state[ids] = index.length, index.trained, state
        few = np.flatnonzero(~index.whole)
        # A label on a document's own first token trains nothing.
        trained = index.trained[few] + (index.first_trained[few] & (index.offset[few] > 0))
        self._pieces.append((ids[few], index.length[few], trained, state[few]))
        return span

    def _join_pieces(self) -> None:
        """Count documents in pieces, which may be in several slices, by all of them."""
        for ids, *_ in self._pieces:
            self.length[ids] = self.trained[ids] = self.state[ids] = 0
        for ids, length, trained, state in self._pieces:
            np.add.at(self.length, ids, length)
            np.add.at(self.trained, ids, trained)
            np.bitwise_or.at(self.state, ids, state)
        del self._pieces

    def stretches(self, ids: Sequence[int]) -> dict[int, list[Stretch]]:
        """Return where the tokens of some documents lie, in order, by example id."""
        found: dict[int, list[Stretch]] = {example_id: [] for example_id in ids}
        numbers = self._slice[list(ids)]
        for number in set(numbers.tolist()):
            self._look_up(number, np.array(ids)[numbers == number], found)
        pieces = {one for one in ids if sum(place.length for place in found[one]) < self.length[one]}
        for number, (first, last) in enumerate(self._spans if pieces else ()):  # spread over several slices
            there = [one for one in pieces if first <= one <= last and number != self._slice[one]]
            if there:
                self._look_up(number, np.array(there), found)
        for places in found.values():
            places.sort(key=lambda one: one.offset)
        return found

    def _look_up(self, which: int, ids: Int64, found: dict[int, list[Stretch]]) -> None:
        """Add what a slice holds of some documents."""
        file = self._files[which]
        index, number = self._read(file), slice_number(file.name)
        assert number is not None
        here = np.flatnonzero(np.isin(index.example_ids, ids))
        starts = index.starts(self.shards.manifest.pad_to_multiple_of)[here].tolist()
        columns = (index.example_ids, index.rest, index.row, index.offset, index.length)
        for start, *values in zip(starts, *(column[here].tolist() for column in columns), strict=True):
            example_id, rest, row, offset, length = values
            place = Stretch(example_id, number, rest, row, 0 if rest else start, offset, length)
            found[example_id].append(place)


def blocks_of(count: int) -> Iterator[slice]:
    """Yield stretches of a column that fit into the cache one by one."""
    for first, last in pairwise([*range(0, count, _BLOCK), count]):
        yield slice(first, last)


def bins_of(lengths: Int32) -> UInt8:
    """Return the number of each length's bin, uint8[N], from the bits of a float: exponent and eighths.

    >>> bins_of(np.array([0, 1, 2, 15, 16, 17, 18], np.int32)).tolist()
    [255, 0, 8, 31, 32, 32, 33]
    """
    bits = lengths.astype(np.float64).view(np.int64) >> (52 - _EIGHTHS)
    return np.where(bits, bits - _BIASED, 255).astype(np.uint8)


def bin_starts() -> Int64:
    """Return the shortest length of each bin, int64[256]; the last is that of nothing.

    >>> bin_starts()[[0, 8, 31, 32, 33, 255]].tolist()
    [1, 2, 15, 16, 18, 0]
    """
    numbers = np.arange(255)
    starts = (2.0 ** (numbers >> _EIGHTHS) * (1 + (numbers & 7) / 8)).astype(np.int64)
    return np.append(length_bins(np.minimum(starts, _LONGEST)), 0)


def shares_of(trained: Int32, lengths: Int32) -> UInt8:
    """Return the trained part of each document in sixteenths, uint8[N], rounded down; 15 where all is."""
    parts = trained.astype(np.float64) * SHARES / np.maximum(lengths, 1)
    return np.minimum(parts, SHARES - 1).astype(np.uint8)
