"""Rows with pictures made here, and a model's folder that prepares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.made_pictures import good_pictures, make, saved
from tests.processors import write_processor
from tests.unit.test_pictures_masks import TEMPLATES

Row = dict[str, Any]


def write_model(folder: Path, name: str = "qwen2.5-vl") -> Path:
    """Write the tokenizer, the chat template and the processor of a family as one folder."""
    write_processor(folder, name)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
    return folder


def asked(*contents: str, **more: Any) -> Row:
    """Return a row of questions and answers in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    return {"messages": messages, **more}


def write_rows(folder: Path, rows: list[Row], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_pictures(folder: Path, number: int = 6) -> list[str]:
    """Write some pictures of different sizes; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for index in range(number):
        names.append(f"{index}.jpg")
        (folder / names[-1]).write_bytes(saved(make(60 + 28 * index, 90, seed=index), "JPEG"))
    return names


def mixed_rows(folder: Path) -> list[Row]:
    """Return rows of every kind and number of pictures, and of text alone; their files lie in `folder/pictures`."""
    place = folder / "pictures"
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (name, data) in enumerate(good_pictures().items()):
        (place / f"{number}.bin").write_bytes(data)
        rows.append(asked(f"<image>What is {name}?", f"Red {number}", images=[f"pictures/{number}.bin"]))
    several = [f"pictures/{number}.bin" for number in (5, 9, 5)]
    rows.append(asked("<image> and\n<image>", "Good day", "<image>?", "Yes", images=several))
    rows.append(asked("Hello", "Good day"))
    return rows
