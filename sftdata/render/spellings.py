"""Pass a conversation to a chat template in a spelling that it takes, or explain what it refuses.

The OpenAI API has tool arguments as JSON text and `content: null` beside a call; templates are written for
what their author passed them: some join arguments as text, some print them with `tojson`, some measure a
content that is not there. A row goes to the template as it is, and in another spelling of the same only where
that one cannot be right.

What a template raises is written for its author ("Conversation roles must alternate", for a chat that has a
system message), or for no one (`'dict object' has no attribute 'content'`, for a tool call). What it refuses
is found by rendering the row without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations

import msgspec
from msgspec.structs import replace

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.render.template import (
    REASONING_FIELDS,
    ChatTemplate,
    Message,
    TemplateRefusal,
    calls_of,
    message_texts,
)

NULL_AS_EMPTY = "rows_with_null_content"
"""Counter of the rows that a template takes only with "" where they have no content."""


def spellings(row: Conversation) -> Iterator[Conversation]:
    """Yield a row as it is and with "" for null contents; then both with arguments as objects, as JSON."""
    tried = []
    for spell in (_as_they_are, _as_objects, _as_text):
        for fill in (_as_it_is, _as_empty):
            messages = [_with_arguments(fill(message), spell) for message in row.messages]
            if messages not in tried:
                tried.append(messages)
                filled = fill is _as_empty and messages != [
                    _with_arguments(message, spell) for message in row.messages
                ]
                yield replace(
                    row, messages=messages, counted=(*row.counted, NULL_AS_EMPTY) if filled else row.counted
                )


def needs_spelling(row: Conversation) -> bool:
    """Return whether a row has more than one spelling: most have not."""
    return any("tool_calls" in message or message.get("content") is None for message in row.messages)


def misprinted(row: Conversation, text: str) -> bool:
    r"""Return whether a rendered text has tool arguments as no model should write them.

    An object printed as Python prints it (`{'n': 3}`), or JSON text encoded as JSON once more
    (`"{\"n\": 3}"`) or put in braces by the template (`{{"n": 3}}`: Gemma 4, whose calls are not JSON).
    """
    wrong = {
        form
        for message in row.messages
        for function in _functions_with_arguments(message)
        for form in _wrong_forms(function["arguments"])
    }
    data = (
        [text for message in row.messages for text in message_texts(message)]
        if any(form in text for form in wrong)
        else []
    )
    return any(text.count(form) > sum(one.count(form) for one in data) for form in wrong)


def _wrong_forms(arguments: object) -> Iterator[str]:
    """Yield what a text may not hold: JSON encoded or braced once more, objects as Python prints them."""
    if isinstance(arguments, str):
        if arguments.lstrip().startswith("{"):  # else a formatter of the user's own wrote what belongs there
            yield f"{{{arguments}}}"
        once_more = [json.dumps(arguments, ensure_ascii=ascii) for ascii in (False, True)]
        # With its outer quotes only where it has none inside (`"{}"`): a template may write other ones around
        # it.
        yield from (text[1:-1] if '"' in arguments else text for text in once_more)
        return
    right = ""
    stack: list[object] = [arguments]
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list):
            stack += value.values() if isinstance(value, dict) else value
            if "'" in (printed := repr(value)):
                right = right or json.dumps(arguments, ensure_ascii=False) + json.dumps(arguments)
                if printed not in right:  # Python, too, quotes with " what holds a '
                    yield printed


def _functions_with_arguments(message: Message) -> list[Message]:
    functions = [call.get("function") for call in calls_of(message)]
    return [function for function in functions if isinstance(function, dict) and "arguments" in function]


def _with_arguments(message: Message, spell: Callable[[object], object]) -> Message:
    calls = message.get("tool_calls")
    if not calls or not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_respelled(call, spell) for call in calls]}


def _respelled(call: object, spell: Callable[[object], object]) -> object:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": spell(function["arguments"])}}


def _as_they_are(arguments: object) -> object:
    return arguments


def _as_objects(arguments: object) -> object:
    try:
        return msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except msgspec.DecodeError:  # from a formatter of the user's own
        return arguments


def _as_text(arguments: object) -> object:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_it_is(message: Message) -> Message:
    return message


def _as_empty(message: Message) -> Message:
    return {**message, "content": ""} if message.get("content") is None else message


CALLS_FIX = (
    "--chat-template Qwen/Qwen2.5-0.5B-Instruct"
    " (or another tokenizer or file whose template writes tool calls), or take them out"
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
                fix = chosen[0][2](template)
                return RowError("template-error", f"the chat template refuses {what} ({said})", fix)
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
