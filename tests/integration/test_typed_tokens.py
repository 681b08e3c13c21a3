"""Every added token, typed by every role, under both values of `special`: encoded as inference does, or kept as text by the rule.

The rule, written out here a second time: guarded is what is marked `special: true`, what has a name (BOS, EOS, pad), and what
opens or ends a turn (told by hand below; what generation_config.json calls the end of generation ends a turn). All else is
text: the ids are those of the rendered text, encoded in one piece.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tokenizers import Tokenizer

from sftdata.batches import Conversation
from sftdata.config import PrepareConfig
from sftdata.encode.engine import load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import SpanFinder
from sftdata.plan import choose_tokenizer
from sftdata.render.template import ChatTemplate
from tests.encoders import EVERY
from tests.one_stage import encode_batch, render_rows

CHATML = {"<|im_start|>", "<|im_end|>"}
TURNS: dict[str, set[str]] = {
    "llama-3.2-instruct": {
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
    },
    "mistral-7b-instruct": {"</s>"},
    "torchtitan-test": set(),
    "phi-3-mini": {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"},
    "made-turns": {"<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"},
    "made-prepend": {"</s>"},
    "made-strips": {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"},
    "made-calls": {
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜outputs▁begin｜>",
        "<｜outputs▁end｜>",
        "<｜end▁of▁sentence｜>",
    },
}
HARMLESS = "zqxj"


def conversations(typed: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield a conversation for each role, with a text typed in it."""
    ask, answer = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Well done"}
    call = {
        "type": "function",
        "id": "abcdefghi",
        "function": {"name": "f", "arguments": {"a": f"v{typed}w"}},
    }
    plain = {**call, "function": {"name": "f", "arguments": {"a": "b"}}}
    result = {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "r"}
    yield "system", [{"role": "system", "content": f"Be {typed} good"}, ask, answer]
    yield "user", [{**ask, "content": f"Hi {typed} there"}, answer]
    yield "assistant", [ask, {**answer, "content": f"Well {typed} done"}]
    yield "earlier answer", [ask, {**answer, "content": f"Well {typed} done"}, ask, answer]
    yield "reasoning", [ask, {**answer, "reasoning_content": f"so {typed} it"}]
    yield "arguments", [ask, {"role": "assistant", "content": "", "tool_calls": [call]}]
    yield (
        "tool",
        [
            ask,
            {"role": "assistant", "content": "", "tool_calls": [plain]},
            {**result, "content": f"r{typed}s"},
            answer,
        ],
    )
    yield "nothing else", [{**ask, "content": typed}, {**answer, "content": typed}]


