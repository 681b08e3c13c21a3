"""Encoding ordinary and nasty texts with random spans, against plain calls of the reference tokenizer."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sftdata.batches import Ragged, TextBatch, TokenBatch
from tests.encoders import EVERY, encoder, reference, resolved
from tests.one_stage import Counts, encode_batch

ROWS = 150
LOSSY = "torchtitan-test"  # drops what its alphabet lacks, so its own offsets are wrong
PARTS = [
    "hello", " world", "\n", "\n\n", " ", "  ", "\t", "é", "e\u0301", "日本", "👩‍👩‍👧", "x",
    "12345", "'ll", "Don't", "▁", "\r\n", "###",
    " Human:",    "ﬁ", "½", "\u0958", "a", "B", " c", ".", "def f():\n    return 1", "\x00", "\u3000",
]  # fmt: skip
Spans = list[tuple[int, int]]  # characters


SAMPLES = [
    "Name a colour.\nRed, of course. Good day to you, and tell me about it!",
    "def f(x):\n\treturn x  # not 12345\n\n\nprint(f(2))",
    "你好，日本。今天 weather 怎么样？\nIt is 4 °C — don't ask…",
    "### Human: Hi there\n### Assistant: ok\r\n\r\n   indented\t\ttabs \n",
]


def corpus(home: Path) -> list[str]:
    if not (home / "datasets").is_dir():
        return SAMPLES
    rows = json.loads((home / "datasets/instruction/lf_alpaca_zh_demo.json").read_text(encoding="utf-8"))[:40]
    code = json.loads((home / "datasets/instruction/code_alpaca_2k.json").read_text(encoding="utf-8"))[:40]
    return [f"{row['instruction']}\n{row['output']}"[:600] for row in [*rows, *code]]


def cases(home: Path, name: str, seed: int) -> Iterator[tuple[str, Spans]]:
    """Texts with spans whose edges fall anywhere but inside an added token or before a combining mark."""
    random_ = random.Random(f"{name}{seed}")
    added = [token.content for token in resolved(home, name).added_tokens]
    torn = re.compile("|".join(re.escape(content) for content in added if content.strip()))
    real = corpus(home)
    for _ in range(ROWS):
        parts = [
            random_.choice(added if random_.random() < 0.15 else PARTS) for _ in range(random_.randint(0, 25))
        ]
        text = random_.choice(real) if random_.random() < 0.3 else "".join(parts)
        inside = {at for found in torn.finditer(text) for at in range(found.start() + 1, found.end())}
        places = [
            at
            for at in range(len(text) + 1)
            if at not in inside and not (at < len(text) and unicodedata.combining(text[at]))
        ]
        edges = sorted(random_.sample(places, min(len(places) // 2, random_.randint(0, 3)) * 2))
        yield text, list(zip(edges[::2], edges[1::2], strict=True))


def encoded(home: Path, name: str, rows: list[tuple[str, Spans]], boundary: str) -> tuple[TokenBatch, Counts]:
    spans = [[(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans] for text, spans in rows]
    nothing = Ragged.from_lists([[] for _ in rows])
    texts = [text for text, _ in rows]
    batch = TextBatch(
        texts, Ragged.from_lists(spans), nothing, np.arange(len(rows)), False, np.zeros(len(rows), np.bool_)
    )
    return encode_batch(batch, encoder(home, name), boundary=boundary)  # type: ignore[arg-type]


def row_of(batch: TokenBatch, index: int) -> tuple[list[int], list[bool]]:
    own = slice(batch.offsets[index], batch.offsets[index + 1])
    return batch.input_ids[own].tolist(), batch.trained[own].tolist()


@pytest.mark.parametrize("name", EVERY)
def test_ids_before_a_span_are_those_of_inference_and_nothing_before_it_is_trained(
    home: Path, name: str
) -> None:
    rows = list(cases(home, name, 1))
    batch, _ = encoded(home, name, rows, "split")
    for index, (text, spans) in enumerate(rows):
        ids, trained = row_of(batch, index)
        if not spans:
            assert ids == reference(home, name).encode(text, add_special_tokens=False).ids
            assert not any(trained)
            continue
        prompt = reference(home, name).encode(text[: spans[0][0]], add_special_tokens=False).ids
        assert ids[: len(prompt)] == prompt
        assert not any(trained[: len(prompt)])


@pytest.mark.parametrize("name", [name for name in EVERY if name not in (LOSSY, "t5-small", "made-unigram")])
def test_trained_tokens_spell_the_spans_and_all_tokens_the_text(home: Path, name: str) -> None:
    tokenizer = reference(home, name)
    spelling = {token.id: token.content for token in resolved(home, name).added_tokens}

    def spell(ids: list[int]) -> str:
        # Whitespace aside: SentencePiece invents it and Phi-3 swallows it; other tests look at that. Marks are composed or not.
        text, run = "", []
        for token in [*ids, None]:
            if token is None or token in spelling:
                text += tokenizer.decode(run, skip_special_tokens=False)
                text += spelling.get(token, "")
                run = []
            else:
                run.append(token)
        return bare(text)

    rows = list(cases(home, name, 2))
    batch, _ = encoded(home, name, rows, "split")
    for index, (text, spans) in enumerate(rows):
        ids, trained = row_of(batch, index)
        assert spell(ids) == bare(text)
        runs = "".join(text[a:b] for a, b in spans)
        assert spell([token for token, flag in zip(ids, trained, strict=True) if flag]) == bare(runs)


def bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).replace("▁", "").split())


@pytest.mark.parametrize("name", EVERY)
def test_merge_keeps_the_joint_ids_and_trains_what_the_reference_maps_to_the_span(
    home: Path, name: str
) -> None:
    tokenizer = reference(home, name)
    rows = list(cases(home, name, 3))
    batch, _ = encoded(home, name, rows, "merge")
    for index, (text, spans) in enumerate(rows):
        joint = tokenizer.encode(text, add_special_tokens=False)
        ids, trained = row_of(batch, index)
        assert ids == joint.ids
        for start, stop in spans:
            # As transformers does for its assistant mask: first token of the first character to last token of the last one.
            first, last = joint.char_to_token(start), joint.char_to_token(stop - 1)
            if name != LOSSY and first is not None and last is not None:
                assert all(trained[first : last + 1])


@pytest.mark.parametrize(
    "name", ["gpt2", "llama-3.2-instruct", "minimind", "qwen3", "made-bytes", "made-turns"]
)
def test_flags_equal_the_reference_offsets_where_spans_meet_its_tokens(home: Path, name: str) -> None:
    random_ = random.Random(name)
    rows, expected = [], []
    for text, _ in cases(home, name, 4):
        joint = reference(home, name).encode(text, add_special_tokens=False)
        # Some post-processors trim spaces off the offsets; without them each token starts where the one before it ended.
        ends = [end for _, end in joint.offsets]
        if text.isascii() and ends and ends[-1] == len(text):
            first, stop = sorted((random_.randrange(len(ends)), random_.randrange(len(ends))))
            start = ends[first - 1] if first else 0
            rows.append((text, [(start, ends[stop])]))
            tokens = zip([0, *ends], ends, strict=False)
            expected.append(
                (
                    joint.ids,
                    [start <= begin and end <= ends[stop] and begin < ends[stop] for begin, end in tokens],
                )
            )
    batch, _ = encoded(home, name, rows, "split")
    compared = 0
    for index, (ids, trained) in enumerate(expected):
        found = row_of(batch, index)
        if found[0] == ids:  # else the words before the span were found by looking into it
            assert found[1] == trained, rows[index]
            compared += 1
    assert compared > 0.8 * len(rows) > 20
