"""What a slice reads is what was planned: any change in between is an error that names the input, never other rows."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftdata.errors import InputChangedError, IntegrityError, UsageError
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.seals import HASHED_BYTES
from sftdata.sources.source import open_source, plan_source, read_chunk
from sftdata.sources.streams import close_streams
from tests.compressed import zstd

ROWS = [
    {"prompt": f"{number:06} " + "what " * (number % 40), "completion": f"{number}"} for number in range(3000)
]
OTHER = [{"prompt": row["prompt"].replace("what", "WHAT"), "completion": row["completion"]} for row in ROWS]


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, str]]) -> bytes:
    return b"prompt,completion\n" + b"".join(
        f'"{row["prompt"]}",{row["completion"]}\n'.encode() for row in rows
    )


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(rows), sink, row_group_size=500, compression="none", use_dictionary=False
    )
    return bytes(sink.getvalue())


def as_arrow(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": as_csv,
    "txt": lambda rows: "\n".join(row["prompt"] for row in rows).encode(),
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows), mtime=0),
    "jsonl.bz2": lambda rows: bz2.compress(as_jsonl(rows)),
    "jsonl.xz": lambda rows: lzma.compress(as_jsonl(rows)),
    "jsonl.zst": lambda rows: zstd.compress(as_jsonl(rows)),
    "parquet": as_parquet,
    "arrow": as_arrow,
}


def plan(path: Path) -> SourcePlan:
    return plan_source(open_source(str(path)), 0, 20_000)


def overwrite(path: Path, data: bytes) -> None:
    """Write other bytes into the same file, and give it its old times back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    os.replace(other, path)


def cut(path: Path, data: bytes) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path, data: bytes) -> None:
    """Change one byte, three quarters into the file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 3 // 4] ^= 0x20
    overwrite(path, bytes(raw))


CHANGES: dict[str, Callable[[Path, bytes], None]] = {
    "overwrite": overwrite, "exchange": exchange, "cut": cut, "spoil": spoil,
}  # fmt: skip


def read_on(slices: SourcePlan, done: int, wanted: list[list[object]]) -> int:
    """Read from slice `done` on; return how many were refused, and assert that the others hold what was planned."""
    refused = 0
    for piece, rows in list(zip(slices.chunks, wanted, strict=True))[done:]:
        try:
            found = read_chunk(piece)[0].rows
        except InputChangedError:
            refused += 1
            continue
        assert found == rows
    return refused


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_were_not_planned_are_never_read(tmp_path: Path, kind: str, change: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(KINDS[kind](ROWS))
    source = plan(path)
    wanted = [read_chunk(piece)[0].rows for piece in source.chunks]
    assert len(source.chunks) > 5
    read_chunk(source.chunks[0])
    CHANGES[change](path, KINDS[kind](OTHER))
    read_on(source, 1, wanted)  # a stream that is open may go on with what it has
    close_streams()
    assert read_on(source, 0, wanted) > 0
    close_streams()
    overwrite(path, KINDS[kind](ROWS))  # put back
    assert read_on(source, 0, wanted) == 0


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz"])
def test_what_was_appended_since_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(KINDS[kind](ROWS))
    source = plan(path)
    wanted = [read_chunk(piece)[0].rows for piece in source.chunks]
    with path.open("ab") as file:
        file.write(KINDS[kind](OTHER[:500]))
    assert read_on(source, 0, wanted) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_touched_copied_or_linked_is_still_the_planned_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(KINDS[kind](ROWS))
    source = plan(path)
    wanted = [read_chunk(piece)[0].rows for piece in source.chunks]
    os.utime(path)
    path.chmod(0o600)
    os.link(path, tmp_path / "link")
    assert read_on(source, 0, wanted) == 0
    exchange(path, path.read_bytes())
    assert read_on(source, 0, wanted) == 0


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for kind in KINDS:
        path = tmp_path / f"rows.{kind}"
        path.write_bytes(KINDS[kind](ROWS))
        source = plan(path)
        path.unlink()
        with pytest.raises((UsageError, InputChangedError), match=str(path)):
            read_chunk(source.chunks[-1])


def test_a_header_that_changes_between_recognition_and_planning_is_a_change(tmp_path: Path) -> None:
    """Else the columns of the old file would name the fields of the new one."""
    path = tmp_path / "rows.csv"
    path.write_bytes(as_csv(ROWS[:50]))
    source = open_source(str(path))
    path.write_bytes(as_csv(ROWS[:50]).replace(b"prompt,completion", b"completion,prompt"))
    with pytest.raises(
        InputChangedError, match=f"{path}: changed while it was read; .* Fix: run the same command again"
    ):
        plan_source(source, 0, 20_000)


def test_slices_hold_at_every_size_of_blocks_and_borders(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "rows.jsonl"
    for size in (1, HASHED_BYTES - 1, HASHED_BYTES, HASHED_BYTES + 1, 3 * HASHED_BYTES):
        data = b'"' + b"x" * (size - 3) + b'"\n' if size > 3 else b"1"
        lines = [data, *(json.dumps("y" * rng.randrange(200_000)).encode() + b"\n" for _ in range(4))]
        for compressed in (False, True):
            path.write_bytes(gzip.compress(b"".join(lines)) if compressed else b"".join(lines))
            source = plan_source(open_source(str(path)), 0, 1)
            found = [read_chunk(piece) for piece in source.chunks]
            assert sum(len(rows) + len(bad) for rows, bad in found) == source.records


def test_reading_other_records_than_planning_counted_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_jsonl(ROWS[:20]) + b"\n \n")
    (piece,) = plan_source(open_source(str(path)), 0, 1 << 20).chunks
    assert piece.records == 22
    read_chunk(piece)
    with pytest.raises(IntegrityError, match="planning counted 21 records, and reading 22"):
        read_chunk(replace(piece, records=21))
