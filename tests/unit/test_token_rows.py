"""Rows of ids with masks of every kind beside them: each mask is honoured, or refused by its name; none is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sftdata.batches import Tokens
from sftdata.errors import RowError
from sftdata.formats.fields import Fields, FormatOptions
from sftdata.formats.table import FORMATS
from sftdata.formats.tokenrows import TRAINED

TOKENS = FORMATS["tokens"]
IDS = [10, 11, 12, 13, 14, 15]


def convert(row: dict[str, Any]) -> Tokens:
    converted = TOKENS.convert(Fields(row, TOKENS.locate(row, {})), FormatOptions())
    assert isinstance(converted, Tokens)
    return converted


def refused(row: dict[str, Any]) -> str:
    with pytest.raises(RowError) as caught:
        convert(row)
    return f"{caught.value.fault.code}: {caught.value.fault.reason}"


def test_ids_alone_are_trained_whole() -> None:
    assert convert({"input_ids": IDS}) == Tokens(IDS, IDS)


@pytest.mark.parametrize("name", [*TRAINED, *(name.upper() for name in TRAINED)])
@pytest.mark.parametrize("kind", [int, bool])
def test_a_mask_of_what_is_trained_is_honoured(name: str, kind: type) -> None:
    row = {"input_ids": IDS, name: [kind(value) for value in (0, 0, 1, 1, 0, 1)]}
    assert convert(row).labels == [-100, -100, 12, 13, -100, 15]


def test_a_mask_of_the_prompt_is_honoured() -> None:
    assert convert({"input_ids": IDS, "prompt_mask": [1, 1, 1, 0, 0, 0]}).labels == [
        -100,
        -100,
        -100,
        13,
        14,
        15,
    ]


def slow(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Return (id, label) of the tokens that stay, by going over each token and asking every mask."""
    kept = []
    for index, token in enumerate(row["input_ids"]):
        if "attention_mask" in row and not row["attention_mask"][index]:
            continue
        trained = "labels" not in row or row["labels"][index] != -100
        for name in ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "response_mask"):
            trained = trained and (name not in row or bool(row[name][index]))
        trained = trained and ("prompt_mask" not in row or not row["prompt_mask"][index])
        kept.append((token, token if trained else -100))
    return kept


def test_masks_that_come_together_all_count() -> None:
    draw = random.Random(3)
    for _ in range(300):
        size, left, right = draw.randrange(1, 9), draw.randrange(3), draw.randrange(3)
        ids = [draw.randrange(100) for _ in range(left + size + right)]
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [0] * left + [1] * size + [0] * right}
        for name in (*TRAINED, "prompt_mask"):
            if draw.random() < 0.4:
                row[name] = [draw.randrange(2) for _ in ids]
        if draw.random() < 0.5:
            row["labels"] = [draw.choice((-100, token)) for token in ids]
        found = convert(row)
        assert list(zip(found.input_ids, found.labels, strict=True)) == slow(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"attention_mask": [1, 1, 0, 1, 1, 1]}, "bad-tokens: attention_mask is 0 in the middle"),
        ({"attention_mask": [0] * 6}, "bad-tokens: attention_mask is 0 everywhere"),
        ({"attention_mask": [1, 1, 2, 2, 3, 3]}, "packed-row: attention_mask numbers 3 documents"),
        ({"attention_mask": [[1] * 6] * 6}, "bad-tokens: attention_mask is an array, not a list of integers"),
        ({"attention_mask": [1]}, "bad-tokens: attention_mask has 1 entries, input_ids has 6"),
        ({"position_ids": [0, 1, 2, 0, 1, 2]}, "packed-row: position_ids start anew at token 3"),
        ({"position_ids": [0, 1, 2, 3, 2, 3]}, "packed-row: position_ids start anew at token 4"),
        ({"seq_lengths": [4, 2]}, "packed-row: seq_lengths counts 2 documents"),
        (
            {"loss_mask": [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]},
            "bad-tokens: loss_mask is an array, not a list of integers",
        ),
        ({"loss_mask": [0, 2, 1, 1, 1, 1]}, "bad-tokens: loss_mask holds 2; expected 0 or 1"),
        ({"loss_weights": [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]}, "unread-mask: loss_weights"),
        ({"segment_ids": [1, 1, 1, 2, 2, 2]}, "unread-mask: segment_ids"),
        ({"my_mask": [False, False, True, True, True, True]}, "unread-mask: my_mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(row: dict[str, Any], said: str) -> None:
    assert said in refused({"input_ids": IDS} | row)


@pytest.mark.parametrize(
    "row",
    [
        {"attention_mask": [1] * 6},
        {"position_ids": [0, 1, 2, 3, 4, 5]},
        {"position_ids": [7, 8, 9, 10, 11, 12]},
        {"seq_lengths": [6]},
        {"token_type_ids": [0, 0, 0, 1, 1, 1]},
        {"special_tokens_mask": [1, 0, 0, 0, 0, 1]},
        {"my_mask": [1] * 6},
        {"my_numbers": [1, 2, 3]},
        {"tokens": ["a", "b", "c", "d", "e", "f"]},
        {"loss_mask": None},
    ],
    ids=lambda row: next(iter(row)),
)
def test_what_says_nothing_is_let_through(row: dict[str, Any]) -> None:
    assert convert({"input_ids": IDS} | row) == Tokens(IDS, IDS)


def test_positions_of_a_padded_row_are_looked_at_without_the_padding() -> None:
    row = {"input_ids": IDS, "attention_mask": [0, 0, 1, 1, 1, 1], "position_ids": [1, 1, 0, 1, 2, 3]}
    assert convert(row).input_ids == IDS[2:]
