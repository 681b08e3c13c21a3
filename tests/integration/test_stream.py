"""Streams of constant-length rows, and formatters given as functions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.config import PrepareConfig
from sftdata.errors import DataError, UsageError

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")
TEXTS = [{"text": line} for line in (EXAMPLES / "text.txt").read_text("utf-8").splitlines() if line]


def _ids(rows: Any) -> list[int]:
    """Real tokens of the rows, without what fills up the last one."""
    rows = list(rows)
    tokens = np.concatenate([row["input_ids"] for row in rows]).tolist()
    return tokens[: sum(len(ids) for ids in _alone())] if rows else tokens


def _alone() -> list[list[int]]:
    """Each text by itself, the slow way: reference ids, and the end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return [[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in TEXTS]


@pytest.mark.feature("constant-length stream")
@pytest.mark.parametrize("buffer_rows", [1, 7, 1000])
def test_a_stream_is_the_texts_end_to_end_whatever_the_buffer(buffer_rows: int) -> None:
    rows = list(sftdata.stream(iter(TEXTS), tokenizer=TOKENIZER, max_length=64, buffer_rows=buffer_rows))
    wanted = [token for ids in _alone() for token in ids]
    assert all(len(row["input_ids"]) == len(row["labels"]) == row["seq_lengths"].sum() == 64 for row in rows)
    assert _ids(rows) == wanted  # no tail is lost, and every text ends in the end token
    assert len(rows) == -(-len(wanted) // 64)


@pytest.mark.feature("constant-length stream")
def test_all_that_fills_the_last_row_is_untrained() -> None:
    *_, last = sftdata.stream(TEXTS, tokenizer=TOKENIZER, max_length=64)
    fill = 64 - sum(len(ids) for ids in _alone()) % 64
    assert (last["labels"][64 - fill :] == -100).all()
    assert last["seq_lengths"][-1] == fill


@pytest.mark.feature("constant-length stream")
def test_an_infinite_stream_goes_on_with_the_tail_of_the_pass_before() -> None:
    wanted = [token for ids in _alone() for token in ids]
    rows = list(
        islice(
            sftdata.stream(TEXTS, tokenizer=TOKENIZER, max_length=64, infinite=True), 3 * len(wanted) // 64
        )
    )
    found = np.concatenate([row["input_ids"] for row in rows]).tolist()
    assert found == (wanted * 4)[: len(found)]
    with pytest.raises(UsageError, match="give a list"):
        sftdata.stream(iter(TEXTS), tokenizer=TOKENIZER, infinite=True)


@pytest.mark.feature("constant-length stream")
def test_shuffling_keeps_every_text_and_follows_the_seed() -> None:
    def shuffled(seed: int) -> list[int]:
        return _ids(sftdata.stream(TEXTS, tokenizer=TOKENIZER, max_length=64, shuffle=True, seed=seed))

    plain = _ids(sftdata.stream(TEXTS, tokenizer=TOKENIZER, max_length=64))
    assert shuffled(1) == shuffled(1) != plain
    assert shuffled(1) != shuffled(2)
    assert sorted(shuffled(1)) == sorted(plain)


@pytest.mark.feature("constant-length stream")
def test_a_stream_reads_no_further_than_its_buffer() -> None:
    read = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read
        for row in TEXTS * 50:
            read += 1
            yield row

    next(iter(sftdata.stream(rows(), tokenizer=TOKENIZER, max_length=64, buffer_rows=16)))
    assert read <= 32


@pytest.mark.feature("constant-length stream")
def test_chats_are_masked_in_a_stream_as_in_a_set(tmp_path: Path) -> None:
    path = EXAMPLES / "conversations.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    streamed = list(sftdata.stream(rows, tokenizer=TOKENIZER, max_length=96, buffer_rows=3))
    sftdata.prepare(
        path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=96, packing="wrapped", workers=1
    )
    stored = sftdata.open(tmp_path / "set")
    assert [row["labels"].tolist() for row in streamed] == [row.labels.tolist() for row in stored]


SETTINGS = {
    *(
        "tokenizer",
        "formatter",
        "format",
        "map",
        "map_role",
        "kind",
        "prompt_template",
        "revision",
        "chat_template",
        "date",
    ),
    *(
        "template_kwargs",
        "train_on",
        "response_template",
        "instruction_template",
        "mask_mode",
        "loss_weights",
        "boundary",
    ),
    *("eos_token", "trust_control_tokens", "max_length", "engine"),
    "seed",  # its own, of the shuffling
}


@pytest.mark.parametrize("name", sorted(PrepareConfig.model_fields.keys() - SETTINGS))
def test_a_setting_that_cannot_act_on_a_stream_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: acts on sets.*leave it out"):
        sftdata.stream(TEXTS, tokenizer=TOKENIZER, **{name: PrepareConfig.model_fields[name].default})


@pytest.mark.feature("constant-length stream")
def test_bad_rows_are_counted_and_a_buffer_of_them_stops_the_stream() -> None:
    stream = sftdata.stream([*TEXTS, {"text": None}], tokenizer=TOKENIZER, max_length=64)
    with pytest.warns(UserWarning, match="1 null-field"):
        list(stream)
    assert stream.rejected == {"null-field": 1}
    with pytest.raises(DataError, match="Nothing to train on in 2 rows"):
        list(
            sftdata.stream(
                [*TEXTS, {"text": None}, {"text": None}], tokenizer=TOKENIZER, buffer_rows=len(TEXTS)
            )
        )


# ------------------------------------------------------------------------------------------------- formatters


def _pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"What is {n}?", "a": f"A number, {n}."}) + "\n" for n in range(20))
    )
    return path


