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

    Where the template writes one of the tokenizer's stop tokens after an answer, that ends the turn (Command R7B writes
    `<|END_RESPONSE|>` before it). Where it does not, the first control token does, whether another turn follows or not (GLM-4:
    the next header's `<|user|>`). After a tool call the brackets of the call itself are passed over, and a token that
    stands before it too only opens the next message.
    """
    known = [*control_tokens, *stop_tokens]
    shape = re.compile("|".join([*sorted(map(re.escape, known), key=lambda token: (-len(token), token)), CONTROL_SHAPE.pattern]))
    stops = list(stop_tokens)
    for messages in ([_USER, _ANSWER], [_USER, _ANSWER, _USER, _ANSWER]):
        _, after = _around_second(template, messages)
        stops += [] if any(stop in after for stop in stops) else [found[0] for found in [shape.search(after)] if found]
    for messages in ([_USER, _CALLING], [_USER, _CALLING, _RESULT]):
        before, after = _around_second(template, messages)
        found = None if any(stop in after for stop in stops) else CONTROL_SHAPE.search(after)
        stops += [found[0]] if found and found[0] not in before else []
    return tuple(stop for stop in dict.fromkeys(stops) if stop.strip())


def _around_second(template: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the text before the data of the second message and the text from there to the next data; "" where refused."""
    for tools in (None, [_TOOL]):
        try:
            marked = marks.take_out(template.render(marks.mark_messages(messages, lambda _: False), tools), {})
        except TemplateRefusal:
            continue
        own = [mark.position for mark in marked.marks if mark.message == 1]
        later = [mark.position for mark in marked.marks if mark.message > 1]
        return (marked.text[: own[0]], marked.text[own[-1] : later[0] if later else len(marked.text)]) if own else ("", "")
    return "", ""
