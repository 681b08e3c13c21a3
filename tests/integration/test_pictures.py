"""Sets with pictures, end to end: prepared, verified, resumed, changed, and what is refused by name."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import multiprocessing
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer

import sftdata
from sftdata.batches import IGNORE_INDEX
from sftdata.cli import main
from sftdata.config import make_config
from sftdata.errors import DataError, InputChangedError, IntegrityError, UsageError
from sftdata.parts import prepare as prepare_part
from sftdata.parts import read_part
from sftdata.pictures.rows import read_picture_row
from sftdata.set.images import read_images
from sftdata.set.index import read_index, read_rest
from sftdata.set.ledger import REJECTS_NAME
from sftdata.set.manifest import Manifest, read_manifest, write_manifest
from sftdata.set.shards import write_file
from sftdata.set.verify import verify
from sftdata.workers import Workers
from tests.killed import killed_at
from tests.made_pictures import bomb, make, moving_pictures, saved
from tests.oracles.pictures import Own
from tests.picture_sets import asked, mixed_rows, write_model, write_pictures, write_rows
from tests.torture.runs import content
from tests.unit.test_pictures_ids import loaded
from tests.unit.test_pictures_masks import TEMPLATES
from tests.unit.test_pictures_rows import rows_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, rows with pictures of every kind, and a cache in which the gate remembers."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(folder / "cache"))
        write_model(folder / "model")
        write_rows(folder, mixed_rows(folder))
        yield folder


def prepare(place: Path, output: Path, rows: Path | None = None, **settings: Any) -> Manifest:
    given = {"tokenizer": str(place / "model"), "max_length": 256, "workers": 1} | settings
    return sftdata.prepare(str(rows or place / "rows.jsonl"), output=output, **given)


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    prepare(place, place / "set")
    return place / "set"


def documents_of(folder: Path) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Return ids, labels and pictures of each document, from the packed rows alone."""
    found = {}
    for row in sftdata.open(folder):
        assert row.images is not None
        assert row.image_counts is not None
        starts, pictures = np.cumsum([0, *row.seq_lengths]), np.cumsum([0, *row.image_counts])
        for number, example in enumerate(row.examples.tolist()):
            tokens, own = (
                slice(starts[number], starts[number + 1]),
                slice(pictures[number], pictures[number + 1]),
            )
            if example >= 0:
                found[example] = (
                    row.input_ids[tokens].tolist(),
                    row.labels[tokens].tolist(),
                    row.images[own].tolist(),
                )
            else:
                assert row.image_counts[number] == 0
    return found


def test_every_document_has_the_processor_s_ids_and_its_own_pictures(place: Path, made: Path) -> None:
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text("utf-8").splitlines()]
    own, found, stored = (
        Own("qwen2.5-vl", place / "model"),
        documents_of(made),
        read_images(made / "images-00000.arrow"),
    )
    image_id = read_manifest(made).vision.image_id  # type: ignore[union-attr]
    assert found.keys() == {*range(len(rows))}
    for number, row in enumerate(rows):
        files = [(place / name).read_bytes() for name in row.get("images", ())]
        texts = [
            {"role": message["role"], "content": [part for piece in pairwise(["", *message["content"].split("<image>")])
             for part in ([{"type": "image"}] if piece[0] != "" or piece[1] != message["content"].split("<image>")[0] else [])
             + [{"type": "text", "text": piece[1]}]]}
            for message in row["messages"]
        ]  # fmt: skip
        rendered = own.processor.tokenizer.apply_chat_template(
            texts, chat_template=TEMPLATES["qwen2.5-vl"], tokenize=False
        )
        ids, labels, pictures = found[number]
        theirs = (
            own.ids(rendered, [loaded(data) for data in files])
            if files
            else own.processor.tokenizer(rendered)["input_ids"]
        )
        assert ids == list(theirs), row
        assert [stored.sha256[picture] for picture in pictures] == [
            hashlib.sha256(data).digest() for data in files
        ]
        for picture, data in zip(pictures, files, strict=True):
            image = loaded(data)
            assert (stored.height[picture], stored.width[picture]) == (image.height, image.width)
            assert stored.path[picture] in row["images"]
            assert len(stored.data[picture]) == 0
        said = "".join(
            message["content"] + "<|im_end|>" for message in row["messages"] if message["role"] == "assistant"
        )
        assert own.processor.tokenizer.decode([label for label in labels if label != IGNORE_INDEX]) == said
        assert all(
            label == IGNORE_INDEX for token, label in zip(ids, labels, strict=True) if token == image_id
        )


def test_the_set_verifies_counts_its_pictures_and_says_what_made_them(place: Path, made: Path) -> None:
    assert verify(made).problems == verify(made, quick=True).problems == []
    manifest = read_manifest(made)
    ledger, vision = manifest.ledger, manifest.vision
    named = [
        name
        for line in (place / "rows.jsonl").read_text("utf-8").splitlines()
        for name in json.loads(line).get("images", ())
    ]
    files = {name: (place / name).read_bytes() for name in named}
    assert ledger.pictures_in == ledger.pictures_kept == len(named)
    assert ledger.pictures_stored == len(files)
    assert ledger.picture_bytes == sum(map(len, files.values()))
    assert ledger.picture_pixels == sum(loaded(data).width * loaded(data).height for data in files.values())
    assert vision is not None
    assert (manifest.format_version, vision.family, vision.images) == (3, "qwen2.5-vl", "..")
    assert {file.name for file in manifest.files} >= {
        "processor/preprocessor_config.json",
        "images-00000.arrow",
    }
    assert str(place) not in (made / "manifest.json").read_text("utf-8")


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_makes_the_same_bytes(place: Path, workers: int, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text("utf-8").splitlines()] * 3
    write_rows(place, rows, "many.jsonl")
    for count in (1, workers):
        prepare(place, place / f"w{count}", place / "many.jsonl", workers=count, slice_bytes=4096)
    assert content(place / "w1") == content(place / f"w{workers}")
    assert len(read_manifest(place / "w1").shards) > 3
    assert verify(place / f"w{workers}").problems == []
    for count in (1, workers):
        shutil.rmtree(place / f"w{count}")


