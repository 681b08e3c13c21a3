"""JSON lines and plain text: a row is a line, a border is a newline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from sftdata.batches import Reject, RowBatch
from sftdata.errors import Fault
from sftdata.sources.chunks import GRAIN_BYTES, Chunk, Gathered, Marks, Source
from sftdata.sources.jsonrows import parse_row
from sftdata.sources.streams import RawCount, read_all, read_range

SHOWN_BYTES = 1000  # of a line that is too long to keep


def plan_lines(source: Source, slice_bytes: int) -> Marks:
    """Count the lines of a source and note line starts, about one per grain. Memory: one block.

    Raises:
        IntegrityError: a damaged compressed stream.
    """
    grain = min(slice_bytes, GRAIN_BYTES)
    count = RawCount.start()
    positions, records = [source.body], [0]
    offset, lines, wanted, last = 0, 0, source.body + grain, b"\n"
    for block in read_all(source, count):
        newlines = np.frombuffer(block, np.uint8) == ord("\n")  # twice as fast as block.count
        counted = max(source.body - offset, 0)
        while (newline := block.find(b"\n", max(wanted - 1 - offset, counted))) >= 0:
            lines += int(np.count_nonzero(newlines[counted : newline + 1]))
            counted = newline + 1
            positions.append(offset + counted)
            records.append(lines)
            wanted = source.body + ((positions[-1] - source.body) // grain + 1) * grain
        lines += int(np.count_nonzero(newlines[counted:]))
        offset, last = offset + len(block), block[-1:]
    if positions[-1] >= offset:
        positions.pop()
        records.pop()
    total = lines + (last != b"\n" and offset > source.body)
    digest = count.hasher.hexdigest()
    starts, numbers = np.array(positions, np.int64), np.array(records, np.int64)
    return Marks(starts, numbers, offset, total, slice_bytes, count.size, digest, seal=count.blocks.seal())


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


def too_long(length: int, limit: int) -> Fault:
    """Return the fault of a row longer than the limit."""
    what = f"the row takes {length} bytes; the limit is {limit}."
    return Fault("line-too-long", what, "split the row, or raise the limit with --set max_line_bytes=N.")


def read_lines(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    """Parse the lines of a chunk; blank lines use up an id but are no rows."""
    parse = parse_text if chunk.source.container == "text" else parse_row
    found = Gathered(chunk)
    offset = chunk.start
    blocks = read_range(chunk)
    for record, (line, length) in enumerate(split_lines(blocks, max_line_bytes), chunk.first_record):
        if length - 1 > max_line_bytes:
            found.reject(too_long(length, max_line_bytes), line[:SHOWN_BYTES], record, offset)
        elif line and not line.isspace():
            row = parse(line)
            if type(row) is Fault:
                found.reject(row, line, record, offset)
            else:
                found.add(row, record, offset)
        else:
            found.blank += 1
        offset += length
    return found.finish()


def parse_text(line: bytes) -> str | Fault:
    """Decode one document."""
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        found = (
            f"byte 0x{line[error.start]:02x} at byte {error.start} of the line is not UTF-8 ({error.reason})."
        )
        return Fault("invalid-utf8", found, "convert the file to UTF-8, as with iconv -f latin1 -t utf-8.")