@pytest.mark.feature("formatting function")
def test_a_function_given_as_it_is_makes_the_rows(tmp_path: Path) -> None:
    note = "It is said: "  # a closure: no import can find this function

    def formatter(row: dict[str, str]) -> str:
        return f"{row['q']} {note}{row['a']}"

    manifest = sftdata.prepare(
        _pairs(tmp_path), tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, formatter=formatter
    )
    assert manifest.ledger.rows_kept == 20
    assert note.strip() in _text(tmp_path / "set")


@pytest.mark.feature("formatting function")
def test_other_code_of_a_formatter_makes_another_set(tmp_path: Path) -> None:
    path = _pairs(tmp_path)
    sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", formatter=lambda row: row["a"])
    with pytest.raises(UsageError, match="formatter differ"):
        sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", formatter=lambda row: row["q"])


@pytest.mark.feature("formatting function")
def test_a_batched_function_takes_columns_and_a_bad_row_costs_no_other(tmp_path: Path) -> None:
    @sftdata.by_columns
    def formatter(columns: dict[str, list[str]]) -> list[str]:
        if columns["q"] == ["What is 3?"]:
            raise ValueError("not three")
        return [f"{q} {a}" for q, a in zip(columns["q"], columns["a"], strict=True)]

    path = _pairs(tmp_path)
    manifest = sftdata.prepare(
        path, tokenizer=TOKENIZER, output=tmp_path / "set", formatter=formatter, max_rejects="1"
    )
    assert (manifest.ledger.rows_kept, manifest.ledger.rows_rejected) == (19, {"formatter-error": 1})


@pytest.mark.feature("formatting function")
def test_a_list_from_a_function_of_rows_is_refused_with_the_mark_that_mends_it(tmp_path: Path) -> None:
    path = _pairs(tmp_path)
    with pytest.raises(DataError, match="20 formatter-output"):
        sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", formatter=lambda row: [1, 2])


@pytest.mark.feature("formatting function")
def test_a_formatter_wins_over_messages_in_the_data() -> None:
    rows = [
        {"messages": [{"role": "user", "content": "never"}, {"role": "assistant", "content": "seen"}]}
    ] * 3
    stream = sftdata.stream(rows, tokenizer=TOKENIZER, max_length=32, formatter=lambda row: "always this")
    from transformers import AutoTokenizer

    assert "always this" in AutoTokenizer.from_pretrained(TOKENIZER).decode(next(iter(stream))["input_ids"])


def _text(folder: Path) -> str:
    from transformers import AutoTokenizer

    shards = sftdata.open(folder)
    text: str = AutoTokenizer.from_pretrained(TOKENIZER).decode(shards[0].input_ids)
    return text
