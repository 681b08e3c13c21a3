"""Rows of every shape that chats come in, what each may mean, and the verdict on what became of it with one chat template.

A row is given as JSON, as a file would hold it. Templates differ in what they take (arguments as an object or as their JSON text,
content as text or as parts, null or ""), so a row may be read in several ways; any of them is right as long as the text is what
transformers renders of it. What must be trained is told by the slow oracle (oracles/char_masks.py) on the same reading.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.formats.fields import FormatOptions
from sftdata.masks.turns import RenderedConversation, SpanFinder
from sftdata.sources.source import open_source, plan_source, read_chunk
from tests.chats import WEATHER
from tests.one_stage import convert_rows
from tests.oracles.char_masks import Format, Unsure, trained_spans

Message = dict[str, Any]
Row = dict[str, Any]

ASK = {"role": "user", "content": "Is it raining in Oslo?"}
MORE = {"role": "user", "content": "And in Rome?"}
SAYS = {"role": "assistant", "content": "It rains."}
SUN = {"role": "assistant", "content": "The sun shines."}
BRIEF = {"role": "system", "content": "Speak briefly."}
RAIN = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh1", "content": "rain, 4 degrees"}
THINK = "Rain falls there."


def _calls(*cities: str, content: Any = "", text: bool = False, **more: Any) -> Message:
    def arguments(city: str) -> Any:
        return json.dumps({"city": city}) if text else {"city": city}

    calls = [
        {
            "type": "function",
            "id": f"abcdefgh{number}",
            "function": {"name": "get_weather", "arguments": arguments(city)},
        }
        for number, city in enumerate(cities, 1)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def _row(*messages: Message, tools: bool = False) -> Row:
    return {"messages": list(messages), **({"tools": [WEATHER]} if tools else {})}


def _parts(message: Message, *texts: str) -> Message:
    return {**message, "content": [{"type": "text", "text": text} for text in texts]}


_NULL = _calls("Oslo")
_NULL["content"] = None
_ABSENT = {key: value for key, value in _NULL.items() if key != "content"}
_BOTH_RESULTS = (RAIN, {**RAIN, "tool_call_id": "abcdefgh2", "content": "sun"})

SHAPES: dict[str, Row] = {
    "one turn": _row(ASK, SAYS),
    "system": _row(BRIEF, ASK, SAYS),
    "turns": _row(ASK, SAYS, MORE, SUN),
    "turns with system": _row(BRIEF, ASK, SAYS, MORE, SUN, ASK, SAYS),
    "user last": _row(ASK, SAYS, MORE),
    "answers in a row": _row(ASK, SAYS, SUN, MORE, SUN),
    "questions in a row": _row(ASK, MORE, SUN),
    "empty answer": _row(ASK, {**SAYS, "content": ""}, MORE, SUN),
    "white space": _row(
        {**ASK, "content": " Is it?\n"}, {**SAYS, "content": "\n It rains. \n"}, MORE, {**SAYS, "content": "  No"}),
    "call": _row(ASK, _calls("Oslo"), RAIN, SAYS, tools=True),
    "call, arguments as text": _row(ASK, _calls("Oslo", text=True), RAIN, SAYS, tools=True),
    "call, content null": _row(ASK, _NULL, RAIN, SAYS, tools=True),
    "call, no content": _row(ASK, _ABSENT, RAIN, SAYS, tools=True),
    "call, null and text": _row(ASK, _calls("Oslo", content=None, text=True), RAIN, SAYS, tools=True),
    "call, tools not listed": _row(ASK, _calls("Oslo"), RAIN, SAYS),
    "call with words": _row(ASK, _calls("Oslo", content="Let me look."), RAIN, SAYS, tools=True),
    "call last": _row(ASK, _calls("Oslo"), tools=True),
    "call last, arguments as text": _row(ASK, _calls("Oslo", text=True), tools=True),
    "parallel calls": _row(ASK, _calls("Oslo", "Rome"), *_BOTH_RESULTS, SAYS, tools=True),
    "parallel calls as text": _row(ASK, _calls("Oslo", "Rome", text=True), *_BOTH_RESULTS, SAYS, tools=True),
    "parallel calls last": _row(ASK, _calls("Oslo", "Rome"), tools=True),
    "call after call": _row(ASK, _calls("Oslo"), RAIN, _calls("Rome"), {**RAIN, "content": "sun"}, SUN, tools=True),
    "calls in turns": _row(
        BRIEF, ASK, _calls("Oslo"), RAIN, SAYS, MORE, _calls("Rome"), {**RAIN, "content": "sun"}, SUN, tools=True),
    "call of numbers": _row(
        ASK, {**_calls("Oslo"), "tool_calls": [{"type": "function", "id": "abcdefgh1", "function":
                                                {"name": "get_weather", "arguments": {"days": 3}}}]}, RAIN, SAYS, tools=True),
    "call with reasoning": _row(ASK, _calls("Oslo", reasoning_content=THINK), RAIN, SAYS, tools=True),
    "tools unused": _row(ASK, SAYS, tools=True),
    "parts": _row(_parts(ASK, ASK["content"]), _parts(SAYS, SAYS["content"])),
    "two parts": _row(_parts(ASK, "Is it", " raining?"), _parts(SAYS, "It ", "rains.")),
    "parts in the middle": _row(BRIEF, ASK, _parts(SAYS, SAYS["content"]), _parts(MORE, MORE["content"]), SUN),
    "reasoning_content": _row(ASK, {**SAYS, "reasoning_content": THINK}),
    "reasoning": _row(ASK, {**SAYS, "reasoning": THINK}),
    "thinking": _row(ASK, {**SAYS, "thinking": THINK}),
    "reasoning in turns": _row(ASK, {**SAYS, "reasoning_content": THINK}, MORE, {**SUN, "reasoning_content": "Sun there."}),
    "inline think": _row(ASK, {**SAYS, "content": f"<think>\n{THINK}\n</think>\n\nIt rains."}),
    "inline think on one line": _row(ASK, {**SAYS, "content": f"<think>{THINK}</think>It rains."}),
    "inline think in turns": _row(
        ASK, {**SAYS, "content": f"<think>\n{THINK}\n</think>\n\nIt rains."}, MORE,
        {**SAYS, "content": "<think>\nSun there.\n</think>\n\nThe sun shines."}),
    "inline empty think": _row(ASK, {**SAYS, "content": "<think>\n\n</think>\n\nIt rains."}),
    "inline call": _row(
        ASK, {**SAYS, "content": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'}),
    "inline call with words": _row(ASK, {**SAYS, "content": 'I look. <tool_call>{"name": "f"}</tool_call>'}, MORE, SUN),
    "typed end": _row({**ASK, "content": "What is <|im_end|>?"}, {**SAYS, "content": "<|im_end|> ends a turn."}),
    "typed header": _row({**ASK, "content": "Hi<|im_end|>\n<|im_start|>assistant\nSure"}, SAYS, MORE, SUN),
    "typed tag by a user": _row({**ASK, "content": "What is <think> and <tool_call>?"}, SAYS),
}  # fmt: skip


# ----------------------------------------------------------------------------------------- what a row may be read as


def readings(row: Row) -> Iterator[tuple[list[Message], list[dict[str, Any]] | None]]:
    """Yield the ways to hand a row to a template, the row as it stands first."""
    for arguments, null, parts in product(
        ("given", "object", "text"), ("given", ""), ("given", "text", "parts")
    ):
        messages = [_read(message, arguments, null, parts) for message in row["messages"]]
        if not any(_is_odd(message) for message in messages):
            yield messages, row.get("tools")


def _is_odd(message: Message) -> bool:
    """Say whether reasoning stands under a name that templates never see alone."""
    return "reasoning" in message


def _read(message: Message, arguments: str, null: str, parts: str) -> Message:
    message = dict(message)
    reasoning = next(
        (message.pop(key) for key in ("reasoning_content", "thinking", "reasoning") if key in message), None
    )
    if reasoning is not None:
        message |= {"thinking": reasoning, "reasoning_content": reasoning}
    content = message.get("content")
    if content is None and null != "given":
        message["content"] = null
    elif content is not None and parts != "given":
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        # Some templates read the first part only: a text that came in two is one there.
        message["content"] = text if parts == "text" else [{"type": "text", "text": text}]
    if "tool_calls" in message and arguments != "given":
        message["tool_calls"] = [_read_call(call, arguments) for call in message["tool_calls"]]
    return message


def _read_call(call: dict[str, Any], arguments: str) -> dict[str, Any]:
    given = call["function"]["arguments"]
    meant = json.loads(given) if isinstance(given, str) else given
    return {
        **call,
        "function": {**call["function"], "arguments": meant if arguments == "object" else json.dumps(meant)},
    }


# ----------------------------------------------------------------------------------------------------- the verdict


def read_shapes(folder: Path) -> dict[str, Conversation | str]:
    """Read all shapes as `prepare` does, from a file; the code of its fault for one that is rejected there."""
    path = folder / "shapes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SHAPES.values()))
    plan = plan_source(open_source(str(path)), 0, 1 << 30)
    batch, _ = read_chunk(plan.chunks[0])
    converted = convert_rows(batch, "messages", FormatOptions())
    names = list(SHAPES)
    found: dict[str, Conversation | str] = {names[index]: fault.code for index, fault in converted.faults}
    found |= {names[index]: row for index, row in zip(converted.row.tolist(), converted.rows, strict=True)}
    return {name: found[name] for name in names}


def judge(
    form: Format, finder: SpanFinder, name: str, row: Conversation | str
) -> tuple[str, RenderedConversation | None]:
    """Return "right", "unsure" (the oracle cannot tell), "wrong: ..." or "rejected: CODE", with the render of an accepted row."""
    if isinstance(row, str):
        return f"rejected: {row}", None
    try:
        rendered = finder.render(row)
    except RowError as error:
        return f"rejected: {error.fault.code}", None
    verdicts = []
    for messages, tools in readings(SHAPES[name]):
        try:
            same = form.render(messages, tools) == rendered.text
        except Exception:  # templates raise whatever they like
            continue
        if same:
            verdicts.append(_same_spans(form, finder, rendered, messages, tools))
    if not verdicts:
        return "wrong: not what transformers renders", rendered
    return next(verdict for verdict in ("right", "unsure", *verdicts) if verdict in verdicts), rendered


def _same_spans(
    form: Format, finder: SpanFinder, rendered: RenderedConversation, messages: list[Message], tools: Any
) -> str:
    ours = [(turn.start, turn.stop) for turn in rendered.turns]
    if finder.template.has_generation:
        theirs = form.generated(messages, tools)
    else:
        try:
            spans = trained_spans(form, messages, tools)
        except Unsure:
            return "unsure"
        theirs = [spans[turn.message] for turn in rendered.turns]
    if ours == theirs:
        return "right"
    shown = [[rendered.text[slice(*span)] for span in spans] for spans in (ours, theirs)]
    return f"wrong: trains {shown[0]}, the oracle {shown[1]}"
