"""The header of a table of text: which delimiter parts it, what its columns are called, and where its records begin.

A file that is named .csv or .tsv is a table or an error. Other files are one only where the header has known column names
and the lines below fit it, since prose has commas too.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from sftdata.errors import UsageError
from sftdata.sources.delimited import Record, records_of
from sftdata.sources.folders import plain_name

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
    """Return the header under the delimiter that parts it and most of the records below into the same number of fields."""
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
    fitting = sum(
        len(next(csv.reader([text], delimiter=header.delimiter))) == len(header.columns) for text in texts
    )
    return fitting * 2 >= len(texts), len(header.columns)


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