class Bench:
    """One tokenizer with its template, its added tokens marked as given or the other way round."""

    def __init__(self, tokenizer: ResolvedTokenizer, *, flipped: bool) -> None:
        marked = tuple(replace(token, special=token.special != flipped) for token in tokenizer.added_tokens)
        self.tokenizer = replace(tokenizer, added_tokens=marked)
        assert tokenizer.chat_template is not None
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        self.finder = SpanFinder(template, tokenizer.stop_tokens, *self.tokenizer.by_mark)
        self.encoder = load_encoder(self.tokenizer, "tokenizers")
        self.backend = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))

    def ids(
        self, messages: list[dict[str, Any]], boundary: Literal["split", "merge"] = "split"
    ) -> tuple[str, list[int], list[int]] | str:
        """Return text, ids and trained ids of a conversation; the code of its fault where it is rejected."""
        rendered = render_rows(
            [Conversation(messages, [None] * len(messages))], np.zeros(1, np.int64), Renderer(self.finder)
        )
        if rendered.conversations is None:
            return rendered.faults[0][1].code
        tokens, _ = encode_batch(rendered.conversations, self.encoder, boundary=boundary)
        return (
            rendered.conversations.texts[0],
            tokens.input_ids.tolist(),
            tokens.input_ids[tokens.trained].tolist(),
        )

    def joint(self, text: str) -> list[int]:
        """Return what the tokenizer itself makes of a text."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def reads(self, ids: list[int]) -> str:
        """Return the text of some ids; blanks move when SentencePiece decodes."""
        return "".join(self.backend.decode(ids, skip_special_tokens=False).split())


def bench(name: str, home: Path, folder: Path, *, flipped: bool) -> Bench:
    source = str(home / "tokenizers" / name)
    config = PrepareConfig(inputs=["x.jsonl"], tokenizer=source, output=str(folder / "set"))
    tokenizer, _ = choose_tokenizer(config)
    if tokenizer.chat_template is None:
        tokenizer, _ = choose_tokenizer(config.model_copy(update={"chat_template": "chatml"}))
    return Bench(tokenizer, flipped=flipped)


@pytest.mark.parametrize("flipped", [False, True], ids=["as marked", "marked the other way"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "step", [pytest.param(11, id="some"), pytest.param(1, id="all", marks=pytest.mark.torture)]
)
def test_a_typed_token_is_encoded_as_inference_does_or_guarded(
    name: str, flipped: bool, step: int, home: Path, tmp_path: Path
) -> None:
    one = bench(name, home, tmp_path, flipped=flipped)
    named = set(one.tokenizer.special_tokens.values())
    turns = TURNS.get(name, CHATML)
    tokens = [token for token in one.tokenizer.added_tokens if token.content.strip()]
    guarded = {token.content for token in tokens if token.special or token.content in turns | named}
    harmless = {role: one.ids(messages) for role, messages in conversations(HARMLESS)}
    chosen = [token for token in tokens if token.content in turns] + tokens[::step]
    checked = sum(check(one, token.content, token.content in guarded, guarded, harmless) for token in chosen)
    assert checked >= 3 * len(chosen)


def check(one: Bench, typed: str, is_guarded: bool, guarded: set[str], harmless: dict[str, Any]) -> int:
    """Check the rows in which a token is typed; return how many were accepted."""
    unknown = one.tokenizer.special_tokens.get("unk_token")
    steering = {
        token.id
        for token in one.tokenizer.added_tokens
        if token.content in guarded and token.content != unknown
    }
    model = json.loads((one.tokenizer.folder / "tokenizer.json").read_text())["model"]
    # T5 knows "<" in its control tokens only, which leaves it the unknown token.
    knows = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else {*typed}
    accepted = 0
    for role, messages in conversations(typed):
        # Joint encoding is what it is held against; where tokens stay text, what is trained is looked at, cut at its edges.
        found, meant = one.ids(messages, "split" if is_guarded else "merge"), harmless[role]
        if isinstance(found, str):
            assert found == meant or typed in ("</think>", "<think>"), (
                f"{typed!r} in {role}: {found}"
            )  # templates cut there
            continue
        text, ids, trained = found
        accepted += 1
        if not is_guarded:
            assert ids == one.joint(text), f"{typed!r} in {role}"
        elif not isinstance(meant, str):
            births = Counter(id for id in ids if id in steering)
            assert births == Counter(id for id in meant[1] if id in steering), f"{typed!r} in {role}"
            if typed != "</think>":
                shown = "".join(char if char in knows else "<unk>" for char in typed if not char.isspace())
                said = one.reads(meant[2]).replace(HARMLESS, shown)
                assert one.reads(trained) == said, f"{typed!r} in {role}"
    return accepted


@pytest.mark.parametrize("name", ["qwen3", "made-calls"])
def test_trusted_tokens_are_all_encoded_as_inference_does(name: str, home: Path, tmp_path: Path) -> None:
    one = bench(name, home, tmp_path, flipped=False)
    one.finder = SpanFinder(
        one.finder.template, one.tokenizer.stop_tokens, *one.tokenizer.by_mark, trust_control_tokens=True
    )
    for token in one.tokenizer.added_tokens:
        messages = [
            {"role": "user", "content": f"Hi {token.content} there"},
            {"role": "assistant", "content": "Yes"},
        ]
        found = one.ids(messages, "merge")
        assert not isinstance(found, str)
        assert found[1] == one.joint(found[0]), token.content
