"""Sets with pictures as others have them: datasets with Image features in and out, and what differs between two sets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer

import sftdata
from sftdata.cli import main
from sftdata.errors import DataError, IntegrityError, UsageError
from sftdata.set.manifest import Manifest
from sftdata.set.verify import verify
from tests.integration.test_pictures_views import content_of
from tests.made_pictures import make, saved
from tests.picture_sets import asked, write_model, write_rows
from tests.view_sets import view

pytestmark = pytest.mark.usefixtures("no_sync")
FILES = [
    saved(make(30 + 20 * seed, 60, seed=seed), kind)
    for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "PNG"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, four pictures, and rows with none to three of them."""
    folder = tmp_path_factory.mktemp("pictures-out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(folder / "cache"))
        write_model(folder / "model")
        (folder / "pictures").mkdir()
        for number, data in enumerate(FILES):
            (folder / f"pictures/{number}.bin").write_bytes(data)
        write_rows(folder, lines())
        yield folder


def lines(number: int = 12) -> list[dict[str, Any]]:
    found = []
    for index in range(number):
        names = [f"pictures/{(index + more) % 4}.bin" for more in range(index % 4)]
        found.append(asked(f"{'<image> ' * len(names)}What {index}?", f"Red {index}", images=names))
    return found


def prepare(place: Path, inputs: Any, output: Path, **settings: Any) -> Manifest:
    given = {"tokenizer": str(place / "model"), "max_length": 200, "workers": 1} | settings
    return sftdata.prepare(inputs, output=output, **given)


# --------------------------------------------------------------------------------------------------- datasets


def as_dataset(place: Path) -> datasets.Dataset:
    """Return the rows with their pictures as Image features."""
    rows = [row | {"images": [str(place / name) for name in row["images"]]} for row in lines()]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("how", ["saved", "embedded", "parquet", "object", "one picture a row"])
def test_image_features_of_datasets_come_through(place: Path, tmp_path: Path, how: str) -> None:
    """Saved by path or with the bytes in it, as Parquet, and as an object: each picture's file is the one it was."""
    dataset, settings = as_dataset(place), dict[str, Any]()
    inputs: Any = str(tmp_path / "data")
    expected = {
        number: tuple(FILES[int(name[9])] for name in row["images"]) for number, row in enumerate(lines())
    }
    if how == "saved":
        dataset.save_to_disk(tmp_path / "data")
    elif how == "embedded":
        dataset = (
            dataset.with_format("arrow")
            .map(datasets.table.embed_table_storage, batched=True)
            .with_format(None)
        )
        dataset.save_to_disk(tmp_path / "data")
    elif how == "parquet":
        inputs = str(tmp_path / "data.parquet")
        dataset.to_parquet(inputs)
        with pytest.raises(DataError, match="image-outside") as caught:
            prepare(place, inputs, tmp_path / "set")
        assert "--images DIR" in caught.value.fix
        settings = {"images": place}
    elif how == "object":
        inputs, settings = dataset, {"images": place}
    else:
        rows = [
            asked(f"<image>{number}?", "Red", image={"bytes": data, "path": None})
            for number, data in enumerate(FILES)
        ]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).save_to_disk(
            tmp_path / "data"
        )
        expected = {number: (data,) for number, data in enumerate(FILES)}
    manifest = prepare(place, inputs, tmp_path / "set", **settings)
    assert manifest.ledger.rows_rejected == {}
    assert content_of(tmp_path / "set") == {number: files for number, files in expected.items() if files}
    assert not verify(tmp_path / "set").problems


@pytest.mark.parametrize("kind", ["by path", "embedded", "by index"])
def test_a_set_goes_to_a_dataset_with_its_pictures(place: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    prepare(place, str(place / "rows.jsonl"), folder, embed_images=kind == "embedded")
    if kind == "by index":
        view(tmp_path / "view", folder, write=False, max_length=150)
        folder = tmp_path / "view"
    exported = sftdata.export(folder, output=tmp_path / "out", to="datasets")
    found = datasets.load_from_disk(tmp_path / "out")
    assert isinstance(found.features["images"].feature, datasets.Image)
    expected = [
        (document.example_id, document.input_ids.tolist(), document.labels.tolist())
        for row in sftdata.open(folder)
        for document in row.documents()
        if (document.labels != -100).any()
    ]
    assert exported.rows == len(found) == len(expected) == 12
    files = content_of(folder)
    plain = found.cast_column("images", datasets.List(datasets.Image(decode=False)))
    for (example, ids, labels), row, shown in zip(expected, plain, found, strict=True):
        assert (row["input_ids"], row["labels"]) == (ids, labels)
        assert tuple(image["bytes"] for image in row["images"]) == files.get(example, ())
        for image, data in zip(shown["images"], files.get(example, ()), strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))


