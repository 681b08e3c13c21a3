"""Ids and labels against `renderers` (PyPI): hand-written renderers that say of each token whether the model samples it.

It runs where `renderers` can be imported (0.1.12 needs openai, openai-harmony, prime-pydantic-config: no test dependency).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdata.batches import Conversation
from sftdata.masks.texts import Renderer, render_rows
from sftdata.masks.tokens import encode_batch
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate
from tests.encoders import encoder, resolved
from tests.matrix import read_shapes

pytestmark = pytest.mark.slow

# Where the two differ, and who is right.
TYPED = {"typed end", "typed header"}  # it lets control tokens in data count; here they stay text
OTHER_KEYS = {"reasoning", "thinking"}  # it reads `reasoning_content` only; transformers reads all three
MODELS = [
    ("qwen3", "plain/qwen3-thinking", "Qwen3RendererConfig", TYPED | OTHER_KEYS, 38),
    ("llama-3.2-instruct", None, "Llama3RendererConfig", set(), 39),
]


@pytest.mark.parametrize(
    ("name", "template", "config", "differs", "same"), MODELS, ids=[model[0] for model in MODELS]
)
def test_what_the_model_samples_is_what_is_trained(
    name: str,
    template: str | None,
    config: str,
    differs: set[str],
    same: int,
    shared_data: Path,
    tmp_path: Path,
) -> None:
    renderers = pytest.importorskip("renderers", reason="the package `renderers` is not installed")
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    facts, tokenizer = (
        resolved(shared_data, name),
        AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name),
    )
    source = (
        (shared_data / f"templates/{template}.jinja").read_text() if template else str(facts.chat_template)
    )
    theirs = renderers.create_renderer(tokenizer, getattr(renderers, config)())
    # Its Llama 3 has the date of Llama's own template.
    finder = SpanFinder(
        ChatTemplate(source, facts.special_tokens, "2024-07-26"), facts.stop_tokens, *facts.by_mark
    )
    equal, different = 0, set()
    for title, row in read_shapes(tmp_path).items():
        assert isinstance(row, Conversation)
        texts = render_rows([row], np.zeros(1, np.int64), Renderer(finder)).conversations
        if texts is None:
            continue
        tokens, _ = encode_batch(texts, encoder(shared_data, name, "tokenizers"))
        if _sampled(theirs, row) == (tokens.input_ids.tolist(), tokens.trained.tolist()):
            equal += 1
        else:
            different.add(title)
    assert different == differs
    assert equal >= same


def _sampled(theirs: Any, row: Conversation) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them the model samples in an answer."""
    messages = [{**message, "content": message.get("content") or ""} for message in row.messages]
    found = theirs.render(messages, tools=row.tools)
    answers = [message["role"] == "assistant" for message in messages]
    owners = zip(found.sampled_mask, found.message_indices, strict=True)
    return list(found.token_ids), [
        bool(sampled) and owner >= 0 and answers[owner] for sampled, owner in owners
    ]
