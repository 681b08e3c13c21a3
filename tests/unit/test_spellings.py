"""One conversation in the spellings that rows have and templates take: whatever the pair, the text comes out as it was meant."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.batches import Conversation, RowBatch
from sftdata.errors import RowError
from sftdata.formats.fields import FormatOptions
from sftdata.masks.turns import RenderedConversation, SpanFinder
from sftdata.render.spellings import NULL_AS_EMPTY
from sftdata.render.template import ChatTemplate
from tests.one_stage import convert_rows

ARGUMENTS = "c.function.arguments"
# How templates write the arguments of a call: each name says what the template can take.
WAYS = {
    "joins text": "'' + " + ARGUMENTS,
    "encodes whatever it is given": ARGUMENTS + " | tojson",
    "encodes in ASCII": ARGUMENTS + " | tojson(ensure_ascii=True)",
    "prints": ARGUMENTS,
    "asks first": ARGUMENTS + " if " + ARGUMENTS + " is string else " + ARGUMENTS + " | tojson",
    "puts text in braces": f"'{{' + {ARGUMENTS} + '}}' if {ARGUMENTS} is string else {ARGUMENTS} | tojson",
}


def template(way: str, content: str = "(m.content or '')") -> str:
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + " + content + " }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }} {{ "
        + WAYS[way]
        + " }}{{ '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def render(source: str, *messages: dict[str, Any], **columns: Any) -> RenderedConversation:
    """Read a row and render it.

    Raises:
        RowError: it is rejected.
    """
    found = convert_rows(
        RowBatch([{"messages": list(messages), **columns}], *np.zeros((3, 1), np.int64)),
        "messages",
        FormatOptions(),
    )
    if found.faults:
        fault = found.faults[0][1]
        raise RowError(fault.code, fault.reason, fault.fix)
    row = found.rows[0]
    assert isinstance(row, Conversation)
    return SpanFinder(ChatTemplate(source), ("<|im_end|>",), ("<|im_start|>", "<|im_end|>")).render(row)


def trained(rendered: RenderedConversation) -> list[str]:
    return [rendered.text[turn.start : turn.stop] for turn in rendered.turns]


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        **more,
    }


ASK = {"role": "user", "content": "Go."}
values = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.text("ab'\"{}é🙂\\ ", max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.text("kl'", min_size=1, max_size=3), inner, max_size=2),
    ),
    max_leaves=5,
)
objects = st.dictionaries(st.text("abcé", min_size=1, max_size=4), values, max_size=3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("as_text", [True, False], ids=["text", "object"])
@settings(deadline=None)
@given(arguments=objects)
def test_arguments_are_trained_as_json_whatever_form_row_and_template_have(
    way: str, as_text: bool, arguments: dict[str, Any]
) -> None:
    given_form = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
    [turn] = trained(render(template(way), ASK, calling(given_form)))
    written = turn.removeprefix("<call>f ").removesuffix("</call><|im_end|>")
    assert json.loads(written) == arguments


def test_text_is_kept_to_the_letter_where_the_template_takes_text() -> None:
    odd = '{"n":1.0,  "big": 123456789012345678901234567890, "u": "\\u00e9"}'
    for way in ("joins text", "prints", "asks first"):
        assert trained(render(template(way), ASK, calling(odd))) == [f"<call>f {odd}</call><|im_end|>"]


def test_a_quote_of_python_in_the_data_is_no_misprint() -> None:
    said = {"role": "user", "content": "Why {'n': 3}?"}
    [turn] = trained(render(template("encodes whatever it is given"), said, calling({"n": 3})))
    assert turn == '<call>f {"n": 3}</call><|im_end|>'


def test_arguments_that_come_out_wrong_in_any_form_are_rejected() -> None:
    shouting = template("prints").replace(
        ARGUMENTS, "'%s' | format(" + ARGUMENTS + ') | replace(\'"\', "\\\\\\"")'
    )
    with pytest.raises(RowError) as caught:
        render(shouting, ASK, calling('{"n": "x"}'))
    assert caught.value.fault.code == "arguments-misprinted"


@pytest.mark.parametrize(
    "bad", ['{"c": "Ulm"', "{'c': 'Ulm'}", "[1]", '"Ulm"', "Ulm", "3", 3, ["Ulm"], '{"c": NaN}', True]
)
def test_arguments_that_are_no_object_are_rejected(bad: Any) -> None:
    with pytest.raises(RowError) as caught:
        render(template("asks first"), ASK, calling(bad))
    assert caught.value.fault.code == "bad-tool-call"
    assert "arguments" in caught.value.fault.reason


@pytest.mark.parametrize("empty", [None, "", {}, "{}"])
def test_a_call_without_arguments_has_an_empty_object(empty: Any) -> None:
    assert trained(render(template("asks first"), ASK, calling(empty))) == ["<call>f {}</call><|im_end|>"]


@pytest.mark.parametrize("spelling", ["arguments", "parameters"])
def test_arguments_encoded_twice_lose_one_layer_and_are_counted(spelling: str) -> None:
    twice = {"role": "assistant", "tool_calls": [{"name": "f", spelling: json.dumps('{"c": "Ulm"}')}]}
    rendered = render(template("asks first"), ASK, twice)
    assert trained(rendered) == ['<call>f {"c": "Ulm"}</call><|im_end|>']
    assert rendered.counted == ("tool_arguments_decoded",)


# ------------------------------------------------------------------------------------------------------ null contents


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "content", ["m.content", "m.content | trim", "(m.content or '')", "m.content.split('x')[0]"]
)
def test_a_null_content_beside_a_call_reads_as_empty_where_the_template_needs_a_text(
    way: str, content: str
) -> None:
    row = [
        ASK,
        calling({"c": "Ulm"}) | {"content": None},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ]
    empty = [message | {"content": message["content"] or ""} for message in row]
    rendered, expected = render(template(way, content), *row), render(template(way, content), *empty)
    assert (rendered.text, rendered.turns) == (expected.text, expected.turns)
    assert expected.counted == ()
    assert rendered.counted in ((), (NULL_AS_EMPTY,))
    assert (rendered.counted == ()) == (content in ("m.content | trim", "(m.content or '')"))


# ------------------------------------------------------------------------------------------------------ stray nulls


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


INNER = {"type": "object", "properties": {"a": {"type": "integer"}}}
NULLS: dict[str, tuple[Any, Any, Any]] = {
    "undeclared": ({"x": 1, "y": None}, [tool("f", x={})], {"x": 1}),
    "declared": ({"x": 1, "y": None}, [tool("f", x={}, y={})], {"x": 1, "y": None}),
    "in text": ('{"x": 1, "y": null}', [tool("f", x={})], {"x": 1}),
    "inside": ({"x": {"a": 1, "b": None}}, [tool("f", x=INNER)], {"x": {"a": 1}}),
    "inside a list": (
        {"x": [{"a": None, "b": None}]},
        [tool("f", x={"type": "array", "items": INNER})],
        {"x": [{"a": None}]},
    ),
    "of another tool": ({"x": 1, "y": None}, [tool("g", y={}), tool("f", x={})], {"x": 1}),
    "of a tool that is not there": ({"x": 1, "y": None}, [tool("g", y={})], {"x": 1, "y": None}),
    "without tools": ({"y": None}, None, {"y": None}),
    "where any key goes": (
        {"y": None},
        [{"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": True}}],
        {"y": None},
    ),
    "where the schema says nothing": (
        {"y": None},
        [{"name": "f", "parameters": {"type": "object"}}],
        {"y": None},
    ),
}


@pytest.mark.parametrize("case", NULLS)
def test_nulls_that_the_called_tool_does_not_declare_are_left_out_and_counted(case: str) -> None:
    arguments, tools, expected = NULLS[case]
    rendered = render(template("asks first"), ASK, calling(arguments), tools=tools)
    [turn] = trained(rendered)
    assert json.loads(turn.removeprefix("<call>f ").removesuffix("</call><|im_end|>")) == expected
    changed = expected != (json.loads(arguments) if isinstance(arguments, str) else arguments)
    assert rendered.counted == ("calls_with_stray_nulls",) * changed


# ------------------------------------------------------------------------------------------------------ contents in parts

PARTS_ONLY = (
    "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BY_ROLE = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% else %}"
    "{{ m.content[0].text + '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
EITHER = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("source", [PARTS_ONLY, BY_ROLE, EITHER], ids=["parts only", "by role", "either"])
@pytest.mark.parametrize("in_parts", [True, False], ids=["parts", "text"])
def test_a_template_is_given_parts_or_text_as_it_takes_them(source: str, in_parts: bool) -> None:
    texts = [("system", "Be brief."), ("user", "A green vegetable?"), ("assistant", "Chard.")]
    row = [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
        for role, text in texts
    ]
    rendered = render(source, *row)
    assert (
        rendered.text
        == "system: Be brief.<|im_end|>user: A green vegetable?<|im_end|>assistant: Chard.<|im_end|>"
    )
    assert trained(rendered) == ["Chard.<|im_end|>"]
    assert (rendered.dropped, rendered.counted) == ([], ())


# ------------------------------------------------------------------------------------------------------ reasoning

DROPS = template("prints")
CUTS = template("prints", "(m.content or '').split('</think>')[-1]")
INLINE = {"role": "assistant", "content": "<think>\nPairs.\n</think>\n\nFour."}


@pytest.mark.parametrize("spelling", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("source", [DROPS, CUTS], ids=["drops", "cuts"])
def test_reasoning_that_a_template_leaves_out_is_counted_by_every_name(spelling: str, source: str) -> None:
    rendered = render(source, ASK, {"role": "assistant", "content": "Four.", spelling: "Pairs."})
    assert (rendered.reasoning_dropped, rendered.dropped, rendered.counted) == ([1], [], ())


def test_reasoning_inside_a_content_that_a_template_cuts_is_counted() -> None:
    assert render(CUTS, ASK, INLINE).reasoning_dropped == [1]
    assert render(DROPS, ASK, INLINE).reasoning_dropped == []


def test_a_column_of_reasoning_is_the_answers_own() -> None:
    row = {"question": "3+4?", "reasoning": "Count on.", "answer": "7"}
    batch = RowBatch([row], *np.zeros((3, 1), np.int64))
    found = convert_rows(batch, "question-answer", FormatOptions())
    [talk] = found.rows
    assert isinstance(talk, Conversation)
    assert talk.messages[1] == {"role": "assistant", "content": "7", "reasoning_content": "Count on."}
    assert found.unused == {}
    assert convert_rows(batch, "question-answer", FormatOptions(chat=False)).unused == {"reasoning": 1}


def test_reasoning_under_two_names_must_agree() -> None:
    with pytest.raises(RowError) as caught:
        render(DROPS, ASK, {"role": "assistant", "content": "4", "reasoning": "a", "thinking": "b"})
    assert caught.value.fault.code == "said-twice"


# ------------------------------------------------------------------------------------------------------ tools elsewhere

WEATHER = tool("weather", city={"type": "string"})
SHOWS = "{% for t in tools or [] %}{{ t.function.name + '!' }}{% endfor %}" + template("asks first")
ANSWER = {"role": "assistant", "content": "Dry."}
PLACES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tools": ([ASK, ANSWER], {"tools": [WEATHER]}),
    "functions": ([ASK, ANSWER], {"functions": [WEATHER["function"]]}),
    "tool_defs": ([ASK, ANSWER], {"tool_defs": json.dumps([WEATHER])}),
    "template arguments": ([ASK, ANSWER], {"chat_template_kwargs": {"tools": [WEATHER]}}),
    "a part": (  # as a list of parts has them
        [{"role": "system", "content": [{"type": "tools", "value": json.dumps([WEATHER])}, {"type": "text", "text": "Be."}]},
         ASK, ANSWER], {},
    ),
    "the system message": ([{"role": "system", "content": "Be.", "tools": [WEATHER]}, ASK, ANSWER], {}),
    "two places that agree": ([ASK, ANSWER], {"tools": [WEATHER], "chat_template_kwargs": {"tools": [WEATHER["function"]]}}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_tools_are_found_wherever_they_stand(place: str) -> None:
    messages, columns = PLACES[place]
    rendered = render(SHOWS, *messages, **columns)
    assert rendered.text.startswith("weather!<|im_start|>")
    assert rendered.counted == ()


def test_tools_in_two_places_must_agree() -> None:
    with pytest.raises(RowError) as caught:
        render(SHOWS, ASK, ANSWER, tools=[WEATHER], chat_template_kwargs={"tools": [tool("other")]})
    assert caught.value.fault.code == "said-twice"


# ------------------------------------------------------------------------------------------------------ roles


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        ("User", "user"), (" HUMAN ", "user"), ("prompter", "user"), ("GPT", "assistant"), ("IPython", "tool"),
        ("tool_response", "tool"), ("Observation", "tool"), ("Developer", "developer"),
    ],
)  # fmt: skip
def test_roles_are_known_in_any_case(spelling: str, role: str) -> None:
    rendered = render(DROPS, {"role": spelling, "content": "A"}, ANSWER)
    assert rendered.text.startswith(f"<|im_start|>{role}\nA")


def test_null_roles_are_read_by_from_and_value() -> None:
    rendered = render(
        DROPS,
        {"role": None, "from": "human", "content": None, "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
    )
    assert trained(rendered) == ["Hello.<|im_end|>"]


STRANGERS = [
    "prompt_giver",
    "context",
    "environment",
    "assistant_result",
    "tool_results_of_assistant",
    "observer",
    "critic",
]


@pytest.mark.parametrize("role", STRANGERS)
def test_advice_for_an_unknown_role_never_trains_it(role: str) -> None:
    with pytest.raises(RowError) as caught:
        render(DROPS, {"role": role, "content": "A"}, ANSWER)
    assert caught.value.fault.code == "unknown-role"
    assert f"{role}=assistant" not in caught.value.fault.fix
    assert "system, user, assistant (trained) or tool" in caught.value.fault.fix


def test_all_unknown_roles_of_a_row_are_named_at_once_each_with_its_flag() -> None:
    with pytest.raises(RowError) as caught:
        render(
            DROPS,
            {"role": "guest", "content": "A"},
            {"role": "bot", "content": "B"},
            {"role": "guest", "content": "C"},
            {"role": None},
        )
    fault = caught.value.fault
    assert fault.reason.count(".role is") == 3
    for named in ("messages[0].role is 'guest'", "messages[1].role is 'bot'", "messages[3].role is null"):
        assert named in fault.reason
    assert "--map-role bot=assistant" in fault.fix
    assert fault.fix.count("--map-role guest=") == 1


def test_messages_of_calls_are_one_turn_where_they_stand_together() -> None:
    calls = [
        {"role": "tool_call", "content": json.dumps({"name": name, "arguments": {}})} for name in ("f", "g")
    ]
    results = [{"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"}]
    together = render(DROPS.replace("'' + ", ""), ASK, *calls, *results, ANSWER)
    assert trained(together) == ["<call>f {}</call><call>g {}</call><|im_end|>", "Dry.<|im_end|>"]
    spoken = render(DROPS, ASK, {"role": "assistant", "content": "Let me see."}, calls[0], results[0], ANSWER)
    assert trained(spoken)[0] == "Let me see.<call>f {}</call><|im_end|>"
    switched = render(
        DROPS, ASK, {"role": "assistant", "content": "See.", "loss": False}, calls[0], results[0], ANSWER
    )
    assert len(trained(switched)) == 3
