"""What a scan of a source, or of a range of it, finds: plain arrays, by which it is joined and cut."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from sftdata.batches import Int64
from sftdata.sources.borders import DIGEST_BYTES, Digests
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


class _Written(msgspec.Struct, array_like=True):
    start: int
    stop: int
    positions: bytes
    records: bytes
    lines: bytes
    contents: bytes
    digest: bytes
    blocks: bytes
    end: int
    total: int | None
    raw_bytes: int
    step: int | None
    notes: tuple[str, ...]


def encode_marks(marks: Marks) -> bytes:
    """Return marks as bytes, their hash before them; without a stamp, which is of one machine."""
    fields = (getattr(marks, name) for name in _Written.__struct_fields__)
    data = msgspec.msgpack.encode([one.tobytes() if isinstance(one, np.ndarray) else one for one in fields])
    return xxhash.xxh3_128_digest(data) + data


def decode_marks(data: bytes) -> Marks:
    """Return the marks of some bytes.

    Raises:
        ValueError: they are damaged.
    """
    digest, data = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if xxhash.xxh3_128_digest(data) != digest:
        raise ValueError("damaged")
    fields = msgspec.structs.asdict(msgspec.msgpack.decode(data, type=_Written))
    for name in ("positions", "records", "lines"):
        fields[name] = np.frombuffer(fields[name], np.int64)
    fields["contents"] = np.frombuffer(fields["contents"], np.uint8).reshape(-1, DIGEST_BYTES)
    return Marks(**fields)
