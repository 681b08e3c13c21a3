"""Scan sources, large ones in ranges that any processes take, and join what was found.

A boundary that content sets is one wherever the scan began, so a range knows its boundaries from the first of
these on. What lies between the last boundary of a range and the first of the next is scanned when they are
joined, from where rows are known to begin. There it shows whether the scan of a range began at a row, where
that had to be guessed: if it passes over the boundary, the range is scanned again. So the plan is that of one
scan from the beginning to the end, whatever the ranges are.

The hash of a source of several ranges is that of the hashes of its ranges, `-` and their number behind it.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import xxhash

from sftdata.batches import Int64
from sftdata.config import DEFAULT_LINE_BYTES
from sftdata.errors import SftError, changed
from sftdata.sources.arrays import Elements, guess_element, opens_array, scan_array
from sftdata.sources.borders import Boundaries, Digests, LineBoundaries, grain_of
from sftdata.sources.chunks import Source, SourcePlan
from sftdata.sources.cutting import Cutter
from sftdata.sources.lines import guess_record, scan_delimited, scan_lines
from sftdata.sources.marks import Marks
from sftdata.sources.remote import is_url, state_of
from sftdata.sources.seals import HASH_BYTES, HASHED_BYTES, Seal
from sftdata.sources.streams import RawCount, in_cache, open_raw, read_all, read_from, skip_bytes
from sftdata.sources.tables import mark_table

RANGE_BYTES = 64 << 20
STREAMS = ("jsonl", "text", "json", "csv")
_HEAD_BYTES = 64 << 10
_KEPT = 4096  # boundaries of a scan, until they are given to the cutter


class Sizes(NamedTuple):
    """How sources are scanned.

    Attributes:
        chunk: bytes of a chunk on average.
        row: bytes of a row that is held, at most.
        range: bytes of a range; a larger source is scanned in several. A multiple of `HASHED_BYTES`.
    """

    chunk: int
    row: int = DEFAULT_LINE_BYTES
    range: int = RANGE_BYTES


@dataclass(frozen=True, slots=True)
class Stretch:
    """A source to scan, or a range of it.

    Attributes:
        start, stop: bytes of the source.
        whole: it is all of the source.
    """

    source: Source
    start: int
    stop: int
    whole: bool


def stretches_of(source: Source, sizes: Sizes) -> list[Stretch]:
    """Return what is to be scanned of a source: ranges of a large one that can be read from anywhere."""
    size = _size_of(source)
    if source.container not in STREAMS or source.compression != "none" or size <= sizes.range:
        return [Stretch(source, 0, size, whole=True)]
    starts = range(0, size, sizes.range)
    return [Stretch(source, start, min(start + sizes.range, size), whole=False) for start in starts]


def _size_of(source: Source) -> int:
    if source.container in ("saved", "hub"):
        return 0
    if is_url(source.file):
        return state_of(source.file).size or 0
    try:
        return os.stat(source.file).st_size
    except OSError:
        raise changed(source.path) from None


def scan(sizes: Sizes, stretch: Stretch) -> Marks:
    """Scan a source, or a range of it.

    Raises:
        IntegrityError: a damaged compressed stream.
        DataError: an element of an array is damaged, and where it ends is unclear.
    """
    if not stretch.whole:
        return _scan_range(sizes, stretch)
    source = stretch.source
    if source.container not in (*STREAMS, "empty"):
        return mark_table(source, sizes.chunk)
    count, notes = RawCount(), list[str]()
    stream = read_all(source, count)
    found = _boundaries(source, sizes, source.body, source.body_line)
    for _ in _rows(source, sizes, skip_bytes(stream, source.body), found, notes):
        pass
    for _ in stream:  # the hash is that of the whole file
        pass
    found.end_at(found.end)
    seal = count.blocks.seal()
    return Marks(
        0,
        seal.end,
        *_columns(found, len(found.positions)),
        count.hasher.digest(),
        seal.hashes,
        found.end,
        found.total,
        count.size,
        notes=tuple(notes),
    )


def plain_hash(source: Source) -> str:
    """Return the hash of all raw bytes at once, hex: that of a large source in sets of earlier versions."""
    count = RawCount()
    for _ in read_all(source, count):
        pass
    return count.hasher.hexdigest()


def _boundaries(source: Source, sizes: Sizes, start: int, line: int) -> Boundaries:
    kind = LineBoundaries if source.container in ("jsonl", "text") else Boundaries
    return kind(grain_of(sizes.chunk), start, line if source.container == "csv" else 0)


def _rows(
    source: Source, sizes: Sizes, blocks: Iterator[bytes], found: Boundaries, notes: list[str]
) -> Iterator[None]:
    """Scan to the end of the source; yield now and then."""
    match source.container:
        case "jsonl" | "text":
            assert isinstance(found, LineBoundaries)
            yield from scan_lines(blocks, found)
        case "csv":
            yield from scan_delimited(source, blocks, found, partial(read_from, source))
        case "json":
            whole = found.end == source.body
            inside = not whole and opens_array(_head(source))
            elements = Elements(
                source.path, in_cache(blocks), found.end, sizes.row, whole=whole, inside=inside
            )
            yield from scan_array(elements, found)
            if not elements.closed:
                cut = "the array is never closed by ']'; the file may have been cut short."
                notes.append(f"{source.path}: {cut}")
        case "empty":
            notes.append(f"{source.path}: the file is empty.")


def _head(source: Source) -> bytes:
    """Return the first bytes of the rows that are no space, and some behind them."""
    head = b""
    for block in read_from(source, source.body):
        head = (head + block).lstrip()
        if len(head) >= _HEAD_BYTES:
            break
    return head


def _columns(found: Boundaries, count: int) -> tuple[Int64, Int64, Int64, Digests]:
    """Return the first boundaries as arrays."""
    places = (np.array(noted[:count], np.int64) for noted in (found.positions, found.records, found.lines))
    positions, records, lines = places
    return positions, records, lines, found.digests()[:count]


# --------------------------------------------------------------------------------------------- one range


def _scan_range(sizes: Sizes, stretch: Stretch) -> Marks:
    """Hash a range, and scan it from the first row that begins in it on, as far as that can be told."""
    source, count = stretch.source, RawCount()
    stream = _counted(stretch, count)
    first = next(stream, b"")
    start = source.body if not stretch.start else stretch.start + _guess(source, first)
    found = _boundaries(source, sizes, start, 0)
    if start >= stretch.start:
        blocks = skip_bytes(chain([first], stream), start - stretch.start)
        with suppress(SftError, RecursionError):  # what is wrong is found again when ranges are joined
            for _ in _part_of_rows(source, sizes, blocks, found):
                pass
    for _ in stream:
        pass
    if count.size < stretch.stop - stretch.start:
        raise changed(source.path)
    positions, records, lines, contents = _columns(found, len(found.positions))
    sure = 0 if not stretch.start else len(positions) if found.sure is None else found.sure
    return Marks(
        stretch.start,
        stretch.stop,
        positions[sure:],
        records[sure:] - records[sure : sure + 1],
        lines[sure:] - lines[sure : sure + 1],
        contents[sure:-1],
        count.hasher.digest(),
        count.blocks.seal().hashes,
    )


def _counted(stretch: Stretch, count: RawCount) -> Iterator[bytes]:
    left = stretch.stop - stretch.start
    for block in count.watch(_limited(read_from(stretch.source, stretch.start), left)):
        count.blocks.update(block)
        yield block


def _limited(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    for block in blocks:
        yield block[:size]
        size -= len(block)
        if size <= 0:
            return


def _guess(source: Source, data: bytes) -> int:
    """Return where the first row most likely begins; negative if none does."""
    if source.container == "csv":
        return guess_record(data, source.delimiter)
    if source.container == "json":
        return guess_element(data, _head(source))
    return data.find(b"\n") + 1 or -1


def _part_of_rows(source: Source, sizes: Sizes, blocks: Iterator[bytes], found: Boundaries) -> Iterator[None]:
    if source.container == "csv":
        return scan_delimited(source, blocks, found, None)
    return _rows(source, sizes, blocks, found, [])


# -------------------------------------------------------------------------------------------- all ranges


def join(source: Source, marks: Iterable[Marks], sizes: Sizes) -> SourcePlan:
    """Return the plan of a source by the marks of its stretches, in order.

    Raises:
        InputChangedError: it has changed since it was scanned.
        SftError: what stops a scan of the whole source.
    """
    marks = iter(marks)
    first = next(marks)
    if first.total is None:
        return _Join(source, chain([first], marks), sizes).plan()
    cutter = Cutter(first.step or sizes.chunk)
    cutter.add(first.positions, first.records, first.lines, first.contents)
    seal = Seal(0, first.blocks, first.stop) if source.container in (*STREAMS, "empty") else None
    raw = first.raw_bytes, first.digest.hex()
    return cutter.finish(
        source, first.end, first.total, raw, sizes.row, seal=seal, stamp=first.stamp, notes=first.notes
    )


class _Join:
    """Scans what lies between ranges, from a boundary that is known to the first of the next range."""

    def __init__(self, source: Source, marks: Iterator[Marks], sizes: Sizes) -> None:
        self._source, self._marks, self._sizes = source, marks, sizes
        self._cutter = Cutter(sizes.chunk)
        self._hashes, self._digests, self._stop = bytearray(), list[bytes](), 0
        self._next: Marks | None = None  # the last range reached, until it is joined

    def plan(self) -> SourcePlan:
        at, record, line = self._source.body, 0, self._source.body_line
        notes = list[str]()
        while True:
            found = _boundaries(self._source, self._sizes, at, line)
            for _ in _rows(self._source, self._sizes, self._blocks(at), found, notes):
                if (joined := self._meets(found)) is not None:
                    self._add(found, joined, record)
                    at, record, line = self._add_range(record + found.records[0], found.lines[0])
                    break
                if len(found.positions) > _KEPT:
                    self._add(found, len(found.positions) - 1, record)
            else:
                break
        while self._reach():
            pass
        found.end_at(found.end)
        self._add(found, len(found.positions), record)
        digest = f"{xxhash.xxh3_128_hexdigest(b''.join(self._digests))}-{len(self._digests)}"
        seal = Seal(0, bytes(self._hashes), self._stop)
        self._hashes.clear()
        raw = self._stop, digest
        total = record + found.total
        return self._cutter.finish(
            self._source, found.end, total, raw, self._sizes.row, seal=seal, notes=notes
        )

    def _meets(self, found: Boundaries) -> int | None:
        """Return the index of the boundary that the next range begins with, once there is one."""
        if self._next is None or not found.positions or found.positions[-1] < self._next.positions[0]:
            return None
        index = bisect_left(found.positions, int(self._next.positions[0]))
        if found.positions[index] == self._next.positions[0]:
            return index
        self._next = None  # its scan did not begin at a row
        return None

    def _add(self, found: Boundaries, count: int, record: int) -> None:
        positions, records, lines, contents = _columns(found, count)
        self._cutter.add(positions, records + record, lines, contents)
        found.forget(count)

    def _add_range(self, record: int, line: int) -> tuple[int, int, int]:
        """Add the boundaries of the next range; return its last one, which its scan goes on from."""
        assert self._next is not None
        marks, self._next = self._next, None
        records, lines = marks.records + record, marks.lines + line
        self._cutter.add(marks.positions[:-1], records[:-1], lines[:-1], marks.contents)
        return int(marks.positions[-1]), int(records[-1]), int(lines[-1])

    def _reach(self) -> bool:
        """Go on to the next range; return False at the end of the source."""
        marks = next(self._marks, None)
        if marks is None:
            return False
        self._hashes += marks.blocks
        self._digests.append(marks.digest)
        self._next, self._stop = marks if len(marks.positions) else None, marks.stop
        return True

    def _blocks(self, at: int) -> Iterator[bytes]:
        """Yield the stream from a byte on, as it was when its ranges were scanned."""
        number = at // HASHED_BYTES
        with open_raw(self._source.file, self._source.held) as stream:
            stream.seek(number * HASHED_BYTES)
            while number * HASHED_BYTES < self._stop or self._reach():
                block = stream.read(HASHED_BYTES)[: self._stop - number * HASHED_BYTES]
                expected = self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]
                if xxhash.xxh3_64_digest(block) != expected:
                    raise changed(self._source.path)
                yield block[max(at - number * HASHED_BYTES, 0) :]
                number += 1
