"""Shards: the same rows come back without a copy, the same bytes go out, and a write is all or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from sftdata.batches import PackedRows, TokenBatch
from sftdata.errors import IntegrityError, SftError, UsageError
from sftdata.pack import Strategy, gather, plan_packs
from sftdata.set import shards, store
from sftdata.set.shards import read_shard, write_shard
from sftdata.set.store import digest_file, write_atomic


def packed(count: int = 200, max_length: int = 64, strategy: Strategy = "bfd") -> PackedRows:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, max_length + 1, count)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    ids, trained = rng.integers(0, 999, offsets[-1]).astype(np.int32), rng.random(offsets[-1]) < 0.5
    tokens = TokenBatch(ids, trained, offsets, np.arange(count))
    return gather(
        tokens,
        tokens.row,
        plan_packs(lengths, max_length, strategy),
        None if strategy == "none" else max_length,
        0,
    )


def joined(batches: list[PackedRows], column: str) -> list[int]:
    return [value for batch in batches for value in getattr(batch, column).tolist()]


@pytest.mark.parametrize(("strategy", "max_length"), [("bfd", 64), ("wrapped", 64), ("none", None)])
def test_a_shard_gives_its_rows_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: Strategy, max_length: int | None
) -> None:
    monkeypatch.setattr(shards, "_BATCH_TOKENS", 1000)
    rows, path = packed(strategy=strategy), tmp_path / "shard-00000.arrow"
    info = write_shard(path, rows, max_length)
    batches = read_shard(path, max_length)
    assert len(batches) > 3
    for column in ("input_ids", "labels", "seq_lengths", "example_ids"):
        assert joined(batches, column) == getattr(rows, column).tolist()
    assert [n for b in batches for n in np.diff(b.row_offsets)] == np.diff(rows.row_offsets).tolist()
    assert [n for b in batches for n in np.diff(b.segment_offsets)] == np.diff(rows.segment_offsets).tolist()
    assert (info.rows, info.documents) == (len(rows), (rows.example_ids >= 0).sum())
    assert info.tokens == rows.seq_lengths[rows.example_ids >= 0].sum()
    assert info.tokens_trained == (rows.labels != -100).sum()


def test_the_columns_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.arrow"
    write_shard(path, packed(), 64)
    before = pa.total_allocated_bytes()
    batch = read_shard(path, 64)[0]
    assert pa.total_allocated_bytes() - before < 4096
    for column in (batch.input_ids, batch.labels, batch.seq_lengths, batch.example_ids):
        assert not column.flags.owndata
        assert not column.flags.writeable


@pytest.mark.parametrize(("strategy", "max_length"), [("bfd", 64), ("none", None)])
def test_reading_imports_none_of_what_is_slow_to_start(
    tmp_path: Path, strategy: Strategy, max_length: int | None
) -> None:
    write_shard(tmp_path / "shard-00000.arrow", packed(strategy=strategy), max_length)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.modules |= {'pyarrow.compute': None, 'pandas': None}\n"
        "from sftdata.set.shards import read_shard\n"
        f"print(sum(map(len, read_shard(Path('shard-00000.arrow'), {max_length}))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == len(packed(strategy=strategy))


def test_the_schema_is_the_one_of_the_contract(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.arrow", packed(), 64)
    write_shard(tmp_path / "b.arrow", packed(strategy="none"), None)
    with pa.ipc.open_file(tmp_path / "a.arrow") as reader:
        assert [str(field.type) for field in reader.schema] == [
            "fixed_size_list<item: int32>[64]", "fixed_size_list<item: int32>[64]", "list<item: int32>", "list<item: int64>",
        ]  # fmt: skip
        assert reader.schema.names == ["input_ids", "labels", "seq_lengths", "example_ids"]
    with pa.ipc.open_file(tmp_path / "b.arrow") as reader:
        assert str(reader.schema.field("labels").type) == "list<item: int32>"


def test_the_same_rows_give_the_same_bytes_and_the_digests_of_the_file(tmp_path: Path) -> None:
    infos = [write_shard(tmp_path / f"shard-0000{i}.arrow", packed(), 64) for i in range(2)]
    raw = [(tmp_path / info.name).read_bytes() for info in infos]
    assert raw[0] == raw[1]
    assert infos[0].bytes == len(raw[0])
    assert infos[0].xxh3 == xxhash.xxh3_128_hexdigest(raw[0])
    assert infos[0].sha256 == hashlib.sha256(raw[0]).hexdigest()
    assert digest_file(tmp_path / "shard-00001.arrow").sha256 == infos[0].sha256


def test_tokens_are_nearly_all_of_the_file(tmp_path: Path) -> None:
    rows = packed(5000, 256)
    assert write_shard(tmp_path / "shard-00000.arrow", rows, 256).bytes < 8 * len(rows.input_ids) * 1.05


def test_a_shard_without_rows_reads_back_as_nothing(tmp_path: Path) -> None:
    for length, strategy in ((64, "bfd"), (None, "none")):
        path = tmp_path / f"{strategy}.arrow"
        assert write_shard(path, packed(0, strategy=strategy), length).rows == 0
        assert sum(len(batch) for batch in read_shard(path, length)) == 0


@pytest.mark.parametrize("raw", [b"", b"ARROW1\x00\x00", b"x" * 500], ids=["empty", "magic", "text"])
def test_a_file_that_is_no_shard_is_refused_in_one_line(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "shard-00000.arrow"
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="not a readable Arrow IPC file") as caught:
        read_shard(path, 64)
    assert "\n" not in str(caught.value)


def test_other_columns_other_lengths_nulls_and_unequal_lists_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.arrow"
    write_shard(path, packed(), 64)
    with pytest.raises(IntegrityError, match="the columns are input_ids: fixed_size_list"):
        read_shard(path, 32)
    for bad, message in (([[1], None], "nulls"), ([[1], [2, 2]], "input_ids and labels differ in length")):
        good = pa.array([[1], [2]], pa.list_(pa.int32()))
        ids = pa.array([[0], [1]], pa.list_(pa.int64()))
        table = pa.table(
            [good, pa.array(bad, pa.list_(pa.int32())), good, ids], schema=shards.shard_schema(None)
        )
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(IntegrityError, match=message):
            read_shard(path, None)


def test_column_names_that_are_no_text_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.arrow"
    write_shard(path, packed(5), 64)
    path.write_bytes(path.read_bytes().replace(b"labels", b"\xef\xaebels"))
    with pytest.raises(IntegrityError, match="not a readable Arrow IPC file"):
        read_shard(path, 64)


def test_reading_damaged_bytes_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.arrow"
    write_shard(path, packed(20), 64)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(raw)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            outcome = sum(
                int(batch.input_ids.sum() + batch.example_ids.sum()) for batch in read_shard(path, 64)
            )
        except IntegrityError as error:
            outcome = str(error)
        assert "\n" not in str(outcome)


def test_a_thousand_open_shards_hold_no_file_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.arrow"
    write_shard(path, packed(20), 64)
    before = len(os.listdir("/dev/fd"))
    kept = [read_shard(path, 64) for _ in range(1000)]
    assert len(os.listdir("/dev/fd")) == before
    assert kept[999][0].input_ids.tolist() == kept[0][0].input_ids.tolist()


# ------------------------------------------------------------------------------------------------ the one writer


def test_a_file_is_synced_before_its_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            store.os, name, lambda *args, _real=real, _name=name: (calls.append(_name), _real(*args))[1]
        )
    write_atomic(tmp_path / "x", lambda sink: sink.write(b"abc"))
    assert calls == ["write", "fsync", "replace", "fsync"]
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_failing_disk_leaves_what_stood_there_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    path = tmp_path / "shard-00000.arrow"
    write_shard(path, packed(5), 64)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(store.os, operation, fail)
        with pytest.raises(SftError) as caught:
            write_shard(path, packed(9), 64)
    assert str(path) in str(caught.value)
    assert errno.errorcode[number] in str(caught.value)
    assert " Fix: " in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted(sink: store.Sink) -> None:
        sink.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", interrupted)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="create the folder first"):
        write_atomic(tmp_path / "no" / "x", lambda sink: sink.write(b""))
