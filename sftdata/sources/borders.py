"""Where a source is cut: at borders that its content sets, so that a change moves only those near it.

Each source is cut three times over, at row boundaries, and each cut is made of the one before:

    grains   about 64 KiB: after rows that a hash of their own bytes picks; each grain is hashed
    chunks   about 1 MiB: where the hash of the grain that follows is the largest around
    slices   about `slice_bytes`: where that of the chunk that follows is, over all sources (plan.py)

Neither the size of a source nor what lies far away has a say. Rows that are all alike set no border; there
one is set at fixed distances from the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from sftdata.batches import Bool, Int64

UInt64 = npt.NDArray[np.uint64]
Digests = npt.NDArray[np.uint8]
"""uint8[K, 16]: a hash of each of several stretches."""

Bytes: TypeAlias = bytes | msgspec.Raw

NEVER = np.iinfo(np.int64).max
DIGEST_BYTES = 16
GRAIN_BYTES = 64 << 10
_GRAINS_WANTED = 16  # in a chunk
_FARTHEST = 4  # grains between two boundaries where no row was picked
_REACH = 32 << 10  # bytes before its end that decide whether a line is picked, at most
_SHORTEST = 16  # bytes of a line that may be picked: what decides lies inside
_WORD = 8
_TOP = np.uint64(40)
_MIX = tuple(map(np.uint64, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xBF58476D1CE4E5B9)))


def grain_of(chunk_bytes: int) -> int:
    """Return how far apart boundaries are noted, for chunks of about this size."""
    return max(1, min(GRAIN_BYTES, chunk_bytes // _GRAINS_WANTED))


def content_borders(starts: Int64, ranks: UInt64, end: int, sizes: Int64) -> Int64:
    """Choose borders among the starts of pieces: int64[B], indices, the first piece always among them.

    A piece begins a part where its rank is the largest within reach of it, before and behind, the first of
    those that share it, and out of reach of the very beginning. What would be longer than two sizes is cut
    again where ranks are large.

    Args:
        starts: int64[K], ascending.
        ranks: uint64[K], a hash of what each piece holds.
        end: where the last one ends.
        sizes: int64[K], about how long a part that begins there should be; it is the mean.
    """
    if not len(starts):
        return np.zeros(0, np.int64)
    natural = natural_borders(starts, ranks, sizes)
    lengths = np.diff(starts[natural], append=end)
    chosen: list[Int64] = [natural]
    for index in np.flatnonzero(lengths > 2 * sizes[natural]).tolist():
        stop = int(natural[index + 1]) if index + 1 < len(natural) else len(starts)
        chosen.append(_cut_again(starts, ranks, sizes, int(natural[index]), stop, end))
    return np.sort(np.concatenate(chosen))


def reach_of(size: int | Int64) -> int | Int64:
    """Return how far around a border nothing outranks it, for parts of about this size."""
    return size * 5 // 8


def natural_borders(starts: Int64, ranks: UInt64, sizes: Int64) -> Int64:
    """Return the first piece, and those that nothing within reach outranks: int64[B], indices."""
    here, reach = np.arange(len(starts)), reach_of(sizes)
    first = np.searchsorted(starts, starts - reach)
    last = np.searchsorted(starts, starts + reach, side="right")
    before, behind = _largest(ranks, first, here), _largest(ranks, here, last)
    largest = (ranks > before) & (ranks >= behind) & (first > 0)
    return np.flatnonzero(largest | (here == 0))


def _largest(ranks: UInt64, first: Int64, stop: Int64) -> UInt64:
    """Return the largest of `ranks[first:stop]` for each pair, 0 where that is empty."""
    pairs = np.stack([first, stop], axis=1).reshape(-1)
    found = np.maximum.reduceat(np.append(ranks, np.uint64(0)), pairs)[::2]
    return np.where(first < stop, found, np.uint64(0))


def _cut_again(starts: Int64, ranks: UInt64, sizes: Int64, begin: int, stop: int, end: int) -> Int64:
    """Return the borders inside the pieces `begin:stop`, which are too long together."""
    found: list[int] = []
    edge = int(starts[stop]) if stop < len(starts) else end
    while edge - starts[begin] > 2 * (size := int(sizes[begin])):
        nearest, farthest = starts[begin] + (size + 1) // 2, starts[begin] + size + size // 2
        first, last = np.searchsorted(starts, [nearest, farthest + 1])
        if first >= stop:
            break
        begin = int(first + np.argmax(ranks[first : min(last, stop)])) if last > first else int(first)
        found.append(begin)
    return np.array(found, np.int64)


def ranks_of(contents: Digests) -> UInt64:
    """uint64[K]: the rank of each stretch with this hash."""
    ranks: UInt64 = np.ascontiguousarray(contents[:, :8]).view("<u8")[:, 0]
    return ranks


def join_contents(contents: Digests, edges: Int64, first: Int64, last: Int64) -> list[bytes]:
    """Hash each run of stretches `first:last`, half-open: what they hold, and where each stands in it.

    Args:
        edges: int64[K, N], places where each stretch begins, such as byte and record.
    """
    found = []
    for begin, stop in zip(first.tolist(), last.tolist(), strict=True):
        places = (edges[begin:stop] - edges[begin]).astype("<i8")
        found.append(xxhash.xxh3_128_digest(contents[begin:stop].tobytes() + places.tobytes()))
    return found


# ----------------------------------------------------------------------------------------- boundaries of rows


class Boundaries:
    """Boundaries between rows, about a grain apart, and the hash of what lies between them.

    Args:
        grain: bytes from one boundary to the next, on average.
        start: byte where the first row begins.
        line: of that row, where it matters.

    Attributes:
        positions: byte of each boundary.
        records: number of the record that begins there, from 0.
        lines: 1-based line there, where the caller has it.
        sure: the first boundary that is one wherever rows begin before it; None while there is none.
        end: where the rows so far end.
        total: rows so far.
        line: where the next one begins.
    """

    def __init__(self, grain: int, start: int = 0, line: int = 0) -> None:
        self.positions: list[int] = []
        self.records: list[int] = []
        self.lines: list[int] = []
        self.sure: int | None = None
        self.end, self.total, self.line = start, 0, line
        self._grain = grain
        self.farthest = _FARTHEST * grain
        self._content = xxhash.xxh3_128()
        self._digests: list[bytes] = []
        self._due = True

    def set(self, position: int, record: int, line: int = 0) -> None:
        """Set a boundary here, where a row begins."""
        if self.positions:
            self._digests.append(self._content.digest())
            self._content = xxhash.xxh3_128()
        self.positions.append(position)
        self.records.append(record)
        self.lines.append(line)

    @property
    def forced(self) -> int:
        """The byte from which on any row sets the next boundary, once there is one."""
        return self.positions[-1] + self.farthest if self.positions else NEVER

    def hash(self, data: bytes | memoryview) -> None:
        """Add what comes next to the hash of the grain."""
        self._content.update(data)

    def rows(self, texts: Sequence[Bytes], starts: Int64, lengths: Int64, breaks: Int64) -> None:
        """Add rows that were read apart: `texts` and `lengths` decide all that becomes of them.

        Args:
            texts: of the rows, or what is shown of them.
            starts, lengths: int64[N], of the rows in the source, bytes.
            breaks: int64[N], lines that each takes.
        """
        lines = np.cumsum(breaks) - breaks + self.line
        hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(texts))
        due = (hashes >> _TOP) * np.uint64(self._grain) < lengths.astype(np.uint64) << np.uint64(24)
        begins = ([0] if self._due else []) + (np.flatnonzero(due[:-1]) + 1).tolist()
        cuts = self._with_forced(begins, starts)
        sure = begins[1:] if not self.positions else begins
        if self.sure is None and sure:
            self.sure = len(self.positions) + cuts.index(sure[0])
        self._due = bool(due[-1])
        grain = np.zeros(len(texts), np.int64)
        grain[cuts] = 1
        grain = grain.cumsum()
        first = np.array([0, *cuts])
        begun, line = starts[first], lines[first]
        if self.positions:
            begun[0], line[0] = self.positions[-1], self.lines[-1]
        parts: list[Bytes] = [b";"] * (3 * len(texts))
        parts[::3], parts[1::3] = texts, _written(starts - begun[grain], lengths, lines - line[grain])
        for number, (at, stop) in enumerate(pairwise([0, *cuts, len(texts)])):
            if number:
                self.set(int(begun[number]), self.total + at, int(line[number]))
            self.hash(b"".join(parts[3 * at : 3 * stop]))
        self.end, self.total = int(starts[-1] + lengths[-1]), self.total + len(texts)
        self.line = int(lines[-1] + breaks[-1])

    def _with_forced(self, begins: list[int], starts: Int64) -> list[int]:
        """Return the rows that a boundary comes before: set by content, and else far from any."""
        found, forced = list[int](), self.forced
        for stop in [*begins, len(starts)]:
            while stop and starts[stop - 1] >= forced:
                found.append(int(np.searchsorted(starts, forced)))
                forced = int(starts[found[-1]]) + self.farthest
            if stop < len(starts):
                found.append(stop)
                forced = int(starts[stop]) + self.farthest
        return found

    def forget(self, count: int) -> None:
        """Forget the first boundaries."""
        for noted in (self.positions, self.records, self.lines, self._digests):
            del noted[:count]

    def end_at(self, end: int) -> None:
        """Take back a boundary where the source ends, since no row begins there."""
        if self.positions and self.positions[-1] >= end:
            for noted in (self.positions, self.records, self.lines):
                noted.pop()

    def digests(self) -> Digests:
        """Return the hash of each grain."""
        joined = b"".join([*self._digests, self._content.digest()][: len(self.positions)])
        return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)


def _written(*columns: Int64) -> list[bytes]:
    """Write the three numbers of each row as `1 2 3`, faster than by formatting them."""
    numbers = np.empty((len(columns[0]), len(columns)), np.int64)
    for place, column in enumerate(columns):
        numbers[:, place] = column
    codes = np.frombuffer(bytearray(msgspec.json.encode(numbers.reshape(-1).tolist())), np.uint8)
    commas = np.flatnonzero(codes == ord(","))
    codes[commas] = ord(" ")
    codes[commas[2::3]] = ord(";")
    return codes[1:-1].tobytes().split(b";")


class LineBoundaries(Boundaries):
    """Boundaries between lines, of a stream that comes in blocks of any size; they do not depend on these.

    A line is picked by its length, its last bytes and some from its middle, the more often the longer it is.
    """

    def __init__(self, grain: int, start: int = 0, line: int = 0) -> None:
        super().__init__(grain, start, line)
        self._begun = start  # where the line begins that is not yet whole
        self._held = b""  # its last bytes
        self.set(start, 0)

    def add(self, block: bytes) -> None:
        """Add what comes next of the stream."""
        newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        picked = np.flatnonzero(self._picked(block, newlines)).tolist()
        at, lines = 0, self.total - (self.end > self._begun)
        for index in self._chosen(picked, newlines):
            stop = int(newlines[index]) + 1
            self.hash(memoryview(block)[at:stop])
            if self.sure is None and index in picked[:1]:
                self.sure = len(self.positions)
            self.set(self.end + stop, lines + index + 1)
            at = stop
        self.hash(memoryview(block)[at:])
        if len(newlines):
            self._begun, self._held = self.end + int(newlines[-1]) + 1, b""
        rest = block[max(self._begun - self.end, 0) :]
        self._held = (self._held + rest[-_REACH:])[-_REACH:]
        self.end += len(block)
        self.total = lines + len(newlines) + (self.end > self._begun)  # one at the end may have no newline

    def _chosen(self, picked: list[int], newlines: Int64) -> Iterator[int]:
        """Yield the index of each newline that a boundary follows; the last one is set before the next."""
        for stop in [*picked, len(newlines)]:
            while (forced := int(np.searchsorted(newlines, self.forced - 1 - self.end))) < stop:
                yield forced
            if stop < len(newlines):
                yield stop

    def _picked(self, block: bytes, newlines: Int64) -> Bool:
        """bool[N]: whether the line that each newline ends is picked."""
        if not len(newlines):
            return np.zeros(0, np.bool_)
        first = int(newlines[0]) + 1
        joined = self._held + block[max(first - _REACH, 0) : first]
        begun = np.array([self.end + first - self._begun])
        one = self._picks(joined[-_REACH:], np.array([min(len(joined), _REACH) - 1]), begun)
        return np.append(one, self._picks(block, newlines[1:], np.diff(newlines)))

    def _picks(self, data: bytes, ends: Int64, lengths: Int64) -> Bool:
        """Say of each line, whose newline is `data[ends]`, whether it is picked."""
        long = lengths >= _SHORTEST
        ends, lengths = ends[long], lengths[long]
        words = np.ndarray(max(len(data) - _WORD + 1, 0), "<u8", data, 0, (1,))  # a word at every byte
        length = lengths.astype(np.uint64)
        mixed = words[ends - _WORD] * _MIX[0] ^ length * _MIX[1]
        mixed ^= words[ends - np.minimum(lengths // 2, _REACH - 1)] * _MIX[2]
        mixed = (mixed ^ mixed >> np.uint64(29)) * _MIX[3] >> np.uint64(40)
        found = np.zeros(len(long), np.bool_)
        found[long] = mixed * np.uint64(self._grain) < length << np.uint64(24)
        return found
