"""What is trained in a conversation, for every real chat template: equal to a slow oracle, or rejected by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.masks import Mask, TextMarkers
from sftdata.masks.texts import Renderer
from sftdata.masks.turns import RenderedConversation, SpanFinder
from sftdata.render.template import ChatTemplate, control_tokens
from tests import made_templates
from tests.chats import CHATS, WEATHER, Chat, bot, call, quoting, result, system, typing, user
from tests.one_stage import render_rows
from tests.oracles.char_masks import Format, trained_spans

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# What ends a turn, as a reader of the template (and of the model's generation config) knows it. Not listed: "</s>".
STOPS = {
    "chatml": "<|im_end|>", "command-a": "<|END_OF_TURN_TOKEN|>", "command-r": "<|END_OF_TURN_TOKEN|>",
    "command-r-plus-tool_use": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek-r1-distill-qwen-32b": "<｜end▁of▁sentence｜>", "deepseek-v3": "<｜end▁of▁sentence｜>", "falcon-instruct": "",
    "firefunction-v2": "<|eot_id|>", "functionary-medium-v3.2": "<|eot_id|>", "gemma-2-2b-it": "<end_of_turn>",
    "gemma-3": "<end_of_turn>", "gemma-4": "<turn|> <|tool_response>", "glm-4-moe": "<|user|> <|observation|>",
    "glm-4v": "<|user|> <|observation|>", "gpt-oss-harmony": "<|return|> <|end|> <|call|>",
    "granite-3.0-instruct": "<|end_of_text|>", "hermes-3-llama-3.1-8b-tool_use": "<|im_end|>", "jamba": "<|eom|>",
    "llama-3": "<|eot_id|>", "llama-3.1-8b-instruct": "<|eot_id|>", "llama-3.2-3b-instruct": "<|eot_id|>", "llama-4": "<|eot|>",
    "metharme": "</s> <|user|>", "nemotron-3-nano": "<|im_end|>", "openchat-3.5": "<|end_of_turn|>", "phi-3": "<|end|>",
    "phi-3.5-mini-instruct": "<|end|>", "qwen2-vl": "<|im_end|>", "qwen2.5-instruct": "<|im_end|>",
    "qwen3-instruct-2507": "<|im_end|>", "qwen3-thinking": "<|im_end|>", "qwen3-vl": "<|im_end|>", "qwen3.5-think": "<|im_end|>",
    "solar-instruct": "",
    "made-chatml": "<|im_end|>", "made-phi": "<|end|>", "made-tools": "<|im_end|>", "made-thinking": "<|im_end|>",
    "made-next-header": "<|user|>", "made-channels": "<|return|> <|end|>", "made-headers": "<|eot_id|>", "made-no-end": "",
}  # fmt: skip
# Stop tokens that only the tokenizer or its generation config tells; all others are found in the template.
TOLD = {
    "cohere2": ("<|END_OF_TURN_TOKEN|>",), "command-a": ("<|END_OF_TURN_TOKEN|>",), "gemma-4": ("<turn|>", "<|tool_response>"),
}  # fmt: skip

# Templates that join tool arguments as text: objects are handed over as their JSON text.
TEXT_ARGUMENTS = ("deepseek-v3", "firefunction-v2", "functionary-medium-v3.2")

CALLING = {"tools", "tools many turns", "parallel tool calls", "spoken tool call", "last turn calls"}
# Rows that the template renders and that are rejected all the same, each for a reason.
REJECTED: dict[str, dict[str, set[str]]] = {
    # The call is not in the text, so the answer to it has no ground.
    **{name: {"tool-calls-lost": CALLING} for name in (
        "command-a", "deepseek-r1-distill-qwen-32b", "deepseek-v2", "glm-4v", "granite-3.0-instruct", "llama-3", "phi-3",
        "phi-3.5-mini-instruct", "qwen2-vl", "tulu-open-instruct", "made-chatml", "made-mistral", "made-phi", "made-deepseek",
        "made-thinking", "made-next-header", "made-channels", "made-headers", "made-no-end")},
    # Likewise; these refuse a `tool` message, so only a call that nobody answers comes so far.
    **{name: {"tool-calls-lost": {"last turn calls"}} for name in (
        "alpaca", "chatml", "cohere2", "command-r", "falcon-instruct", "gemma-2-2b-it", "gemma-3", "llama-2-chat", "llava-next",
        "mistral-instruct-merged-system", "mistral-v1", "openchat-3.5", "pixtral", "solar-instruct", "vicuna", "zephyr",
        "made-words")},
    # It writes the first call only.
    "gpt-oss-harmony": {"tool-calls-lost": {"parallel tool calls"}},
    # It writes no end token after a call.
    "command-r-plus-tool_use": {"spans-unproven": CALLING},
    # It writes the spoken part behind the tool's answer.
    "gemma-4": {"spans-unproven": {"spoken tool call"}},
    # No prompt can be rendered before the first message, and the usual one is part of the user's turn.
    "firefunction-v2": {"spans-unproven": {"assistant first"}},
    "metharme": {"spans-unproven": {"assistant first"}, "tool-calls-lost": CALLING},
    "mistral-v7-tekken": {"spans-unproven": {"assistant first"}, "tool-calls-lost": {"last turn calls"}},
}  # fmt: skip

TEMPLATES = [
    "alpaca", "chatml", "cohere2", "command-a", "command-r", "command-r-plus-tool_use", "deepseek-r1-distill-qwen-32b",
    "deepseek-v2", "deepseek-v3", "falcon-instruct", "firefunction-v2", "functionary-medium-v3.2", "gemma-2-2b-it",
    "gemma-3", "gemma-4", "glm-4-moe", "glm-4v", "gpt-oss-harmony", "granite-3.0-instruct",
    "hermes-3-llama-3.1-8b-tool_use", "jamba", "llama-2-chat", "llama-3", "llama-3.1-8b-instruct",
    "llama-3.2-3b-instruct", "llama-4", "llava-next", "metharme", "mistral-instruct-merged-system",
    "mistral-nemo-instruct-2407-tools", "mistral-v1", "mistral-v3-tekken-tools", "mistral-v7-tekken", "nemotron-3-nano",
    "openchat-3.5", "phi-3", "phi-3.5-mini-instruct", "pixtral", "qwen2-vl", "qwen2.5-instruct", "qwen3-instruct-2507",
    "qwen3-thinking", "qwen3-vl", "qwen3.5-think", "solar-instruct", "tulu-open-instruct", "vicuna", "zephyr",
]  # fmt: skip


def _format(data: Path, name: str, folder: str = "plain") -> Format:
    source = (data / f"templates/{folder}/{name}.jinja").read_text(encoding="utf-8")
    more = {"functions": "[]", "datetime": "today"} if name == "firefunction-v2" else {}
    return Format(
        source, STOPS.get(name, "</s>").split(), SPECIAL | more, "llava-next" in name, name in TEXT_ARGUMENTS
    )


def _finder(form: Format, stop_tokens: tuple[str, ...] = ("</s>",), **options: Any) -> SpanFinder:
    more = {key: value for key, value in form.arguments.items() if key not in SPECIAL}
    template = ChatTemplate(form.source, SPECIAL, template_kwargs=more)
    return SpanFinder(template, stop_tokens, control_tokens(form.source), **options)


def _render(finder: SpanFinder, chat: Chat) -> RenderedConversation:
    return finder.render(Conversation(chat["messages"], [None] * len(chat["messages"]), chat.get("tools")))


def _trained(rendered: RenderedConversation) -> list[str]:
    return [rendered.text[turn.start : turn.stop] for turn in rendered.turns]


def _chats(form: Format) -> dict[str, Chat]:
    """All conversations, with two that fit this template: one quotes its header, in one its end token is typed."""
    question = [user("A")]
    try:
        text, prompt = form.render(question), form.render(question, prompt=True)
    except Exception:  # it asks for tools
        text, prompt = "", "<|im_start|>assistant\n"
    header = prompt[len(text) :] or text.rpartition("A")[2] or "### Answer:"
    return CHATS | {"quotes a header": quoting(header), "types a stop": typing([*form.stops, "</s>"][0])}


def _outcome(finder: SpanFinder, chat: Chat) -> RenderedConversation | str:
    """Return what becomes of a conversation: the render, or the code it is rejected with."""
    try:
        return _render(finder, chat)
    except RowError as error:
        return error.fault.code


def _reference(form: Format, chat: Chat) -> str | None:
    """Return what transformers renders; None where it fails."""
    try:
        return form.render(chat["messages"], chat.get("tools"))
    except Exception:  # templates raise whatever they like
        return None


@pytest.mark.parametrize("name", [*TEMPLATES, *made_templates.PLAIN])
def test_every_turn_is_what_the_oracle_says_or_rejected_by_name(name: str, home: Path) -> None:
    form = _format(home, name)
    finder = _finder(form, TOLD.get(name, ("</s>",)))
    rejected: dict[str, set[str]] = {}
    for title, chat in _chats(form).items():
        text, outcome = _reference(form, chat), _outcome(finder, chat)
        assert (text is None) == (outcome == "template-error"), title
        if isinstance(outcome, RenderedConversation):
            assert outcome.text == text, title
            spans = {turn.message: (turn.start, turn.stop) for turn in outcome.turns}
            assert spans == trained_spans(form, chat["messages"], chat.get("tools")), title
        elif text is not None:
            rejected.setdefault(outcome, set()).add(title)
    assert rejected == REJECTED.get(name, {})


def test_no_template_is_left_out(shared_data: Path) -> None:
    assert {path.stem for path in (shared_data / "templates/plain").glob("*.jinja")} == set(TEMPLATES)


# What must be generated, and nothing else, read with the eye. "|" stands between turns.
BY_EYE = [
    ("qwen2.5-instruct", "many turns", "Red, of course.<|im_end|>|Green then.\n\nOr olive.<|im_end|>|Blue<|im_end|>|"
     "Very well!<|im_end|>"),
    ("llama-3", "system", "Red.<|eot_id|>|Green.<|eot_id|>"),
    ("mistral-v1", "one turn", " Red, of course.</s>"),
    ("cohere2", "one turn", "Red, of course.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    ("phi-3", "one turn", "Red, of course.<|end|>"),
    ("glm-4-moe", "reasoning", "\n<think></think>\nFour.<|user|>|\n<think>Count on from there.</think>\nSeven."),
    ("qwen3-thinking", "reasoning inside content", "Four.<|im_end|>|<think>\nCount on from there.\n</think>\n\nSeven.<|im_end|>"),
    ("qwen3.5-think", "reasoning", "Four.<|im_end|>|Count on from there.\n</think>\n\nSeven.<|im_end|>"),
    ("nemotron-3-nano", "reasoning inside content", "</think>\n\nFour.<|im_end|>|"
     "Count on from there.\n</think>\n\nSeven.<|im_end|>"),
    ("deepseek-v3", "one turn", "Red, of course.<｜end▁of▁sentence｜>"),
    ("gpt-oss-harmony", "tools", " to=functions.get_weather<|channel|>commentary json<|message|>{\"city\": \"Oslo\"}<|call|>|"
     "<|channel|>final<|message|>It rains, at 4 degrees.<|return|>"),
    ("mistral-v3-tekken-tools", "tools", "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}, \"id\": "
     "\"abcdefgh1\"}]</s>|It rains, at 4 degrees.</s>"),
    ("gemma-4", "tools", "<|tool_call>call:get_weather{city:<|\"|>Oslo<|\"|>}<tool_call|><|tool_response>|"
     "It rains, at 4 degrees.<turn|>"),
    ("hermes-3-llama-3.1-8b-tool_use", "tools", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": "
     "{\"city\": \"Oslo\"}}\n</tool_call><|im_end|>|It rains, at 4 degrees.<|im_end|>"),
    ("alpaca", "one turn", "Red, of course.</s>"),
    ("falcon-instruct", "one turn", " Red, of course."),
    ("made-chatml", "many turns", "Red, of course.<|im_end|>|Green then.\n\nOr olive.<|im_end|>|Blue<|im_end|>|"
     "Very well!<|im_end|>"),
    ("made-mistral", "one turn", " Red, of course.</s>"),
    ("made-deepseek", "system", "Red.</s>|Green.</s>"),
    ("made-thinking", "reasoning", "Four.<|im_end|>|Count on from there.\n</think>\n\nSeven.<|im_end|>"),
    ("made-thinking", "reasoning inside content", "Four.<|im_end|>|Count on from there.\n</think>\n\nSeven.<|im_end|>"),
    ("made-thinking", "one turn", "\n</think>\n\nRed, of course.<|im_end|>"),
    ("made-next-header", "system", "Red.<|user|>|Green."),
    ("made-channels", "system", "<|channel|>final<|message|>Red.<|end|>|<|channel|>final<|message|>Green.<|return|>"),
    ("made-headers", "blank answer", "<|eot_id|>|You are welcome.<|eot_id|>"),
    ("made-words", "one turn", "Red, of course.</s>"),
    ("made-no-end", "one turn", " Red, of course."),
    ("made-tools", "tools", "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}</tool_call><|im_end|>|"
     "It rains, at 4 degrees.<|im_end|>"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "title", "expected"), BY_EYE, ids=[f"{name}-{title}" for name, title, _ in BY_EYE]
)
def test_these_texts_are_trained(name: str, title: str, expected: str, home: Path) -> None:
    form = _format(home, name)
    rendered = _render(_finder(form, TOLD.get(name, ("</s>",))), CHATS[title])
    assert "|".join(_trained(rendered)) == expected


# ----------------------------------------------------------------------------------------------- {% generation %}


GENERATION = [
    "automodel-gpt-oss-20b", "automodel-olmo", "automodel-qwen3-tulu3", "axolotl-phi-4", "smollm3", "trl-cohere-training",
    "trl-deepseekv3-training", "trl-gemma-training", "trl-gemma3-training", "trl-glm4moe-training", "trl-gptoss-training",
    "trl-llama3-training", "trl-llava-next-training", "trl-nemotron-3-nano-training", "trl-phi3-5-training",
    "trl-phi3-training", "trl-qwen2-5-training", "trl-qwen2-5-vl-training", "trl-qwen3-5-think-training",
    "trl-qwen3-instruct-2507-training", "trl-qwen3-training",
]  # fmt: skip


# Rows that the template renders, without their tool calls.
GENERATION_REJECTED: dict[str, dict[str, set[str]]] = {
    **{name: {"tool-calls-lost": CALLING} for name in (
        "automodel-olmo", "axolotl-phi-4", "trl-llama3-training", "trl-phi3-5-training", "trl-phi3-training",
        "trl-qwen2-5-vl-training", "smollm3")},
    **{name: {"tool-calls-lost": {"last turn calls"}} for name in (
        "trl-cohere-training", "trl-gemma-training", "trl-gemma3-training", "trl-llava-next-training")},
    **{name: {"tool-calls-lost": {"parallel tool calls"}} for name in ("automodel-gpt-oss-20b", "trl-gptoss-training")},
}  # fmt: skip


@pytest.mark.parametrize("name", [*GENERATION, *made_templates.GENERATION])
def test_generation_blocks_are_where_transformers_says(name: str, home: Path) -> None:
    form = _format(home, name, "generation")
    finder = _finder(form)
    rejected: dict[str, set[str]] = {}
    for title, chat in _chats(form).items():
        text, outcome = _reference(form, chat), _outcome(finder, chat)
        assert (text is None) == (outcome == "template-error"), title
        if isinstance(outcome, RenderedConversation):
            assert outcome.text == text, title
            blocks = form.generated(chat["messages"], chat.get("tools"))
            assert [(turn.start, turn.stop) for turn in outcome.turns] == blocks, title
        elif text is not None:
            rejected.setdefault(outcome, set()).add(title)
    assert rejected == GENERATION_REJECTED.get(name, {})


def test_no_generation_template_is_left_out(shared_data: Path) -> None:
    assert {path.stem for path in (shared_data / "templates/generation").glob("*.jinja")} == set(GENERATION)


def test_a_generation_block_belongs_to_the_message_it_speaks_for() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<e>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    rendered = _render(_finder(Format(source)), {"messages": [user("Hi"), bot(""), user("So?"), bot("Yes")]})
    assert [turn.message for turn in rendered.turns] == [1, 3]
    assert _trained(rendered) == ["<e>", "Yes<e>"]


BODY = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<e>"
SPARING = (
    "{% for m in messages %}{{ '<s>' + m.role + '\\n' }}{% if m.role == 'assistant' and SPEAKS %}{% generation %}" + BODY
    + "{% endgeneration %}{% else %}" + BODY + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)  # fmt: skip
TALKS = {
    "plain": [user("Weather?"), bot("Look."), user("Well?"), bot("It is dry."), user("Sure?"), bot("Yes.")],
    "calls": [
        user("Weather?"),
        bot("", tool_calls=[call("Oslo")]),
        result("Dry."),
        bot("It is dry."),
        user("Sure?"),
        bot("Yes."),
    ],
}
SPEAKS: dict[str, Callable[[dict[str, Any], bool], bool]] = {
    "true": lambda message, last: True,
    "not m.tool_calls": lambda message, last: not message.get("tool_calls"),
    "loop.last": lambda message, last: last,
    "not loop.last": lambda message, last: not last,
    "'dry' in m.content": lambda message, last: "dry" in message["content"],
}


def _counted(
    source: str, messages: list[dict[str, Any]], trained: list[Any] | None = None, mask: Mask | None = None
) -> tuple[int, str]:
    """Return how many messages are counted as outside generation blocks, and the trained text."""
    row = Conversation(messages, trained or [None] * len(messages))
    found = render_rows(
        [row], np.zeros(1, np.int64), Renderer(_finder(Format(source), ("<e>",)), mask or Mask())
    )
    assert found.conversations is not None
    spans = found.conversations.trained[0].tolist()
    count = found.tally.counts.get("messages_outside_generation", 0)
    assert (count > 0) == ("messages_outside_generation" in found.tally.counts)
    return count, "|".join(found.conversations.texts[0][start:stop] for start, stop in spans)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("speaks", SPEAKS)
def test_an_assistant_message_that_no_generation_block_speaks_for_is_counted(speaks: str, talk: str) -> None:
    source, messages = SPARING.replace("SPEAKS", speaks), TALKS[talk]
    outside = [index for index in (1, 3, 5) if not SPEAKS[speaks](messages[index], index == 5)]
    assert _counted(source, messages)[0] == len(outside)
    off = [False if index in outside else None for index in range(len(messages))]
    assert _counted(source, messages, off)[0] == 0  # not wanted, so not missed
    assert _counted(source, messages, mask=Mask("all"))[0] == 0
    assert _counted(source, messages, mask=TextMarkers(response="assistant\n"))[0] == 0


def test_the_last_assistant_message_is_not_replaced_by_an_earlier_one_that_has_a_generation_block() -> None:
    source = SPARING.replace("SPEAKS", "not loop.last")
    messages = [user("Hi"), bot("Hello."), user("So?"), bot("Yes.")]
    assert _counted(source, messages, mask=Mask("last-assistant")) == (1, "")


def test_without_the_generation_tags_every_turn_is_trained() -> None:
    source = (
        SPARING.replace("SPEAKS", "false").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    count, trained = _counted(source, TALKS["calls"])
    assert (count, trained.count("<e>"), "Oslo" in trained) == (0, 3, True)


# -------------------------------------------------------------------------------------------- what surprises a mask


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_control_token_in_data_ends_no_turn_and_is_reported() -> None:
    chat = {"messages": [user("What is <|im_end|>?"), bot("<|im_end|> ends a turn.")]}
    rendered = _render(_finder(Format(CHATML)), chat)
    assert _trained(rendered) == ["<|im_end|> ends a turn.<|im_end|>"]
    assert [rendered.text[start:stop] for start, stop in rendered.literal] == ["<|im_end|>", "<|im_end|>"]


CALLS = {
    "name first": "<call>{{ c.function.name ~ ' ' ~ c.function.arguments | tojson }}",
    "name last": "<call>{{ c.function.arguments | tojson ~ ' ' ~ c.function.name }}",
    "all in one": "<call>{{ c.function | tojson }}",
}


@pytest.mark.parametrize("arguments", [{}, {"n": 1}, {"n": "one"}, {"n": "<|im_end|>"}], ids=str)
@pytest.mark.parametrize("name", ["f<|im_end|>", "<|im_end|>f", "<|im_end|>", "f<|im_end|><|im_start|>"])
@pytest.mark.parametrize("order", CALLS)
def test_a_stop_token_in_a_call_ends_no_turn(order: str, name: str, arguments: dict[str, Any]) -> None:
    source = CHATML.replace(
        "+ m.content +", "+ (m.content or '') }}{% for c in m.tool_calls or [] %}CALL{% endfor %}{{"
    )
    form = Format(source.replace("CALL", CALLS[order]))
    calls = [
        {"type": "function", "function": {"name": called, "arguments": arguments}} for called in (name, "g")
    ]
    chat = {
        "messages": [user("Hi"), bot("", tool_calls=calls), {"role": "tool", "content": "ok"}, bot("Done.")]
    }
    whole = form.render(chat["messages"][:2]).rpartition("<|im_start|>assistant\n")[2].removesuffix("\n")
    finder = _finder(form, ("<|im_end|>",))
    assert _trained(_render(finder, {"messages": [user("Hi"), bot("", tool_calls=calls[1:])]}))[0].endswith(
        "<|im_end|>"
    )
    outcome = _outcome(finder, chat)
    # Where no mark of the row's data stands behind the name, its end cannot be proven.
    assert outcome == "spans-unproven" or _trained(outcome) == [whole, "Done.<|im_end|>"]
    if order == "name first" and "n" in arguments and arguments["n"] != 1:
        assert outcome != "spans-unproven"


@pytest.mark.parametrize("shown", ["loop.last", "m.role == 'user'", "loop.first or m.content != 'Good day.'"])
@pytest.mark.parametrize("generation", [False, True])
def test_an_answer_that_a_template_leaves_out_is_not_taught_as_an_empty_one(
    shown: str, generation: bool
) -> None:
    opened, closed = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.role == 'assistant' %}}{opened}{{{{ m.content if {shown} else '' }}}}<|im_end|>{closed}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = {"messages": [user("Hello"), bot("Good day."), user("So?"), bot("Thus.")]}
    assert _outcome(_finder(Format(source), ("<|im_end|>",)), chat) == "spans-unproven"


@pytest.mark.parametrize("generation", [False, True])
def test_a_call_that_a_template_leaves_out_is_refused_though_another_names_the_function(
    generation: bool,
) -> None:
    opened, closed = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.role == 'assistant' %}}{opened}{{% if m.tool_calls %}}<call>{{{{ m.tool_calls[0].function | tojson }}}}"
        f"{{% else %}}{{{{ m.content }}}}{{% endif %}}<|im_end|>{closed}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    finder = _finder(Format(source), ("<|im_end|>",))
    both = {"messages": [user("Weather?"), bot("", tool_calls=[call("Oslo", 1), call("Rome", 2)])]}
    assert _outcome(finder, both) == "tool-calls-lost"
    one = _outcome(finder, {"messages": [user("Weather?"), bot("", tool_calls=[call("Oslo")])]})
    assert isinstance(one, RenderedConversation)
    assert len(one.turns) == 1


@pytest.mark.parametrize("content", ["a", "think", "Hm.", "Yes, Hm. indeed."])
@pytest.mark.parametrize("thought", ["think", "Hm.", "Hello", "a"])
def test_lost_reasoning_is_told_apart_from_a_lost_text_wherever_its_words_recur(
    content: str, thought: str
) -> None:
    source = CHATML.replace("m.content", "('<think>' if m.role == 'assistant' else '') + m.content")
    writes = source.replace("'<think>'", "'<think>' + m.reasoning_content")
    loses = source.replace("+ m.content", "+ (m.reasoning_content or m.content)")
    chat = {
        "messages": [
            user("Hello"),
            bot(content, reasoning_content=thought),
            user("Hm."),
            bot("Done", reasoning_content=""),
        ]
    }
    found = {
        name: _render(_finder(Format(text)), chat) for name, text in (("source", source), ("writes", writes))
    }
    assert [(one.dropped, one.reasoning_dropped) for one in found.values()] == [([], [1]), ([], [])]
    if content != thought:  # which of two equal texts is left out, no render tells
        kept = _render(_finder(Format(loses)), chat)
        assert (kept.dropped, kept.reasoning_dropped) == ([1], [])


def test_trusted_control_tokens_are_not_reported() -> None:
    chat = {"messages": [user("What is <|im_end|>?"), bot("An end token.")]}
    assert _render(_finder(Format(CHATML), trust_control_tokens=True), chat).literal == []


def test_control_tokens_that_steer_the_template_are_rejected() -> None:
    source = "{% for m in messages %}{{ m.content.split('<|x|>')[-1] }}<|im_end|>{% endfor %}"
    with pytest.raises(RowError) as caught:
        _render(_finder(Format(source)), {"messages": [user("Hi"), bot("secret<|x|>open")]})
    assert caught.value.fault.code == "control-token-ambiguous"


def test_private_characters_in_data_are_rejected() -> None:
    with pytest.raises(RowError) as caught:
        _render(_finder(Format(CHATML)), {"messages": [user("Hi \U00108001"), bot("Hello")]})
    assert caught.value.fault.code == "reserved-characters"


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-thinking",
        "gpt-oss-harmony",
        "gemma-4",
        "mistral-v3-tekken-tools",
        "alpaca",
        *made_templates.PLAIN,
    ],
)
def test_the_first_row_never_decides_for_the_others(name: str, home: Path) -> None:
    """Prompts are remembered by kind of transition; whatever came before, a row gets the spans it gets alone."""
    form = _format(home, name)
    shared = _finder(form, TOLD.get(name, ("</s>",)))
    chats = list(_chats(form).values())
    for chat in [*chats, *reversed(chats)]:
        assert _outcome(shared, chat) == _outcome(_finder(form, TOLD.get(name, ("</s>",))), chat)


def test_left_out_texts_are_named() -> None:
    chat = {
        "messages": [
            user("Two and two?"),
            bot("Four.", reasoning_content="Pairs."),
            user("Good"),
            bot("Thanks"),
        ]
    }
    assert _render(_finder(Format(CHATML)), chat).reasoning_dropped == [1]
    assert _render(_finder(Format(CHATML)), chat).dropped == []
    assert _render(_finder(Format(CHATML)), CHATS["many turns"]).dropped == []


@pytest.mark.parametrize(("name", "break_"), [("qwen2.5-instruct", "\n"), ("made-tools", "")])
def test_a_call_that_holds_numbers_only_is_trained_though_the_reasoning_is_left_out(
    name: str, break_: str, home: Path
) -> None:
    area = {"type": "function", "function": {"name": "area", "arguments": {"radius": 1.5}}}
    calling = {"role": "assistant", "reasoning_content": "A circle.", "tool_calls": [area]}
    rendered = _render(_finder(_format(home, name)), {"messages": [user("Radius 1.5"), calling]})
    assert [rendered.text[turn.start : turn.stop] for turn in rendered.turns] == [
        f'<tool_call>{break_}{{"name": "area", "arguments": {{"radius": 1.5}}}}{break_}</tool_call><|im_end|>'
    ]
    assert (rendered.dropped, rendered.reasoning_dropped) == ([], [1])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "qwen2.5-instruct",
            "qwen3-thinking",
            "gpt-oss-harmony",
            "llama-3.1-8b-instruct",
            "alpaca",
            "gemma-4",
        ),
        *made_templates.PLAIN,
    ],
)
def test_eighty_turns_cost_no_more_renders_than_eight(name: str, home: Path) -> None:
    counts = {}
    for turns in (8, 80):
        finder = _finder(_format(home, name), TOLD.get(name, ("</s>",)))
        counts[turns] = _count_renders(finder, _long_chat(turns))
    assert counts[80] <= counts[8] + 2, counts
    assert counts[80] <= 10, counts


@pytest.mark.parametrize("name", ["qwen2.5-instruct", "made-tools"])
def test_eighty_turns_with_tools_cost_no_more_renders_than_eight(name: str, home: Path) -> None:
    counts = {}
    for turns in (8, 80):
        messages = [system("Use tools.")]
        for turn in range(turns):
            calling = bot("", tool_calls=[call(f"City {turn}")])
            messages += [user(f"City {turn}?"), calling, result("rain"), bot(f"Rain in {turn}.")]
        chat = {"messages": messages, "tools": [WEATHER]}
        counts[turns] = _count_renders(_finder(_format(home, name)), chat)
    assert counts[80] == counts[8] <= 8


def _long_chat(turns: int) -> Chat:
    return {
        "messages": [
            message
            for turn in range(turns)
            for message in (user(f"Question {turn}?"), bot(f"Answer {turn}."))
        ]
    }


def _count_renders(finder: SpanFinder, chat: Chat) -> int:
    renders = 0
    render = finder.template.render

    def counting(*arguments: Any, **keywords: Any) -> str:
        nonlocal renders
        renders += 1
        return render(*arguments, **keywords)

    finder.template.render = counting  # type: ignore[method-assign]
    _render(finder, chat)
    return renders
