"""What each slice was made from, and what became of it: `slices.jsonl`, a record a slice.

By these records the next `prepare` knows which slices it can reuse.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from sftdata.set.ledger import read_lines
from sftdata.set.local import file_of
from sftdata.set.store import Count, PlainPath, Sha256

SLICES_NAME = "slices.jsonl"


class SliceSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of a source that a slice was made from.

    Attributes:
        name: of the source, as in the manifest.
        start, stop: in bytes of the decompressed source; in rows of a columnar one.
        first_record, records: 0-based number of its first record, and how many, blank lines included; None
            where these were not counted.
        first_id: example id of the first record.
        first_line: 1-based line of the first record; 0 where the source is not read by lines.
        xxh3: xxh3-128 over the xxh3-64 of each block of 64 KiB of the decompressed source that it touches; of
            a columnar source, of its files.
        content: xxh3-128 of all that decides its rows, the same wherever they stand.
    """

    name: str
    start: Count
    stop: Count
    first_record: Count
    records: Count | None
    first_id: Count
    first_line: Count
    xxh3: str
    content: str


class SliceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a slice was made from, and what became of it.

    Attributes:
        number: as in the names of its files.
        made_with: sha256 of all that decides its bytes but its place and the bytes of its sources.
        sources: in order.
        files: names of its shard, rest and index.
        lists: bytes of its part of each list, by name.
        ledger: as in the manifest, of this slice alone.
    """

    number: Count
    made_with: Sha256
    sources: tuple[SliceSource, ...]
    files: tuple[PlainPath, ...]
    ledger: dict[str, object]
    lists: dict[PlainPath, Count] = {}


def encode_slice(record: SliceRecord) -> bytes:
    """Return a record as a line of `slices.jsonl`."""
    return msgspec.json.encode(record, order="sorted") + b"\n"


def read_slices(folder: Path) -> list[SliceRecord]:
    """Return the records of the slices of a set; none of a set without them.

    Raises:
        IntegrityError: the file is damaged.
    """
    return list(read_lines(file_of(folder, SLICES_NAME), SliceRecord))
