"""What reading passes on: a source, its plan, its chunks, and their rows.

All but the collector of rows are small, frozen and picklable, because chunks travel to worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import eq
from typing import Literal, TypeVar, overload

import numpy as np

from sftdata.batches import Int64, Reject, RowBatch
from sftdata.errors import UNITS, Fault, IntegrityError, Unit, place, without_secrets
from sftdata.output import counted
from sftdata.sources.borders import Digests, UInt64
from sftdata.sources.seals import Seal, Stamp

Item = TypeVar("Item", covariant=True)
Container = Literal["jsonl", "text", "json", "csv", "parquet", "arrow", "saved", "hub", "empty"]
Compression = Literal["none", "gzip", "zstd", "xz", "bz2"]
RawRow = dict[str, object] | str
"""A row as parsed: an object of JSON data, or a line of plain text."""

SHOWN_BYTES = 1000  # kept of a row that is too long to hold


@dataclass(frozen=True, slots=True)
class Source:
    """One input, with its container as recognised from its bytes.

    Attributes:
        path: local path, URL, or Hub dataset id.
        copy: local path of what was fetched of a URL; empty where nothing was.
        held: local path of what keeps the ranges that are read of a URL; empty where nothing does.
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
    held: str = ""

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


class Lazy(Sequence[Item]):
    """What is made when it is asked for, and is equal to what holds the same."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class Chunks(Lazy[Chunk]):
    """Chunks of one source as arrays: a `Chunk` is made when it is asked for.

    Attributes:
        starts, stops, records, counts: int64[K], as `start`, `stop`, `first_record` and `records` of each.
        lines: int64[K], as `first_line`; None where the source is not read by lines.
        contents: as `content`; None for samples.
        base_id: example id of the first record of the source.
        seal: of the whole source.
        stamp, only, number, name: as of each.
    """

    source: Source
    starts: Int64
    stops: Int64
    records: Int64
    counts: Int64
    lines: Int64 | None = None
    ranks: UInt64 | None = None
    contents: Digests | None = None
    base_id: int = 0
    seal: Seal | None = None
    stamp: Stamp | None = None
    only: tuple[int, int] | None = None
    number: int = 0
    name: str = ""

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> Chunks: ...

    def __getitem__(self, index: int | slice) -> Chunk | Chunks:
        if isinstance(index, slice):
            return self.select(index)
        start, stop, record = (int(column[index]) for column in (self.starts, self.stops, self.records))
        return Chunk(
            self.source,
            start,
            stop,
            record,
            self.base_id + record,
            0 if self.lines is None else int(self.lines[index]),
            int(self.counts[index]),
            self.seal and self.seal.part(start, stop),
            self.stamp,
            self.only,
            b"" if self.contents is None else self.contents[index].tobytes(),
            0 if self.ranks is None else int(self.ranks[index]),
            self.number,
            self.name,
        )

    def select(self, which: slice | Int64) -> Chunks:
        """Return some of them."""
        names = ("starts", "stops", "records", "counts", "lines", "ranks", "contents")
        columns = {name: column for name in names if (column := getattr(self, name)) is not None}
        return replace(self, **{name: column[which] for name, column in columns.items()})

    @property
    def sizes(self) -> Int64:
        """int64[K]: of each, in the unit of `start` and `stop`."""
        return self.stops - self.starts


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """A source, read through once: what it holds, and where to cut it.

    Attributes:
        base_id: example id of the first record; record i (0-based; blank lines count) is `base_id + i`.
        records: lines, elements or records, blank lines included.
        raw_bytes: size of the raw file, still compressed.
        xxh3_128: hash of the raw bytes, hex; of a file read in ranges, as in ranges.py.
        chunks: cut by content; end to end they are the source.
        samples: up to 32 small stretches, evenly spaced from the first to the last, for detection.
        max_line_bytes: a longer row is not held.
        notes: about the source, one line each.  entry: of the registry that it is of; empty for none.
    """

    source: Source
    base_id: int
    records: int
    raw_bytes: int
    xxh3_128: str
    chunks: Chunks
    samples: Chunks
    max_line_bytes: int
    notes: tuple[str, ...] = ()
    entry: str = ""

    def placed(self, number: int, base_id: int, name: str = "") -> SourcePlan:
        """Return the plan as that of the source of this number and name, whose example ids begin here."""
        chunks, samples = (
            replace(chunks, number=number, name=name, base_id=base_id)
            for chunks in (self.chunks, self.samples)
        )
        return replace(self, base_id=base_id, chunks=chunks, samples=samples)

    def locate(self, example_id: int) -> tuple[str, int]:
        """Return the path and the 1-based line (element, record) of an example of this source."""
        return without_secrets(self.source.path), example_id - self.base_id + 1


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
            what = f"{where} planning counted {counted(chunk.records or 0, 'record')}, and reading {read}."
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
