"""What reading passes on: a source, its plan, its chunks, their rows, and the hashes of what was planned.

All but the collector of rows are small, frozen and picklable, because chunks travel to worker processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from sftdata.batches import Int64, Reject, RowBatch
from sftdata.errors import UNITS, Fault, IntegrityError, Unit, changed, place, without_secrets
from sftdata.sources.borders import Digests, content_borders, join_contents, ranks_of
from sftdata.sources.remote import State, is_url, state_of

Container = Literal["jsonl", "text", "json", "csv", "parquet", "arrow", "saved", "hub", "empty"]
Compression = Literal["none", "gzip", "zstd", "xz", "bz2"]
RawRow = dict[str, object] | str
"""A row as parsed: an object of JSON data, or a line of plain text."""

SAMPLES = 32
SHOWN_BYTES = 1000  # kept of a row that is too long to hold


@dataclass(frozen=True, slots=True)
class Source:
    """One input, with its container as recognised from its bytes.

    Attributes:
        path: local path, URL, or Hub dataset id.
        copy: local path of what was fetched of a URL; empty where nothing was.
        body: byte where the rows begin, after a byte order mark and the header of a CSV.
        body_line: 1-based line where they begin.
        delimiter, columns: of a CSV.
        split, subset: of a saved or Hub dataset; None where none was chosen.
        head: hashes of the blocks that this was recognised from.
    """

    path: str
    container: Container
    compression: Compression = "none"
    body: int = 0
    body_line: int = 1
    delimiter: str = ","
    columns: tuple[str, ...] = ()
    split: str | None = None
    subset: str | None = None
    head: bytes = b""
    copy: str = ""

    @property
    def file(self) -> str:
        """The path or URL that its bytes are read from here."""
        return self.copy if self.copy and os.path.exists(self.copy) else self.path

    @property
    def unit(self) -> Unit:
        """What its records are."""
        return UNITS.get(self.container, "line")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a source: `start:stop` in bytes of the decompressed stream, or in rows of a table.

    Attributes:
        first_record: 0-based line, element or record at `start`.
        first_id: example id of that record.
        first_line: of a CSV: 1-based line at `start`.
        records: how many planning counted here, blank lines included; None where it did not.
        seal: what the bytes must be; None for columnar sources.
        stamp: what the files of a columnar source must be; None for others.
        only: records of the source, half-open, that are read where the chunk holds more.
        content: hash of all that decides its rows, wherever they stand; of a columnar source, of its files.
        rank: of the hashes of grains, that of its first: what borders are chosen by.
        number, name: of its source among the inputs.
    """

    source: Source
    start: int
    stop: int
    first_record: int
    first_id: int
    first_line: int = 0
    records: int | None = None
    seal: Seal | None = None
    stamp: Stamp | None = None
    only: tuple[int, int] | None = None
    content: bytes = b""
    rank: int = 0
    number: int = 0
    name: str = ""

    def record_of(self, example_id: int) -> int:
        """Return the 1-based number of a row in its source."""
        return example_id - self.first_id + self.first_record + 1

    def part(self) -> tuple[int, int] | None:
        """Return the records that are read, counted in the chunk; None for all of them."""
        if self.only is None or self.records is None:
            return None
        first, stop = (min(max(edge - self.first_record, 0), self.records) for edge in self.only)
        return None if (first, stop) == (0, self.records) else (first, stop)

    def line_of(self, line: int) -> int | None:
        """Return the line of a `RowBatch`; None in a source that is not read by lines."""
        return line if self.source.unit in ("line", "record") else None

    def place(self, example_id: int, line: int) -> str:
        """Return where a row is, in words; `line` as in a `RowBatch`."""
        unit = self.source.unit
        return place(self.source.path, self.record_of(example_id), unit, line if unit == "record" else None)


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """A source, read through once: what it holds, and where to cut it.

    Attributes:
        base_id: example id of the first record; record i (0-based; blank lines count) is `base_id + i`.
        records: lines, elements or records, blank lines included.
        raw_bytes: size of the raw file, still compressed.
        xxh3_128: hash of the raw bytes, hex.
        chunks: cut by content; end to end they are the source.
        samples: up to 32 small stretches, evenly spaced from the first to the last, for detection.
        max_line_bytes: a longer row is not held.
        notes: about the source, for the user, one line each.
    """

    source: Source
    base_id: int
    records: int
    raw_bytes: int
    xxh3_128: str
    chunks: tuple[Chunk, ...]
    samples: tuple[Chunk, ...]
    max_line_bytes: int
    notes: tuple[str, ...] = ()

    def placed(self, number: int, base_id: int, name: str = "") -> SourcePlan:
        """Return the plan as that of the source of this number and name, whose example ids begin here."""

        def placed(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
            return tuple(
                replace(chunk, number=number, name=name, first_id=base_id + chunk.first_record)
                for chunk in chunks
            )

        return replace(self, base_id=base_id, chunks=placed(self.chunks), samples=placed(self.samples))

    def locate(self, example_id: int) -> tuple[str, int]:
        """Return the path and the 1-based line (element, record) of an example of this source."""
        return without_secrets(self.source.path), example_id - self.base_id + 1


class _Cut(NamedTuple):
    """What lies between two boundaries; as in a `Chunk`, `record` and `line` of the first."""

    start: int
    stop: int
    record: int
    records: int
    line: int
    rank: int
    content: bytes


@dataclass(frozen=True, slots=True, eq=False)
class RowBoundaries:
    """Boundaries between rows, noted while planning: `positions[i]` is where record `records[i]` starts.

    Attributes:
        positions, records: int64[K], ascending.
        contents: the hash of what lies between each boundary and the next.
        end: where the source ends, in the same unit as positions (bytes or rows).
        total: records in the source.
        step: distance between boundaries that a chunk should span on average, in that unit.
        raw_bytes, xxh3_128: of the raw file.
        notes: for the plan.
        lines: of a CSV: int64[K], 1-based line of each boundary.
        seal: of the stream; stamp: of the files of a columnar source.
    """

    positions: Int64
    records: Int64
    contents: Digests
    end: int
    total: int
    step: int
    raw_bytes: int
    xxh3_128: str
    notes: tuple[str, ...] = ()
    lines: Int64 | None = None
    seal: Seal | None = None
    stamp: Stamp | None = None

    def cut(self, first: Int64, last: Int64) -> list[_Cut]:
        """Return the stretches from each boundary of `first` to that of `last` (indices), or to the end."""
        starts, stops = self.positions[first], np.append(self.positions, self.end)[last]
        records, ends = self.records[first], np.append(self.records, self.total)[last]
        lines = np.zeros(len(starts), np.int64) if self.lines is None else self.lines[first]
        columns = (starts, stops, records, ends - records, lines, ranks_of(self.contents)[first])
        edges = np.stack([self.positions, self.records], axis=1)
        contents = join_contents(self.contents, edges, first, last)
        return list(map(_Cut, *map(np.ndarray.tolist, columns), contents))

    def chunks(self) -> list[_Cut]:
        """Return stretches of about a step that are all of the source."""
        sizes = np.full(len(self.positions), self.step, np.int64)
        first = content_borders(self.positions, ranks_of(self.contents), self.end, sizes)
        return self.cut(first, np.append(first, len(self.positions))[1:])

    def sampled(self) -> list[_Cut]:
        """Return evenly spaced stretches from one boundary to the next, the first and the last included."""
        count = len(self.positions)
        first = np.linspace(0, count - 1, min(SAMPLES, count)).astype(np.int64)
        return self.cut(first, first + 1)


def cut_source(source: Source, base_id: int, boundaries: RowBoundaries, max_line_bytes: int) -> SourcePlan:
    """Cut a source at its row boundaries.

    Raises:
        InputChangedError: it began otherwise when its container was recognised.
    """
    seal, stamp = boundaries.seal, boundaries.stamp
    if seal is not None and not seal.hashes.startswith(source.head):
        raise changed(source.path)

    def chunks(cuts: list[_Cut]) -> tuple[Chunk, ...]:
        return tuple(
            Chunk(
                source,
                cut.start,
                cut.stop,
                cut.record,
                base_id + cut.record,
                cut.line,
                cut.records,
                seal and seal.part(cut.start, cut.stop),
                stamp,
                content=cut.content,
                rank=cut.rank,
            )
            for cut in cuts
        )

    return SourcePlan(
        source,
        base_id,
        boundaries.total,
        boundaries.raw_bytes,
        boundaries.xxh3_128,
        chunks(boundaries.chunks()),
        chunks(boundaries.sampled()),
        max_line_bytes,
        boundaries.notes,
    )


@dataclass(slots=True)
class RowCollector:
    """Rows and rejects of one chunk, while it is being read."""

    chunk: Chunk
    rows: list[RawRow] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    unreadable: list[Reject] = field(default_factory=list)
    blank: int = 0

    def add(self, row: RawRow, record: int, offset: int, line: int | None = None) -> None:
        """Add a row; `line` where that is not the number of the record."""
        self.rows.append(row)
        self.records.append(record)
        self.lines.append(record + 1 if line is None else line)
        self.offsets.append(offset)

    def reject(self, fault: Fault, raw: bytes, record: int, offset: int, line: int | None = None) -> None:
        """Add a row that could not be parsed."""
        chunk = self.chunk
        self.unreadable.append(
            Reject(
                file=chunk.name,
                line=chunk.line_of(record + 1 if line is None else line),
                record=record + 1,
                byte_offset=offset,
                code=fault.code,
                reason=fault.reason,
                fix=fault.fix,
                row=raw.decode("utf-8", "backslashreplace"),
            )
        )

    def finish(self) -> tuple[RowBatch, list[Reject]]:
        """Return the columns.

        Raises:
            IntegrityError: planning counted other records in the same bytes.
        """
        chunk = self.chunk
        read = len(self.rows) + len(self.unreadable) + self.blank
        if chunk.records not in (None, read):
            where = f"{chunk.source.path}: from byte or row {chunk.start} to {chunk.stop}"
            what = f"{where} planning counted {chunk.records} records, and reading {read}."
            raise IntegrityError(what, "report this file.")
        batch = RowBatch(
            self.rows,
            np.array(self.records, np.int64) + (chunk.first_id - chunk.first_record),
            np.array(self.lines, np.int64),
            np.array(self.offsets, np.int64),
            file=chunk.name,
            numbered_from=chunk.first_record - chunk.first_id + 1,
            by_line=chunk.line_of(0) is not None,
        )
        return batch, self.unreadable


def too_long(length: int, limit: int) -> Fault:
    """Return the fault of a row longer than the limit."""
    what = f"the row takes {length} bytes; the limit is {limit}."
    return Fault("line-too-long", what, "split the row, or raise the limit with --set max_line_bytes=N.")


# ------------------------------------------------------------------------------- the bytes that were planned
#
# A set is made of the very bytes whose hash its manifest holds. A stream is hashed block by block while it is
# planned, and each block again when a chunk reads it: whatever was written in between is found, even in
# place, of the same length and with its old times. Columnar files are mapped by their libraries; there the
# state of the files is compared before and after each read, and they are hashed again where it differs.

HASHED_BYTES = 64 << 10  # of one block
_HASH_BYTES = 8
_State = tuple[int, ...] | State
_CLOCK_NS = 20_000_000  # the clock of a file system moves in steps; two changes within one look alike


class BlockHashes:
    """xxh3-64 of each block of a stream, the last one shorter."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._block = xxhash.xxh3_64()
        self._filled = self._size = 0

    def update(self, data: bytes) -> None:
        """Add what comes next."""
        view = memoryview(data)
        self._size += len(view)
        while view:
            part = view[: HASHED_BYTES - self._filled]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == HASHED_BYTES:
                self._close()
            view = view[len(part) :]

    def seal(self) -> Seal:
        """Return the seal of the whole stream; nothing may be added afterwards."""
        if self._filled:
            self._close()
        return Seal(0, bytes(self._done), self._size)

    def _close(self) -> None:
        self._done += self._block.digest()
        self._block = xxhash.xxh3_64()
        self._filled = 0


@dataclass(frozen=True, slots=True)
class Seal:
    """What a stretch of a stream must hold.

    Attributes:
        first: number of the first block that the stretch touches.
        hashes: of this block and those after it.
        end: where the stream ended when it was planned, bytes; what was appended since is not read.
    """

    first: int
    hashes: bytes
    end: int

    @property
    def stop(self) -> int:
        """Number of the block behind the last."""
        return self.first + len(self.hashes) // _HASH_BYTES

    def since(self, block: int) -> bytes:
        """Return the hashes of the blocks from this number on."""
        return self.hashes[max(block - self.first, 0) * _HASH_BYTES :]

    def part(self, start: int, stop: int) -> Seal:
        """Return the seal of bytes `start:stop`."""
        first, last = start // HASHED_BYTES, -(-stop // HASHED_BYTES)
        hashes = self.hashes[(first - self.first) * _HASH_BYTES : (last - self.first) * _HASH_BYTES]
        return Seal(first, hashes, self.end)


def block_hashes(data: bytes) -> bytes:
    """Return the hashes of the blocks of some bytes, end to end."""
    hashes = BlockHashes()
    hashes.update(data)
    return hashes.seal().hashes


def unchanged(path: str, blocks: Iterable[bytes], seal: Seal, start: int, stop: int) -> Iterator[bytes]:
    """Yield bytes `start:stop` of a stream, each block after its hash was compared.

    Args:
        path: for the message.
        blocks: of the stream, of `HASHED_BYTES` each, from the one that holds `start` on.

    Raises:
        InputChangedError: they are not those that were planned.
    """
    position = start // HASHED_BYTES * HASHED_BYTES
    for block in blocks:
        block = block[: seal.end - position]
        at = (position // HASHED_BYTES - seal.first) * _HASH_BYTES
        if xxhash.xxh3_64_digest(block) != seal.hashes[at : at + _HASH_BYTES]:
            raise changed(path)
        yield block[max(start - position, 0) : stop - position]
        position += HASHED_BYTES
        if position >= stop:
            return
    if position < stop:
        raise changed(path)


@dataclass(frozen=True, slots=True)
class Stamp:
    """The state of the files of a columnar source when they were hashed.

    Attributes:
        files: name, and device, number, size, time of writing and of last change of each, or its `State`.
        xxh3_128: of their bytes, one file after the other.
    """

    files: tuple[tuple[str, _State], ...]
    xxh3_128: str

    def holds(self) -> bool:
        """Whether the files still look as they did."""
        return all(_state(name) == state for name, state in self.files)


def states_of(names: Sequence[str]) -> tuple[tuple[str, _State], ...]:
    """Return what the file system says of files, once it could tell a change from the one before.

    Raises:
        InputChangedError: a file is gone.
    """
    states = tuple((name, _state(name)) for name in names)
    for name, state in states:
        if not state:
            raise changed(name)
    times = [state[-1] for _, state in states if isinstance(state[-1], int)]
    if any(abs(time.time_ns() - last) < _CLOCK_NS for last in times):
        time.sleep(_CLOCK_NS / 1e9)
        return tuple((name, _state(name)) for name in names)
    return states


def _state(name: str) -> _State:
    if is_url(name):
        return state_of(name)
    try:
        found = os.stat(name)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
