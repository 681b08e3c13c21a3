"""Made-up conversations that a chat template is tried on, and what it writes around their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftdata.render import marks
from sftdata.render.template import ChatTemplate, TemplateRefusal

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "S"}
USER: Message = {"role": "user", "content": "A"}
ANSWER: Message = {"role": "assistant", "content": "B"}
RESULT: Message = {"role": "tool", "content": "C", "name": "f", "tool_call_id": "abcdefghi"}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def calling(arguments: Any) -> Message:
    """Return an assistant message that calls a tool."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


# Templates take the arguments of a call as an object or as its JSON text.
CALLS = (calling({"x": "y"}), calling('{"x": "y"}'))


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes between the data of two messages, or behind that of the last.

    Attributes:
        text: the characters.
        before: the message (its place in the conversation) whose data stands before; -1 for none.
        after: the message whose data stands behind; None for none.
    """

    text: str
    before: int
    after: int | None


def frames(template: ChatTemplate, messages: list[Message]) -> list[Frame]:
    """Render a conversation and cut its messages' data out; no frames where the template refuses it."""
    for tools in (None, [_TOOL]):
        try:
            marked = marks.take_out(
                template.render(marks.mark_messages(messages, lambda _: False), tools), {}
            )
        except TemplateRefusal:
            continue
        found, at, before = [], 0, -1
        for mark in marked.marks:
            if mark.message != before:
                found.append(Frame(marked.text[at : mark.position], before, mark.message))
            before, at = mark.message, mark.position
        return [*found, Frame(marked.text[at:], before, None)]
    return []
