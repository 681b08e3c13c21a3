"""Text read line by line: JSON lines, plain text (a document a line), and CSV (RFC 4180)."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from sftdata.batches import Int64, Reject, RowBatch
from sftdata.errors import Fault
from sftdata.sources.borders import Boundaries, LineBoundaries
from sftdata.sources.chunks import (
    SHOWN_BYTES,
    Chunk,
    RowCollector,
    Source,
    too_long,
)
from sftdata.sources.jsonrows import parse_row
from sftdata.sources.streams import in_cache, read_range

_QUOTE, _NEWLINE = b'"\n'
RECORD_LIMIT = 16 << 20  # a longer record of a CSV is not held, bytes

csv.field_size_limit(2**31 - 1)

# -------------------------------------------------------------------------------- JSON lines and plain text


def scan_lines(blocks: Iterator[bytes], found: LineBoundaries) -> Iterator[None]:
    """Note line starts, about one per grain; yield now and then. Memory: one block."""
    for block in blocks:
        found.add(block)
        yield


def split_lines(blocks: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """Yield (line without its newline, bytes it takes with the newline).

    A line longer than `limit` bytes is never held: its first bytes are yielded, and the length tells.
    """
    parts: list[bytes] = []
    length = 0
    for block in blocks:
        *lines, rest = block.split(b"\n")
        if lines and length:
            parts.append(lines[0])
            length += len(lines[0])
            yield b"".join(parts), length + 1
            parts, length, lines = [], 0, lines[1:]
        for line in lines:
            yield line, len(line) + 1
        length += len(rest)
        if length <= limit:
            parts.append(rest)
        elif len(parts) != 1 or len(parts[0]) != SHOWN_BYTES:
            parts = [b"".join(part[:SHOWN_BYTES] for part in (*parts, rest))[:SHOWN_BYTES]]
    if length:
        yield b"".join(parts), length


def read_lines(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    """Parse the lines of a chunk; blank lines use up an id but are no rows."""
    parse: Callable[[bytes], dict[str, object] | str | Fault]
    parse = _parse_text if chunk.source.container == "text" else parse_row
    found = RowCollector(chunk)
    offset = chunk.start
    blocks = read_range(chunk)
    for record, (line, length) in enumerate(split_lines(blocks, max_line_bytes), chunk.first_record):
        if length - 1 > max_line_bytes:
            found.reject(too_long(length, max_line_bytes), line[:SHOWN_BYTES], record, offset)
        elif line and not line.isspace():
            row = parse(line)
            if isinstance(row, Fault):
                found.reject(row, line, record, offset)
            else:
                found.add(row, record, offset)
        else:
            found.blank += 1
        offset += length
    return found.finish()


def _parse_text(line: bytes) -> str | Fault:
    """Decode one document."""
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at byte {error.start} of the line"
        fix = "convert the file to UTF-8, as with iconv -f latin1 -t utf-8."
        return Fault("invalid-utf8", f"{where} is not UTF-8 ({error.reason}).", fix)


# ---------------------------------------------------------------------------------------------- CSV and TSV


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


class Records(NamedTuple):
    """Records that follow each other.

    Attributes:
        texts: as of a `Record`.
        starts, lengths, lines: int64[N], the same.
        closed: all of them are.
    """

    texts: list[bytes]
    starts: Int64
    lengths: Int64
    lines: Int64
    closed: bool = True

    def one_by_one(self) -> Iterator[Record]:
        """Yield each."""
        columns = self.starts.tolist(), self.texts, self.lengths.tolist(), self.lines.tolist()
        for start, text, length, lines in zip(*columns, strict=True):
            yield Record(start, text, length, self.closed, lines)


def scan_delimited(
    source: Source,
    blocks: Iterator[bytes],
    found: Boundaries,
    reopen: Callable[[int], Iterator[bytes]] | None,
) -> Iterator[None]:
    """Note where some records of a CSV start; yield now and then.

    Args:
        blocks: of the stream, from the end of what was found on.
        reopen: as of `batches_of`.
    """
    for part in batches_of(blocks, found.end, source.delimiter, RECORD_LIMIT, reopen):
        found.rows(part.texts, part.starts, part.lengths, part.lines)
        yield


def guess_record(data: bytes, delimiter: str) -> int:
    """Return where a record most likely begins in a text from the middle of a CSV; -1 if none does.

    Most quotes that open a field stand behind a delimiter or a line break, or double the one before. Others
    are few where it is guessed rightly whether the text begins inside of a field.
    """
    codes = np.frombuffer(data, np.uint8)
    quotes, newlines = np.flatnonzero(codes == _QUOTE), np.flatnonzero(codes == _NEWLINE)
    before = codes[quotes - 1]
    opens = (before == ord(delimiter[-1])) | (before == _NEWLINE) | (np.diff(quotes, prepend=-1) == 1)
    inside = int((~opens[1::2]).sum() < (~opens[0::2]).sum())
    starts = newlines[np.searchsorted(quotes, newlines) % 2 == inside] + 1
    return int(starts[0]) if len(starts) else -1


def read_delimited(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    """Parse the records of a chunk into dicts of strings."""
    found = RowCollector(chunk)
    source, limit = chunk.source, min(max_line_bytes, RECORD_LIMIT)
    reopen = partial(read_range, chunk)
    parts = batches_of(read_range(chunk), chunk.start, source.delimiter, RECORD_LIMIT, reopen)
    line = chunk.first_line
    for number, record in enumerate(chain.from_iterable(map(Records.one_by_one, parts)), chunk.first_record):
        row = _parse_record(record, source, limit, max_line_bytes)
        if isinstance(row, Fault):
            text = record.text[:SHOWN_BYTES] if row.code == "line-too-long" else record.text
            found.reject(row, text, number, record.offset, line)
        elif row is not None:
            found.add(row, number, record.offset, line)
        else:
            found.blank += 1
        line += record.lines
    return found.finish()


def _parse_record(
    record: Record, source: Source, limit: int, max_line_bytes: int
) -> dict[str, object] | Fault | None:
    """Return the record as a dict, or None for a blank line."""
    if record.length > limit + 1:
        if limit == max_line_bytes:
            return too_long(record.length, limit)
        what = f"the record takes {record.length} bytes; a record of a CSV may take {RECORD_LIMIT}."
        return Fault("line-too-long", what, "split the row, or write it as a line of JSON.")
    if not record.closed:
        fix = "close it; double a quote that is part of the text."
        return Fault("invalid-csv", "a quoted field is never closed.", fix)
    text = _parse_text(record.text)
    if isinstance(text, Fault):
        return text
    if not text.strip(" "):
        return None
    try:
        fields = next(csv.reader([text], delimiter=source.delimiter, strict=True))
    except csv.Error as error:
        return Fault("invalid-csv", f"{error}.", "quote the field, and double the quotes inside it.")
    if len(fields) != len(source.columns):
        what = f"{len(fields)} fields, but the header names {len(source.columns)}."
        return Fault("wrong-field-count", what, "quote fields that hold the delimiter or a line break.")
    return dict(zip(source.columns, fields, strict=True))


def batches_of(
    blocks: Iterator[bytes],
    offset: int,
    delimiter: str,
    limit: int,
    reopen: Callable[[int], Iterator[bytes]] | None,
) -> Iterator[Records]:
    """Yield the records that `records_of` does, many at a time, at the speed of arrays.

    Args:
        reopen: opens the stream anew at an offset; without it, this is a part of the stream, and only records
            that end in it are yielded.
    """
    held, wanted, ended = b"", 0, False
    blocks = in_cache(blocks)
    while not ended:
        block = next(blocks, b"")
        ended, held = not block, held + block
        if len(held) < wanted and not ended:
            continue
        ends, lines = _record_ends(held, delimiter.encode())
        starts = np.append(0, ends)[:-1]
        whole = int(np.argmax(np.append(ends - starts > limit, True)))
        if whole:
            ends, starts, lines = ends[:whole], starts[:whole], lines[:whole]
            texts = [held[start : end - 1] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
            yield Records(texts, starts + offset, ends - starts, lines)
            offset, held = offset + int(ends[-1]), held[int(ends[-1]) :]
        wanted = 2 * len(held)  # so that what is looked at again and again stays linear
        if len(held) > limit:  # a record that is too long, or a field that is never closed
            if reopen is None:
                return
            one = next(records_of(reopen(offset), offset, delimiter, limit, reopen))
            yield _alone(one)
            offset += one.length
            blocks, held, wanted, ended = in_cache(reopen(offset)), b"", 0, False
    if reopen is not None:
        yield from map(_alone, records_of(iter([held]), offset, delimiter, limit, reopen))


def _alone(record: Record) -> Records:
    start, length, lines = (np.array([number]) for number in (record.offset, record.length, record.lines))
    return Records([record.text], start, length, lines, record.closed)


def _record_ends(data: bytes, delimiter: bytes) -> tuple[Int64, Int64]:
    """Return where each whole record of a text ends, behind its line break, and how many lines it takes.

    Where every other quote may open a field, as it stands behind a delimiter, a line break or the quote that
    it doubles, the quotes before a line break tell whether it is in a field. A quote inside of a text without
    quotes breaks that; there, fields are followed one by one.
    """
    codes = np.frombuffer(data, np.uint8)
    newlines, quotes = np.flatnonzero(codes == _NEWLINE), np.flatnonzero(codes == _QUOTE)
    ending = np.searchsorted(quotes, newlines) % 2 == 0
    if len(quotes):
        opening = quotes[0::2]
        before = codes[opening - 1]
        opens = (before == delimiter[0]) | (before == _NEWLINE) | (opening == 0)
        opens[1:] |= quotes[1::2][: len(opening) - 1] + 1 == opening[1:]
        if len(delimiter) > 1 or delimiter == b'"' or not opens.all():
            ending = np.isin(newlines + 1, np.fromiter(_followed(data, delimiter), np.int64))
    of = np.flatnonzero(ending)
    return newlines[of] + 1, np.diff(of, prepend=-1)


def _followed(data: bytes, delimiter: bytes) -> Iterator[int]:
    """Yield the ends of the whole records of a text."""
    quoted, at, end = re.compile(re.escape(delimiter) + b'"'), 0, 0
    inside = data.startswith(b'"')
    at += inside
    while True:
        if inside:
            at = data.find(b'"', at) + 1
            if not at:
                return
            inside = data.startswith(b'"', at)  # a doubled quote is text
            at += inside
            continue
        end = data.find(b"\n", at) + 1
        if quote := quoted.search(data, at, end or len(data)):
            at, inside = quote.end(), True
        elif end:
            yield end
            inside = data.startswith(b'"', end)
            at = end + inside
        else:
            return


def records_of(
    blocks: Iterator[bytes],
    offset: int,
    delimiter: str,
    limit: int,
    reopen: Callable[[int], Iterator[bytes]] | None = None,
) -> Iterator[Record]:
    """Yield each record; of one that takes more than `limit` bytes the first line only.

    A quoted field that is never closed is one bad record of one line; reading goes on with the next line. The
    csv module would take the rest of the file for that field.

    Args:
        reopen: opens the stream anew at an offset; without it, a field is not followed beyond `limit` bytes.
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
        if open_ and length > limit >= first and reopen:
            # Too long to hold: look for its end all the same, and if there is none, reopen after its first
            # line.
            followers = []
            while open_ and (line := following()) is not None:
                length += line[1]
                lines_taken += 1
                open_ = _leaves_open(line[0], opening, inside=True)
            lines = split_lines(reopen(offset + first), limit) if open_ else lines
        elif open_:
            waiting.extendleft(reversed(followers))
        if open_:
            length, lines_taken, followers = first, 1, []
        whole = b"\n".join([text, *(more for more, _ in followers)])
        yield Record(offset, whole, length, not open_, lines_taken)
        offset += length


def _leaves_open(line: bytes, opening: re.Pattern[bytes], *, inside: bool) -> bool:
    """Return whether a quoted field is open at the end of a line."""
    position = 0
    while True:
        if inside:
            position = line.find(b'"', position) + 1
            if not position:
                return True
            inside = line[position : position + 1] == b'"'  # a doubled quote is text
            position += inside
            continue
        quote = opening.search(line, position)
        if quote is None:
            return False
        position, inside = quote.end(), True