def test_a_killed_run_resumes_to_the_same_bytes(place: Path, no_sync: None) -> None:
    rows = write_rows(place, mixed_rows(place)[:24], "few.jsonl")

    def make_it() -> object:
        return prepare(place, place / "killed", rows, slice_bytes=2048)

    changes = -killed_at(make_it, 0)
    whole = content(place / "killed")
    assert changes > 8
    for number in range(2, changes, 3):
        shutil.rmtree(place / "killed", ignore_errors=True)
        shutil.rmtree(place / "killed.partial", ignore_errors=True)
        killed_at(make_it, number)
        make_it()
        assert content(place / "killed") == whole, number


def test_slices_of_another_version_are_made_again_where_a_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(place, mixed_rows(place)[:24], "old.jsonl")
    whole = prepare(place, tmp_path / "whole", rows, slice_bytes=2048)
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.run.conclude", None)
        with pytest.raises(TypeError):
            prepare(place, tmp_path / "set", rows, slice_bytes=2048)
    (record, *_), part = sorted((tmp_path / "set.partial/slices").glob("*.json")), tmp_path / "set.partial"
    name = f"images-{record.stem}.arrow"
    table = pa.ipc.open_file((part / name).read_bytes()).read_all().drop_columns(["file_bytes"])
    file = write_file(part / name, table.schema, table.to_batches())
    said = json.loads(record.read_text())
    said["files"] = [msgspec.to_builtins(file) if one["name"] == name else one for one in said["files"]]
    record.write_text(json.dumps(said))
    assert prepare(place, tmp_path / "set", rows, slice_bytes=2048).digest == whole.digest
    assert content(tmp_path / "set") == content(tmp_path / "whole")


# --------------------------------------------------------------------------------------------- where pictures are


def test_a_set_moves_with_its_pictures_and_alone_where_it_embeds_them(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "a" / "pictures")
    rows = write_rows(
        tmp_path / "a", [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names]
    )
    prepare(place, tmp_path / "a/set", rows)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert verify(tmp_path / "b/set").problems == []
    shutil.move(tmp_path / "b/set", tmp_path / "lone")
    for quick in (False, True):
        (problem,) = verify(tmp_path / "lone", quick=quick).problems
        assert re.match(
            rf"{tmp_path}: 6 of 6 pictures, as pictures/\d.jpg: not there. Fix: put their folder back",
            problem,
        )
        assert "--embed-images" in problem
    rows = tmp_path / "b/rows.jsonl"
    shutil.move(tmp_path / "lone", tmp_path / "b/set")
    (tmp_path / "b/elsewhere").mkdir()
    shutil.move(tmp_path / "b/pictures", tmp_path / "b/elsewhere/pictures")
    assert (
        "put their folder back there, or prepare the set anew, with --images DIR"
        in verify(tmp_path / "b/set").problems[0]
    )
    prepare(place, tmp_path / "b/set", rows, images=tmp_path / "b/elsewhere")
    assert verify(tmp_path / "b/set").problems == []
    shutil.move(tmp_path / "b/elsewhere/pictures", tmp_path / "b/pictures")
    prepare(place, tmp_path / "b/whole", rows, embed_images=True)
    shutil.move(tmp_path / "b/whole", tmp_path / "whole")
    shutil.rmtree(tmp_path / "b")
    assert verify(tmp_path / "whole").problems == []
    stored = read_images(tmp_path / "whole/images-00000.arrow")
    assert [hashlib.sha256(data).digest() for data in stored.data] == list(stored.sha256)


def test_files_of_many_record_batches_hold_the_same(
    place: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.set.shards._BATCH_TOKENS", 512)
    monkeypatch.setattr("sftdata.set.images._BATCH_BYTES", 5000)
    prepare(place, tmp_path / "set", embed_images=True)
    for name in ("shard-00000.arrow", "images-00000.arrow"):
        assert pa.ipc.open_file((tmp_path / "set" / name).read_bytes()).num_record_batches > 4
    assert documents_of(tmp_path / "set") == documents_of(made)
    assert verify(tmp_path / "set").problems == []
    one, many = (read_images(folder / "images-00000.arrow") for folder in (made, tmp_path / "set"))
    assert (many.sha256, many.path, many.format) == (one.sha256, one.path, one.format)
    assert many.tokens.tolist() == one.tokens.tolist()
    assert [hashlib.sha256(data).digest() for data in many.data] == one.sha256
    opened = sftdata.open(tmp_path / "set")
    order = [*range(len(opened))][::-1]
    for name in ("images", "image_counts"):
        rows = [getattr(opened[row], name) for row in order]
        assert getattr(opened.take(order), name).tolist() == np.concatenate(rows).tolist()


def test_parts_uris_structs_and_parquet_hold_their_pictures(place: Path, tmp_path: Path) -> None:
    data = saved(make(61, 45), "PNG")
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": uri}}
    talk = [
        {"role": "user", "content": [part, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Red"},
    ]
    prepare(place, tmp_path / "uris", write_rows(tmp_path, [{"messages": talk}]))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.utf8())])
    messages = pa.array([asked("<image>?", "Red")["messages"]])
    table = pa.table(
        {"messages": messages, "images": pa.array([[{"bytes": data, "path": "x.png"}]], pa.list_(image))}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    prepare(place, tmp_path / "structs", tmp_path / "rows.parquet")
    for name in ("uris", "structs"):
        stored = read_images(tmp_path / name / "images-00000.arrow")
        assert list(stored.sha256) == [hashlib.sha256(data).digest()]
        assert bytes(stored.data[0]) == data
        assert stored.path == [""]
        assert verify(tmp_path / name).problems == []
        assert read_manifest(tmp_path / name).vision.images == "."  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="embed_images=True acts on pictures that rows name by their paths"):
        prepare(place, tmp_path / "no", tmp_path / "rows.parquet", embed_images=True)
    with pytest.raises(UsageError, match='images=".*" acts on pictures that rows name by their paths'):
        prepare(place, tmp_path / "no", tmp_path / "rows.parquet", images=tmp_path)