def test_other_targets_have_no_place_for_pictures_and_a_lost_one_is_named(
    place: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path, lines(3))
    (tmp_path / "pictures").mkdir()
    for number, data in enumerate(FILES):
        (tmp_path / f"pictures/{number}.bin").write_bytes(data)
    prepare(place, str(rows), tmp_path / "set")
    for to in ("token-rows", "verl", "nemo-rl", "tinker", "megatron-bridge"):
        with pytest.raises(UsageError, match=f"the rows of {to} have no place for") as caught:
            sftdata.export(tmp_path / "set", output=tmp_path / "out", to=to)  # type: ignore[arg-type]
        assert caught.value.fix == "--to datasets"
    prepare(place, str(rows), tmp_path / "weighted", loss_weights=True)
    with pytest.raises(UsageError, match="weights, which datasets cannot carry") as caught:
        sftdata.export(tmp_path / "weighted", output=tmp_path / "out", to="datasets")
    assert caught.value.fix == "prepare it without --loss-weights."
    (tmp_path / "pictures/2.bin").write_bytes(FILES[1])
    with pytest.raises(IntegrityError, match="pictures/2.bin: another picture by now"):
        sftdata.export(tmp_path / "set", output=tmp_path / "out", to="datasets")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- diff


def test_a_difference_says_which_pictures_came_went_or_changed(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    """A file that changed under its name, a picture of another size, an answer, and rows that are the same under other names."""
    for side in ("a", "b"):
        (tmp_path / side / "pictures").mkdir(parents=True)
        for number, data in enumerate(FILES):
            (tmp_path / side / f"pictures/{number}{side}.bin").write_bytes(data)
    (tmp_path / "b/pictures/1b.bin").write_bytes(
        saved(make(50, 60, seed=40), "PNG")
    )  # of the size of the one before
    (tmp_path / "b/pictures/2b.bin").write_bytes(saved(make(300, 60, seed=41), "PNG"))
    rows = {
        side: [
            asked("<image>?", "Red", images=[f"pictures/0{side}.bin"]),
            asked("<image><image>?", "Red " * 3, images=[f"pictures/0{side}.bin", f"pictures/1{side}.bin"]),
            asked("<image>?", "Green", images=[f"pictures/2{side}.bin"]),
            asked("<image> and", "Blue" if side == "a" else "Red", images=[f"pictures/3{side}.bin"]),
            asked("?", "Red"),
        ]
        for side in ("a", "b")
    }
    rows["b"].append(asked("<image> new?", "Red", images=["pictures/0b.bin"]))
    for side in ("a", "b"):
        prepare(place, str(write_rows(tmp_path / side, rows[side])), tmp_path / side / "set")
    found = sftdata.diff(tmp_path / "a/set", tmp_path / "b/set")
    kinds = {change.kind: change.documents for change in found.changes if change.documents}
    assert (found.same, kinds) == (2, {"came": 1, "picture": 1, "answer": 1, "prompt": 1})
    (change,) = (change for change in found.changes if change.kind == "picture")
    (example,) = change.examples
    boxes = [[piece.text for piece in one.pieces if piece.picture] for one in (example.a, example.b) if one]
    assert boxes == [
        ["[image 60x30 0a.bin]", "[image 60x50 1a.bin]"],
        ["[image 60x30 0b.bin]", "[image 60x50 1b.bin]"],
    ]
    assert main(["diff", str(tmp_path / "a/set"), str(tmp_path / "b/set")]) in (0, 1)
    said = capsys.readouterr().out
    assert "same ids, another picture" in said
    assert "[image 60x50 1b.bin]" in said
    assert "image_pad" not in said
    assert sftdata.diff(tmp_path / "a/set", tmp_path / "a/set").equal
    view(tmp_path / "a/view", tmp_path / "a/set", write=False, max_length=100)
    assert sftdata.diff(tmp_path / "a/set", tmp_path / "a/view").same == 5


def test_sets_of_two_tokenizers_are_compared_with_their_pictures(place: Path, tmp_path: Path) -> None:
    """Byte by byte the texts are the same, and so are the pictures but for one."""
    engine = Tokenizer.from_file(str(write_model(tmp_path / "model") / "tokenizer.json"))
    engine.add_special_tokens([AddedToken("<another>", special=True)])
    engine.save(str(tmp_path / "model/tokenizer.json"))
    rows = [asked("<image>?", f"Red {number}", images=[f"pictures/{number}.bin"]) for number in range(4)]
    for side in ("a", "b"):
        (tmp_path / side / "pictures").mkdir(parents=True)
        for number, data in enumerate(FILES):
            (tmp_path / side / f"pictures/{number}.bin").write_bytes(data)
    (tmp_path / "b/pictures/1.bin").write_bytes(saved(make(50, 60, seed=40), "PNG"))
    settings: dict[str, Any] = {"max_length": 4096}
    prepare(place, str(write_rows(tmp_path / "a", rows)), tmp_path / "a/set", **settings)
    prepare(
        place,
        str(write_rows(tmp_path / "b", rows)),
        tmp_path / "b/set",
        **settings | {"tokenizer": str(tmp_path / "model")},
    )
    found = sftdata.diff(tmp_path / "a/set", tmp_path / "b/set")
    assert (found.same, {one.kind: one.documents for one in found.changes if one.documents}) == (
        3,
        {"picture": 1},
    )
    assert "two tokenizers" in found.notes[0]
