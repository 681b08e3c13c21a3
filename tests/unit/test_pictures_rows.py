"""Every spelling of a row with pictures becomes the same messages and references; every bad picture is refused by name."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sftdata.errors import RowError
from sftdata.pictures.references import Reference, load_picture, read_reference
from sftdata.pictures.rows import gather_evidence, read_picture_row
from tests.made_pictures import make, saved

Row = dict[str, Any]
PNG = saved(make(12, 9), "PNG")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
IMAGE = {"type": "image"}


def text(said: str) -> Row:
    return {"type": "text", "text": said}


def user(*parts: object) -> Row:
    return {"role": "user", "content": list(parts)}


SAID = {"role": "assistant", "content": "A cat."}


def fault(row: Row) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        read_picture_row(row)
    assert caught.value.fault.fix
    return caught.value.fault.code, caught.value.fault.reason


# ------------------------------------------------------------------------------------------------------- spellings

SPELLINGS: dict[str, Row] = {
    "Hugging Face, TRL": {"messages": [user(IMAGE, text("Who?")), SAID], "images": ["a.png"]},
    "Hugging Face structs": {"messages": [user(IMAGE, text("Who?")), SAID], "images": [{"bytes": None, "path": "a.png"}]},
    "Arrow's nulls": {
        "messages": [user({"type": "image", "text": None}, {"type": "text", "text": "Who?", "image": None}), SAID],
        "images": ["a.png"],
    },
    "by index": {"messages": [user({"type": "image", "index": 0}, text("Who?")), SAID], "images": ["a.png"]},
    "Qwen-VL parts": {"messages": [user({"type": "image", "image": "a.png"}, text("Who?")), SAID]},
    "Qwen-VL file URI": {"messages": [user({"type": "image", "image": "file://a.png".replace("//", "///")}, text("Who?")), SAID]},
    "transformers": {"messages": [user({"type": "image", "path": "a.png"}, text("Who?")), SAID]},
    "OpenAI": {"messages": [user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("Who?")), SAID]},
    "OpenAI responses": {
        "messages": [user({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Who?"}), SAID]
    },
    "LLaMA-Factory v1": {
        "messages": [user({"type": "image_url", "value": "a.png"}, {"type": "text", "value": "Who?"}), SAID]
    },
    "LLaMA-Factory": {"messages": [{"role": "user", "content": "<image>Who?"}, SAID], "images": ["a.png"]},
    "a lone path": {"messages": [{"role": "user", "content": "<image>Who?"}, SAID], "images": "a.png"},
    "JSON text": {"messages": json.dumps([{"role": "user", "content": "<image>Who?"}, SAID]), "images": '["a.png"]'},
    "marker in parts": {"messages": [user(text("<image>Who?")), SAID], "images": ["a.png"]},
    "Qwen-VL in the text": {"messages": [{"role": "user", "content": "<img>a.png</img>Who?"}, SAID]},
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_same_row(name: str) -> None:
    read = read_picture_row(SPELLINGS[name])
    assert read is not None
    assert read.row == {"messages": [user(IMAGE, text("Who?")), SAID]}
    assert [(one.path or "").lstrip("/") for one in read.pictures] == ["a.png"]


def test_llava_and_sharegpt_rows_keep_their_own_keys() -> None:
    row = {
        "id": "7", "image": "x/7.jpg",
        "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A <image> tag."}],
    }  # fmt: skip
    read = read_picture_row(row)
    assert read is not None
    assert read.row == {
        "id": "7",
        "conversations": [
            {"from": "human", "value": [text("What is it?\n"), IMAGE]},
            {"from": "gpt", "value": "A <image> tag."},
        ],
    }
    assert read.pictures == (Reference("image", "x/7.jpg"),)
    assert row["image"] == "x/7.jpg", "the row is left as it is"


def test_several_pictures_keep_their_order_over_turns_prompt_and_completion() -> None:
    talk = [
        {"role": "user", "content": "<image> and <image>?"},
        SAID,
        {"role": "tool", "content": "seen <image>"},
        SAID,
    ]
    read = read_picture_row({"messages": talk, "images": ["1", "2", "3"]})
    assert read is not None
    assert [one.path for one in read.pictures] == ["1", "2", "3"]
    assert read.row["messages"] == [
        user(IMAGE, text(" and "), IMAGE, text("?")), SAID, {"role": "tool", "content": [text("seen "), IMAGE]}, SAID,
    ]  # fmt: skip
    read = read_picture_row({"prompt": talk[:1], "completion": [SAID], "images": ["1", "2"]})
    assert read is not None
    assert len(read.pictures) == 2
    assert read.row["completion"] == [SAID]


def test_other_parts_stay_where_they_are() -> None:
    other = {"type": "tool_call", "tool_call": {"name": "f"}}
    read = read_picture_row({"messages": [user(text("a<image>b"), other), SAID], "images": ["1"]})
    assert read is not None
    assert read.row["messages"] == [user(text("a"), IMAGE, text("b"), other), SAID]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Write <image> in HTML"}, SAID]},
        {"messages": [{"role": "user", "content": "<img>not a path</img>"}, SAID]},
        {"text": "a <image> b"},
        {"messages": [{"role": "user", "content": "Who?"}, SAID], "images": [], "video": None},
        {"prompt": "Who?", "completion": "A cat.", "image": None},
    ],
)
def test_rows_of_text_are_none(row: Row) -> None:
    assert read_picture_row(row) is None


def test_a_marker_in_an_answer_is_text_and_takes_no_picture() -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "<image>"}],
        "images": ["1"],
    }
    read = read_picture_row(row)
    assert read is not None
    assert read.row["messages"][1] == {"role": "assistant", "content": "<image>"}  # type: ignore[index]


# --------------------------------------------------------------------------------------------------------- refusals

ASKED = {"role": "user", "content": "<image>Who?"}
BAD: list[tuple[Row, str, str]] = [
    ({"messages": [ASKED, SAID], "images": ["1", "2"]}, "images-unplaced", "holds 2 pictures; the messages place 1"),
    ({"messages": [ASKED, ASKED, SAID], "images": ["1"]}, "images-missing", "messages[1] is the place of picture 2"),
    ({"messages": [ASKED, SAID], "images": []}, "images-missing", "no column holds one"),
    ({"messages": [ASKED, SAID], "image": None}, "images-missing", "no column holds one"),
    ({"messages": [user(IMAGE), SAID]}, "images-missing", "messages[0].content[0]"),
    ({"messages": [user({"type": "image", "index": 3}), SAID], "images": ["1"]}, "images-missing", "picture 4"),
    (
        {"messages": [user({"type": "image", "index": 1}, {"type": "image", "index": 1}), SAID], "images": ["1", "2"]},
        "images-unplaced", "place 1 of them",
    ),
    ({"messages": [user({"type": "image", "image": "1"}), SAID], "images": ["1"]}, "images-unplaced", "place 0"),
    ({"messages": [{"role": "user", "content": "Who?", "images": ["1"]}, SAID]}, "images-unplaced", "messages[0] holds pictures"),
    ({"messages": [ASKED, SAID], "img": "a.JPG"}, "images-missing", "the column 'img'"),
    ({"messages": [ASKED, SAID], "photos": [{"bytes": PNG}]}, "images-missing", "the column 'photos'"),
    ({"messages": [ASKED, SAID], "file": URI}, "images-missing", "the column 'file'"),
    ({"messages": [SAID], "images": ["1"]}, "images-unplaced", "place 0"),
    ({"messages": [{"role": "user", "content": "Who?"}, SAID], "images": ["1"]}, "images-unplaced", "holds 1 picture; "),
    ({"messages": [user(text("Who?")), SAID], "images": ["1", "2"]}, "images-unplaced", "place 0"),
    ({"messages": [ASKED, SAID], "images": ["1"], "image": "2"}, "images-unplaced", "'images' and 'image' both hold"),
    ({"question": "Who?", "answer": "A cat.", "image": "1"}, "images-not-in-messages", "'image'"),
    ({"prompt": "<image>Who?", "completion": "A cat.", "images": ["1"]}, "images-not-in-messages", "'images'"),
    ({"messages": [ASKED, {"role": "assistant", "content": [IMAGE]}], "images": ["1"]}, "image-in-answer", "messages[1]"),
    ({"messages": [ASKED, SAID], "images": [None]}, "image-missing", "images[0] is null"),
    ({"messages": [ASKED, SAID], "images": [""]}, "image-missing", "images[0] is empty"),
    ({"messages": [ASKED, SAID], "images": [{"bytes": None, "path": None}]}, "image-missing", "images[0]"),
    ({"messages": [ASKED, SAID], "images": [7]}, "image-value", "images[0] is a number"),
    ({"messages": [ASKED, SAID], "images": [["1"]]}, "image-value", "images[0] is an array"),
    ({"messages": [ASKED, SAID], "images": [{"name": "x"}]}, "image-value", "images[0] is an object"),
    ({"messages": [ASKED, SAID], "images": ["https://x.org/a.png"]}, "image-remote", "https://x.org/a.png"),
    ({"messages": [ASKED, SAID], "images": ["s3://bucket/a.png"]}, "image-remote", "s3://bucket"),
    ({"messages": [user({"type": "image_url", "image_url": {"url": "http://x/a.png"}}), SAID]}, "image-remote", "http://x"),
    ({"messages": [ASKED, SAID], "images": ["data:image/png;base64,!!!!"]}, "image-unreadable", "no base64"),
    ({"messages": [ASKED, SAID], "images": ["data:text/html,<p>"]}, "image-value", "text/html"),
    ({"messages": [ASKED, SAID], "video": "a.mp4"}, "video-row", "'video'"),
    ({"messages": [ASKED, SAID], "videos": ["a.mp4"], "images": ["1"]}, "video-row", "'videos'"),
    ({"messages": [ASKED, SAID], "audios": ["a.wav"]}, "audio-row", "'audios'"),
    ({"messages": [user({"type": "video", "video": "a.mp4"}), SAID]}, "video-part", "messages[0]"),
    ({"messages": [user({"type": "input_audio", "input_audio": {}}), SAID]}, "audio-part", "'input_audio'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "code", "found"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bad_or_missing_picture_is_refused_by_name(row: Row, code: str, found: str) -> None:
    given, reason = fault(row)
    assert given == code
    assert found in reason


def test_the_fix_names_the_column_that_is_not_read_and_the_place_as_the_row_writes_it() -> None:
    with pytest.raises(RowError) as caught:
        read_picture_row({"messages": [ASKED, SAID], "my file": "a.png"})
    assert caught.value.fault.fix == "--map images='my file'"
    with pytest.raises(RowError) as caught:
        read_picture_row({"messages": [user(IMAGE), SAID], "images": ["1", "2"]})
    assert caught.value.fault.fix == 'write {"type": "image"} where each of them stands.'


@pytest.mark.parametrize(
    "value", [None, "", [], 7, "a.png, of Ann", "Ann", {"name": "x"}, ["x"], {"text": "a.png"}]
)
def test_a_column_that_is_no_picture_leaves_a_row_of_text(value: object) -> None:
    assert read_picture_row({"messages": [ASKED, SAID], "more": value}) is None


def test_what_a_part_says_of_its_picture_and_nothing_reads_is_named() -> None:
    part = {"type": "image", "image": "1", "max_pixels": 50176, "resized_height": None, "text": None}
    read = read_picture_row({"messages": [user(part, text("Who?")), SAID]})
    assert read is not None
    assert read.unused == {"image.max_pixels": 1}


def test_who_answers_can_be_said() -> None:
    row = {
        "messages": [{"role": "cat", "content": "<image>"}, {"role": "user", "content": "<image>"}],
        "images": ["1"],
    }
    read = read_picture_row(row, lambda role: role == "cat")
    assert read is not None
    assert read.row["messages"][0] == {"role": "cat", "content": "<image>"}  # type: ignore[index]


# ------------------------------------------------------------------------------------------------------ references


@pytest.mark.parametrize(
    "value",
    [
        PNG, URI, URI.replace("data:image", "DATA:image"), base64.b64encode(PNG).decode(), {"bytes": PNG, "path": "a.png"},
        {"bytes": base64.b64encode(PNG).decode()}, {"url": URI}, {"type": "base64", "media_type": "image/png", "data": URI[22:]},
        {"source": {"type": "base64", "data": URI[22:]}}, URI[:60] + "\n" + URI[60:],
    ],
    ids=["bytes", "data URI", "in capitals", "base64", "struct", "struct of text", "url", "Anthropic", "source", "lines"],
)  # fmt: skip
def test_bytes_in_a_row_are_the_file(value: object, tmp_path: Path) -> None:
    reference = read_reference(value, "images[0]")
    assert reference.path is None
    assert load_picture(reference, tmp_path) == PNG


def test_paths_start_from_the_folder_of_pictures_and_links_stay_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "a b.png").write_bytes(PNG)
    (folder / "link").symlink_to(folder / "own")
    (tmp_path / "behind").symlink_to(folder)
    assert load_picture(read_reference("link/a b.png", "image"), tmp_path / "behind") == PNG
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a b.png").write_bytes(PNG)
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "file.png").symlink_to("../elsewhere/a b.png")
    for path in ("out/a b.png", "file.png", "link/../out/a b.png"):
        with pytest.raises(RowError, match=r"is a link to .*elsewhere/a b.png, outside of") as caught:
            load_picture(read_reference(path, "image"), folder)
        assert caught.value.fault.code == "image-outside"
    for path in (
        "link/a b.png",
        "./link/../link/a b.png",
        str(folder / "link" / "a b.png"),
        f"file://{folder}/link/a%20b.png",
    ):
        assert load_picture(read_reference(path, "image"), folder) == PNG


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("none.png", "image-missing"), ("../secret.png", "image-outside"), ("/etc/hostname", "image-outside"),
        ("a/../../secret.png", "image-outside"), ("folder", "image-unreadable"), ("pipe", "image-unreadable"),
        ("a\0b", "image-missing"), ("secret.png/x", "image-missing"), ("x" * 5000, "image-unreadable"),
    ],
)  # fmt: skip
def test_a_path_that_leads_to_no_picture_is_refused_by_name(path: str, code: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "secret.png").write_bytes(PNG)
    os.mkfifo(folder / "pipe")
    with pytest.raises(RowError) as caught:
        load_picture(read_reference(path, "images[3]"), folder)
    assert caught.value.fault.code == code
    assert caught.value.fault.reason.startswith("images[3] (")


def test_a_file_too_large_to_be_a_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 29)
    with pytest.raises(RowError, match="536,870,912 bytes"):
        load_picture(read_reference("huge.png", "image"), tmp_path)


# -------------------------------------------------------------------------------------------------------- evidence


def test_the_evidence_counts_ways_sources_and_faults() -> None:
    rows = [
        SPELLINGS["LLaMA-Factory"],
        SPELLINGS["LLaMA-Factory"],
        SPELLINGS["OpenAI"],
        {"text": "a"},
        BAD[0][0],
    ]
    rows.append({"messages": [user({"type": "image", "image": URI}), SAID]})
    found = gather_evidence(rows)
    assert (found.rows, found.first) == (6, "a.png")
    assert found.lines == [
        "2 of 6 rows: pictures as <image> in the messages",
        "2 of 6 rows: pictures as parts of the messages",
        "3 pictures by path",
        "1 picture by bytes",
        "1 of 6 rows rejected: images-unplaced",
    ]


def rows_of(path: Path) -> list[Row]:
    content = path.read_text(encoding="utf-8")
    found: list[Row] = (
        [json.loads(line) for line in content.splitlines() if line.strip()]
        if path.suffix == ".jsonl"
        else json.loads(content)
    )
    return found


@pytest.mark.parametrize(
    ("name", "pictures", "faults"),
    [
        ("llava_instruct_100.json", 100, {}),
        ("llava_tables_252.jsonl", 252, {}),
        ("qwen_vl_single_images.json", 3, {}),
        ("qwen_vl_video.json", 0, {"video-row": 3}),
        ("lf_mllm_demo.json", 8, {}),
        ("lf_v1_multimodal_demo.jsonl", 32, {}),
    ],
)
def test_every_public_file_is_read_or_refused_by_name(
    name: str, pictures: int, faults: dict[str, int], shared_data: Path
) -> None:
    found = gather_evidence(rows_of(shared_data / "datasets/vision" / name))
    assert found.sources.total() == pictures
    assert found.faults == faults