def test_a_picture_that_changed_is_noticed_by_verify_prepare_and_reuse(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 24)
    lines = [asked(f"<image>{'What? ' * 40}", "Red", images=[f"pictures/{name}"]) for name in names]
    rows = write_rows(tmp_path, lines)
    first = prepare(place, tmp_path / "set", rows, slice_bytes=1024, max_length=512)
    notes: list[str] = []

    def again() -> Manifest:
        notes.clear()
        return prepare(place, tmp_path / "set", rows, slice_bytes=1024, max_length=512, on_note=notes.append)

    assert again().digest == first.digest
    assert "up to date" in notes[-1]
    (tmp_path / "pictures/3.jpg").write_bytes(saved(make(300, 200, seed=9), "JPEG"))
    assert verify(tmp_path / "set", quick=True).problems == []
    assert "3.jpg: another picture by now" in verify(tmp_path / "set").problems[0]
    second = again()
    assert second.digest != first.digest
    assert verify(tmp_path / "set").problems == []
    reused, whole = next(note for note in notes if "reused" in note), len(second.shards)
    assert f"{whole - 1} of {whole} slices reused" in reused
    prepare(place, tmp_path / "anew", rows, slice_bytes=1024, max_length=512)
    assert content(tmp_path / "anew") == content(tmp_path / "set")


@pytest.mark.parametrize("now", [b"another", None])
def test_a_picture_that_changes_before_it_is_embedded_stops_the_run(
    place: Path, tmp_path: Path, now: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_pictures(tmp_path / "pictures", 1)
    rows = write_rows(tmp_path, [asked("<image>?", "Red", images=[f"pictures/{names[0]}"])])
    monkeypatch.setattr("sftdata.set.images.read_again", lambda path, folder: now)
    with pytest.raises(InputChangedError, match="pictures/0.jpg: changed while"):
        prepare(place, tmp_path / "set", rows, embed_images=True)
    assert not (tmp_path / "set").exists()


def test_a_picture_that_came_later_and_a_folder_that_moved_are_noticed(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 3)
    lines = [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names]
    rows = write_rows(tmp_path, lines)
    shutil.move(tmp_path / "pictures/1.jpg", tmp_path / "aside.jpg")
    with pytest.raises(DataError, match="1 image-missing"):
        prepare(place, tmp_path / "set", rows)
    lost = prepare(place, tmp_path / "set", rows, max_rejects="1")
    assert lost.ledger.rows_rejected == {"image-missing": 1}
    shutil.move(tmp_path / "aside.jpg", tmp_path / "pictures/1.jpg")
    assert prepare(place, tmp_path / "set", rows).ledger.pictures_kept == 3
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "pictures", tmp_path / "elsewhere/pictures")
    moved = prepare(place, tmp_path / "set", rows, images=tmp_path / "elsewhere")
    assert moved.vision is not None
    assert moved.vision.images == "../elsewhere"
    assert verify(tmp_path / "set").problems == []


def test_a_picture_that_stays_bad_keeps_nothing_from_being_up_to_date(place: Path, tmp_path: Path) -> None:
    names = [f"pictures/{name}" for name in write_pictures(tmp_path / "pictures", 24)]
    good = (tmp_path / names[3]).read_bytes()
    (tmp_path / names[2]).unlink()
    (tmp_path / names[3]).write_bytes(good[:-40])
    (tmp_path / names[4]).write_bytes(saved(make(1, 250), "PNG"))
    names[5] = "https://example.com/a.jpg"
    lines = [asked(f"<image>{'What? ' * 40}", "Red", images=[name]) for name in names]
    notes: list[str] = []

    how: dict[str, Any] = {"slice_bytes": 1024, "max_rejects": "4", "max_length": 512}

    def again(number: int = 23) -> Manifest:
        notes.clear()
        rows = write_rows(tmp_path, lines[:number])
        return prepare(place, tmp_path / "set", rows, on_note=notes.append, **how)

    missing, cut, aspect, remote = ("image-missing", "image-cut", "image-aspect", "image-remote")
    first = again()
    assert first.ledger.rows_rejected == dict.fromkeys((missing, cut, aspect, remote), 1)
    assert again().digest == first.digest
    assert "up to date" in notes[-1]
    again(24)
    assert "7 of 9 slices reused, 2 made anew" in notes[-1]  # those at the end
    (tmp_path / names[2]).write_bytes(good[:-40])
    assert again(24).ledger.rows_rejected == {cut: 2, aspect: 1, remote: 1}
    assert "8 of 9 slices reused, 1 made anew" in notes[-1]
    (tmp_path / names[4]).write_bytes(good)
    assert again(24).ledger.rows_rejected == {cut: 2, remote: 1}
    assert "8 of 9 slices reused, 1 made anew" in notes[-1]
    again(24)
    assert "up to date" in notes[-1]
    prepare(place, tmp_path / "anew", tmp_path / "rows.jsonl", **how)
    assert content(tmp_path / "anew") == content(tmp_path / "set")


