"""Ids are those of `AutoTokenizer.apply_chat_template`, for every row of every real chat file, and so are the prompts' ids."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from transformers import AutoTokenizer

from sftdata.batches import Conversation, TextBatch, TokenBatch
from sftdata.encode.engine import Encoder, load_encoder
from sftdata.formats.detect import detect
from sftdata.formats.fields import FormatOptions
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate
from sftdata.sources.source import open_source, plan_source, read_chunk
from tests.encoders import resolved
from tests.one_stage import convert_rows, encode_batch, render_rows
from tests.oracles.char_masks import fixed_clock

TOKENIZERS = ["llama-3.2-instruct", "mistral-7b-instruct", "phi-3-mini", "qwen2.5-instruct", "qwen3"]
FILES = [
    "messages/tinker_conversations.jsonl", "messages/lf_v1_sft_demo.jsonl", "messages/lf_reason_tool_use_demo_50.jsonl",
    "sharegpt/fastchat_dummy_conversation.json", "sharegpt/fastchat_dummy_with_system.json", "sharegpt/sharegpt_zh_1k.jsonl",
    "sharegpt/numina_cot_1k.jsonl", "sharegpt/emollm_xtuner_multiturn_zh.json", "sharegpt/axolotl_conversation.json",
    "tools/glaive_toolcall_en.json", "tools/glaive_toolcall_zh.json",
]  # fmt: skip
# A thousand rows each: in `make test` with one tokenizer, in `make torture` with all.
LONG = (
    "sharegpt/sharegpt_zh_1k.jsonl",
    "sharegpt/numina_cot_1k.jsonl",
    "sharegpt/emollm_xtuner_multiturn_zh.json",
)
CASES = [
    pytest.param(name, file, marks=pytest.mark.torture if file in LONG and name != "qwen2.5-instruct" else ())
    for name in TOKENIZERS
    for file in FILES
]
# Every row has what this template does not know: a system message, or the answer of a tool.
REFUSED = {
    ("mistral-7b-instruct", "sharegpt/emollm_xtuner_multiturn_zh.json"),
    ("mistral-7b-instruct", "messages/lf_reason_tool_use_demo_50.jsonl"),
}

pytestmark = pytest.mark.slow


@lru_cache(maxsize=len(FILES))
def _conversations(path: Path) -> list[Conversation]:
    plan = plan_source(open_source(str(path)), 0, 1 << 30)
    reading = detect([plan])
    rows: list[Any] = []
    for piece in plan.chunks:
        batch, _ = read_chunk(piece)
        rows += convert_rows(batch, reading.format, FormatOptions()).rows
    return [row for row in rows if isinstance(row, Conversation)]


@lru_cache(maxsize=1)
def _tools(shared_data: Path, name: str) -> tuple[SpanFinder, Encoder, Any]:
    facts = resolved(shared_data, name)
    assert facts.chat_template is not None
    template = ChatTemplate(facts.chat_template, facts.special_tokens)
    finder = SpanFinder(template, facts.stop_tokens, *facts.by_mark)
    reference = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    return finder, load_encoder(facts, "gigatoken"), reference


def _row(tokens: TokenBatch, place: int) -> tuple[list[int], list[bool]]:
    stretch = slice(tokens.offsets[place], tokens.offsets[place + 1])
    return tokens.input_ids[stretch].tolist(), tokens.trained[stretch].tolist()


@pytest.mark.parametrize(("name", "file"), CASES)
def test_ids_are_those_of_apply_chat_template(name: str, file: str, shared_data: Path) -> None:
    finder, encoder, reference = _tools(shared_data, name)
    conversations = _conversations(shared_data / "datasets" / file)
    rendered = render_rows(conversations, np.arange(len(conversations)), Renderer(finder))
    assert {fault.code for _, fault in rendered.faults} <= {"template-error", "tool-calls-lost"}
    texts = rendered.conversations
    assert (len(texts) if texts else 0) == len(conversations) - len(rendered.faults)
    if texts is None:
        assert (name, file) in REFUSED
        return
    tokens, counts = encode_batch(texts, encoder)
    with fixed_clock():
        different = sum(
            not _same_as_reference(tokens, place, texts, conversations, reference)
            for place in range(len(texts))
        )
    assert different <= counts.boundary_rows + counts.literal_rows


def _same_as_reference(
    tokens: TokenBatch, place: int, texts: TextBatch, conversations: list[Conversation], reference: Any
) -> bool:
    """Compare a row's ids with the reference's, and those before its first turn (every fifth row: its last) with the prompt's."""
    row = conversations[int(texts.row[place])]
    ids, trained = _row(tokens, place)
    messages = row.messages
    try:
        wanted = reference.apply_chat_template(messages, tools=row.tools, tokenize=True, return_dict=False)
    except jinja2.UndefinedError:  # a call without content, which this template asks for: "" says the same
        messages = [{"content": "", **message} for message in messages]
        wanted = reference.apply_chat_template(messages, tools=row.tools, tokenize=True, return_dict=False)
    same = ids == wanted
    starts = [at for at, flag in enumerate(trained) if flag and not trained[at - 1]]
    spans = texts.trained[place].tolist()
    assert len(starts) == len(spans)
    assistants = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    if len(starts) < len(assistants) or len(texts.literal[place]):
        return same  # turns that the row switched off; control tokens in data, which the reference takes for its own
    # Behind a cut the ids are those of the answer as generated; apply_chat_template would join it with its header again.
    turn = len(starts) - 1 if same and place % 5 == 0 else 0
    asked = messages[: assistants[turn]]
    prompt = reference.apply_chat_template(asked, tools=row.tools, tokenize=False, add_generation_prompt=True)
    if texts.texts[place].startswith(prompt):  # else the template rewrites what was said before
        assert texts.texts[place].encode()[: spans[turn][0]].decode() == prompt
        assert ids[: starts[turn]] == reference(prompt, add_special_tokens=False)["input_ids"]
    return same
