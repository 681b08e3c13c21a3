"""CSV and TSV: a row is a record, which may span lines when a field is quoted (RFC 4180)."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from sftdata.batches import Reject, RowBatch
from sftdata.errors import Fault
from sftdata.sources.chunks import GRAIN_BYTES, Chunk, Gathered, Marks, Source
from sftdata.sources.lines import SHOWN_BYTES, parse_text, split_lines, too_long
from sftdata.sources.streams import RawCount, read_all, read_range, skip_bytes

RECORD_LIMIT = 16 << 20  # a longer record is not held, bytes

Again = Callable[[int], Iterator[bytes]]

csv.field_size_limit(2**31 - 1)


class Record(NamedTuple):
    """One record of a table.

    Attributes:
        offset, length: where it starts, and its bytes, the line break at its end included.
        text: without that line break; of a record that is too long the first line only.
        closed: no quoted field of it is left open.
        lines: lines that it takes.
    """

    offset: int
    text: bytes
    length: int
    closed: bool
    lines: int


def plan_delimited(source: Source, slice_bytes: int) -> Marks:
    """Count the records of a CSV and note where some of them start."""
    count = RawCount.start()
    grain = min(slice_bytes, GRAIN_BYTES)
    positions: list[int] = []
    records: list[int] = []
    lines: list[int] = []
    total, wanted, line = 0, source.body, source.body_line
    blocks = skip_bytes(read_all(source, count), source.body)
    end = source.body
    for record in records_of(blocks, source.body, source.delimiter, RECORD_LIMIT, _again(source)):
        if record.offset >= wanted:
            positions.append(record.offset)
            records.append(total)
            lines.append(line)
            wanted = source.body + ((record.offset - source.body) // grain + 1) * grain
        total += 1
        line += record.lines
        end = record.offset + record.length
    starts, numbers, texts = (np.array(found, np.int64) for found in (positions, records, lines))
    raw = count.size, count.hasher.hexdigest()
    return Marks(starts, numbers, end, total, slice_bytes, *raw, lines=texts, seal=count.blocks.seal())


def read_delimited(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    """Parse the records of a chunk into dicts of strings."""
    found = Gathered(chunk)
    source, limit = chunk.source, min(max_line_bytes, RECORD_LIMIT)
    records = records_of(
        read_range(chunk), chunk.start, source.delimiter, RECORD_LIMIT, partial(read_range, chunk)
    )
    line = chunk.first_line
    for record, (offset, text, length, closed, lines) in enumerate(records, chunk.first_record):
        row: dict[str, str] | Fault | None
        if length > limit + 1:
            row = too_long(length, limit) if limit == max_line_bytes else _too_long_for_csv(length)
        elif not closed:
            row = Fault(
                "invalid-csv",
                "a quoted field is never closed.",
                "close it; double a quote that is part of the text.",
            )
        else:
            row = _parse(text, source)
        if isinstance(row, Fault):
            found.reject(
                row, text[: SHOWN_BYTES if row.code == "line-too-long" else None], record, offset, line
            )
        elif row is not None:
            found.add(row, record, offset, line)
        else:
            found.blank += 1
        line += lines
    return found.finish()


def _too_long_for_csv(length: int) -> Fault:
    what = f"the record takes {length} bytes; a record of a CSV may take {RECORD_LIMIT}."
    return Fault("line-too-long", what, "split the row, or write it as a line of JSON.")


def _parse(text: bytes, source: Source) -> dict[str, str] | Fault | None:
    """Return the record as a dict, or None for a blank line."""
    decoded = parse_text(text)
    if isinstance(decoded, Fault) or not decoded.strip(" "):
        return decoded if isinstance(decoded, Fault) else None
    try:
        fields = next(csv.reader([decoded], delimiter=source.delimiter, strict=True))
    except csv.Error as error:
        return Fault("invalid-csv", f"{error}.", "quote the field, and double the quotes inside it.")
    if len(fields) != len(source.columns):
        found = f"{len(fields)} fields, but the header names {len(source.columns)}."
        return Fault("wrong-field-count", found, "quote fields that hold the delimiter or a line break.")
    return dict(zip(source.columns, fields, strict=True))


def records_of(
    blocks: Iterator[bytes], offset: int, delimiter: str, limit: int, again: Again | None = None
) -> Iterator[Record]:
    """Yield each record; of one that takes more than `limit` bytes the first line only.

    A quoted field that is never closed is one bad record of one line; reading goes on with the next line.

    Args:
        again: opens the stream anew at an offset; without it, a field is not followed beyond `limit` bytes.
    """
    opening = re.compile(rb"(?:^|" + re.escape(delimiter.encode()) + rb')"')
    lines = split_lines(blocks, limit)
    waiting: deque[tuple[bytes, int]] = deque()

    def following() -> tuple[bytes, int] | None:
        return waiting.popleft() if waiting else next(lines, None)

    while (line := following()) is not None:
        text, first = line
        length, lines_taken, followers = first, 1, list[tuple[bytes, int]]()
        open_ = b'"' in text and _leaves_open(text, opening, inside=False)
        while open_ and length <= limit and (line := following()) is not None:
            followers.append(line)
            length += line[1]
            lines_taken += 1
            open_ = _leaves_open(line[0], opening, inside=True)
        if (
            open_ and length > limit >= first and again
        ):  # too long to hold; its end is looked for all the same
            followers = []
            while open_ and (line := following()) is not None:
                length += line[1]
                lines_taken += 1
                open_ = _leaves_open(line[0], opening, inside=True)
            lines = split_lines(again(offset + first), limit) if open_ else lines
        elif open_:
            waiting.extendleft(reversed(followers))
        if open_:
            length, lines_taken, followers = first, 1, []
        yield Record(
            offset, b"\n".join([text, *(more for more, _ in followers)]), length, not open_, lines_taken
        )
        offset += length


def _again(source: Source) -> Again:
    """Return what opens a source anew at an offset."""
    return lambda start: skip_bytes(read_all(source, RawCount.start()), start)


def _leaves_open(line: bytes, opening: re.Pattern[bytes], *, inside: bool) -> bool:
    """Return whether a quoted field is open at the end of a line."""
    position = 0
    while True:
        if inside:
            position = line.find(b'"', position) + 1
            if not position:
                return True
            inside = line[position : position + 1] == b'"'
            position += inside
            continue
        quote = opening.search(line, position)
        if quote is None:
            return False
        position, inside = quote.end(), True
