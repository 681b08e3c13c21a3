"""The gutter names who speaks as the template's own headers do, in every face; text that spells a header is text."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sftdata.config import PrepareConfig
from sftdata.pages import macro
from sftdata.run import preview
from sftdata.show.terminal import print_view
from sftdata.show.view import Piece, find_turns, open_shown, view_example
from sftdata.vocabulary import read_vocabulary
from tests.shown_sets import CHAT, TOKENIZER, encode_marked, write_set


def turns(marked: str) -> list[tuple[str, str]]:
    """Return (role, text) of a string: control tokens in angle brackets, ⟦ ⟧ around what is trained."""
    pieces = [
        Piece(word, (0,), part.startswith("⟦"), word[0] in "<[")
        for part in re.split(r"(⟦.*?⟧)", marked, flags=re.DOTALL)
        for word in re.findall(r"<[^<>]+>|\[/?[A-Z_]+\]|\s+|[^\s<\[]+", part.strip("⟦⟧"))
    ]
    return [(role, "".join(piece.text for piece in turn)) for role, turn in find_turns(pieces)]


@pytest.mark.parametrize(
    ("marked", "roles"),
    [
        ("<bos><|im_start|>system\nBe<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n", "system assistant"),
        ("<s><|header|>user<|/header|>\n\nHi<|eot|><|header|>ipython<|/header|>\n\n3<|eot|>", "user tool"),
        ("<|system|>Be<|user|>Hi<|assistant|>⟦Yo<|user|>⟧Go<|observation|>3", "system user assistant user tool"),
        ("<s>[INST]Hi[/INST]⟦Yo</s>⟧[INST]Go[/INST]⟦Yes</s>⟧", "user assistant user assistant"),
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yo<end_of_turn>⟧\n", "user assistant"),
        ("<｜bos｜>Be kind.<｜User｜>Hi<｜Assistant｜>⟦Yo<｜eos｜>⟧", "prompt user assistant"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>planner\nGo<|im_end|>\n", "user planner"),
        ("### Human: Hi\n### Assistant:⟦ Yo<eos>⟧", "prompt answer"),
        ("<bos>⟦Once upon a time<eos>⟧", "text"),
        ("Nothing is trained", "prompt"),
    ],
)  # fmt: skip
def test_roles_are_those_of_the_headers(marked: str, roles: str) -> None:
    found = turns(marked)
    assert " ".join(role for role, _ in found) == roles
    assert "".join(text for _, text in found) == re.sub("[⟦⟧]", "", marked)


def test_a_header_that_the_data_spells_is_text() -> None:
    typed = [
        token for part in ("<|", "im", "_start", "|>", "assistant", "\n") for token in encode_marked(part)[0]
    ]
    before, after = encode_marked("<|im_start|>user\n")[0], encode_marked("<|im_end|>")[0]
    ids = np.array([*before, *typed, *after], np.int32)
    document = view_example(ids, np.full(len(ids), -100, np.int32), read_vocabulary(TOKENIZER))
    assert [role for role, _ in document.turns()] == ["user"]


def test_every_face_names_the_roles_and_puts_each_at_its_turn(tmp_path: Path) -> None:
    view = open_shown(write_set(tmp_path / "set", [CHAT.format("Why?", "So.")])).view(0)
    out = io.StringIO()
    print_view(view, Console(file=out, width=200, color_system=None))
    lines = [line.split("│" if "│" in line else "┃")[0].split() for line in out.getvalue().splitlines()[2:6]]
    assert [line[0] for line in lines if len(line) == 2] == ["user", "assistant"]
    parts = ("<|im_start|>user\n", "Why?<|im_end|>\n", "<|im_start|>assistant\n")
    places = np.cumsum([0, *(len(encode_marked(part)[0]) for part in parts)]).tolist()
    assert [line[-1] for line in lines] == [str(place) for place in places]
    assert re.findall(r'<div class="turn"><b>(\w+)</b>', macro("documents.html.jinja", "fragment")(view)) == [
        "user",
        "assistant",
    ]
    roles = [piece["role"] for piece in view.to_json()["documents"][0]["pieces"]]
    assert list(dict.fromkeys(roles)) == ["user", "assistant"]


@pytest.mark.parametrize(
    "name",
    [
        *("llama-3.2-instruct", "minicpm3-4b", "minimind", "phi-3-mini", "qwen2.5-instruct", "qwen3"),
        *("made-bytes", "made-metaspace", "made-strips"),
    ],
)
def test_roles_of_templates_are_told_apart(home: Path, tmp_path: Path, name: str) -> None:
    said = [
        ("system", "Be kind."),
        ("user", "Zero?"),
        ("assistant", "One."),
        ("user", "Two?"),
        ("assistant", "Three."),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    folder = home / "tokenizers" / name
    config = PrepareConfig(
        inputs=[str(tmp_path / "chat.jsonl")], tokenizer=str(folder), output=tmp_path / "none", max_length=256
    )
    (example,) = preview(config, 1).examples
    document = view_example(example.input_ids, example.labels, read_vocabulary(folder))
    found = [(role, "".join(piece.text for piece in pieces)) for role, pieces in document.turns()]
    assert [role for role, _ in found] == [role for role, _ in said]
    assert all(text in shown for (_, text), (_, shown) in zip(said, found, strict=True))
