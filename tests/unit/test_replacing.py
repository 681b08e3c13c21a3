"""Replacing a set deletes what is of the set, and nothing else: files of the user are named, and stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.errors import UsageError
from sftdata.set import build as build_module
from sftdata.set.manifest import partial_folder
from tests.object_stores import Bucket, bucket  # noqa: F401  a fixture
from tests.torture.runs import content, prepare, write_chats

SETS = Path(__file__).parents[1] / "sets"
REFUSED = (
    "files that the set was not made with: {}; replacing it would delete them."
    " Fix: move them out of {}, or choose another output"
)


@pytest.fixture
def data(tmp_path: Path, no_sync: None) -> Path:
    return write_chats(tmp_path / "chats.jsonl", 31)


def put(folder: Path, *names: str) -> None:
    """Put files of the user in a folder."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("mine")


def refused(run: Callable[[], Any], folder: Path, *names: str) -> None:
    """Expect a refusal that names files, before any work: each file is as it was, and nothing stands beside the folder."""
    before, beside = content(folder), {*folder.parent.iterdir()}
    with pytest.raises(UsageError) as caught:
        run()
    assert REFUSED.format(", ".join(names), folder) in str(caught.value)
    assert content(folder) == before
    assert {*folder.parent.iterdir()} == beside


def test_a_set_is_not_replaced_while_files_of_the_user_lie_in_it(data: Path, tmp_path: Path) -> None:
    folder, mine = (
        tmp_path / "set",
        ("notes.txt", "run/model.safetensors", "shard-00099.arrow", "tokenizer/notes.txt"),
    )
    prepare(data, folder)
    put(folder, *mine)
    (folder / "latest").symlink_to(tmp_path)
    prepare(data, folder)  # up to date: there is nothing to delete
    refused(lambda: prepare(data, folder, max_length=32, overwrite=True), folder, "latest", *mine)
    for name in mine:
        (folder / name).rename(tmp_path / Path(name).name)
    (folder / "latest").unlink()
    assert prepare(data, folder, max_length=32, overwrite=True).settings["max_length"] == 32
    assert not (folder / "run").exists()


def test_the_card_of_a_set_that_its_user_has_written_into_is_kept(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "set")
    with (tmp_path / "set" / "README.md").open("a") as card:
        card.write("Mine.\n")
    refused(lambda: prepare(data, tmp_path / "set", overwrite=True), tmp_path / "set", "README.md")
    (tmp_path / "set" / "README.md").rename(tmp_path / "README.md")
    prepare(data, tmp_path / "set", overwrite=True)
    assert "Mine." not in (tmp_path / "set" / "README.md").read_text()


def test_many_files_are_counted(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "set")
    put(tmp_path / "set", *(f"note-{number}" for number in range(12)))
    with pytest.raises(UsageError, match="note-0, note-1, note-10, note-11, note-2 and 7 more; replacing"):
        prepare(data, tmp_path / "set", max_length=32, overwrite=True)


def test_inputs_that_grew_replace_no_file_of_the_user_either(data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "set")
    put(tmp_path / "set", "notes.txt")
    with data.open("a") as lines:
        lines.write(data.read_text())
    refused(lambda: prepare(data, tmp_path / "set"), tmp_path / "set", "notes.txt")
    (tmp_path / "set" / "notes.txt").unlink()
    assert prepare(data, tmp_path / "set").ledger.rows_in == 62


@pytest.mark.parametrize("mine", ["notes.txt", "eval/notes.txt", "run/model.safetensors"])
def test_a_split_is_not_replaced_while_files_of_the_user_lie_in_it(
    mine: str, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sides"
    prepare(data, folder, eval="20%")
    put(folder, mine)
    refused(lambda: prepare(data, folder, eval="40%", overwrite=True), folder, mine)
    if mine.startswith("eval"):  # else the folder is no split any more, and is left alone for that
        refused(lambda: prepare(data, folder, overwrite=True), folder, mine)
    with data.open("a") as lines:
        lines.write(data.read_text())
    refused(lambda: prepare(data, folder, eval="20%"), folder, mine)


@pytest.mark.parametrize("more", [{}, {"eval": "20%"}], ids=["view", "sides"])
def test_a_view_replaces_no_file_of_the_user(more: dict[str, str], data: Path, tmp_path: Path) -> None:
    prepare(data, tmp_path / "base")
    sftdata.view(tmp_path / "base", output=tmp_path / "view", **more)
    put(tmp_path / "view", "notes.txt")
    again = {"output": tmp_path / "view", "max_length": 128, "overwrite": True} | more
    refused(lambda: sftdata.view(tmp_path / "base", **again), tmp_path / "view", "notes.txt")


@pytest.mark.parametrize("damage", ["", '{"format_version": 2, "sha', '{"format_version": 2, "shards": []}'])
def test_a_set_whose_manifest_is_damaged_is_known_by_the_names_of_its_files(
    damage: str, data: Path, tmp_path: Path
) -> None:
    prepare(data, tmp_path / "set")
    (tmp_path / "set" / "manifest.json").write_text(damage)
    put(tmp_path / "set", "notes.txt")
    refused(lambda: prepare(data, tmp_path / "set", overwrite=True), tmp_path / "set", "notes.txt")
    (tmp_path / "set" / "notes.txt").unlink()
    assert prepare(data, tmp_path / "set", overwrite=True).ledger.rows_in == 31


@pytest.mark.parametrize("name", sorted(path.name for path in SETS.iterdir()))
def test_sets_of_older_versions_are_replaced(name: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(SETS / name, tmp_path / "set")
    (tmp_path / "set" / ".DS_Store").touch()  # of Finder, which makes one wherever it looks
    (tmp_path / "set" / ".manifest.json.1a2b3c4d.tmp").touch()  # of a run that was killed
    assert prepare(data, tmp_path / "set", overwrite=True).ledger.rows_in == 31
    assert not (tmp_path / "set" / ".DS_Store").exists()


def test_a_file_that_came_during_the_run_stays_and_the_run_ends_once_it_is_moved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    prepare(data, folder)
    real = build_module.Build.complete

    def complete(build: Any, *given: Any) -> Any:
        put(folder, "notes.txt")
        return real(build, *given)

    with monkeypatch.context() as patch:
        patch.setattr(build_module.Build, "complete", complete)
        with pytest.raises(UsageError, match=r"not made with: notes\.txt"):
            prepare(data, folder, max_length=32, overwrite=True)
    (folder / "notes.txt").rename(tmp_path / "notes.txt")
    made = partial_folder(folder).stat().st_ino
    assert prepare(data, folder, max_length=32, overwrite=True).settings["max_length"] == 32
    assert folder.stat().st_ino == made  # it only had to be put in place


def test_objects_of_the_user_stay_where_a_set_in_a_store_is_replaced(data: Path, bucket: Bucket) -> None:  # noqa: F811
    prepare(data, "s3://bucket/set")  # type: ignore[arg-type]
    bucket.objects["s3://bucket/set/notes.txt"] = b"mine"
    made = prepare(data, "s3://bucket/set", max_length=32, overwrite=True)  # type: ignore[arg-type]
    assert made.settings["max_length"] == 32
    assert bucket.objects["s3://bucket/set/notes.txt"] == b"mine"
