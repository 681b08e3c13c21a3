"""Where a turn ends: behind all that the model writes before it hands over, whatever the template calls it.

The templates are made: each says what it writes behind an answer, behind a call and before each role, so that the right end is
known from how it was made.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pytest

from sftdata.batches import Conversation
from sftdata.masks.turns import SpanFinder
from sftdata.render.control_tokens import find_unknown_tokens
from sftdata.render.template import ChatTemplate, control_tokens

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}
ASK = {"role": "user", "content": "Rain?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4 mm"}
ANSWER = {"role": "assistant", "content": "It rains."}


class Style(NamedTuple):
    """What a template writes: behind an answer and behind a call (both belong to the turn), and before a message of each role."""

    answer: str
    call: str
    header: str  # holds %s for the role
    gap: str = ""


STYLES = {
    "one token": Style("<|end|>", "<|end|>", "<|start|>%s<|message|>"),
    "one token and a newline": Style("<|end|>", "<|end|>", "<|start|>%s\n", "\n"),
    "another token behind calls": Style("<|end|>", "<|call|>", "<|start|>%s<|message|>"),
    "a run behind calls": Style("<|im_end|>", "<|/tc|><|calls|>", "<|im_start|>%s\n", "\n"),
    "a run behind calls, headers side by side": Style(
        "<|im_end|>", "<|/tc|><|calls|>", "<|im_start|>%s<|sep|>"
    ),
    "a run behind answers": Style("<|/answer|><|end|>", "<|/tc|><|end|>", "<|turn|>%s<|sep|>"),
    "three tokens": Style("<|/a|><|/b|><|/c|>", "<|/x|><|/y|><|/z|>", "<|%s|>"),
    "brackets that are no tokens": Style("<|end|>", "</call></calls><|hand|>", "<|%s|>\n", "\n"),
    "bars on one side": Style("<turn|>", "<call|><|wait>", "<|turn>%s\n", "\n"),
}
CHATS = {
    "an answer alone": [ASK, ANSWER],
    "a call alone": [ASK, CALLING],
    "a call, its result, an answer": [ASK, CALLING, RESULT, ANSWER],
    "calls in the middle and at the end": [ASK, ANSWER, ASK, CALLING, RESULT, ANSWER, ASK, CALLING],
    "two calls in a row": [ASK, CALLING, RESULT, CALLING, RESULT, ANSWER, ASK, ANSWER],
}


def template(style: Style) -> str:
    header = style.header.replace("%s", "' + m.role + '").replace("\n", "\\n")
    prompt = style.header.replace("%s", "assistant").replace("\n", "\\n")
    call = "{{ '<|tc|>' + c.function.name + (c.function.arguments | tojson) }}"
    return (
        f"{{% for m in messages %}}{{{{ '{header}' + m.content }}}}"
        f"{{% if m.tool_calls %}}{{% for c in m.tool_calls %}}{call}{{% endfor %}}{style.call}"
        f"{{% elif m.role == 'assistant' %}}{style.answer}{{% else %}}<|over|>{{% endif %}}{{{{ {style.gap!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"
    )


def trained(style: Style, messages: list[dict[str, Any]], told: tuple[str, ...] = ()) -> list[str]:
    source = template(style)
    finder = SpanFinder(ChatTemplate(source), told, control_tokens(source))
    rendered = finder.render(Conversation(messages, [None] * len(messages)))
    assert all(turn.ended for turn in rendered.turns)
    return [rendered.text[turn.start : turn.stop] for turn in rendered.turns]


@pytest.mark.parametrize(("name", "title"), list(product(STYLES, CHATS)))
def test_a_turn_ends_behind_all_that_the_model_writes(name: str, title: str) -> None:
    style, messages = STYLES[name], CHATS[title]
    ends = {"": 'look{"city": "Oslo"}' + style.call, "It rains.": "It rains." + style.answer}
    expected = [ends[m["content"]] for m in messages if m["role"] == "assistant"]
    found = [text.removeprefix("<|tc|>") for text in trained(style, messages)]
    assert found == expected
    # A tokenizer that names the end of answers changes nothing about calls.
    last = "<" + style.answer.rpartition("<")[2]
    assert [text.removeprefix("<|tc|>") for text in trained(style, messages, (last,))] == expected


NEXT_HEADER = """{% for m in messages %}{{ '<|' + (m.role if m.role != 'tool' else 'observation') + '|>\n' + m.content }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name + (c.function.arguments | tojson) }}</call>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


