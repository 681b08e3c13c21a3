"""What a scan of a source, or of a range of it, finds: plain arrays, by which it is joined and cut."""

from __future__ import annotations

from dataclasses import dataclass

from sftdata.batches import Int64
from sftdata.sources.borders import Digests
from sftdata.sources.seals import Stamp


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """Boundaries between rows, about a grain apart.

    Attributes:
        start, stop: of the range, bytes of the decompressed stream (rows of a table).
        positions, records, lines: int64[K], of each boundary; of a range, records and lines count from the
            first.
        contents: the hash of what lies between each and the next; of a range, K - 1.
        digest: xxh3-128 of the raw bytes.
        blocks: hashes of the blocks of the stream.
        end, total: of a whole source: where its rows end, and how many they are; None for a range.
        raw_bytes: of the file.
        step: of a table: rows of a chunk on average.
        stamp: of the files of a table.
        notes: for the plan.
    """

    start: int
    stop: int
    positions: Int64
    records: Int64
    lines: Int64
    contents: Digests
    digest: bytes
    blocks: bytes = b""
    end: int = 0
    total: int | None = None
    raw_bytes: int = 0
    step: int | None = None
    stamp: Stamp | None = None
    notes: tuple[str, ...] = ()
