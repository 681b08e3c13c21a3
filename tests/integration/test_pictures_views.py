"""Views of sets with pictures: what `prepare` would have made, by index as written, and no picture lost on the way."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.errors import DataError, UsageError
from sftdata.set.images import read_images
from sftdata.set.manifest import Manifest
from sftdata.set.rows import SetFiles
from sftdata.set.steps import Cost, measure_balance, stored_steps
from sftdata.set.verify import verify
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view
from tests.integration.test_views_by_index import assert_reads_as_written
from tests.made_pictures import make, saved
from tests.picture_sets import asked, write_model, write_rows
from tests.view_sets import contents, split, view

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_sync")


def rows_with_pictures(folder: Path, number: int = 60) -> list[dict[str, Any]]:
    """Return rows with none to three pictures, by path and as bytes, some equal, long, rejected or without an answer."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    draw, names, uris = random.Random(4), [], []
    for seed in range(10):
        data = saved(make(30 + 17 * seed, 40 + 31 * (seed % 4), seed=seed), "PNG")
        names.append(f"pictures/{seed}.png")
        (folder / names[-1]).write_bytes(data)
        uris.append("data:image/png;base64," + base64.b64encode(data).decode())
    rows = []
    for index in range(number):
        images = [draw.choice(names if draw.random() < 0.7 else uris) for _ in range(index % 4)]
        marks = " and ".join("<image>" for _ in images)
        answer = "Red " * draw.choice((1, 5, 60))
        rows.append(
            asked(
                f"{marks} What {index % 7}?",
                answer,
                *(("And?", "Blue") if index % 3 == 0 else ()),
                images=images,
            )
        )
        if index % 13 == 5:
            rows[-1]["messages"] = [message | {"weight": 0} for message in rows[-1]["messages"]]
    rows.append(asked("<image>?", "Red", images=["pictures/none.png"]))
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, rows with pictures, and a cache in which the gate remembers."""
    folder = tmp_path_factory.mktemp("picture-views")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(folder / "cache"))
        write_model(folder / "model")
        write_rows(folder, rows_with_pictures(folder))
        yield folder


def prepare(place: Path, output: Path, rows: Path | None = None, **settings: Any) -> Manifest:
    given = {
        "tokenizer": str(place / "model"),
        "max_length": 512,
        "workers": 1,
        "slice_bytes": 2048,
    } | settings
    return sftdata.prepare(str(rows or place / "rows.jsonl"), output=output, max_rejects="5", **given)


LAYOUTS = [
    {"packing": packing, "overlong": overlong, "max_length": length}
    for packing in ("bfd", "none")
    for overlong in ("truncate", "drop")
    for length in (64, 200, 1000)
]


@pytest.mark.parametrize("embed", [False, True])
def test_a_view_is_what_prepare_makes_and_by_index_reads_as_written(
    place: Path, tmp_path: Path, embed: bool
) -> None:
    draw = random.Random(embed)
    for base in draw.sample(LAYOUTS, 2):
        made = tmp_path / f"base-{LAYOUTS.index(base)}"
        assert prepare(place, made, embed_images=embed, **base).ledger.pictures_in > 60
        for target in draw.sample(LAYOUTS, 3):
            folder = tmp_path / f"made-{LAYOUTS.index(target)}"
            expected = prepare(place, folder, embed_images=embed, **target)
            written, indexed = (tmp_path / f"{made.name}-{folder.name}-{write}" for write in (True, False))
            found = view(written, made, **target)
            assert found.ledger.to_json() == expected.ledger.to_json(), (base, target)
            assert contents(written) == contents(folder), (base, target)
            assert (found.settings, found.vision, found.digest) == (
                expected.settings,
                expected.vision,
                expected.digest,
            )
            assert not verify(written).problems, (base, target)
            split(indexed, made, **target)
            assert_reads_as_written(indexed, written)
            assert stored_of(indexed) == stored_of(written)
            assert not verify(indexed).problems, (base, target)


def stored_of(folder: Path) -> list[tuple[Any, ...]]:
    """Return what a reader sees of the pictures of a set: facts and bytes of each that a row names, and those of the rest."""
    opened, found = sftdata.open(folder), []
    for number, row in enumerate(opened):
        stored = opened.stored_pictures(number)
        assert row.images is not None
        for picture in row.images.tolist():
            assert stored is not None
            facts = (
                getattr(stored, name)[picture]
                for name in ("sha256", "format", "path", "height", "width", "tokens")
            )
            found.append((number, picture, *facts, stored.file_bytes[picture], bytes(stored.data[picture])))
    files = SetFiles(folder, opened.manifest)
    for number in range(len(opened.manifest.shards) + 20):
        for part in files.rest(number):
            assert part.images is not None
            assert part.image_counts is not None
            found.append((number, part.images.tolist(), part.image_counts.tolist()))
    return found


RECIPES: dict[str, Settings] = {
    "by prompt": {"dedup": "prompt", "max_length": 300},
    "mixture": {"mix": {"more.jsonl": 70, "rows.jsonl": 30}, "passes": 3, "seed": 2},
    "capped": {"cap": {"*": "25 rows"}, "order": "shuffled"},
    "epochs": {"epochs": 3, "max_length": 800},
    "padded": {"pad_to_multiple_of": 8, "order": "length", "max_length": 512},
    "text alone": {"sources": "texts.jsonl"},
}


@pytest.fixture(scope="module")
def sets(place: Path) -> Path:
    """Sets `paths` and `whole`, of two folders of pictures, the second embedded; `texts` has none."""
    write_rows(place / "other", rows_with_pictures(place / "other", 40), "more.jsonl")
    write_rows(
        place, [asked(f"What is {number}?", "Red " * (number % 9)) for number in range(30)], "texts.jsonl"
    )
    prepare(place, place / "paths", max_length=300)
    prepare(place, place / "more", place / "other/more.jsonl")
    prepare(place, place / "whole", place / "other/more.jsonl", embed_images=True, slice_bytes=1 << 20)
    prepare(place, place / "texts", place / "texts.jsonl")
    return place


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_of_several_sets_and_of_views_hold_the_same_pictures_by_index_and_written(
    sets: Path, tmp_path: Path, recipe: str
) -> None:
    """A text set, one that names pictures by path and one that embeds them; and views by index of such a view."""
    settings = RECIPES[recipe]
    folders = [sets / "texts", sets / "paths", sets / ("whole" if recipe == "capped" else "more")]
    made = [tmp_path / name for name in ("indexed", "written", "again", "again-written")]
    for write in (False, True):
        found = view(made[write], *folders, write=write, **settings)
        found.ledger.check()
        view(made[2 + write], made[0], write=write, max_length=220)
    for indexed, written in (made[:2], made[2:]):
        assert_reads_as_written(indexed, written)
        assert stored_of(indexed) == stored_of(written)
        assert not verify(indexed).problems
        assert not verify(written).problems
        assert content_of(indexed) == content_of(written)
    ledger = found.ledger
    assert ledger.pictures_in == ledger.pictures_kept + ledger.pictures_in_rejected_rows + (
        ledger.pictures_in_dropped_rows + ledger.pictures_left_out
    )
    assert recipe != "text alone" or ledger.pictures_left_out > 60


def content_of(folder: Path) -> dict[int, tuple[bytes, ...]]:
    """Return the files that the pictures of each document were read from, wherever the set has them."""
    opened, found = sftdata.open(folder), {}
    vision = opened.manifest.vision
    assert vision is not None
    for number, row in enumerate(opened):
        stored, at = opened.stored_pictures(number), 0
        assert row.images is not None
        assert row.image_counts is not None
        for example, count in zip(row.examples.tolist(), row.image_counts.tolist(), strict=True):
            for picture in row.images[at : at + count].tolist():
                assert stored is not None
                data = (
                    bytes(stored.data[picture])
                    or (folder / vision.images / stored.path[picture]).read_bytes()
                )
                assert hashlib.sha256(data).digest() == stored.sha256[picture]
                found[example] = (*found.get(example, ()), data)
            at += count
    return found


def test_the_same_question_about_other_pictures_is_another_prompt(place: Path, tmp_path: Path) -> None:
    """A row with equal pictures, under another name or as bytes, is the same; a later picture is no part of the prompt."""
    (tmp_path / "pictures").mkdir()
    data = [saved(make(60, 60, seed=seed), "PNG") for seed in range(3)]
    for name, file in zip(("a", "b", "c", "again"), (*data, data[0]), strict=True):
        (tmp_path / f"pictures/{name}.png").write_bytes(file)
    a, b, c, again = (f"pictures/{name}.png" for name in ("a", "b", "c", "again"))
    uri = "data:image/png;base64," + base64.b64encode(data[0]).decode()
    lines = [
        asked("<image>?", "Red", images=[a]), asked("<image>?", "Red", images=[b]),
        asked("<image>?", "Blue", images=[again]), asked("<image>?", "Red", images=[uri]),
        asked("<image>?", "Red", "<image>?", "Red", images=[c, b]), asked("<image>?", "Red", "<image>?", "Red", images=[c, a]),
        asked("<image><image>?", "Red", images=[a, b]), asked("<image><image>?", "Red", images=[b, a]),
    ]  # fmt: skip
    prepare(place, tmp_path / "set", write_rows(tmp_path, lines))
    kept = {
        by: taken(view(tmp_path / by, tmp_path / "set", dedup=by), tmp_path / by) for by in ("prompt", "row")
    }
    assert kept == {"prompt": [0, 1, 4, 6, 7], "row": [0, 1, 2, 4, 5, 6, 7]}
    many = write_rows(tmp_path, lines * 8, "many.jsonl")
    train, held = sftdata.prepare(
        str(many),
        tokenizer=str(place / "model"),
        output=tmp_path / "parts",
        workers=1,
        max_length=64,
        eval="50%",
        seed=5,
    )  # type: ignore[misc]
    sides = [
        {number % 8 for number in taken(one, tmp_path / f"parts/{name}")}
        for one, name in ((train, "train"), (held, "eval"))
    ]
    together = [{0, 2, 3}, {1}, {4, 5}, {6}, {7}]
    assert all((group <= sides[0]) != (group <= sides[1]) for group in together)
    assert sides[0] | sides[1] == {*range(8)}


def taken(_: Manifest, folder: Path) -> list[int]:
    return sorted(
        {example for row in sftdata.open(folder) for example in row.examples.tolist() if example >= 0}
    )


def test_prepare_that_chooses_is_prepare_and_view(place: Path, tmp_path: Path) -> None:
    settings: Settings = {"dedup": "prompt", "cap": {"*": "30 rows"}, "seed": 3}
    made = prepare(place, tmp_path / "chosen", **settings)
    prepare(place, tmp_path / "all")
    chosen = view(tmp_path / "view", tmp_path / "all", **settings)
    assert (made.ledger, made.digest, made.vision) == (chosen.ledger, chosen.digest, chosen.vision)
    assert contents(tmp_path / "chosen") == contents(tmp_path / "view")
    assert not verify(tmp_path / "chosen").problems
    assert {file.name for file in made.files} >= {"processor/preprocessor_config.json"}
    assert made.ledger.pictures_left_out


def test_a_chosen_set_notices_a_picture_that_changed(place: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, rows_with_pictures(tmp_path, 12))
    notes: list[str] = []

    def again() -> Manifest:
        notes.clear()
        return prepare(place, tmp_path / "set", rows, dedup="row", on_note=notes.append)

    first = again()
    assert again().digest == first.digest
    assert "up to date" in notes[-1]
    name = next(filter(None, read_images(tmp_path / "set/images-00000.arrow").path))
    (tmp_path / name).write_bytes(saved(make(81, 133, seed=99), "PNG"))
    assert again().digest != first.digest
    assert not verify(tmp_path / "set").problems


def test_a_view_moves_with_its_bases_and_is_mended_where_they_went_alone(place: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a", rows_with_pictures(tmp_path / "a", 12))
    prepare(place, tmp_path / "a/set", rows)
    for name, write in (("view", False), ("written", True)):
        view(tmp_path / "a" / name, tmp_path / "a/set", write=write, max_length=300)
    shutil.move(tmp_path / "a", tmp_path / "b")
    for name in ("view", "written"):
        assert not verify(tmp_path / "b" / name).problems
    (tmp_path / "c").mkdir()
    for name, write in (("view", False), ("written", True)):
        shutil.move(tmp_path / "b" / name, tmp_path / "c" / name)
        assert verify(tmp_path / "c" / name).problems
        view(tmp_path / "c" / name, tmp_path / "b/set", write=write, max_length=300)
        assert not verify(tmp_path / "c" / name).problems


def test_what_cuts_pictures_is_refused_and_what_cannot_go_together(sets: Path, tmp_path: Path) -> None:
    for settings, why in (
        ({"packing": "wrapped"}, 'packing="wrapped" cuts rows anywhere'),
        ({"overlong": "split"}, "overlong=.split. would cut pictures off"),
        ({"overlong": "truncate-left"}, "overlong=.truncate-left. would cut"),
    ):
        with pytest.raises(UsageError, match=why):
            view(tmp_path / "view", sets / "texts", sets / "paths", **settings)
    with pytest.raises(DataError, match="max_length is 64") as caught:
        view(tmp_path / "view", sets / "paths", overlong="error", max_length=64)
    assert caught.value.fix == "--overlong truncate (or drop), or a larger --max-length."
    small = prepare(sets, tmp_path / "small", max_pixels=28 * 28 * 4)
    assert small.vision is not None
    with pytest.raises(UsageError, match=r"small: processor .*; .*paths has"):
        view(tmp_path / "view", sets / "paths", tmp_path / "small")
    with pytest.raises(UsageError, match=r'exclude=".*small": processor'):
        view(tmp_path / "view", sets / "paths", exclude=[str(tmp_path / "small")])


def test_a_text_that_holds_the_image_token_does_not_join_pictures(sets: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path, [{"text": "Good day"}, {"text": "a <|image_pad|> b"}], "stray.jsonl")
    prepare(sets, tmp_path / "stray", texts)
    with pytest.raises(UsageError, match=r"stray.jsonl:2: holds the token that stands") as caught:
        view(tmp_path / "view", sets / "paths", tmp_path / "stray")
    (line,) = re.findall(r"--drop FILE, with the line (\d+) in it.", caught.value.fix)
    (tmp_path / "drop.txt").write_text(line)
    made = view(tmp_path / "view", sets / "paths", tmp_path / "stray", drop=tmp_path / "drop.txt")
    assert made.ledger.documents_left_out == {"drop": 1}
    assert not verify(tmp_path / "view").problems


@pytest.mark.parametrize("kind", ["images", "packs", "rest"])
def test_flipped_bits_of_views_by_index_and_of_their_bases_are_found(
    sets: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(sets / "whole", tmp_path / "whole")
    view(tmp_path / "view", tmp_path / "whole", write=False, max_length=64)
    draw = random.Random(kind)
    for folder in ("whole", "view"):
        for path in sorted((tmp_path / folder).glob(f"{kind}-*.arrow")):
            data = path.read_bytes()
            for _ in range(10):
                at = draw.randrange(len(data))
                path.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :])
                assert verify(tmp_path / "view").problems, (path, at)
            path.write_bytes(data)
    assert not verify(tmp_path / "view").problems


def test_steps_of_equal_work_count_what_pictures_cost_the_vision_tower(sets: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    tower = {"depth": 8, "hidden_size": 256, "intermediate_size": 512, "spatial_merge_size": 2}
    says: list[str] = []
    for name, config in (("blind", text), ("seeing", {"text_config": text, "vision_config": tower})):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        settings = {
            "steps_for": "2x2",
            "model": tmp_path / f"{name}.json",
            "max_length": 512,
            "pack_over": "view",
        }
        config_of = ViewConfig(
            sets=(str(sets / "texts"), str(sets / "more")), output=tmp_path / name, **settings
        )
        make_view(config_of, say=says.append)
    assert "The work of a vision tower is not in it: --model names none." in says
    cost = stored_steps(sftdata.open(tmp_path / "seeing").manifest).cost  # type: ignore[union-attr]
    assert cost.picture is not None
    weights = 8 * (4 * 256**2 + 2 * 256 * 512)
    assert cost.picture.token == 4 * 2 * weights // 3
    assert cost.picture.square == 4**2 * 4 * 256 * 8 // 3
    measured = measure_balance(sftdata.open(tmp_path / "seeing"))
    assert measured is not None
    ratios = {name: ratio_of(tmp_path / name, cost) for name in ("blind", "seeing")}
    assert measured.mean == pytest.approx(ratios["seeing"])
    assert ratios["seeing"] < ratios["blind"]


def ratio_of(folder: Path, cost: Cost) -> float:
    """Return the mean over whole steps of 2 x 2 rows of the busiest rank's cost over that of all, counted one by one."""
    opened, costs = sftdata.open(folder), []
    for number, row in enumerate(opened):
        stored = opened.stored_pictures(number)
        assert row.images is not None
        assert cost.picture is not None
        spent = sum(cost.token * length + cost.square * length**2 for length in row.seq_lengths.tolist())
        for picture in row.images.tolist():
            assert stored is not None
            tokens = int(stored.tokens[picture])
            spent += cost.picture.token * tokens + cost.picture.square * tokens**2
        costs.append(spent)
    steps = [costs[at : at + 4] for at in range(0, len(costs) - 3, 4)]
    busiest = [max(sum(step[:2]), sum(step[2:])) / (sum(step) / 2) for step in steps]
    return sum(busiest) / len(busiest)