def test_without_an_end_of_its_own_a_turn_ends_in_the_first_token_of_the_next_header() -> None:
    finder = SpanFinder(
        ChatTemplate(NEXT_HEADER), ("<|endoftext|>",), ("<|user|>", "<|assistant|>", "<|observation|>")
    )
    messages = CHATS["a call, its result, an answer"] + [ASK, ANSWER]
    rendered = finder.render(Conversation(messages, [None] * len(messages)))
    assert [rendered.text[turn.start : turn.stop] for turn in rendered.turns] == [
        '<call>look{"city": "Oslo"}</call><|observation|>', "It rains.<|user|>", "It rains.",
    ]  # fmt: skip
    assert [turn.ended for turn in rendered.turns] == [True, True, False]


OPENS_THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}"
)
ANSWERS = {
    "<think>\nIt pours.\n</think>\nYes.": "It pours.\n</think>\nYes.",  # what the prompt holds is there word for word
    "<think>It pours.</think>Yes.": "It pours.</think>Yes.",  # the tag is, the newline is not
    "<think>": "",
    "Yes.": "Yes.",
    "<thinking>Yes.": "<thinking>Yes.",
    "So: <think>no</think>": "So: <think>no</think>",
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("turns", [1, 3])
def test_what_the_generation_prompt_holds_is_not_trained_where_the_turn_repeats_it(
    answer: str, turns: int
) -> None:
    finder = SpanFinder(
        ChatTemplate(OPENS_THINKING), ("<|end|>",), ("<|start|>", "<|end|>"), ("<think>", "</think>")
    )
    for _ in range(2):  # the second time by what was learnt from the first
        messages = [ASK, {"role": "assistant", "content": answer}] * turns
        rendered = finder.render(Conversation(messages, [None] * len(messages)))
        assert [rendered.text[t.start : t.stop] for t in rendered.turns] == [
            ANSWERS[answer] + "<|end|>"
        ] * turns
        finder.render(Conversation([ASK, ANSWER] * turns, [None] * 2 * turns))


R1_LIKE = (
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}{{ '<|' + m.role + '|>' + text + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


@pytest.mark.parametrize("blank", ["", "\n", "\n\n"])
def test_reasoning_that_a_template_cuts_off_an_answer_is_named(blank: str) -> None:
    finder = SpanFinder(
        ChatTemplate(R1_LIKE), ("<|end|>",), ("<|user|>", "<|assistant|>", "<|end|>"), ("<think>", "</think>")
    )
    thought = {"role": "assistant", "content": f"<think>\nClouds.\n</think>{blank}Yes."}
    rendered = finder.render(Conversation([ASK, thought, ASK, ANSWER], [None] * 4))
    assert rendered.reasoning_dropped == [1]
    assert [rendered.text[t.start : t.stop] for t in rendered.turns] == [
        f"{blank}Yes.<|end|>",
        "It rains.<|end|>",
    ]


ENDS = ["[|endofturn|]", "[|end|]", "[e~[", "<seed:eos>", "<sep>", "<_end>", "</s>", "<eod>"]
ROLES = {"[|%s|]": ["[|user|]", "[|assistant|]"], "### %s:\n": [], "]~b]%s\n": []}


def _plain(header: str, end: str) -> ChatTemplate:
    spoken = (
        "{{ '"
        + header.replace("%s", "' + m.role + '").replace("\n", "\\n")
        + "' + m.content + '"
        + end
        + "\\n' }}"
    )
    prompt = header.replace("%s", "assistant")
    return ChatTemplate(
        f"{{% for m in messages %}}{spoken}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


@pytest.mark.parametrize(("header", "end"), list(product(ROLES, ENDS)))
def test_what_stands_in_brackets_behind_every_answer_is_a_token(header: str, end: str) -> None:
    found = find_unknown_tokens(_plain(header, end), ["<|endoftext|>"])
    assert found[0] == end
    assert set(found) == {end, *(ROLES[header] if end.startswith("[|") else [])}
    assert find_unknown_tokens(_plain(header, end), ["<|endoftext|>", end]) == ()  # the tokenizer has it


@pytest.mark.parametrize(
    ("header", "end"), [("### %s:\n", ""), ("%s: ", " "), ("[%s] ", ""), ("<|%s|>", ""), ("%s: ", "<|end|>")]
)
def test_words_and_headers_are_no_tokens(header: str, end: str) -> None:
    assert find_unknown_tokens(_plain(header, end), ["<|endoftext|>"]) == ()
