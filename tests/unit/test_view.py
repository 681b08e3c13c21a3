"""What is coloured is what the stored labels say, in every face, and data cannot act on terminal or page."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sftdata
from sftdata.errors import UsageError
from sftdata.output import visible
from sftdata.pages import macro
from sftdata.show.terminal import print_view
from sftdata.show.view import View, open_shown, view_example, view_page
from sftdata.vocabulary import read_vocabulary
from tests.shown_sets import CHAT, TOKENIZER, encode_marked, write_set

ACTING = "a\x1b[31mred\x1b[0m \x07\x08\r\x9b2J \u202egnol\u202c \u2066x\u2069 \u200b\ufeff\U000e0041"
NASTY = f'{ACTING} <script>alert(1)</script> &amp; "q"'
TEXTS = [
    CHAT.format("What grows in March?", "Peas and\nbroad beans."),
    CHAT.format("Family?", "👩‍👩‍👧 日本語 héllo"),
    "Once upon ⟦a time.<|im_end|>⟧",
    CHAT.format(NASTY, NASTY),
    CHAT.format("Empty lines\n\n\n", "\n\nyes\n\n"),
]  # fmt: skip


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", TEXTS, max_length=400)


def stored_trained_ids(folder: Path, row: int) -> list[int]:
    packed = sftdata.open(folder)[row]
    return [int(label) for label in packed.labels if label != -100]


def render(view: View, *, styled: bool, ids: bool, width: int = 10_000, no_color: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=styled, width=width, color_system="standard" if styled else None, no_color=no_color,
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip
    print_view(view, console, ids=ids)
    return out.getvalue()


def without_key(rendered: str) -> str:
    return rendered.split("\n", 1)[1]


# ------------------------------------------------------------------------- the colours are the labels


def test_what_the_terminal_underlines_are_the_stored_labels(shown: Path) -> None:
    shards = open_shown(shown)
    for row in range(len(shards)):
        text = without_key(render(shards.view(row), styled=True, ids=True))
        segments = [found for found in re.findall(r"\x1b\[([\d;]*)m([^\x1b]*)", text) if found[1]]
        ids = [
            int(number)
            for (codes, _), (_, told) in pairwise(segments)
            if "4" in codes.split(";") and re.fullmatch(r"‹[\d ]+›", told)
            for number in told.strip("‹›").split()
        ]
        assert ids == stored_trained_ids(shown, row)


def test_what_plain_brackets_hold_are_the_stored_labels(shown: Path) -> None:
    shards = open_shown(shown)
    for row in range(len(shards)):
        text = render(shards.view(row), styled=False, ids=True)
        assert bracketed_ids(without_key(text)) == stored_trained_ids(shown, row)


def bracketed_ids(text: str) -> list[int]:
    """Read ids whose piece, right before them, is in brackets."""
    return [int(number) for numbers in re.findall(r"⟧‹([\d ]+)›", text) for number in numbers.split()]


class TrainedSpans(HTMLParser):
    """Collect the ids of the spans of class t."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[int] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "span" and "t" in (values.get("class") or "").split() and "data-ids" in values:
            self.ids += map(int, (values["data-ids"] or "").split())

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_the_page_marks_are_the_stored_labels(shown: Path) -> None:
    shards = open_shown(shown)
    for row in range(len(shards)):
        for html in (
            view_page(shards.view(row)),
            macro("documents.html.jinja", "fragment")(shards.view(row), ids=True),
            shards[row]._repr_html_(),
        ):
            parser = TrainedSpans()
            parser.feed(html)
            assert parser.ids == stored_trained_ids(shown, row)


def test_json_gives_back_ids_and_labels(shown: Path) -> None:
    shards = open_shown(shown)
    packed = shards[0]
    view = shards.view(0).to_json()
    ids = [token for document in view["documents"] for token in document["input_ids"]]
    labels = [label for document in view["documents"] for label in document["labels"]]
    assert ids == packed.input_ids[: len(ids)].tolist()
    assert labels == packed.labels[: len(ids)].tolist()
    assert len(ids) + view["padding"] == len(packed.input_ids)
    assert [document["origin"] for document in view["documents"]] == [
        f"data.jsonl:{i + 1}" for i in packed.examples if i >= 0
    ]


def test_no_color_keeps_the_underline(shown: Path) -> None:
    text = render(open_shown(shown).view(0), styled=True, ids=False, no_color=True)
    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", text) for code in found.split(";")}
    assert "4" in codes
    assert not codes & {str(code) for code in (*range(30, 38), *range(90, 98))}


# ---------------------------------------------------------------------------------- text of the tokens


@given(st.text(st.characters(exclude_characters="⟦⟧", exclude_categories=["Cs"])))
def test_pieces_spell_the_text_exactly(text: str) -> None:
    vocabulary = read_vocabulary(TOKENIZER)
    ids, _ = encode_marked(text)
    document = view_example(np.array(ids, np.int32), np.array(ids, np.int32), vocabulary)
    assert "".join(piece.text for piece in document.pieces) == text
    assert [token for piece in document.pieces for token in piece.ids] == ids


