"""A build that was stopped goes on from what is whole, and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sftdata.errors import UsageError
from sftdata.set import build as build_module
from sftdata.set.manifest import partial_folder
from tests.torture.runs import content, prepare, write_chats


class Stopped(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 31)


@pytest.fixture
def whole(data: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of an unbroken run, of three slices."""
    prepare(data, tmp_path / "whole")
    files = content(tmp_path / "whole")
    assert len([name for name in files if name.startswith("shard-")]) == 3
    return files


@contextmanager
def committing(monkeypatch: pytest.MonkeyPatch, *, slices: int) -> Iterator[list[int]]:
    """Let a run commit so many slices and then stop; the list takes their numbers."""
    real, done = build_module.Build.commit, list[int]()

    def commit(
        build: build_module.Build, result: build_module.ShardResult, lists: dict[str, bytes]
    ) -> build_module.ShardResult:
        if len(done) == slices:
            raise Stopped
        done.append(result.index)
        return real(build, result, lists)

    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, "commit", commit)
        yield done


def stop_after_two(data: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with committing(monkeypatch, slices=2) as done, pytest.raises(Stopped):
        prepare(data, output)
    assert sorted(done) == [0, 1]
    return partial_folder(output)


def test_a_stopped_run_goes_on_with_the_slice_it_was_in(
    data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_two(data, tmp_path / "set", monkeypatch)
    with committing(monkeypatch, slices=3) as done:
        prepare(data, tmp_path / "set")
    assert done == [2]
    assert content(tmp_path / "set") == whole


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_a_shard_that_is_not_whole_is_made_again(
    damage: str, data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = stop_after_two(data, tmp_path / "set", monkeypatch) / "shard-00001.arrow"
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size + (64 if damage == "longer" else -64))
    with committing(monkeypatch, slices=3) as done:
        prepare(data, tmp_path / "set")
    assert done == [1, 2]
    assert content(tmp_path / "set") == whole


def test_a_slice_without_its_lists_is_made_again(
    data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stop_after_two(data, tmp_path / "set", monkeypatch)
    (folder / "slices" / "00000.lists").unlink()
    prepare(data, tmp_path / "set")
    assert content(tmp_path / "set") == whole


def test_an_unfinished_set_is_not_continued_with_other_settings(
    data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_two(data, tmp_path / "set", monkeypatch)
    with pytest.raises(UsageError, match="max_length: 64 -> 32"):
        prepare(data, tmp_path / "set", max_length=32)
    prepare(data, tmp_path / "set", max_length=32, overwrite=True)
    prepare(data, tmp_path / "other", max_length=32)
    assert content(tmp_path / "set") == content(tmp_path / "other") != whole


@pytest.mark.parametrize("gone", ["shard-00001.arrow", "rejects.jsonl", "tokenizer/tokenizer.json"])
def test_a_set_that_was_being_removed_is_not_put_in_place(
    gone: str, data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    prepare(data, tmp_path / "set")
    os.rename(tmp_path / "set", partial_folder(tmp_path / "set"))
    (partial_folder(tmp_path / "set") / gone).unlink()
    prepare(data, tmp_path / "set")
    assert content(tmp_path / "set") == whole


def test_no_set_is_built_inside_a_set_that_would_take_it_along(
    data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    prepare(data, tmp_path / "set")
    for place in ("inner", "new/inner"):
        with pytest.raises(UsageError, match="lies in the set"):
            prepare(data, tmp_path / "set" / place)
    assert content(tmp_path / "set") == whole
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text("{}", encoding="utf-8")  # of a web page, and no set
    prepare(data, tmp_path / "app" / "set")
