"""Lists of rows beside the shards, one JSON object a line: each task writes its part, and the set joins them in order.

rejects.jsonl   rows that cannot be used, with the row itself, so that the file can be fixed and fed back in
dropped.jsonl   rows that were read and are not in the shards, with the reason
counted.jsonl   the rows behind each counter of the ledger, as ranges of example ids
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np

from sftdata.batches import Int64, Reject
from sftdata.errors import IntegrityError
from sftdata.shardset.atomic import Sink

REJECTS_NAME, DROPPED_NAME, COUNTED_NAME = "rejects.jsonl", "dropped.jsonl", "counted.jsonl"
LISTS = (REJECTS_NAME, DROPPED_NAME, COUNTED_NAME)


class CountedRows(msgspec.Struct, frozen=True, kw_only=True):
    """The rows that one task added to a counter.

    Attributes:
        counter: its name in the ledger.
        examples: first and last example id of each run of rows that follow each other.
    """

    counter: str
    examples: list[tuple[int, int]]


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


def encode_lines(items: Iterable[msgspec.Struct]) -> bytes:
    r"""Return items as JSON lines.

    >>> encode_lines([CountedRows(counter="rows_parted", examples=[(0, 4), (7, 7)])])
    b'{"counter":"rows_parted","examples":[[0,4],[7,7]]}\n'
    """
    return b"".join(msgspec.json.encode(item) + b"\n" for item in items)


def runs_of(ids: Int64) -> list[tuple[int, int]]:
    """Return the first and last of each run of ids, int64[N], that follow each other; each id counts once.

    >>> runs_of(np.array([3, 1, 2, 7, 7]))
    [(1, 3), (7, 7)]
    """
    ids = np.unique(ids)
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
    ends = np.append(starts[1:], len(ids)) - 1
    return list(zip(ids[starts].tolist(), ids[ends].tolist(), strict=True)) if len(ids) else []


def counted_rows(rows: Mapping[str, Int64]) -> Iterator[CountedRows]:
    """Yield what one task counted, by name; `rows` are example ids, int64[N], of each counter."""
    for name in sorted(rows):
        if len(rows[name]):
            yield CountedRows(counter=name, examples=runs_of(rows[name]))


def write_parts(parts: Iterable[bytes], sink: Sink) -> None:
    """Write bytes end to end."""
    for part in parts:
        sink.write(part)


def read_counted(folder: Path) -> dict[str, Int64]:
    """Return the ids of all rows behind each counter, int64[N], ascending; nothing for a set that has no such list.

    Raises:
        IntegrityError: the list is damaged.
    """
    path = folder / COUNTED_NAME
    found: dict[str, list[Int64]] = {}
    try:
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            counted = msgspec.json.decode(line, type=CountedRows)
            found.setdefault(counted.counter, []).extend(
                np.arange(first, last + 1) for first, last in counted.examples
            )
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path}: damaged: {error}.", "run `sftdata verify`, or prepare the set again."
        ) from None
    return {name: np.concatenate(parts) for name, parts in found.items()}
