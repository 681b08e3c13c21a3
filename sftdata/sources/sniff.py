"""Recognise compression and container from the first bytes of a file, not from its name.

The name is asked in one case only, which no content can settle: a table of comma-separated words, or lines of prose with commas
(headers.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from sftdata.errors import UsageError
from sftdata.sources.chunks import Compression, Container, Source
from sftdata.sources.headers import find_header
from sftdata.sources.streams import RawCount, compression_of, read_all
from sftdata.sources.unchanged import block_hashes

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
    raw = _head(Source(path, "empty"), 16)
    compression = compression_of(raw.data)
    head = _head(Source(path, "empty", compression), HEAD_BYTES)
    return replace(_recognise(path, compression, head), head=block_hashes(head.data))


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
    stream = read_all(source, RawCount.start())
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
    """Tell JSON lines from arrays and pretty-printed objects, by how many lines are shaped as objects, damaged or not."""
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
