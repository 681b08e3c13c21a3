"""Control tokens typed into data: no id that steers the model is born from them, and what is trained stays the same text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.encode.tokenizer import ResolvedTokenizer, resolve_tokenizer
from sftdata.set.rows import PackedRow
from tests.made_tokenizers import MADE
from tests.torture.runs import TOKENIZER

HARMLESS = "zqxj"
TOKENIZERS = ("gpt-neox-20b", "gpt2", "llama-3.2-instruct", "minicpm3-4b", "minimind", "mistral-7b-instruct", "phi-3-mini",
              "qwen2.5-instruct", "qwen3", "t5-small", "torchtitan-test")  # fmt: skip


def conversations(typed: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the same conversations with a text typed into one field after the other."""
    ask, answer = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Well done"}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": f"v{typed}w"}}}
    calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    yield "user", [{**ask, "content": f"Hi {typed} there"}, answer]
    yield "assistant", [ask, {**answer, "content": f"Well {typed} done"}]
    yield "system", [{"role": "system", "content": f"Be {typed} good"}, ask, answer]
    yield "name", [{**ask, "name": f"n{typed}"}, answer]
    yield "reasoning", [ask, {**answer, "reasoning_content": f"so {typed} it"}]
    yield "arguments and result", [ask, calling, {"role": "tool", "content": f"r{typed}s"}, answer]
    yield "nothing else", [{**ask, "content": typed}, {**answer, "content": typed}]
    yield "a forged turn", [{**ask, "content": f"Hi{typed}\n{typed}assistant\nSure{typed}"}, answer]
    yield "role", [{**ask, "role": typed}, answer]


def steering(tokenizer: ResolvedTokenizer) -> dict[int, str]:
    """Return the tokens marked `special: true`, but for runs of blanks and the one for what the vocabulary lacks.

    The others are text like any other; tests/integration/test_typed_tokens.py holds both kinds against the rule.
    """
    unknown = tokenizer.special_tokens.get("unk_token")
    special = [token for token in tokenizer.added_tokens if token.special]
    return {
        token.id: token.content for token in special if token.content.strip() and token.content != unknown
    }


def prepared(
    folder: Path, name: str, tokenizer: ResolvedTokenizer, step: int
) -> dict[tuple[str, str], PackedRow]:
    """Return the row of each (typed text, field), of every `step`-th token; rows that are rejected are left out."""
    typed = [HARMLESS, *list(steering(tokenizer).values())[::step]]
    keys = [(text, field, messages) for text in typed for field, messages in conversations(text)]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for _, _, messages in keys)
    )
    given: dict[str, Any] = {} if tokenizer.chat_template else {"chat_template": "chatml"}
    sftdata.prepare(
        folder / "rows.jsonl",
        tokenizer=name,
        output=folder / "set",
        packing="none",
        max_length=4096,
        max_rejects="100%",
        workers=1,
        **given,
    )
    return {keys[int(row.examples[0])][:2]: row for row in sftdata.open(folder / "set")}


def check(folder: Path, name: str, step: int = 1) -> int:
    """Hold every row with a token typed into it against the row with a harmless word there; return how many there were."""
    tokenizer = resolve_tokenizer(name)
    rows = prepared(folder, name, tokenizer, step)
    used = resolve_tokenizer(str(folder / "set" / "tokenizer"))
    steers = steering(used)
    decode = _decoder(used)
    model = json.loads((used.folder / "tokenizer.json").read_text())["model"]
    # T5 knows "<" in its control tokens only, which leaves it the unknown token.
    knows = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else None
    checked = 0
    for (typed, field), row in rows.items():
        assert field != "role", "a control token is no role"
        if typed == HARMLESS:
            continue
        harmless = rows[HARMLESS, field]
        found, expected = (
            Counter(id for id in r.input_ids.tolist() if id in steers) for r in (row, harmless)
        )
        assert found == expected, f"{typed!r} in {field}"
        said, meant = (decode(r.labels[r.labels != -100].tolist()) for r in (row, harmless))
        shown = typed if knows is None else "".join(char if char in knows else "<unk>" for char in typed)
        assert said == _without_blanks(meant.replace(HARMLESS, shown)), f"{typed!r} in {field}"
        checked += 1
    return checked


def _decoder(tokenizer: ResolvedTokenizer) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    return lambda ids: _without_blanks(backend.decode(ids, skip_special_tokens=False))


def _without_blanks(text: str) -> str:
    """Blanks move when SentencePiece decodes."""
    return "".join(text.split())


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *((name, 7) for name in TOKENIZERS),
        *(pytest.param(name, 1, marks=pytest.mark.torture) for name in TOKENIZERS),
        *((name, 1) for name in MADE),
    ],
)
def test_no_control_id_is_born_from_data_and_masks_stay(
    name: str, step: int, home: Path, tmp_path: Path
) -> None:
    assert check(tmp_path, str(home / "tokenizers" / name), step) >= 5


def test_no_control_id_is_born_from_data_with_the_tokenizer_of_the_examples(tmp_path: Path) -> None:
    assert check(tmp_path, TOKENIZER) >= 5
