"""Verify: whatever happens to a file of a set is found and named; a set that breaks a law is found although its digests fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sftdata.batches import PackedRows
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, write_manifest
from sftdata.set.opened import open_set
from sftdata.set.shards import read_shard, write_shard
from sftdata.set.verify import verify

Build = Callable[..., Manifest]
SLICES = [[5, 9, 20, 31, 7, 12], [3, 3, 31, 8], [30, 30, 2]]


def problem(folder: Path, **options: bool) -> str:
    """The one problem of a set; each is a single line."""
    report = verify(folder, **options)
    assert len(report.problems) == 1, report.problems
    assert "\n" not in report.problems[0]
    assert not report.ok
    with pytest.raises(IntegrityError):
        report.raise_if_broken()
    return report.problems[0]


# -------------------------------------------------------------------------------------------------------- sound sets


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("sha256", [False, True])
def test_a_sound_set_passes(build_set: Build, tmp_path: Path, strategy: str, sha256: bool) -> None:
    manifest = build_set(SLICES, strategy=strategy)
    report = verify(tmp_path / "set", sha256=sha256)
    report.raise_if_broken()
    assert report.ok
    assert report.digest == manifest.digest
    assert report.rows == manifest.ledger.rows_packed
    assert report.files == 7  # an index beside each shard, and the rejects
    assert report.bytes == sum(file.bytes for file in (*manifest.shards, *manifest.files))


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        verify(tmp_path / "nothing")


# --------------------------------------------------------------------------------------------------- damaged files


def test_every_flipped_bit_is_found_and_its_file_named(build_set: Build, tmp_path: Path) -> None:
    build_set(SLICES)
    rng = np.random.default_rng(0)
    for _ in range(300):
        path = tmp_path / "set" / f"shard-0000{rng.integers(3)}.arrow"
        raw = path.read_bytes()
        changed = bytearray(raw)
        changed[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        assert problem(tmp_path / "set").startswith(f"{path}: xxh3-128 is ")
        path.write_bytes(raw)
    verify(tmp_path / "set").raise_if_broken()


def test_every_truncation_is_found_and_its_file_named(build_set: Build, tmp_path: Path) -> None:
    build_set(SLICES)
    path = tmp_path / "set" / "shard-00001.arrow"
    raw = path.read_bytes()
    boundaries = [
        position for position in range(0, len(raw), 8) if raw[position : position + 4] == b"\xff\xff\xff\xff"
    ]
    for size in {0, 1, 8, *boundaries, *range(16, len(raw), len(raw) // 100), len(raw) - 1}:
        path.write_bytes(raw[:size])
        assert problem(tmp_path / "set").startswith(f"{path}: {size} bytes; the manifest says {len(raw)}")
    path.write_bytes(raw + b"\0")
    assert "bytes; the manifest says" in problem(tmp_path / "set")


def test_swapped_shards_are_named_with_what_they_hold(build_set: Build, tmp_path: Path) -> None:
    build_set([[31, 31], [30, 30], [29, 29]])
    a, b = (tmp_path / "set" / f"shard-0000{i}.arrow" for i in (0, 2))
    a.rename(tmp_path / "kept")
    b.rename(a)
    (tmp_path / "kept").rename(b)
    again = "restore the file, or repeat the command that made the set, with --overwrite."
    assert verify(tmp_path / "set").problems == [
        f"{a}: holds the bytes of shard-00002.arrow. Fix: {again}",
        f"{b}: holds the bytes of shard-00000.arrow. Fix: {again}",
    ]


def test_missing_linked_and_foreign_shards_are_named(build_set: Build, tmp_path: Path) -> None:
    build_set(SLICES)
    folder = tmp_path / "set"
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "shard-00001.arrow").unlink()
    assert problem(folder).startswith(f"{folder / 'shard-00001.arrow'}: missing")
    (folder / "shard-00001.arrow").symlink_to(tmp_path / "copy" / "shard-00001.arrow")
    assert "reached through a link" in problem(folder)
    (folder / "shard-00001.arrow").unlink()
    (folder / "shard-00001.arrow").mkdir()
    assert problem(folder).startswith(f"{folder / 'shard-00001.arrow'}: missing")

    folder = tmp_path / "copy"
    shutil.copy(folder / "shard-00001.arrow", folder / "shard-00003.arrow")
    assert problem(folder).startswith(f"{folder / 'shard-00003.arrow'}: a second copy of shard-00001.arrow")
    (folder / "shard-00003.arrow").write_bytes(b"something else")
    assert problem(folder).startswith(f"{folder / 'shard-00003.arrow'}: not part of the set")


def test_a_changed_file_beside_the_shards_is_named(build_set: Build, tmp_path: Path) -> None:
    build_set(SLICES)
    (tmp_path / "set" / "rejects.jsonl").write_text("{}\n")
    assert "rejects.jsonl: 3 bytes; the manifest says 0" in problem(tmp_path / "set")


def test_a_file_that_cannot_be_read_is_named(
    build_set: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_set([[5]])
    from sftdata.set import verify as module

    def fail(path: Path, sha256: bool) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(module, "digest_file", fail)
    assert all("cannot be read: Input/output error" in line for line in verify(tmp_path / "set").problems)


def test_a_forged_xxh3_does_not_pass_sha256(build_set: Build, tmp_path: Path) -> None:
    sealed = build_set(SLICES)
    shards = (msgspec.structs.replace(sealed.shards[0], sha256="0" * 64), *sealed.shards[1:])
    write_manifest(tmp_path / "set", msgspec.structs.replace(sealed, shards=shards))
    verify(tmp_path / "set").raise_if_broken()
    assert "sha256 is" in problem(tmp_path / "set", sha256=True)


def test_several_problems_are_all_named(build_set: Build, tmp_path: Path) -> None:
    build_set(SLICES)
    for index in range(3):
        (tmp_path / "set" / f"shard-0000{index}.arrow").write_bytes(b"")
    report = verify(tmp_path / "set")
    assert len(report.problems) == 3
    with pytest.raises(IntegrityError, match="2 more: see `sftdata verify`"):
        report.raise_if_broken()


# -------------------------------------------------------------------------------------------------------- broken laws


def poke(column: str, index: int, value: int) -> Callable[[PackedRows], None]:
    def change(rows: PackedRows) -> None:
        getattr(rows, column)[index] = value

    return change


def shift_length(rows: PackedRows) -> None:
    rows.seq_lengths[0] += 1


def padding_first(rows: PackedRows) -> None:
    row = next(r for r in range(len(rows)) if rows.segment_offsets[r + 1] - rows.segment_offsets[r] > 1)
    rows.example_ids[rows.segment_offsets[row]] = -1


def train_padding(rows: PackedRows) -> None:
    segment = int(np.flatnonzero(rows.example_ids == -1)[0])
    end = int(rows.seq_lengths[: segment + 1].sum())
    rows.labels[end - 1] = rows.input_ids[end - 1]


def other_padding(rows: PackedRows) -> None:
    segment = int(np.flatnonzero(rows.example_ids == -1)[0])
    rows.input_ids[int(rows.seq_lengths[: segment + 1].sum()) - 1] = 9


def train_first(rows: PackedRows) -> None:
    rows.labels[0] = rows.input_ids[0]


def wrong_label(rows: PackedRows) -> None:
    position = int(np.flatnonzero(rows.labels != -100)[0])
    rows.labels[position] = (rows.input_ids[position] + 1) % 1000


def empty_document(rows: PackedRows) -> None:
    segments = rows.segment_offsets[1]
    rows.seq_lengths[segments - 1] += rows.seq_lengths[0]
    rows.seq_lengths[0] = 0


LAWS = {
    "seq_lengths do not sum to the length of the row": shift_length,
    "a document has no tokens": empty_document,
    "an example id belongs to no source": poke("example_ids", 0, 10_000),
    "padding stands before a document": padding_first,
    "padding is trained": train_padding,
    "padding is not the pad id 0": other_padding,
    "the first token of a document is trained": train_first,
    "a label is neither -100 nor the id of its token": wrong_label,
    "a token id is outside the vocabulary of 1000": poke("input_ids", 1, 1000),
}


def resealed(folder: Path, manifest: Manifest, change: Callable[[PackedRows], None]) -> None:
    """Break a law in the first shard, and write digests, counts and seal as if it were right."""
    path = folder / "shard-00000.arrow"
    (view,) = read_shard(path, manifest.max_length)
    rows = PackedRows(
        *(column.copy() for name in PackedRows.__slots__ if (column := getattr(view, name)) is not None)
    )
    change(rows)
    info = write_shard(path, rows, manifest.max_length)
    counted = Ledger()
    for shard in manifest.shards:
        for batch in read_shard(folder / shard.name, manifest.max_length):
            counted.count_packed(batch, manifest.max_length)
    ledger = manifest.ledger
    for name in ("tokens_trained", "tokens_context", "tokens_padding", "documents"):
        setattr(ledger, name, getattr(counted, name))
    ledger.tokens_in = ledger.tokens
    if (
        manifest.max_length
        and ledger.rows_packed * manifest.max_length != ledger.tokens + ledger.tokens_padding
    ):
        ledger.tokens_padding = ledger.rows_packed * manifest.max_length - ledger.tokens
    write_manifest(folder, msgspec.structs.replace(manifest, shards=(info, *manifest.shards[1:])))


@pytest.mark.parametrize("what", LAWS)
def test_a_broken_law_is_found_although_all_digests_fit(build_set: Build, tmp_path: Path, what: str) -> None:
    resealed(tmp_path / "set", build_set(SLICES), LAWS[what])
    problems = verify(tmp_path / "set").problems
    assert any(
        what in line and line.startswith(f"{tmp_path / 'set' / 'shard-00000.arrow'}: row ")
        for line in problems
    ), problems
    assert all("\n" not in line for line in problems)


@pytest.mark.parametrize("name", ["rows", "documents", "tokens", "tokens_trained"])
def test_counts_that_the_shards_do_not_bear_out_are_named(
    build_set: Build, tmp_path: Path, name: str
) -> None:
    sealed = build_set(SLICES)
    first, second, *rest = sealed.shards
    forged = (
        msgspec.structs.replace(first, **{name: getattr(first, name) + 1}),
        msgspec.structs.replace(second, **{name: getattr(second, name) - 1}),
        *rest,
    )
    write_manifest(tmp_path / "set", msgspec.structs.replace(sealed, shards=forged))
    problems = verify(tmp_path / "set").problems
    assert len(problems) == 2
    assert f"shard-00000.arrow: {name} is {getattr(first, name)} when counted" in problems[0]


def test_rows_kept_is_counted_again_from_example_ids(build_set: Build, tmp_path: Path) -> None:
    sealed = build_set(SLICES)
    sealed.ledger.rows_in += 1
    sealed.ledger.rows_kept += 1
    *rest, last = sealed.sources
    sources = (*rest, msgspec.structs.replace(last, rows=last.rows + 1))
    write_manifest(tmp_path / "set", msgspec.structs.replace(sealed, sources=sources))
    assert "rows_kept is 13 when counted; the manifest says 14" in problem(tmp_path / "set")


def test_a_shard_whose_rows_contradict_the_manifest_is_not_read_row_by_row(
    build_set: Build, tmp_path: Path
) -> None:
    sealed = build_set(SLICES)
    first, second, *rest = sealed.shards
    moved = (
        msgspec.structs.replace(first, rows=first.rows + 1),
        msgspec.structs.replace(second, rows=second.rows - 1),
        *rest,
    )
    write_manifest(tmp_path / "set", msgspec.structs.replace(sealed, shards=moved))
    with pytest.raises(IntegrityError, match="Fix: run `sftdata verify`"):
        open_set(tmp_path / "set")[0]
