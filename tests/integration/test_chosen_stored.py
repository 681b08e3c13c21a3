"""Chosen documents and views in an object store: the bytes of a folder; both sides of a split, or none."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.choosing import SIDES
from sftdata.cli import main
from sftdata.errors import DataError, UsageError
from sftdata.set.manifest import MANIFEST_NAME
from tests.object_stores import Bucket, Killed, bucket
from tests.torture.runs import content
from tests.view_sets import Settings, chats, prepare, write_lines

__all__ = ["bucket"]
pytestmark = pytest.mark.usefixtures("no_sync")
SET = "s3://bucket/set"
SPLIT: Settings = {"eval": "30%", "dedup": "row"}
CHOICES: list[Settings] = [
    SPLIT, {"cap": {"*": "30 rows"}, "seed": 3}, {"mix": {"a*": 1, "b*": 2}, "eval": "25%"},
    {"exclude": "OTHER"},
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [write_lines(folder / f"{name}.jsonl", chats(60, ord(name), 40)) for name in "ab"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))


def make(output: str | Path, inputs: list[Path], **settings: Any) -> list[str]:
    """Make sets; return the digest of each."""
    made = prepare(output, inputs, **settings)  # type: ignore[arg-type]
    return [one.digest for one in (made if isinstance(made, tuple) else (made,))]


def found(bucket: Bucket) -> dict[str, dict[str, bytes]]:
    """Return what a reader finds: the files of a set, or of each side of a split, by one look at one object."""
    if (text := bucket.objects.get(f"{SET}/{MANIFEST_NAME}")) is None:
        return {}
    pointer = json.loads(text)
    below = bucket.below(f"{SET}/{pointer['folder']}/")
    sides = pointer.get("sides", [""])
    return {side: _files(below, f"{side}/" if side else "") for side in sides}


def _files(below: dict[str, bytes], start: str) -> dict[str, bytes]:
    names = {name.removeprefix(start): text for name, text in below.items() if name.startswith(start)}
    return {name: text for name, text in names.items() if not name.startswith(("slices/", "plan.json"))}


def in_a_folder(folder: Path, inputs: list[Path], **settings: Any) -> dict[str, dict[str, bytes]]:
    make(folder, inputs, **settings)
    return {side: content(folder / side) for side in (SIDES if "eval" in settings else ("",))}


def is_all(bucket: Bucket, wholes: dict[str, dict[str, bytes]]) -> bool:
    """Hold the sets against those of a folder, and look for what was left behind."""
    assert found(bucket) == wholes
    assert len(bucket.objects) == sum(map(len, wholes.values())) + 1, sorted(bucket.objects)
    return True


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_a_choice_in_a_store_has_the_bytes_of_one_in_a_folder(
    inputs: list[Path], bucket: Bucket, tmp_path: Path, chosen: Settings
) -> None:
    if "exclude" in chosen:
        make("s3://bucket/other", inputs[:1], cap={"*": "20 rows"})
        chosen = {"exclude": ("s3://bucket/other",)}
    wholes = in_a_folder(tmp_path / "set", inputs, **chosen)
    others = len(bucket.objects)
    make(SET, inputs, **chosen)
    assert found(bucket) == wholes
    assert len(bucket.objects) - others == sum(map(len, wholes.values())) + 1
    bucket.changes.clear()
    make(SET, inputs, **chosen)
    assert not bucket.changes, "it is up to date"
    for side in wholes:
        place = f"{SET}/{side}".rstrip("/")
        assert sftdata.verify(place).problems == []
        assert sftdata.open(place).manifest.digest == sftdata.open(tmp_path / "set" / side).manifest.digest


def test_other_settings_replace_it_only_if_asked(inputs: list[Path], bucket: Bucket, tmp_path: Path) -> None:
    make(SET, inputs, **SPLIT)
    before = dict(bucket.objects)
    for settings, what in (({}, "eval"), ({"dedup": "row"}, "eval"), ({"eval": "20%"}, "dedup, eval")):
        with pytest.raises(
            UsageError, match=rf"{SET}: holds a finished set made otherwise \((?:{what}).* differ\)"
        ):
            make(SET, inputs, **settings)
    assert bucket.objects == before
    make(SET, inputs, overwrite=True)
    assert is_all(bucket, in_a_folder(tmp_path / "whole", inputs))
    with pytest.raises(UsageError, match="made otherwise"):
        make(SET, inputs, **SPLIT)
    make(SET, inputs, **SPLIT, overwrite=True)
    assert is_all(bucket, in_a_folder(tmp_path / "split", inputs, **SPLIT))
    with pytest.raises(
        UsageError,
        match=f"{SET}: a split of train and eval, and no set itself. Fix: name one, as {SET}/train",
    ):
        sftdata.open(SET)
    with pytest.raises(UsageError, match="no such set"):
        sftdata.open("s3://bucket/none/train")


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.torture)], ids=str)
def test_killed_anywhere_there_is_the_old_split_none_or_the_new_one(
    inputs: list[Path], bucket: Bucket, tmp_path: Path, seeds: range
) -> None:
    """A reader looks before each change; no look ever finds one side without the other, or of another split."""
    old = in_a_folder(tmp_path / "old", inputs[:1], **SPLIT)
    new = in_a_folder(tmp_path / "new", inputs, **SPLIT)
    make(SET, inputs[:1], **SPLIT)
    standing = dict(bucket.objects)

    def look(operation: str, key: str) -> None:
        assert found(bucket) in allowed

    bucket.answer = look
    for seed in seeds:
        chance = random.Random(seed)
        bucket.objects = dict(standing) if seed % 2 else {}
        allowed = [old if seed % 2 else {}, new]
        given = SPLIT | {"overwrite": bool(seed % 2)}
        for _ in range(chance.randint(1, 3)):
            bucket.revive(chance.randint(1, 110), after=chance.random() < 0.5)
            with contextlib.suppress(Killed):
                make(SET, inputs, **given)
        bucket.revive()
        make(SET, inputs, **given)
        assert is_all(bucket, new)


def test_a_set_that_would_hide_a_side_is_refused(inputs: list[Path], bucket: Bucket) -> None:
    make(SET, inputs[:1], **SPLIT)
    make(f"{SET}/eval", inputs[:1], dedup="row", overwrite=True)
    with pytest.raises(
        UsageError, match=f"{SET}/eval: a set of its own, .* Fix: remove it, or choose another output."
    ):
        make(SET, inputs, **SPLIT, overwrite=True)
    bucket.objects = {
        name: text for name, text in bucket.objects.items() if not name.startswith(f"{SET}/eval/")
    }
    make(SET, inputs, **SPLIT, overwrite=True)
    assert [*found(bucket)] == [*SIDES]


def test_a_choice_that_leaves_nothing_is_in_nobodys_way(inputs: list[Path], bucket: Bucket) -> None:
    with pytest.raises(DataError, match=f"^{SET}/eval: no document is left"):
        make(SET, inputs, eval="0.0001%")
    assert not found(bucket)
    with pytest.raises(UsageError, match="not a finished set"):
        sftdata.open(SET)
    make(SET, inputs, dedup="row", max_length=64)
    assert list(found(bucket)) == [""]


def test_inputs_that_grew_are_chosen_from_anew(inputs: list[Path], bucket: Bucket, tmp_path: Path) -> None:
    make(SET, inputs[:1], **SPLIT)
    make(SET, inputs, **SPLIT)
    assert is_all(bucket, in_a_folder(tmp_path / "set", inputs, **SPLIT))


def test_the_command_names_both_sides(
    inputs: list[Path], bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.view_sets import TOKENIZER

    command = [
        "prepare",
        *map(str, inputs),
        "-t",
        TOKENIZER,
        "-o",
        SET,
        "--max-length",
        "256",
        "--workers",
        "1",
    ]
    command += ["--eval", "30%"]
    assert main(command) == 0
    assert f"{SET}/train: " in capsys.readouterr().err
    assert main([*command, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [f"{SET}/{side}" for side in SIDES]


# ------------------------------------------------------------------------------------------------- views


def test_a_view_is_written_to_a_store(
    inputs: list[Path], bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "whole", inputs)
    make("s3://bucket/whole", inputs)
    others = len(bucket.objects)
    sftdata.view(tmp_path / "whole", output=tmp_path / "view", write=True, **SPLIT)
    for place in (tmp_path / "whole", "s3://bucket/whole"):
        for name in [name for name in bucket.objects if name.startswith(SET)]:
            del bucket.objects[name]
        sftdata.view(place, output=SET, write=True, **SPLIT)
        shards = {
            side: {n: t for n, t in files.items() if n.endswith(".arrow")}
            for side, files in found(bucket).items()
        }
        assert shards == {
            side: {n: t for n, t in content(tmp_path / "view" / side).items() if n.endswith(".arrow")}
            for side in SIDES
        }
        assert sftdata.verify(f"{SET}/eval").problems == []
        assert str(tmp_path) not in str(bucket.below(SET))
    capsys.readouterr()
    assert main(["view", "s3://bucket/whole", "-o", SET, "--write", "--eval", "30%", "--dedup", "row"]) == 0
    assert "is up to date" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"made otherwise \(max_length differ\)"):
        sftdata.view("s3://bucket/whole", output=SET, write=True, max_length=64, **SPLIT)
    assert len(bucket.objects) - others == sum(map(len, found(bucket).values())) + 1


def test_a_push_in_place_of_a_side_is_refused(inputs: list[Path], bucket: Bucket, tmp_path: Path) -> None:
    make(SET, inputs, **SPLIT)
    make(tmp_path / "whole", inputs)
    standing = dict(bucket.objects)
    for side in SIDES:
        with pytest.raises(UsageError, match=f"{SET}/{side}: another set is there"):
            sftdata.push(tmp_path / "whole", f"{SET}/{side}")
    assert bucket.objects == standing


def test_a_view_by_index_in_a_store_names_sets_in_stores_alone(
    inputs: list[Path], bucket: Bucket, tmp_path: Path
) -> None:
    make(tmp_path / "whole", inputs)
    make("s3://bucket/whole", inputs)
    with pytest.raises(
        UsageError, match=f"{SET}: the view would name the tokens of {tmp_path}.*Fix: write=True"
    ):
        sftdata.view(tmp_path / "whole", output=SET)
    make("s3://bucket/split", inputs, **SPLIT)
    sftdata.view("s3://bucket/whole", output="s3://bucket/index", max_length=96)
    standing = dict(bucket.objects)
    with pytest.raises(UsageError, match="would replace the set that holds its tokens"):
        sftdata.view("s3://bucket/whole", output="s3://bucket/whole", max_length=64)
    for base, output in (("whole", "whole"), ("split/train", "split"), ("index", "whole")):
        given, output = f"s3://bucket/{base}", f"s3://bucket/{output}"
        with pytest.raises(UsageError, match=f"{output}: the view would replace the set that holds its tok"):
            sftdata.view(given, output=output, max_length=64, overwrite=True)
    assert bucket.objects == standing
    sftdata.view("s3://bucket/whole", output=SET, max_length=64)
    sftdata.view(tmp_path / "whole", output=tmp_path / "view", max_length=64)
    assert [row.labels.tolist() for row in sftdata.open(SET)] == [
        row.labels.tolist() for row in sftdata.open(tmp_path / "view")
    ]
    assert sftdata.verify(SET).problems == []