def test_flipped_bits_of_sidecars_are_found(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures")
    rows = write_rows(tmp_path, [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names])
    prepare(place, tmp_path / "set", rows, embed_images=True)
    path, draw = tmp_path / "set/images-00000.arrow", random.Random(3)
    whole = path.read_bytes()
    for _ in range(200):
        at = draw.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        assert verify(tmp_path / "set").problems, at
    path.write_bytes(whole)
    assert verify(tmp_path / "set").problems == []
    table, manifest = pa.ipc.open_file(whole).read_all(), read_manifest(tmp_path / "set")
    columns = table.to_pydict()
    columns["bytes"][0] = columns["bytes"][1]
    other = write_file(path, table.schema, pa.table(columns, table.schema).to_batches())
    files = tuple(other if file.name == path.name else file for file in manifest.files)
    write_manifest(tmp_path / "set", msgspec.structs.replace(manifest, files=files))
    assert "a picture: other bytes than its hash" in verify(tmp_path / "set").problems[0]


Columns = dict[str, list[list[int]]]


def train_a_picture(rows: Columns, image_id: int) -> None:
    row = next(row for row, ids in enumerate(rows["input_ids"]) if image_id in ids)
    rows["labels"][row][rows["input_ids"][row].index(image_id)] = image_id


def name_another_picture(rows: Columns, image_id: int) -> None:
    last = max(max(row, default=0) for row in rows["images"])
    next(row for row in rows["images"] if row)[0] = last + 1


def exchange_pictures(rows: Columns, image_id: int) -> None:
    row = next(row for row in rows["images"] if len({*row}) > 1)
    row.reverse()


def count_one_more(rows: Columns, image_id: int) -> None:
    rows["image_counts"][0][0] += 1


def move_a_count(rows: Columns, image_id: int) -> None:
    counts = next(counts for counts in rows["image_counts"] if sum(map(bool, counts)) > 1)
    first, second = [place for place, count in enumerate(counts) if count][:2]
    counts[first], counts[second] = counts[first] - 1, counts[second] + 1


LAWS = {
    "row 0: a token that stands for a picture is trained": train_a_picture,
    "slice 0: a document names a picture that is not among its": name_another_picture,
    "slice 0: a document has other image tokens than its pictures": exchange_pictures,
    "slice 0: a document has other image tokens than": move_a_count,
    "shard-00000.arrow: image_counts do not sum to the images": count_one_more,
}


@pytest.mark.parametrize("what", LAWS)
def test_a_broken_law_is_found_although_all_digests_fit(made: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(made, tmp_path / "set")
    path, manifest = folder / "shard-00000.arrow", read_manifest(folder)
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    rows = table.to_pydict()
    assert manifest.vision is not None
    LAWS[what](rows, manifest.vision.image_id)
    file = write_file(path, table.schema, pa.table(rows, table.schema).to_batches())
    shard = msgspec.structs.replace(manifest.shards[0], **msgspec.structs.asdict(file))
    write_manifest(folder, msgspec.structs.replace(manifest, shards=(shard, *manifest.shards[1:])))
    problems = verify(folder).problems
    assert any(what in line and line.startswith(str(folder)) for line in problems), problems


def test_two_documents_with_equal_ids_and_other_pictures_are_not_the_same(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for seed in range(2):
        (tmp_path / f"pictures/{seed}.png").write_bytes(saved(make(60, 60, seed=seed), "PNG"))
    turns = [("pictures/0.png",), ("pictures/1.png",), ("pictures/0.png",)]
    lines = [asked("<image>?", "Red", images=list(names)) for names in turns]
    lines += [
        asked("<image>?", "Red", "<image>?", "Red", images=["pictures/0.png", f"pictures/{seed}.png"])
        for seed in range(2)
    ]
    prepare(place, tmp_path / "set", write_rows(tmp_path, lines))
    index = read_index(tmp_path / "set/index-00000.arrow")
    order = np.argsort(index.example_ids)
    whole, prompt = index.document_hash[order].tolist(), index.prompt_hash[order].tolist()
    found = documents_of(tmp_path / "set")
    assert found[0][0] == found[1][0]
    assert whole[0] == whole[2] != whole[1]
    assert prompt[0] == prompt[2] != prompt[1]
    assert whole[3] != whole[4]
    assert prompt[3] == prompt[4] == prompt[0], "the second picture comes behind the first answer"


# ------------------------------------------------------------------------------------------------- over-long rows


def test_no_cut_falls_into_a_picture_or_before_it(place: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(saved(make(84, 84), "PNG"))  # 9 tokens
    picture = ["pictures/a.png"]
    lines = [
        asked("<image>?", "Red " * 400, images=picture),
        asked("?", "Red " * 400, "<image>?", "Red", images=picture),
        asked("?", "Red", "<image>?", "Red", images=picture),
    ]
    manifest = prepare(place, tmp_path / "set", write_rows(tmp_path, lines), max_length=96)
    assert manifest.ledger.rows_dropped == {"overlong-picture": 1}
    assert (manifest.ledger.pictures_in, manifest.ledger.pictures_kept) == (3, 2)
    assert manifest.ledger.pictures_in_dropped_rows == 1
    assert verify(tmp_path / "set").problems == []
    (rest,) = read_rest(tmp_path / "set/rest-00000.arrow", pictured=True)
    assert rest.image_counts is not None
    assert dict(zip(rest.example_ids.tolist(), rest.image_counts.tolist(), strict=True)) == {0: 0, 1: 1}
    with pytest.raises(DataError, match="overlong-picture"):
        prepare(place, tmp_path / "none", write_rows(tmp_path, lines[1:2], "one.jsonl"), max_length=96)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"overlong": "split"}, "overlong=.split. would cut pictures off"),
        ({"overlong": "truncate-left"}, "overlong=.truncate-left. would cut pictures off"),
        ({"packing": "wrapped"}, 'packing="wrapped" cuts rows anywhere'),
    ],
)
def test_what_would_cut_or_lose_pictures_is_refused_before_any_work(
    settings: dict[str, Any], why: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        prepare(place, tmp_path / "set", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["parts in any order", "a killed part", "an executor"])
def test_parts_and_a_cluster_make_the_same_bytes(
    place: Path, tmp_path: Path, how: str, no_sync: None
) -> None:
    names = [f"pictures/{name}" for name in write_pictures(tmp_path / "pictures", 9)]
    lines = [asked(f"<image>{'What? ' * number}", "Red", images=[names[number % 9]]) for number in range(40)]
    rows = write_rows(tmp_path, [*lines, asked("<image>?", "Red", images=["pictures/none.jpg"])])
    given: dict[str, Any] = {
        "tokenizer": str(place / "model"),
        "max_length": 128,
        "slice_bytes": 1024,
        "max_rejects": "1",
    }
    whole = sftdata.prepare(str(rows), output=tmp_path / "whole", workers=1, **given)

    def run(part: str | None) -> Manifest | None:
        config = make_config(inputs=[str(rows)], output=tmp_path / "set", **given)
        return prepare_part(config, Workers(1), part=None if part is None else read_part(part))

    if how == "an executor":
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            made: Manifest | None = sftdata.prepare(str(rows), output=tmp_path / "set", workers=pool, **given)
    elif how == "a killed part":
        killed_at(lambda: run("2/3"), 12)
        assert run("3/3") is None
        (tmp_path / names[0]).write_bytes(saved(make(50, 400), "JPEG"))
        assert run("1/3") is None
        made = run(None)  # looks at the pictures of what was there
        shutil.rmtree(tmp_path / "whole")
        whole = sftdata.prepare(str(rows), output=tmp_path / "whole", workers=1, **given)
    else:
        *others, made = [run(part) for part in ("3/3", "1/3", "2/3")]
        assert others == [None, None]
    assert made is not None
    assert (made.digest, made.vision) == (whole.digest, whole.vision)
    assert content(tmp_path / "set") == content(tmp_path / "whole")
    assert verify(tmp_path / "set").problems == []


# ------------------------------------------------------------------------------------------------------- rejects


def test_bad_pictures_are_rejected_by_name_and_the_others_stay(place: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    good = saved(make(60, 60), "JPEG")
    png = saved(make(60, 60), "PNG")
    at = png.index(b"IDAT") + 20
    broken = png[:at] + bytes(16) + png[at + 16 :]
    files = {
        "good.jpg": good,
        "cut.jpg": good[:-40],
        "bomb.png": bomb(),
        "text.jpg": b"<html>404</html>",
        "thin.png": saved(make(1, 250), "PNG"),
    }
    for name, data in (files | {"broken.png": broken}).items():
        (tmp_path / "pictures" / name).write_bytes(data)
    cases = {
        "image-missing": asked("<image>?", "A", images=["pictures/none.jpg"]),
        "image-remote": asked("<image>?", "A", images=["https://example.com/a.jpg"]),
        "image-cut": asked("<image>?", "A", images=["pictures/cut.jpg"]),
        "image-too-large": asked("<image>?", "A", images=["pictures/bomb.png"]),
        "image-unreadable": asked("<image>?", "A", images=["pictures/text.jpg"]),
        "image-aspect": asked("<image>?", "A", images=["pictures/thin.png"]),
        "image-outside": asked("<image>?", "A", images=["../../etc/passwd"]),
        "images-unplaced": asked("?", "A", images=["pictures/good.jpg"]),
        "images-missing": asked("<image><image>?", "A", images=["pictures/good.jpg"]),
        "video-row": asked("?", "A", videos=["a.mp4"]),
        "audio-part": asked("?", "A")
        | {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]},
    }
    lines = [asked("<image>?", "Red", images=["pictures/good.jpg"])] * 20 + list(cases.values())
    rows = write_rows(tmp_path, lines)
    manifest = prepare(place, tmp_path / "set", rows, max_rejects="50%")
    rejects = [json.loads(line) for line in (tmp_path / "set" / REJECTS_NAME).read_text("utf-8").splitlines()]
    assert [reject["code"] for reject in rejects] == list(cases)
    assert all(reject["fix"] for reject in rejects)
    thin = next(reject for reject in rejects if reject["code"] == "image-aspect")
    assert thin["reason"].startswith("picture 1 of the row has 250x1 pixels: ")
    ledger = manifest.ledger
    assert (ledger.pictures_in, ledger.pictures_kept, ledger.pictures_in_rejected_rows) == (26, 20, 6)
    more = write_rows(
        tmp_path, [*lines[:20], asked("<image>?", "A", images=["pictures/broken.png"])], "broken.jsonl"
    )
    assert prepare(place, tmp_path / "quick", more).ledger.rows_kept == 21
    checked = prepare(place, tmp_path / "checked", more, check_pixels=True, max_rejects="1")
    assert checked.ledger.rows_rejected == {"image-unreadable": 1}


def test_ids_and_texts_with_image_tokens_of_their_own_are_rejected(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 1)
    rows = write_rows(tmp_path, [asked("<image>?", "Red", images=[f"pictures/{names[0]}"])] * 3)
    texts = write_rows(tmp_path, [{"text": "a <|image_pad|> b"}, {"text": "a b"}], "texts.jsonl")
    given = {"tokenizer": str(place / "model"), "max_length": 96, "workers": 1, "max_rejects": "1"}
    manifest = sftdata.prepare([str(rows), str(texts)], output=tmp_path / "set", **given)
    assert manifest.ledger.rows_rejected == {"images-lost": 1}
    typed = [asked("<image>?", "Red", images=[f"pictures/{names[0]}"])] * 3 + [asked("<|image_pad|>?", "Red")]
    manifest = prepare(
        place,
        tmp_path / "typed",
        write_rows(tmp_path, typed, "typed.jsonl"),
        trust_control_tokens=True,
        max_rejects="1",
    )
    assert manifest.ledger.rows_rejected == {"images-lost": 1}
    assert verify(tmp_path / "typed").problems == []


# ------------------------------------------------------------------------------------------------------ settings


def test_pixels_are_bounded_and_part_of_what_a_set_is(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures")
    rows = write_rows(tmp_path, [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names])
    whole = prepare(place, tmp_path / "set", rows)
    with pytest.raises(UsageError, match="made otherwise .vision.max_pixels, vision.processor_sha256 differ"):
        prepare(place, tmp_path / "set", rows, max_pixels=28 * 28 * 4)
    small = prepare(place, tmp_path / "small", rows, max_pixels=28 * 28 * 4, min_pixels=28 * 28)
    assert small.ledger.tokens_in < whole.ledger.tokens_in
    assert max(read_images(tmp_path / "small/images-00000.arrow").tokens) <= 4
    like = sftdata.prepare(str(rows), output=tmp_path / "like", like=tmp_path / "small", workers=1)
    assert like.digest == small.digest


def test_a_response_template_trains_no_picture(place: Path, tmp_path: Path) -> None:
    """Found in the ids, it flags all that follows, a picture of the next question too."""
    names = [f"pictures/{name}" for name in write_pictures(tmp_path / "pictures", 2)]
    rows = write_rows(tmp_path, [asked("<image>?", "Red", "<image>?", "Red", images=names)])
    engine = Tokenizer.from_file(str(place / "model/tokenizer.json"))
    start, end = ((engine.token_to_id(token),) for token in ("<|im_start|>", "<|im_end|>"))
    manifest = prepare(place, tmp_path / "set", rows, response_template=start, instruction_template=end)
    assert manifest.vision is not None
    ids, labels, _ = documents_of(tmp_path / "set")[0]
    pictures = [label for token, label in zip(ids, labels, strict=True) if token == manifest.vision.image_id]
    assert len(pictures) > 10
    assert {*pictures} == {IGNORE_INDEX}
    assert sum(label != IGNORE_INDEX for label in labels) > 10


def test_settings_on_pictures_without_any_are_refused(place: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path, [asked("?", "Red")])
    for name, value in {
        "max_pixels": 4000,
        "images": tmp_path,
        "check_pixels": True,
        "processor": place / "model",
    }.items():
        with pytest.raises(UsageError, match=f"^{name}=.* acts on .*pictures.*there are none"):
            prepare(place, tmp_path / "set", texts, **{name: value})


def test_a_text_set_beside_a_processor_is_what_it_is_without(place: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path, [asked("?", "Red", images=[]), asked("Write <image> in HTML", "Red")])
    prepare(place, tmp_path / "with", texts)
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").unlink()
    prepare(tmp_path, tmp_path / "without", texts)
    one, other = (read_manifest(tmp_path / name) for name in ("with", "without"))
    assert one.digest == other.digest
    assert one.format_version == 2
    assert '"vision":' not in (tmp_path / "with/manifest.json").read_text("utf-8")


def test_questions_that_mark_pictures_and_have_none_are_refused_or_said_and_counted(
    place: Path, tmp_path: Path
) -> None:
    marked = asked("<image>?", "Red")
    rows = write_rows(tmp_path, [marked] * 3 + [asked("?", "Red")])
    with pytest.raises(
        UsageError, match="3 of 4 sampled rows have <image> in a question, and no picture"
    ) as caught:
        prepare(place, tmp_path / "set", rows)
    assert "--map images=COLUMN" in caught.value.fix
    few = write_rows(tmp_path, [marked] + [asked("?", "Red")] * 3, "few.jsonl")
    notes = prepare(place, tmp_path / "few", few).notes
    assert any("1 of 4 sampled rows have <image> in a question" in line for line in notes)
    name = f"pictures/{write_pictures(tmp_path / 'pictures', 1)[0]}"
    answered = asked("Write HTML", "An <image>")
    mixed = write_rows(tmp_path, [marked, answered, asked("<image>?", "Red", images=[name])], "mixed.jsonl")
    assert prepare(place, tmp_path / "mixed", mixed).ledger.counters["image_markers_as_text"] == 1


def test_animations_are_counted_and_settings_of_one_picture_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for kind, data in moving_pictures().items():
        (tmp_path / f"pictures/a.{kind}").write_bytes(data)
    parts = [
        {"type": "image", "image": "pictures/a.gif", "max_pixels": 784},
        {"type": "image", "image": "pictures/a.png"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red"}]}
    counters = prepare(place, tmp_path / "set", write_rows(tmp_path, [row])).ledger.counters
    assert counters["animated_pictures"] == 2
    assert counters["column_unused:image.max_pixels"] == 1


def test_without_a_processor_pictures_are_refused_and_a_few_rejected(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").unlink()
    names = write_pictures(tmp_path / "pictures", 1)
    pictured = asked("<image>?", "Red", images=[f"pictures/{names[0]}"])
    rows = write_rows(tmp_path, [pictured] * 3)
    with pytest.raises(
        UsageError, match="3 of 3 sampled rows hold pictures, and no processor is named"
    ) as caught:
        prepare(tmp_path, tmp_path / "set", rows)
    assert "--processor FOLDER" in caught.value.fix
    assert prepare(tmp_path, tmp_path / "set", rows, processor=place / "model").ledger.rows_kept == 3
    few = write_rows(tmp_path, [asked("?", "Red")] * 9 + [pictured], "few.jsonl")
    assert prepare(tmp_path, tmp_path / "few", few, max_rejects="1").ledger.rows_rejected == {
        "no-processor": 1
    }


def test_a_formatter_s_pictures_need_a_processor_by_name(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 2)
    rows = write_rows(tmp_path, [{"q": "?", "a": "Red", "file": f"pictures/{name}"} for name in names])
    formatter = "tests.integration.test_pictures:from_files"
    with pytest.raises(UsageError, match="max_pixels acts on pictures; rows of a formatter"):
        prepare(place, tmp_path / "set", rows, formatter=formatter, max_pixels=4000)
    made = prepare(place, tmp_path / "set", rows, formatter=formatter, processor=place / "model")
    assert made.ledger.pictures_kept == 2


def from_files(row: dict[str, str]) -> dict[str, Any]:
    return asked(f"<image>{row['q']}", row["a"], images=[row["file"]])


@pytest.mark.parametrize("name", ["idefics3", "gemma3", "internvl", "pixtral", "llava-next"])
def test_other_families_whose_templates_take_parts_alone(name: str, place: Path, tmp_path: Path) -> None:
    """A content that is text becomes one part: templates of these families take nothing else."""
    write_model(tmp_path / "model", name)
    names = [f"pictures/{name}" for name in write_pictures(tmp_path / "pictures", 3)]
    lines = [
        asked("<image>?", "Red", images=names[:1]),
        asked("<image><image>?", "Red", images=names[1:]),
        asked("?", "Red"),
    ]
    manifest = prepare(
        tmp_path, tmp_path / "set", write_rows(tmp_path, lines), max_length=8192, packing="none"
    )
    assert manifest.vision is not None
    assert (manifest.ledger.rows_kept, manifest.ledger.pictures_kept) == (3, 3)
    assert verify(tmp_path / "set").problems == []
    own, found = Own(name, tmp_path / "model"), documents_of(tmp_path / "set")
    for number, row in enumerate(lines):
        parts = [
            {**message, "content": [{"type": "image"}] * message["content"].count("<image>")
             + [{"type": "text", "text": message["content"].replace("<image>", "")}]}
            for message in row["messages"]
        ]  # fmt: skip
        text = own.processor.tokenizer.apply_chat_template(
            parts, chat_template=TEMPLATES[name], tokenize=False
        )
        images = [Image.open(tmp_path / path).convert("RGB") for path in row.get("images", ())]
        theirs = own.ids(text, images) if images else list(own.processor.tokenizer(text)["input_ids"])
        assert found[number][0] == theirs, (name, number)


# ------------------------------------------------------------------------------------------- what was once wrong


def test_no_cut_falls_between_a_picture_and_the_mark_that_closes_it(place: Path, tmp_path: Path) -> None:
    """At the length that ends with the last image token the row goes whole; with the mark and one more it stays."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(saved(make(84, 84), "PNG"))
    line = asked("?", "Red", "<image>?", "Red " * 50, images=["pictures/a.png"])
    rows = write_rows(tmp_path, [line, asked("?", "Red")])
    whole = prepare(place, tmp_path / "whole", rows, max_length=512)
    assert whole.vision is not None
    ids = documents_of(tmp_path / "whole")[0][0]
    end = len(ids) - ids[::-1].index(whole.vision.image_id)
    engine = Tokenizer.from_file(str(place / "model/tokenizer.json"))
    assert whole.vision.closing == (engine.token_to_id("<|vision_end|>"),) == (ids[end],)
    for length, dropped in ((end - 1, 1), (end, 1), (end + 1, 0)):
        manifest = prepare(place, tmp_path / f"cut-{length}", rows, max_length=length)
        assert manifest.ledger.rows_dropped == ({"overlong-picture": 1} if dropped else {}), length


def test_an_error_on_long_rows_advises_what_pictures_allow(place: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures", 1)
    rows = write_rows(tmp_path, [asked("<image>?", "Red " * 100, images=[f"pictures/{names[0]}"])])
    with pytest.raises(DataError) as caught:
        prepare(place, tmp_path / "set", rows, max_length=64, overlong="error")
    assert caught.value.fix == "--overlong truncate (or drop), or a larger --max-length."
    assert (
        prepare(place, tmp_path / "set", rows, max_length=64, overlong="truncate").ledger.pictures_kept == 1
    )


def test_text_may_be_prepared_like_a_set_with_pictures(place: Path, made: Path, tmp_path: Path) -> None:
    texts, notes = write_rows(tmp_path, [asked("?", "Red")]), list[str]()
    given: dict[str, Any] = {"output": tmp_path / "set", "like": made, "workers": 1}
    manifest = sftdata.prepare(str(texts), on_note=notes.append, **given)
    assert manifest.vision is None
    assert f'like="{made}": a set with pictures; here there are none, and its processor rests.' in notes
    with pytest.raises(UsageError, match='processor=".*" acts on rows with pictures, and there are none'):
        sftdata.prepare(str(texts), processor=place / "model", **given | {"output": tmp_path / "other"})


def test_a_damaged_processor_is_refused_beside_another_tokenizer(
    place: Path, made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made, tmp_path / "made")
    path = folder / "processor/preprocessor_config.json"
    path.write_text(path.read_text("utf-8").replace("3136", "6272"), "utf-8")
    rows = write_rows(tmp_path, [asked("?", "Red")])
    with pytest.raises(IntegrityError, match="preprocessor_config.json") as caught:
        sftdata.prepare(
            str(rows), output=tmp_path / "set", like=folder, tokenizer=str(place / "model"), workers=1
        )
    assert caught.value.fix == "restore the file, or name the processor with --processor."


def test_paths_in_objects_start_from_the_current_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_pictures(tmp_path / "pictures", 2)
    lines = [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names]
    settings: dict[str, Any] = {"tokenizer": str(place / "model"), "max_length": 128, "workers": 1}
    with pytest.raises(DataError, match="image-missing"):
        sftdata.prepare(lines, output=tmp_path / "set", **settings)
    there = sftdata.prepare(lines, output=tmp_path / "there", images=tmp_path, **settings)
    monkeypatch.chdir(tmp_path)
    here = sftdata.prepare(lines, output=tmp_path / "set", **settings)
    assert here.vision == there.vision
    assert here.ledger.pictures_kept == 2
    assert verify(tmp_path / "set").problems == []


def test_a_set_that_waits_to_be_placed_is_made_anew_where_a_picture_changed(
    place: Path, tmp_path: Path, no_sync: None
) -> None:
    """Of the same size, so that only its bytes tell."""
    names = write_pictures(tmp_path / "pictures", 4)
    rows = write_rows(tmp_path, [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names])

    def make_it() -> object:
        return prepare(place, tmp_path / "set", rows)

    changes = -killed_at(make_it, 0)
    for number in range(1, changes):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        shutil.rmtree(tmp_path / "set.partial", ignore_errors=True)
        killed_at(make_it, changes - number)
        if (tmp_path / "set.partial/manifest.json").exists():
            break
    assert (tmp_path / "set.partial/manifest.json").exists()
    assert not (tmp_path / "set").exists()
    picture = tmp_path / "pictures/0.jpg"
    data = picture.read_bytes()
    other = saved(make(60, 90, seed=77), "JPEG")
    picture.write_bytes(other + b"\0" * (len(data) - len(other)))
    make_it()
    assert verify(tmp_path / "set").problems == []


# -------------------------------------------------------------------------------------------------------- advice


def pictured(folder: Path, *names: str) -> Path:
    """Write a picture and rows that name it in each of these folders; return the rows, or the folders of several."""
    for name in names:
        (folder / name / "pictures").mkdir(parents=True)
        (folder / name / "pictures/a.png").write_bytes(saved(make(140, 140), "PNG"))
        write_rows(folder / name, [asked("<image>?", "Red", images=["pictures/a.png"])] * 2, f"{name}.jsonl")
    return folder / names[0]


# What is refused, the flags that do as the advice says, and those that it gives: relative to the folder of the test.
ADVICE: dict[str, tuple[list[str], str, list[str]]] = {
    "--processor FOLDER": (["rows/rows.jsonl", "-t", "bare"], "--processor FOLDER", ["--processor", "model"]),
    "--images DIR": (["rows/rows.jsonl", "more/more.jsonl", "-t", "model"], "--images DIR", ["--images", "rows"]),
    "--packing bfd": (["rows/rows.jsonl", "-t", "model", "--packing", "wrapped"], "--packing bfd", ["--packing", "bfd"]),
    "--overlong truncate": (
        ["rows/rows.jsonl", "-t", "model", "--overlong", "split"], "--overlong truncate", ["--overlong", "truncate"],
    ),
    "a formatter's": (
        ["rows/rows.jsonl", "-t", "model", "--formatter", "tests.test_advice:everything", "--max-pixels", "9000"],
        "--processor FOLDER", ["--processor", "model"],
    ),
    "a smaller --max-pixels": (
        ["rows/rows.jsonl", "-t", "model", "--max-length", "44"],
        "a larger --max-length, or a smaller --max-pixels", ["--max-pixels", "784", "--min-pixels", "784"],
    ),
    "--map images=COLUMN": (["rows/named.jsonl", "-t", "model"], "--map images=photo", ["--map", "images=photo"]),
    "--max-pixels of --min-pixels": (
        ["rows/rows.jsonl", "-t", "model", "--min-pixels", "9000", "--max-pixels", "8000"],
        "give a larger --max-pixels, from 9000 on.", ["--max-pixels", "9000"],
    ),
    "a folder above": (
        ["rows/upwards.jsonl", "-t", "model"], "write paths that start from a folder above all pictures", ["--images", "."],
    ),
    "<image>": (["rows/unplaced.jsonl", "-t", "model"], "write <image> where each of them stands", []),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVICE)
def test_advice_on_pictures_is_followed(
    name: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, advice, more = ADVICE[name]
    monkeypatch.chdir(tmp_path)
    pictured(tmp_path, "rows", "more")
    shutil.copytree(place / "model", "model")
    shutil.copytree("model", "bare", ignore=lambda *_: ["preprocessor_config.json"])
    write_rows(tmp_path / "rows", [asked("?", "Red", images=["pictures/a.png"])], "unplaced.jsonl")
    write_rows(tmp_path / "rows", [asked("<image>?", "Red", photo="pictures/a.png")], "named.jsonl")
    write_rows(
        tmp_path / "rows", [asked("<image>?", "Red", images=["../more/pictures/a.png"])], "upwards.jsonl"
    )
    assert main(["prepare", *flags, "-o", "set", "--workers", "1"]) in (2, 3)
    write_rows(tmp_path / "rows", [asked("<image>?", "Red", images=["more/pictures/a.png"])], "upwards.jsonl")
    assert advice in capsys.readouterr().err
    if not more:
        write_rows(tmp_path / "rows", [asked("<image>?", "Red", images=["pictures/a.png"])], "unplaced.jsonl")
    for flag in more[::2]:
        if flag in flags:
            del flags[flags.index(flag) : flags.index(flag) + 2]
    assert main(["prepare", *flags, *more, "-o", "set", "--workers", "1"]) == 0, capsys.readouterr().err
    assert verify("set").problems == []
    assert read_manifest(Path("set")).ledger.pictures_kept


# ----------------------------------------------------------------------------------------------------- public rows

# File: what its refusal names, and how many rows and pictures the set has once the fix is followed.
PUBLIC: dict[str, tuple[str, int, int]] = {
    "lf_mllm_demo.json": ("", 6, 8),
    "lf_v1_multimodal_demo.jsonl": ("--images DIR", 24, 32),
    "llava_instruct_100.json": ("--images DIR", 100, 100),
    "llava_tables_252.jsonl": ("--images DIR", 252, 252),
    "qwen_vl_single_images.json": ("--images DIR", 3, 3),
    "qwen_vl_video.json": ("leave out rows with films.", 0, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_file_makes_a_set_or_is_refused_with_a_fix_that_works(
    name: str, place: Path, tmp_path: Path, shared_data: Path
) -> None:
    """The pictures of most files are not public; those made here have their names."""
    source, (fix, rows, pictures) = shared_data / "datasets/vision" / name, PUBLIC[name]
    template = str(shared_data / "templates/plain/qwen2-vl.jinja")
    given: dict[str, Any] = {
        "tokenizer": str(shared_data / "tokenizers/qwen2.5-instruct"), "processor": place / "model", "chat_template": template,
        "max_length": 4096, "workers": 1,
    }  # fmt: skip
    if fix:
        with pytest.raises((UsageError, DataError)) as caught:
            sftdata.prepare(str(source), output=tmp_path / "set", **given)
        assert fix in caught.value.fix, caught.value
        if name == "qwen_vl_video.json":
            return
        given["images"] = tmp_path / "pictures"
        for row in rows_of(source):
            read = read_picture_row(row)
            for number, picture in enumerate(read.pictures if read else ()):
                path = tmp_path / "pictures" / (picture.path or "")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(saved(make(56 + 28 * (number % 5), 84, seed=number), "PNG"))
    manifest = sftdata.prepare(str(source), output=tmp_path / "set", **given)
    assert verify(tmp_path / "set").problems == []
    assert (manifest.ledger.rows_kept, manifest.ledger.pictures_kept) == (rows, pictures)
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text("utf-8")
    assert f"| `vision/{name}` | {manifest.settings['formats'][0]} | {rows} | {pictures} |" in page


# ------------------------------------------------------------------------------------------------------- shown


def test_pictures_are_boxes_on_a_terminal_and_small_pictures_on_a_page(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name from the data is escaped on both; a picture that is gone, or another by now, leaves its box alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "a<b>\x1b[31m.jpg"):
        Path(name).write_bytes(saved(make(600, 900, seed=len(name)), "JPEG"))
    lines = [
        asked("<image>?", "Red", images=["cat.jpg"]),
        asked("<image>?", "Blue", images=["a<b>\x1b[31m.jpg"]),
    ]
    write_rows(tmp_path, lines)
    base = ["-t", str(place / "model"), "--max-length", "2048", "--max-pixels", "20000"]
    assert main(["preview", "rows.jsonl", *base]) == 0
    assert "[image 900x600 cat.jpg]" in capsys.readouterr().out
    assert main(["prepare", "rows.jsonl", *base, "-o", "set", "--workers", "1"]) == 0
    for arguments in (
        ["inspect", "set"],
        ["inspect", "set", "--html", "page.html"],
        ["audit", "set"],
        ["stats", "set"],
    ):
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "[image 900x600 cat.jpg]" in said
    assert "\x1b" not in said
    page = Path("page.html").read_text("utf-8")
    assert "a<b>" not in page
    uris = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(uris) == 2
    for uri in uris:
        assert max(Image.open(io.BytesIO(base64.b64decode(uri))).size) <= 160
        assert len(uri) < 40_000
    Path("cat.jpg").write_bytes(saved(make(8, 8), "JPEG"))
    assert main(["inspect", "set", "--html", "page.html"]) == 0
    page = Path("page.html").read_text("utf-8")
    assert page.count("data:image/jpeg") == 1
    assert page.count("[image 900x600") == 2
