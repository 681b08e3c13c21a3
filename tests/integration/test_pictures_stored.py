"""Sets with pictures in an object store: the bytes of a folder, never half a set, and what is refused by name."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.config import make_config
from sftdata.errors import UsageError
from sftdata.parts import Part
from sftdata.parts import prepare as prepare_part
from sftdata.set.manifest import MANIFEST_NAME, decode_manifest
from sftdata.workers import Workers
from tests.made_pictures import make, saved
from tests.object_stores import Bucket, Killed, bucket
from tests.picture_sets import asked, write_model, write_pictures, write_rows
from tests.torture.runs import content
from tests.torture.test_stored import SET, files, is_whole

__all__ = ["bucket"]
pytestmark = pytest.mark.usefixtures("no_sync")
Given = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(folder / "cache"))
        yield write_model(folder / "model")


@pytest.fixture
def given(model: Path, tmp_path: Path) -> Given:
    """Settings for rows that name pictures by path, hold their bytes, or have none, in several slices."""
    names = [f"pictures/{name}" for name in write_pictures(tmp_path / "in" / "pictures")]
    uri = "data:image/png;base64," + base64.b64encode(saved(make(61, 45), "PNG")).decode()
    rows = [
        asked(f"<image>{'What? ' * 40}", f"Red {number}", images=[name]) for number, name in enumerate(names)
    ]
    rows += [asked("<image>?", "Red", images=[uri]), asked("Hello", "Good day")]
    rows += [asked("<image>?", "Red", images=["pictures/none.jpg"])]
    return {
        "inputs": [str(write_rows(tmp_path / "in", rows))], "tokenizer": str(model), "max_length": 128,
        "slice_bytes": 512, "max_rejects": "1", "workers": 1, "embed_images": True,
    }  # fmt: skip


def run(given: Given, part: Part | None = None, output: str | Path = SET) -> bool:
    """Make a part; say whether it finished the set."""
    return prepare_part(make_config(output=output, **given), Workers(1), part=part) is not None


def in_a_folder(given: Given, folder: Path) -> dict[str, bytes]:
    run(given, output=folder)
    return content(folder)


def change(given: Given) -> None:
    """Put another picture, of another size, in the place of one."""
    Path(given["inputs"][0]).with_name("pictures").joinpath("3.jpg").write_bytes(
        saved(make(200, 120, seed=9), "JPEG")
    )


def test_a_set_in_a_store_has_the_bytes_of_one_in_a_folder(
    given: Given, bucket: Bucket, tmp_path: Path
) -> None:
    whole = in_a_folder(given, tmp_path / "set")
    assert sum(name.startswith("images-") for name in whole) > 3
    run(given)
    assert is_whole(bucket, whole)
    bucket.changes.clear()
    run(given)
    assert not bucket.changes, "it is up to date"
    bucket.objects.clear()
    assert [run(given, Part(number, 3)) for number in (3, 1, 2)][-1]
    assert is_whole(bucket, whole)


def test_it_is_read_there_as_any_set(
    given: Given,
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = in_a_folder(given, tmp_path / "set")
    run(given)
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    for quick in (False, True):
        assert sftdata.verify(SET, quick=quick).problems == []
    there, here = sftdata.open(SET), sftdata.open(tmp_path / "set")
    assert there.manifest == decode_manifest(whole[MANIFEST_NAME], "")
    for row in range(len(here)):
        stored = there.stored_pictures(row), here.stored_pictures(row)
        assert [[bytes(data) for data in one.data] for one in stored if one] == [
            [bytes(data) for data in one.data] for one in stored[1:] if one
        ] * 2
    capsys.readouterr()
    assert main(["inspect", SET]) == 0
    assert "[image " in capsys.readouterr().out
    sftdata.view(SET, output=tmp_path / "view", write=True)
    assert sftdata.verify(tmp_path / "view").problems == []


def test_pictures_by_path_are_embedded_or_refused(given: Given, bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf'output="{SET}": the set would name pictures in /.* Fix: embed_images=True'
    ):
        run(given | {"embed_images": False})
    assert not bucket.objects
    run(given | {"embed_images": False}, output=tmp_path / "set")
    for write in (False, True):
        with pytest.raises(
            UsageError, match=rf"{SET}: the view would name pictures in .* Fix: prepare the sets with"
        ):
            sftdata.view(tmp_path / "set", output=SET, write=write)
    run(given, output=tmp_path / "whole")
    sftdata.view(tmp_path / "whole", output=SET, write=True)
    assert sftdata.verify(SET).problems == []


def test_killed_anywhere_there_is_no_set_or_a_whole_one(given: Given, bucket: Bucket, tmp_path: Path) -> None:
    """Of every second run, a picture changes after the first kill: what was made of the old one is made again."""
    wholes = [in_a_folder(given, tmp_path / "first")]
    before = (tmp_path / "in/pictures/3.jpg").read_bytes()
    change(given)
    wholes.append(in_a_folder(given, tmp_path / "second"))
    for seed in range(10):
        chance = random.Random(seed)
        (tmp_path / "in/pictures/3.jpg").write_bytes(before)
        bucket.objects.clear()
        for number in range(2):
            bucket.revive(chance.randint(1, 45), after=chance.random() < 0.5)
            with contextlib.suppress(Killed):
                run(given, Part(chance.randint(1, 2), 2) if seed % 3 == 0 else None)
            found = {
                name: text
                for name, text in files(bucket).items()
                if not name.startswith(("slices/", "plan.json"))
            }
            assert found in ({}, *wholes)
            if seed % 2 and not number:
                change(given)
        bucket.revive()
        run(given)
        assert is_whole(bucket, wholes[seed % 2])


@pytest.mark.parametrize("kill_at", [0, 5, 20, 25, 28, 29, 30])
def test_a_picture_that_changed_is_noticed_and_the_old_set_stays_whole_until_it_is_replaced(
    given: Given, bucket: Bucket, tmp_path: Path, kill_at: int
) -> None:
    wholes = [in_a_folder(given, tmp_path / "first")]
    run(given)
    change(given)
    wholes.append(in_a_folder(given, tmp_path / "second"))

    def look(operation: str, key: str) -> None:
        found = {
            name: text
            for name, text in files(bucket).items()
            if not name.startswith(("slices/", "plan.json"))
        }
        assert found in wholes

    bucket.answer = look
    bucket.revive(kill_at)
    with contextlib.suppress(Killed):
        run(given)
    bucket.revive()
    run(given)
    assert is_whole(bucket, wholes[1])
    assert json.loads(wholes[0][MANIFEST_NAME])["digest"] != json.loads(wholes[1][MANIFEST_NAME])["digest"]
