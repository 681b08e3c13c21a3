"""Ids and labels against `renderers` (PyPI): hand-written, it says of each token if the model samples it.

It runs where `renderers` can be imported (0.1.12 needs openai, openai-harmony, prime-pydantic-config: no test
dependency).

The chat template, as transformers renders it, decides the ids. What is trained follows from the generation
prompt, or from the template's own `{% generation %}` blocks; `renderers` decides it by argument only. Each
difference is listed below with its reason. One that a whole model shares is a rule, which is applied to what
`renderers` says; then all must be equal.

Only Qwen3's and Llama's own tokenizers are at hand. The other models' tokens are added to Qwen3's vocabulary,
marked special or not as in the model, and both sides encode with that. gpt-oss cannot be compared so: its
renderer encodes with a vocabulary of its own (openai-harmony downloads it and checks its hash).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from sftdata.batches import Conversation
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import SpanFinder
from sftdata.render.template import ChatTemplate
from tests.encoders import encoder, resolved
from tests.matrix import SHAPES, read_shapes, readings
from tests.one_stage import encode_batch, render_rows

pytestmark = pytest.mark.slow

OPEN, CLOSE = "⟦", "⟧"  # around what is trained
BRACKETS = re.compile(f"[{OPEN}{CLOSE}]")
Rule = tuple[str, str]


@dataclass(frozen=True)
class Model:
    """What a host tokenizer must have to stand for a model's own, and where `renderers` differs.

    Attributes:
        template, config: the chat template, and the renderer's config class.
        special, plain: added tokens that are marked `special: true`, and others.
        stops: what ends generation, the EOS token first.
        rules: patterns and replacements that turn what `renderers` trains into what we train.
        differs: titles of shapes that differ, by the reason.
        rejected: titles of shapes whose spans cannot be proven, by the reason.
    """

    template: str
    config: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bos: str | None = None
    stops: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    rules: tuple[Rule, ...] = ()
    differs: dict[str, set[str]] = field(default_factory=dict)
    rejected: dict[str, set[str]] = field(default_factory=dict)


# It lets control tokens that someone typed count; here they stay text, in every model that has them.
TYPED = {"typed end", "typed header"}
# It reads `reasoning_content` only; a template is given the reasoning under every name that it reads.
OTHER_KEYS = {"reads reasoning under one name only": {"reasoning", "thinking"}}

# It leaves out reasoning before the last question, which TRL's templates keep.
DROPS_THINKING = {"drops earlier reasoning": {"reasoning in turns", "inline think in turns"}}
# It renders Qwen3's thinking template for the Instruct model too, whose own template takes no reasoning apart.
THINKS = {
    "renders reasoning": {
        "call with reasoning", "reasoning_content", "reasoning in turns", "inline think on one line",
        "inline think in turns",
    },
}  # fmt: skip

# What its own generation prompt holds (`<think>\n`) it takes for sampled; inference feeds it.
PROMPT_THINKS = (
    (f"{OPEN}<think>\n", f"<think>\n{OPEN}"),
    (f"{OPEN}<think>", f"<think>{OPEN}"),
)
# It takes the newline behind `<|assistant|>` for a part of the prompt; that (its own too) ends before it.
GLM_NEWLINE = (rf"<\|assistant\|>\n{OPEN}", f"<|assistant|>{OPEN}\n")
# What TRL's templates have in {% generation %} is trained: the newline behind the end, DeepSeek's header.
TRL_NEWLINE = (rf"<\|im_end\|>{CLOSE}\n", f"<|im_end|>\n{CLOSE}")
TRL_HEADER = (rf"(<｜Assistant｜>|<｜tool▁outputs▁end｜>){OPEN}", rf"{OPEN}\1")
# They end GLM's last turn as one that is followed by another.
TRL_ENDS = (
    (rf"(</arg_value>\n</tool_call>){CLOSE}", rf"\1<|observation|>{CLOSE}"),
    (rf"(?<!\|>){CLOSE}(?=<\|assistant\|>|\Z)", f"<|user|>{CLOSE}"),
)
# They write a thinking block in every answer, the models' own only behind the last question.
TRL_THINKS = (rf"assistant\n{OPEN}(?!<think>)", f"assistant\n{OPEN}<think>\n\n</think>\n\n")
NO_THINKING = (rf"{OPEN}<think>\n\n</think>\n\n", OPEN)

_PARALLEL = {"parallel calls", "parallel calls as text", "parallel calls last"}
_DEEPSEEK = {
    "special": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "plain": (
        "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
    ),
    "bos": "<｜begin▁of▁sentence｜>",
    "stops": ("<｜end▁of▁sentence｜>",),
}  # fmt: skip
_DEEPSEEK_CALLS = {
    "writes no newline between calls": _PARALLEL,
    "opens later calls as the first, which the template does once": {"call after call", "calls in turns"},
}
_GLM = {
    "special": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink"),
    "plain": ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "stops": ("<|endoftext|>", "<|user|>", "<|observation|>"),
}
_GEMMA = {
    "special": (
        "<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>",
        "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|image>", "<|image|>",
        "<image|>", '<|"|>',
    ),
    "bos": "<bos>",
    "stops": ("<eos>", "<turn|>", "<|tool_response>"),
}  # fmt: skip
_NEMOTRON = {"special": ("<s>", "</s>", "<unk>"), "bos": "<s>", "stops": ("<|im_end|>", "</s>")}
_CALLS = {title for title in SHAPES if "tool_calls" in json.dumps(SHAPES[title])}

MODELS: dict[str, Model] = {
    "qwen3": Model("plain/qwen3-thinking", "Qwen3", differs=OTHER_KEYS),
    "qwen3-trl": Model(
        "generation/trl-qwen3-training",
        "Qwen3",
        rules=(TRL_NEWLINE, TRL_THINKS),
        differs=OTHER_KEYS | DROPS_THINKING | {"keeps newlines where it drops thinking": {"white space"}},
    ),
    "qwen3-2507": Model("plain/qwen3-instruct-2507", "Qwen3", rules=(NO_THINKING,), differs=THINKS),
    "qwen3-2507-trl": Model(
        "generation/trl-qwen3-instruct-2507-training",
        "Qwen3",
        rules=(NO_THINKING, TRL_NEWLINE),
        differs=THINKS,
    ),
    "qwen3-vl": Model("plain/qwen3-vl", "Qwen3VL"),
    "qwen3.5": Model("plain/qwen3.5-think", "Qwen35", rules=PROMPT_THINKS, differs=OTHER_KEYS),
    "qwen3.5-trl": Model(
        "generation/trl-qwen3-5-think-training",
        "Qwen35",
        rules=(TRL_NEWLINE, TRL_THINKS),
        differs=OTHER_KEYS | DROPS_THINKING,
    ),
    "nemotron-3": Model(
        "plain/nemotron-3-nano", "Nemotron3", **_NEMOTRON, rules=PROMPT_THINKS, differs=OTHER_KEYS
    ),
    "nemotron-3-trl": Model(
        "generation/trl-nemotron-3-nano-training",
        "Nemotron3",
        **_NEMOTRON,
        rules=(TRL_NEWLINE,),
        differs=OTHER_KEYS,
    ),
    "glm-4.5": Model("plain/glm-4-moe", "GLM45", **_GLM, rules=(GLM_NEWLINE,), differs=OTHER_KEYS),
    "glm-4.5-trl": Model(
        "generation/trl-glm4moe-training",
        "GLM45",
        **_GLM,
        rules=(GLM_NEWLINE, *TRL_ENDS),
        differs=OTHER_KEYS,
    ),
    "gemma-4": Model(
        "plain/gemma-4",
        "Gemma4",
        **_GEMMA,
        differs={
            "writes reasoning without calls": {"reasoning_content", "reasoning", "reasoning in turns"},
            "makes one turn of answers in a row": {"answers in a row"},
        },
        rejected={"words stand behind the tool's answer": {"call with words"}},
    ),
    # The file is named after V3, but its template opens `<think>` and cuts reasoning off, as R1's.
    "deepseek-r1": Model("plain/deepseek-v3", "DeepSeekR1", **_DEEPSEEK, differs=_DEEPSEEK_CALLS),
    "deepseek-r1-trl": Model(
        "generation/trl-deepseekv3-training",
        "DeepSeekR1",
        **_DEEPSEEK,
        rules=(TRL_HEADER,),
        differs=_DEEPSEEK_CALLS,
    ),
    "deepseek-r1-distill": Model(
        "plain/deepseek-r1-distill-qwen-32b",
        "DeepSeekR1",
        **_DEEPSEEK,
        rejected={"the template loses calls, or their end": _CALLS},
    ),
    "llama-3.2-instruct": Model(
        "plain/llama-3.2-3b-instruct", "Llama3", rejected={"the template takes one call a turn": _PARALLEL}
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_the_model_samples_is_what_is_trained(name: str, shared_data: Path, tmp_path: Path) -> None:
    renderers = pytest.importorskip("renderers", reason="the package `renderers` is not installed")
    from transformers import AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = MODELS[name]
    home = _host(name, model, shared_data, tmp_path)
    facts, tokenizer = resolved(home, name), AutoTokenizer.from_pretrained(home / "tokenizers" / name)
    source = (shared_data / f"templates/{model.template}.jinja").read_text(encoding="utf-8")
    theirs = renderers.create_renderer(tokenizer, getattr(renderers, f"{model.config}RendererConfig")())
    # Its Llama 3 has the date of Llama's own template.
    template = ChatTemplate(source, facts.special_tokens, "2024-07-26")
    finder = SpanFinder(template, facts.stop_tokens, *facts.by_mark)
    different, rejected = set(), set()
    for title, row in read_shapes(tmp_path).items():
        assert isinstance(row, Conversation)
        texts = render_rows([row], np.zeros(1, np.int64), Renderer(finder)).conversations
        if texts is None:
            rejected.add(title)
            continue
        tokens, _ = encode_batch(texts, encoder(home, name, "tokenizers"))
        ours = tokens.input_ids.tolist(), tokens.trained.tolist()
        decided = _decided(tokenizer, _sampled(theirs, row), model.rules, tokenizer.decode(ours[0]))
        if ours not in decided:
            different.add(title)
            _check_that_the_template_decides(tokenizer, source, title, ours[0], decided[-1][0])
    typed = TYPED if "<|im_end|>" in tokenizer.get_vocab() else set()
    assert different == typed.union(*model.differs.values())
    assert rejected == set().union(*model.rejected.values())


def _host(name: str, model: Model, shared_data: Path, folder: Path) -> Path:
    """Return a folder that holds tokenizers/NAME: the real one, or one made of Qwen3's."""
    if name in ("qwen3", "llama-3.2-instruct"):
        return shared_data
    made = Tokenizer.from_file(str(shared_data / "tokenizers/qwen3/tokenizer.json"))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in model.special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in model.plain])
    place = folder / "tokenizers" / name
    place.mkdir(parents=True)
    made.save(str(place / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": model.bos,
        "eos_token": model.stops[0],
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (place / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    ends = {"eos_token_id": [made.token_to_id(token) for token in model.stops]}
    (place / "generation_config.json").write_text(json.dumps(ends))
    return folder


def _sampled(theirs: Any, row: Conversation) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation, and which of them the model samples in an answer."""
    messages = [{**message, "content": message.get("content") or ""} for message in row.messages]
    found = theirs.render(messages, tools=row.tools)
    answers = [message["role"] == "assistant" for message in messages]
    owners = zip(found.sampled_mask, found.message_indices, strict=True)
    return list(found.token_ids), [
        bool(sampled) and owner >= 0 and answers[owner] for sampled, owner in owners
    ]


def _decided(
    tokenizer: Any, found: tuple[list[int], list[bool]], rules: Iterable[Rule], text: str
) -> list[tuple[list[int], list[bool]]]:
    """Return what may be trained by `renderers` and the rules: its own tokens, or those cut at moved edges.

    A rule that changes the text is left out where the text is `text` without it.
    """
    shown = before = _shown(tokenizer, *found)
    for pattern, replacement in rules:
        ruled = re.sub(pattern, replacement, shown)
        if _bare(ruled) == _bare(shown) or _bare(shown) != text:
            shown = ruled
    ids: list[int] = []
    trained: list[bool] = []
    for number, stretch in enumerate(BRACKETS.split(shown)):
        new = tokenizer.encode(stretch, add_special_tokens=False)
        ids += new
        trained += [number % 2 == 1] * len(new)
    return [*([found] if shown == before else []), (ids, trained)]


def _shown(tokenizer: Any, ids: list[int], trained: list[bool]) -> str:
    """Return a text with brackets around what is trained."""
    pieces = []
    for now, before, token in zip(trained, [False, *trained], ids, strict=False):
        pieces += [(OPEN if now else CLOSE) * (now != before), tokenizer.decode([token])]
    return "".join(pieces) + CLOSE * trained[-1]


def _bare(shown: str) -> str:
    return BRACKETS.sub("", shown)


def _check_that_the_template_decides(
    tokenizer: Any, source: str, title: str, ours: list[int], theirs: list[int]
) -> None:
    """Hold what differs against transformers: it renders our text, theirs only if typed tokens differ."""
    rendered = set()
    for messages, tools in readings(SHAPES[title]):
        try:
            rendered.add(
                tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, tokenize=False)
            )
        except Exception:  # templates raise whatever they like
            continue
    assert tokenizer.decode(ours) in rendered
    assert (tokenizer.decode(theirs) in rendered) == (title in TYPED)
