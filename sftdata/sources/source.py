"""Open an input (recognise its container), plan it in one pass, and read its chunks.

names ─ expand_inputs ─> paths ─ open_source ─> Source ─ plan_source ─> SourcePlan ─ read_chunk ─> RowBatch
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import gettempdir
from typing import NamedTuple

import numpy as np

from sftdata.batches import Reject, RowBatch
from sftdata.config import DEFAULT_LINE_BYTES
from sftdata.errors import UsageError
from sftdata.sources.arrays import read_array
from sftdata.sources.chunks import Chunk, Compression, Container, Source, SourcePlan
from sftdata.sources.inputs import is_hub_id, is_saved_dataset, plain_name
from sftdata.sources.lines import Record, read_delimited, read_lines, records_of
from sftdata.sources.ranges import RANGE_BYTES, STREAMS, Sizes, join, scan, stretches_of
from sftdata.sources.remote import fetch, hold, is_url, read_range_of
from sftdata.sources.seals import block_hashes
from sftdata.sources.streams import close_streams, compression_of, read_all
from sftdata.sources.tables import close_table, read_table


def open_source(
    path: str, *, split: str | None = None, subset: str | None = None, whole: bool = True
) -> Source:
    """Recognise the container of one input (as `expand_inputs` returns them) from its content.

    Args:
        split, subset: of a Hub or saved dataset.
        whole: copy an object whole before it is read; else read ranges of it, each once, where that can be.

    Raises:
        UsageError: the file cannot be opened or holds no rows of a known container.
    """
    if not is_url(path):
        if Path(path).is_dir() and is_saved_dataset(Path(path)):
            return Source(path, "saved", split=split)
        if is_hub_id(path):
            return Source(path, "hub", split=split, subset=subset)
    return (None if whole else _in_ranges(path)) or sniff(path)


def plan_source(
    source: Source,
    base_id: int,
    slice_bytes: int,
    max_line_bytes: int = DEFAULT_LINE_BYTES,
    range_bytes: int = RANGE_BYTES,
) -> SourcePlan:
    """Read a source once: hash it, count its records, and cut it into chunks at borders set by content.

    Args:
        base_id: example id of its first record.
        slice_bytes: bytes of the decompressed stream (or of the file, for columnar sources) per chunk.
        max_line_bytes: a longer row is not held; the same as for `read_chunk`.
        range_bytes: as of `Sizes`.

    Raises:
        IntegrityError: a damaged compressed stream.
    """
    sizes = Sizes(slice_bytes, max_line_bytes, range_bytes)
    marks = (scan(sizes, stretch) for stretch in stretches_of(source, sizes))
    return join(source, marks, sizes).placed(0, base_id)


def read_chunk(chunk: Chunk, max_line_bytes: int = DEFAULT_LINE_BYTES) -> tuple[RowBatch, list[Reject]]:
    """Return the rows of a chunk, and the rows that could not be parsed.

    Raises:
        InputChangedError: the source holds other bytes than when it was planned.
    """
    found = _read_whole(chunk, max_line_bytes)
    return found if chunk.only is None else _only(chunk, *found)


def close_sources() -> None:
    """Close what this process keeps open for the next chunk."""
    close_streams()
    close_table()


def _read_whole(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    match chunk.source.container:
        case "jsonl" | "text":
            return read_lines(chunk, max_line_bytes)
        case "json":
            return read_array(chunk, max_line_bytes)
        case "csv":
            return read_delimited(chunk, max_line_bytes)
        case _:
            return read_table(chunk)


def _only(chunk: Chunk, batch: RowBatch, unreadable: list[Reject]) -> tuple[RowBatch, list[Reject]]:
    """Keep the rows of the records that are meant."""
    assert chunk.only is not None
    first, stop = (chunk.first_id - chunk.first_record + record for record in chunk.only)
    keep = np.flatnonzero((batch.example_ids >= first) & (batch.example_ids < stop))
    rows = [batch.rows[index] for index in keep.tolist()]
    columns = {name: getattr(batch, name)[keep] for name in ("example_ids", "lines", "byte_offsets")}
    kept = replace(batch, rows=rows, **columns)
    return kept, [row for row in unreadable if chunk.only[0] < row.record <= chunk.only[1]]


# ------------------------------------------------------------------------------ recognising a file
#
# By its first bytes, not by its name. The name is asked in one case only, which no content can settle: a
# table of comma-separated words, or lines of prose with commas.

HEAD_BYTES = 256 << 10
BOM = b"\xef\xbb\xbf"
_AS_CSV = "save it as CSV (UTF-8), and give that file."
FOREIGN = (
    (b"PK\x03\x04", "a zip archive", "unpack it first."),
    (b"\xd0\xcf\x11\xe0", "an old Office file", _AS_CSV),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first."),
    (b"%PDF", "a PDF", "extract its text first."),
    (b"\x80\x04", "a Python pickle, which can run code when opened", "save the rows as JSON lines."),
    (b"SQLite format 3", "an SQLite database", "export the rows as JSON lines or CSV."),
)
IN_A_ZIP = (
    (b"xl/", "a spreadsheet", _AS_CSV),
    (b"opendocument.spreadsheet", "a spreadsheet", _AS_CSV),
    (b"word/", "a Word document", "save its text as .txt, one document a line."),
)


@dataclass(frozen=True, slots=True)
class Head:
    """The first bytes of the decompressed stream; `whole` when that is all there is."""

    data: bytes
    whole: bool


def sniff(path: str) -> Source:
    """Return the source a file is.

    Raises:
        UsageError: UTF-16, an archive or another format that holds no rows.
    """
    copy = (fetch(path) or "") if is_url(path) else ""
    raw = _head(Source(path, "empty", copy=copy), 16)
    compression = compression_of(raw.data)
    if compression != "none" and is_url(path) and not copy:
        raise UsageError(
            f"{path}: read from a copy, as it is compressed; that would take half of {gettempdir()}.",
            "set TMPDIR to a folder with more room.",
        )
    head = _head(Source(path, "empty", compression, copy=copy), HEAD_BYTES)
    return replace(_recognise(path, compression, head), head=block_hashes(head.data), copy=copy)


def _in_ranges(path: str) -> Source | None:
    """Return the source that an object is, if ranges of it can be read from anywhere, and are kept."""
    if not is_url(path) or (held := hold(path)) is None:
        return None
    size = os.stat(held).st_size
    try:
        head = Head(read_range_of(path, 0, min(size, HEAD_BYTES), held), size <= HEAD_BYTES)
    except UsageError:  # no ranges are served
        return None
    if compression_of(head.data) != "none":
        return None
    source = replace(_recognise(path, "none", head), head=block_hashes(head.data), held=held)
    return source if source.container in STREAMS else None


def _recognise(path: str, compression: Compression, head: Head) -> Source:
    binary = _binary_container(head.data)
    if binary and compression != "none":
        raise UsageError(
            f"{path}: a {binary} file inside {compression} cannot be read in ranges.", "decompress it first."
        )
    if binary:
        return Source(path, binary)
    _refuse_foreign(path, head.data)
    body = len(BOM) if head.data.startswith(BOM) else 0
    text = Head(head.data[body:], head.whole)
    if not text.data.strip():
        if text.whole:
            return Source(path, "empty", compression)
        return Source(path, "text", compression, body)
    container = _json_container(text)
    if container == "json":
        return Source(path, container, compression, body)
    if text.data.count(b"\r") > 1 and b"\n" not in text.data:
        fix = f"tr '\\r' '\\n' < {PurePosixPath(path).name} > lines.txt"
        raise UsageError(f"{path}: lines end in CR alone, expected LF.", fix)
    if container:
        return Source(path, container, compression, body)
    if header := find_header(path, text.data):
        return Source(
            path, "csv", compression, body + header.length, header.lines + 1, header.delimiter, header.columns
        )
    return Source(path, "text", compression, body)


def _head(source: Source, size: int) -> Head:
    data = b""
    stream = read_all(source)
    for block in stream:
        data += block
        if len(data) > size:
            stream.close()  # type: ignore[attr-defined]
            return Head(data[:size], False)
    return Head(data, True)


def _binary_container(data: bytes) -> Container | None:
    if data.startswith(b"PAR1"):
        return "parquet"
    if data.startswith(b"ARROW1") or (data.startswith(b"\xff\xff\xff\xff") and len(data) > 8):
        return "arrow"
    return None


def _refuse_foreign(path: str, data: bytes) -> None:
    for start, order in ((b"\xff\xfe", "LE"), (b"\xfe\xff", "BE")):
        if data.startswith(start):
            _refuse_utf16(path, order)
    for inside, what, fix in IN_A_ZIP:
        if data.startswith(b"PK\x03\x04") and inside in data:
            raise UsageError(f"{path}: this is {what}, not rows.", fix)
    for magic, what, fix in FOREIGN:
        if data.startswith(magic):
            raise UsageError(f"{path}: this is {what}, not rows.", fix)
    sample = data[:4096]
    if len(sample) > 1 and sample.count(0) > len(sample) // 4 and (sample[0] == 0) != (sample[1] == 0):
        _refuse_utf16(path, "LE" if sample[1] == 0 else "BE")
    if sample.count(0) > len(sample) // 20:
        raise UsageError(
            f"{path}: this is an unknown binary file.", "give JSON lines, JSON, CSV, text, Parquet or Arrow."
        )


def _refuse_utf16(path: str, order: str) -> None:
    name = PurePosixPath(path).name
    raise UsageError(
        f"{path}: the text is UTF-16, expected UTF-8.",
        f"iconv -f UTF-16{order} -t UTF-8 {name} > utf8-{name}",
    )


def _json_container(head: Head) -> Container | None:
    """Tell JSON lines from arrays and pretty-printed objects: by how many lines look like objects."""
    lines = [line.strip() for line in head.data.split(b"\n")]
    if not head.whole and len(lines) > 1:
        lines.pop()
    lines = [line for line in lines if line]
    start = head.data.lstrip()
    shaped = sum(line.startswith(b"{") and line.endswith(b"}") for line in lines)
    listed = sum(
        re.fullmatch(rb"\[\s*\{.*\}\s*\]", line) is not None for line in lines
    )  # each line a list of messages
    if shaped * 2 >= len(lines) or (len(lines) > 1 and listed * 2 >= len(lines)):
        return "jsonl"
    if re.match(rb"\[\s*[\[{\]\"]", start):
        return "json"
    if re.match(rb'\{\s*["}]', start):
        return "jsonl" if len(lines) == 1 else "json"
    return None


# ------------------------------------------------------------------ the header of a table of text
#
# A file that is named .csv or .tsv is a table or an error. Other files are one only where the header has
# known column names and the lines below fit it, since prose has commas too.

DELIMITERS = ("\t", ",", ";")
NAMED_DELIMITERS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t", ",", ";", "|")}
COMMON_COLUMNS = {
    *("messages", "conversations", "conversation", "prompt", "completion", "response", "answer", "output"),
    *("question", "query", "instruction", "input", "context", "text", "content"),
}
_DIRECTIVE = re.compile(rb'"?sep=(.)"?\r?\n')  # first line that Excel reads and writes
_LOOKED_AT = 20  # records


class Header(NamedTuple):
    """How the records of a table are read.

    Attributes:
        delimiter: one character.
        columns: their names; one without a name is called `Unnamed: N`, as pandas calls it.
        length: bytes before the first record.
        lines: lines before the first record.
    """

    delimiter: str
    columns: tuple[str, ...]
    length: int
    lines: int


def find_header(path: str, data: bytes) -> Header | None:
    """Return the header of a table, or None for a text that is not one.

    Args:
        path: its name decides whether the file has to be a table.
        data: the beginning of the file.

    Raises:
        UsageError: the file is named .csv or .tsv, and its first line cannot be the header of a table.
    """
    suffix = plain_name(path)[-4:]
    if suffix in NAMED_DELIMITERS:
        return _named_header(path, data, NAMED_DELIMITERS[suffix])
    found = (_known_header(data, delimiter) for delimiter in DELIMITERS)
    return next((header for header in found if header), None)


def _known_header(data: bytes, delimiter: str) -> Header | None:
    first = data.split(b"\n", 1)[0]
    columns = parse_header(first, delimiter)
    if len(columns) < 2 or not COMMON_COLUMNS.intersection(columns):
        return None
    header = Header(delimiter, columns, len(first) + 1, 1)
    texts = [record.text for record in _records(data, header)]
    fitting = sum(text.count(delimiter.encode()) >= len(columns) - 1 for text in texts)
    return header if fitting * 2 >= len(texts) else None


def parse_header(line: bytes, delimiter: str) -> tuple[str, ...]:
    """Return the column names, or nothing when the line is not a header."""
    try:
        fields = next(csv.reader([line.decode("utf-8").rstrip("\r\n")], delimiter=delimiter, strict=True), [])
    except (csv.Error, UnicodeDecodeError):
        return ()
    named = all(re.fullmatch(r"[^\W\d][\w .:/-]{0,63}", name) for name in fields)
    return tuple(fields) if named and len(set(fields)) == len(fields) else ()


def _named_header(path: str, data: bytes, delimiters: tuple[str, ...]) -> Header:
    """Return the header for the delimiter that splits it and most records into equally many fields."""
    start = 0
    if directive := _DIRECTIVE.match(data):
        start, delimiters = directive.end(), (directive[1].decode("utf-8", "replace"),)
    found = [header for delimiter in delimiters if (header := _header_at(data, start, delimiter))]
    header = max(found, key=lambda header: _score(data, header), default=None)
    if header is None or any('"' in name for name in header.columns):
        raise UsageError(
            f"{path}: the first line is not the header of a table: {_shown(data[start:])}.",
            "begin the file with the names of its columns, in UTF-8, a quoted name closed by its quote.",
        )
    _check_names(path, header)
    return header


def _header_at(data: bytes, start: int, delimiter: str) -> Header | None:
    record = next(records_of(iter([data[start:]]), start, delimiter, len(data)), None)
    if record is None or not record.closed:
        return None
    try:
        fields = next(
            csv.reader([record.text.decode("utf-8").rstrip("\r")], delimiter=delimiter, strict=True), []
        )
    except (csv.Error, UnicodeDecodeError):
        return None
    names = tuple(name.strip() or f"Unnamed: {number}" for number, name in enumerate(fields))
    lines = data[: start + record.length].count(b"\n")
    return Header(delimiter, names, start + record.length, lines)


def _score(data: bytes, header: Header) -> tuple[bool, int]:
    """Rank a reading of a table: one that its records fit first, then the one of more columns."""
    texts = [record.text.decode("utf-8", "replace") for record in _records(data, header)]
    fitting = sum(_fields(text, header.delimiter) == len(header.columns) for text in texts)
    return fitting * 2 >= len(texts), len(header.columns)


def _fields(text: str, delimiter: str) -> int:
    """Return how many fields a record has; 0 for what is none, such as one with a CR in the middle."""
    try:
        return len(next(csv.reader([text], delimiter=delimiter)))
    except csv.Error:
        return 0


def _records(data: bytes, header: Header) -> Iterator[Record]:
    """Yield the first records below the header that are whole and not blank."""
    records = islice(records_of(iter([data[header.length :]]), 0, header.delimiter, len(data)), _LOOKED_AT)
    return (record for record in records if record.closed and record.text.strip())


def _check_names(path: str, header: Header) -> None:
    twice = [name for name, count in Counter(header.columns).items() if count > 1]
    if twice:
        raise UsageError(
            f"{path}: the header names the column {twice[0]!r} twice.", "give each column a name of its own."
        )
    if all(name.startswith("Unnamed: ") for name in header.columns):
        raise UsageError(
            f"{path}: no column of the header has a name.", "begin the file with the names of its columns."
        )


def _shown(data: bytes) -> str:
    return repr(data.split(b"\n", 1)[0][:60].decode("utf-8", "replace"))
