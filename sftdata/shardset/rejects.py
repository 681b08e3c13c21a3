"""Rejected rows: one JSON line each, with the row itself, so that the file can be mended and fed back in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from sftdata.places import place
from sftdata.shardset.atomic import FileDigest, write_atomic

REJECTS_NAME = "rejects.jsonl"


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A row that cannot be used, where it stands, why, and what mends it.

    Attributes:
        file: name of the source.
        line: 1-based line where it starts; None in a file that is not read by lines.
        record: its number in the file, from 1: of the line, the record of a CSV, the element of an array, the row of a table.
        byte_offset: where the row starts in the decompressed source; -1 where rows have no byte position.
        code: stable kebab-case name of the fault.
        reason: what was found and expected.
        fix: what mends it.
        row: the row as parsed, or its text where it could not be parsed.
    """

    file: str
    line: int | None
    record: int
    byte_offset: int
    code: str
    reason: str
    fix: str
    row: Any

    @property
    def place(self) -> str:
        """Where the row stands, in words."""
        if self.line is None:  # only the rows of a table have no byte position
            return place(self.file, self.record, "row" if self.byte_offset < 0 else "element")
        return place(self.file, self.record, "line" if self.line == self.record else "record", self.line)


def encode_reject(reject: Reject) -> bytes:
    r"""Return a reject as one JSON line; what UTF-8 cannot hold (half a surrogate pair) is kept as an escape.

    >>> encode_reject(Reject(file="a.csv", line=3, record=2, byte_offset=90, code="invalid-csv", reason="r", fix="f", row='"'))
    b'{"file":"a.csv","line":3,"record":2,"byte_offset":90,"code":"invalid-csv","reason":"r","fix":"f","row":"\\""}\n'
    """
    try:
        line = msgspec.json.encode(reject)
    except (UnicodeEncodeError, msgspec.MsgspecError, TypeError, OverflowError):
        plain = {name: getattr(reject, name) for name in reject.__struct_fields__}
        line = json.dumps(plain, default=str, separators=(",", ":")).encode()
    return line + b"\n"


def first_reject(folder: Path, code: str) -> Reject:
    """Return the first row of a folder's rejects that was rejected for this reason."""
    with open(folder / REJECTS_NAME, "rb") as lines:
        return next(
            reject for line in lines if (reject := msgspec.json.decode(line, type=Reject)).code == code
        )


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> FileDigest:
    """Write `rejects.jsonl` into a folder, atomically, in the order given.

    Raises:
        UsageError: the file cannot be written.
    """
    lines = b"".join(encode_reject(reject) for reject in rejects)
    return write_atomic(folder / REJECTS_NAME, lambda sink: sink.write(lines))
