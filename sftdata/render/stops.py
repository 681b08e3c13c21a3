"""Which strings end a turn: the tokenizer's stop tokens, and what the chat template itself writes after an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from sftdata.render import marks
from sftdata.render.template import CONTROL_SHAPE, ChatTemplate, TemplateRefusal

_USER: dict[str, Any] = {"role": "user", "content": "A"}
_ANSWER: dict[str, Any] = {"role": "assistant", "content": "B"}
_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"x": "y"}}}
_CALLING: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: dict[str, Any] = {"role": "tool", "content": "C", "name": "f", "tool_call_id": "abcdefghi"}
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}


def find_stops(template: ChatTemplate, stop_tokens: Sequence[str], control_tokens: Iterable[str]) -> tuple[str, ...]:
    """Return the strings that end a turn of `template`.

    Where the template writes one of the tokenizer's stop tokens after an answer, that ends the turn (Command R7B closes the answer
    with `<|END_RESPONSE|>` first). Where it does not, the first control token does, whether another turn follows or not (in GLM-4
    it is the next header's `<|user|>`). After a tool call the brackets of the call itself are passed over.
    """
    known = [*control_tokens, *stop_tokens]
    shape = re.compile("|".join([*sorted(map(re.escape, known), key=lambda token: (-len(token), token)), CONTROL_SHAPE.pattern]))
    stops = list(stop_tokens)
    for messages, tokens in (
        ([_USER, _ANSWER], shape),
        ([_USER, _ANSWER, _USER, _ANSWER], shape),
        ([_USER, _CALLING], CONTROL_SHAPE),
        ([_USER, _CALLING, _RESULT], CONTROL_SHAPE),
    ):
        after = _after_second(template, messages)
        found = None if any(stop in after for stop in stops) else tokens.search(after)
        stops += [found[0]] if found and found[0].strip() else []
    return tuple(dict.fromkeys(stops))


def _after_second(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    """Return the text between the data of the second message and the next data, or the end; "" where the template refuses."""
    for tools in (None, [_TOOL]):
        try:
            marked = marks.take_out(template.render(marks.mark_messages(messages, lambda _: False), tools), {})
        except TemplateRefusal:
            continue
        own = [mark.position for mark in marked.marks if mark.message == 1]
        later = [mark.position for mark in marked.marks if mark.message > 1]
        return marked.text[own[-1] : later[0] if later else len(marked.text)] if own else ""
    return ""
