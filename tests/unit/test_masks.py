"""What each kind of row and each mask trains, from the rows of a file to the labels of a set."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import sftdata

Trained = Callable[..., list[list[str]]]
CHAT = [
    {"role": "user", "content": "Name a colour"},
    {"role": "assistant", "content": "Red"},
    {"role": "user", "content": "Another"},
    {"role": "assistant", "content": "Blue"},
]
MARKED = "Human: one\nAssistant: two\nHuman: three\nAssistant: ok"


@pytest.fixture
def trained(made_data: Path, tmp_path: Path) -> Trained:
    """Prepare rows and return, for each that is kept, the stretches of text that are trained."""

    def prepare(*rows: dict[str, Any], **settings: Any) -> list[list[str]]:
        folder = made_data / "tokenizers" / "made-bytes"
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sftdata.prepare(
            tmp_path / "rows.jsonl", tokenizer=str(folder), output=tmp_path / "set", max_length=512,
            max_rejects="100%", workers=1, **settings,
        )  # fmt: skip
        decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
        stretches = {}
        for document in (document for row in sftdata.open(tmp_path / "set") for document in row.documents()):
            runs = groupby(document.labels.tolist(), key=lambda label: label != -100)
            stretches[document.example_id] = [
                decode(list(run), skip_special_tokens=False) for on, run in runs if on
            ]
        return [stretches[example] for example in sorted(stretches)]

    return prepare


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("auto", ["Red<|im_end|>", "Blue<|im_end|>"]),
        ("assistant", ["Red<|im_end|>", "Blue<|im_end|>"]),
        ("last-assistant", ["Blue<|im_end|>"]),
    ],
)
def test_a_conversation_trains_its_turns(train_on: str, expected: list[str], trained: Trained) -> None:
    assert trained({"messages": CHAT}, train_on=train_on) == [expected]


def test_a_conversation_trains_all_of_itself_when_told_so(trained: Trained) -> None:
    [[stretch]] = trained({"messages": CHAT}, train_on="all")
    assert stretch.startswith("user\nName a colour<|im_end|>")  # all but the first token of the document
    assert stretch.endswith("Blue<|im_end|>\n")


def test_a_turn_that_is_switched_off_is_context(trained: Trained) -> None:
    off = [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]
    assert trained({"messages": off}) == [["Blue<|im_end|>"]]


def test_of_prompt_and_completion_in_messages_the_completion_is_trained(trained: Trained) -> None:
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert trained(row) == [["Blue<|im_end|>"]]


def test_answers_inside_a_prompt_are_trained_when_asked_for(trained: Trained) -> None:
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert trained(row, train_on="assistant") == [["Red<|im_end|>", "Blue<|im_end|>"]]


def test_a_completion_is_trained_with_its_end_and_its_prompt_is_not(trained: Trained) -> None:
    rows = [{"prompt": "Question: one", "completion": " two"}, {"prompt": "say", "completion": ""}]
    assert trained(*rows) == [[" two<|im_end|>"], ["<|im_end|>"]]


def test_a_text_is_trained_with_its_end(trained: Trained) -> None:
    assert trained({"text": "Human one two"}) == [[" one two<|im_end|>"]]


def test_markers_train_what_lies_between_them(trained: Trained) -> None:
    given = {"response_template": "Assistant:", "instruction_template": "Human:"}
    assert trained({"text": MARKED}, **given) == [[" two\n", " ok<|im_end|>"]]


def test_without_an_instruction_marker_the_last_answer_is_trained(trained: Trained) -> None:
    assert trained({"text": MARKED}, response_template="Assistant:") == [[" ok<|im_end|>"]]


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("\nHuman: say", [" two\n", " ok\n"]), ("\nHuman: say\nAssistant:", [" two\n", " ok\n", "<|im_end|>"])],
)
def test_only_a_text_that_ends_in_an_answer_trains_its_end(
    ending: str, expected: list[str], trained: Trained
) -> None:
    given = {"response_template": "Assistant:", "instruction_template": "Human:"}
    assert trained({"text": MARKED + ending}, **given) == [expected]


def test_a_marker_that_data_spells_in_control_tokens_is_none(trained: Trained) -> None:
    given = {"response_template": "<|im_start|>assistant\n", "instruction_template": "<|im_start|>user\n"}
    typed = {"role": "user", "content": "say <|im_start|>assistant\nno"}
    [stretches] = trained({"messages": [typed, CHAT[1]]}, **given)
    assert stretches == ["Red<|im_end|>\n"]


def test_markers_as_ids_train_what_lies_between_them(trained: Trained, made_data: Path) -> None:
    encode = Tokenizer.from_file(str(made_data / "tokenizers/made-bytes/tokenizer.json")).encode
    given = {"response_template": encode("Assistant:").ids, "instruction_template": encode("Human:").ids}
    rows = [{"text": MARKED}, {"text": "nobody speaks"}]  # a row without its marker is rejected, and only it
    assert trained(*rows, **given) == [[" two\n", " ok<|im_end|>"]]


def test_the_old_collators_mask_never_trains_the_pad_id(trained: Trained) -> None:
    given = {"response_template": "Assistant:", "mask_mode": "trl-0.7.10"}
    assert trained({"text": "Human: one\nAssistant: two<|endoftext|> ok"}, **given) == [
        [" two", " ok<|im_end|>"]
    ]


def test_ids_are_trained_where_their_label_is_the_id(trained: Trained) -> None:
    rows = [
        {"input_ids": [70, 71, 72, 73], "labels": [-100, 71, -100, 73]},
        {"input_ids": [70, 71, 72, 73], "labels": [-100, 72, 73, -100]},  # shifted: rejected
    ]
    assert [len(stretches) for stretches in trained(*rows)] == [2]


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_the_first_token_of_a_document_is_never_trained(packing: str, trained: Trained) -> None:
    rows = [{"input_ids": [70 + n, 71, 72], "labels": [70 + n, 71, 72]} for n in range(3)]
    assert [len(stretch) for (stretch,) in trained(*rows, packing=packing)] == [2, 2, 2]
