"""Say what a chat template refuses in a row, and what fixes it: found by rendering the row without it.

What a template raises is written for its author ("Conversation roles must alternate", of a chat that has a system message), or by
no one (`'dict object' has no attribute 'content'`, of a tool call).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

from msgspec.structs import replace

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.render.spellings import spellings
from sftdata.render.template import REASONING_FIELDS, ChatTemplate, TemplateRefusal

Message = dict[str, Any]

CALLS_FIX = (
    "--chat-template Qwen/Qwen2.5-0.5B-Instruct (or another tokenizer or file whose template writes tool calls), "
    "or take them out"
)
# Built-in templates that put a system message where the models of a family have learnt to see it.
_FAMILIES = (("<start_of_turn>", "gemma"), ("<<SYS>>", "llama-2"), ("[INST]", "mistral"))


def explain_refusal(template: ChatTemplate, row: Conversation, refusal: TemplateRefusal) -> RowError:
    """Return the error for a row that the template would not render."""
    said = str(refusal).rstrip(".! ")
    suspects = [suspect for suspect in _SUSPECTS if suspect[1](row.messages) != row.messages]
    for count in range(1, len(suspects) + 1):
        for chosen in combinations(suspects, count):
            messages = row.messages
            for _, without, _ in chosen:
                messages = without(messages)
            if messages and _renders(template, replace(row, messages=messages)):
                what = " and ".join(name for name, _, _ in chosen)
                return RowError(
                    "template-error", f"the chat template refuses {what} ({said})", chosen[0][2](template)
                )
    fix = "change the row to what the template accepts, or choose another with --chat-template"
    return RowError("template-error", f"the chat template refuses the row ({said})", fix)


def _renders(template: ChatTemplate, row: Conversation) -> bool:
    for attempt in spellings(row):
        try:
            template.render(attempt.messages, row.tools, row.template_kwargs)
        except TemplateRefusal:
            continue
        return True
    return False


def _without_calls(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "tool" and not message.get("tool_calls")]


def _without_system(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]


def _without_reasoning_at_calls(messages: list[Message]) -> list[Message]:
    return [
        {key: value for key, value in message.items() if key not in REASONING_FIELDS}
        if message.get("tool_calls") and message.get("content")
        else message
        for message in messages
    ]


def _developer_as_system(messages: list[Message]) -> list[Message]:
    return [
        {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
    ]


def _first_of_each_run(messages: list[Message]) -> list[Message]:
    return [
        message
        for index, message in enumerate(messages)
        if not index or message["role"] != messages[index - 1]["role"]
    ]


def _system_fix(template: ChatTemplate) -> str:
    name = next((name for marker, name in _FAMILIES if marker in template.text), "chatml")
    return f"--chat-template {name}, or put its text into the first user message"


# What a template may refuse, the row without it, and the fix; of several, the first one's serves for all.
_SUSPECTS: tuple[tuple[str, Callable[[list[Message]], list[Message]], Callable[[ChatTemplate], str]], ...] = (
    (
        "content and reasoning beside one tool call",
        _without_reasoning_at_calls,
        lambda _: "put the content into the reasoning, or leave one of the two out",
    ),
    ("its developer message", _developer_as_system, lambda _: "--map-role developer=system"),
    ("its tool calls", _without_calls, lambda _: CALLS_FIX),
    ("its system message", _without_system, _system_fix),
    (
        "messages of one role in a row",
        _first_of_each_run,
        lambda _: "--chat-template chatml, which takes any order, or merge these messages",
    ),
)