def test_a_character_of_several_tokens_is_one_piece() -> None:
    vocabulary = read_vocabulary(TOKENIZER)
    ids, _ = encode_marked("x👧")
    document = view_example(np.array(ids, np.int32), np.full(len(ids), -100, np.int32), vocabulary)
    assert [(piece.text, len(piece.ids)) for piece in document.pieces] == [("x", 1), ("👧", len(ids) - 1)]
    assert len(ids) > 3


def test_half_a_character_is_spelled_in_bytes_and_never_hidden() -> None:
    vocabulary = read_vocabulary(TOKENIZER)
    ids, _ = encode_marked("👧")
    labels = np.where(np.arange(len(ids)) < 2, -100, ids).astype(np.int32)
    document = view_example(np.array(ids, np.int32), labels, vocabulary)
    text = "".join(piece.text for piece in document.pieces)
    assert "\ufffd" not in text
    assert bytes(int(code, 16) for code in re.findall(r"\\x([0-9a-f]{2})", text)) == "👧".encode()
    trained = [piece.trained for piece in document.pieces for _ in piece.ids]
    assert trained == [False] * 2 + [True] * (len(ids) - 2)


def test_a_control_token_is_told_from_text_that_spells_it() -> None:
    vocabulary = read_vocabulary(TOKENIZER)
    real, _ = encode_marked("<|im_end|>")
    typed = [token for part in ("<|", "im", "_end", "|>") for token in encode_marked(part)[0]]
    ids = np.array(real + typed, np.int32)
    document = view_example(ids, np.full(len(ids), -100, np.int32), vocabulary)
    assert [piece.special for piece in document.pieces] == [True] + [False] * (len(document.pieces) - 1)
    assert "".join(piece.text for piece in document.pieces) == "<|im_end|>" * 2


@pytest.mark.parametrize(
    "name",
    [
        *(
            "gpt2",
            "llama-3.2-instruct",
            "minicpm3-4b",
            "minimind",
            "mistral-7b-instruct",
            "phi-3-mini",
            "qwen3",
        ),
        *("made-bytes", "made-turns", "made-prepend", "made-metaspace", "made-strips"),
    ],
)
def test_tokenizers_spell_the_text_exactly(home: Path, name: str) -> None:
    text = "Hello 日本語 👩‍👩‍👧 é\n\n  x\ty ﷽ don't"
    folder = home / "tokenizers" / name
    ids, _ = encode_marked(text, folder)
    document = view_example(np.array(ids, np.int32), np.array(ids, np.int32), read_vocabulary(folder))
    # SentencePiece tokenizers invent one space before the text, and it is shown.
    assert "".join(piece.text for piece in document.pieces).removeprefix(" ") == text


# ------------------------------------------------------------------------------------------ escaping


def test_data_cannot_act_on_the_terminal(shown: Path) -> None:
    shards = open_shown(shown)
    for styled in (True, False):
        for width in (40, 10_000):
            text = "".join(
                render(shards.view(row), styled=styled, ids=False, width=width) for row in range(len(shards))
            )
            ours = re.sub(r"\x1b\[[\d;]*m", "", text) if styled else text
            assert "\x1b[31m" not in text
            acting = {
                character for character in ours if character != "\n" and visible(character) != character
            }
            assert not acting
    assert "␛[31mred␛[0m ␇␈␍\\x9b2J \\u202egnol" in text


def test_data_cannot_act_on_the_page(shown: Path) -> None:
    shards = sftdata.open(shown)
    row = next(index for index, packed in enumerate(shards) if 3 in packed.examples)
    for html in (view_page(shards.view(row)), shards[row]._repr_html_()):
        parser = TrainedSpans()
        parser.feed(html)
        assert not parser.tags & {"script", "img", "a", "iframe", "link"}
        assert "<script>alert(1)</script> &amp;" in parser.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff]", html)


@given(st.text())
def test_visible_text_is_harmless_and_stays_so(text: str) -> None:
    once = visible(text)
    assert visible(once) == once
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", once)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_visible_leaves_writing_alone(text: str) -> None:
    assert visible(text) == text


# --------------------------------------------------------------------------------- rows and examples


def test_an_example_is_found_in_whichever_row_it_lies(tmp_path: Path) -> None:
    shards = open_shown(
        write_set(
            tmp_path / "set", [CHAT.format(f"Number {i}?", f"It is {i}.") for i in range(20)], max_length=64
        )
    )
    for example in range(20):
        (document,) = shards.view_example(example).documents
        assert f"It is {example}." in "".join(piece.text for piece in document.pieces)
        assert document.origin == f"data.jsonl:{example + 1}"


@pytest.mark.parametrize("row", [-9, 9])
def test_a_row_outside_the_set_is_refused_with_the_rows_there_are(shown: Path, row: int) -> None:
    with pytest.raises(UsageError, match=r"row -?9; the set has rows 0 to \d"):
        open_shown(shown).view(row)


def test_an_example_outside_the_set_is_refused_with_the_examples_there_are(shown: Path) -> None:
    with pytest.raises(UsageError, match="example 5; its sources hold examples 0 to 4"):
        open_shown(shown).view_example(5)


def test_the_set_itself_has_a_face_in_notebooks(shown: Path) -> None:
    html = sftdata.open(shown)._repr_html_()
    assert "tokens in" in html
    assert "<script" not in html
