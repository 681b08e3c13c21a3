"""Marks: private characters put around data before a render, so that afterwards every character has a known author.

A mark pair (open, close) stands just inside the outer whitespace of each text a message brings: a template that trims it still
leaves both. A placeholder stands for a control token typed inside data, so that the template's own control tokens and the data's
are told apart. Taking marks and placeholders out again must give the plain render, character for character; that equality is
the proof that the marks changed nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sftdata.render.environment import GENERATION_CLOSE, GENERATION_OPEN
from sftdata.render.template import REASONING_FIELDS

_FIRST_MARK, _FIRST_PLACEHOLDER = 0x108000, 0x10E000
MAX_MESSAGES = (_FIRST_PLACEHOLDER - _FIRST_MARK) // 2
RESERVED = re.compile("[\U00108000-\U0010efff\U0010fff0\U0010fff1]")
_SPLIT = re.compile(f"({RESERVED.pattern})")
# A reserved character as `tojson(ensure_ascii=True)` writes it: two halves of a surrogate pair.
_ESCAPED = re.compile(r"\\u(db[ef][0-9a-f])\\u(d[c-f][0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a text of message `message` opens or closes in the rendered text, characters."""

    position: int
    message: int
    closes: bool


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A rendered text with its marks taken out.

    Attributes:
        text: what the plain render gives.
        marks: ends of the messages' texts, in the order they stand in `text`.
        generation: (start, stop) of each `{% generation %}` block, characters.
        literal: (start, stop) of each control token that data brought, characters.
        places: message -> where in `marks` its own stand.
    """

    text: str
    marks: list[Mark]
    generation: list[tuple[int, int]]
    literal: list[tuple[int, int]]
    places: dict[int, list[int]]


def mark_text(text: str, message: int) -> str:
    """Put a mark pair inside the outer whitespace of `text`; a blank text is left alone."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    opening, closing = chr(_FIRST_MARK + 2 * message), chr(_FIRST_MARK + 2 * message + 1)
    return f"{text[:start]}{opening}{core}{closing}{text[start + len(core) :]}"


def mark_messages(messages: Sequence[dict[str, Any]], skip: Callable[[str], object]) -> list[dict[str, Any]]:
    """Mark the texts of every message: content, reasoning and the strings among the arguments of its tool calls.

    Names of functions stay unmarked: templates compare them, and repeat them in the header of the tool's answer.

    Args:
        skip: says which texts to leave unmarked.
    """
    return [_mark_message(message, index, skip) for index, message in enumerate(messages)]


def _mark_message(message: dict[str, Any], index: int, skip: Callable[[str], object]) -> dict[str, Any]:
    copy = dict(message)
    for key in ("content", *REASONING_FIELDS):
        if key in copy:
            copy[key] = _mark_value(copy[key], index, skip)
    if isinstance(copy.get("tool_calls"), list):
        copy["tool_calls"] = [_mark_call(call, index, skip) for call in copy["tool_calls"]]
    return copy


def _mark_call(call: Any, index: int, skip: Callable[[str], object]) -> Any:
    if not isinstance(call, dict):
        return call
    inside = {"function": _mark_call, "arguments": _mark_value}
    return {key: inside[key](item, index, skip) if key in inside else item for key, item in call.items()}


def _mark_value(value: Any, index: int, skip: Callable[[str], object]) -> Any:
    if isinstance(value, str):
        return value if skip(value) else mark_text(value, index)
    if isinstance(value, dict):
        return {key: _mark_value(item, index, skip) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_value(item, index, skip) for item in value]
    return value


def message_texts(message: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of a message that `mark_messages` marks, as far as it is not told to skip them.

    >>> list(message_texts({"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"city": "Rome"}}}]}))
    ['Rome']
    """
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    stack = [call.get("arguments") for call in calls if isinstance(call, dict)]
    stack += [message.get("content"), reasoning_of(message)]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if value.strip():
                yield value
        elif isinstance(value, dict | list):
            stack += value.values() if isinstance(value, dict) else value


def reasoning_of(message: dict[str, Any]) -> Any:
    """Return a message's reasoning, under whatever name: several hold the same."""
    return next((message[key] for key in REASONING_FIELDS if message.get(key) is not None), None)


def substitute_tokens(
    value: Any, tokens: re.Pattern[str], table: dict[str, str], keep: frozenset[str] = frozenset()
) -> Any:
    r"""Replace every token in strings (keys too) by a placeholder, growing `table` (placeholder -> token); leave those of `keep`.

    >>> table = {}
    >>> substitute_tokens({"a": "<s>x<s>"}, re.compile("<s>"), table) == {"a": "\U0010e000x\U0010e000"}, list(table.values())
    (True, ['<s>'])
    """
    if isinstance(value, str):
        return tokens.sub(
            lambda match: match[0] if match[0] in keep else _placeholder(match[0], table), value
        )
    if isinstance(value, dict):
        return {
            substitute_tokens(key, tokens, table, keep): substitute_tokens(item, tokens, table, keep)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [substitute_tokens(item, tokens, table, keep) for item in value]
    return value


def _placeholder(token: str, table: dict[str, str]) -> str:
    for placeholder, known in table.items():
        if known == token:
            return placeholder
    placeholder = chr(_FIRST_PLACEHOLDER + len(table))
    table[placeholder] = token
    return placeholder


def take_out(marked: str, table: dict[str, str]) -> MarkedText:
    """Take marks and placeholders out of a rendered text and say where they stood.

    >>> out = take_out("a" + mark_text(" b ", 3) + "c", {})
    >>> out.text, [(mark.position, mark.message, mark.closes) for mark in out.marks]
    ('a b c', [(2, 3, False), (3, 3, True)])
    """
    pieces: list[str] = []
    marks: list[Mark] = []
    literal: list[tuple[int, int]] = []
    generation: list[tuple[int, int]] = []
    places: dict[int, list[int]] = {}
    opened = position = 0
    if "\\udb" in marked:
        marked = _ESCAPED.sub(_unescape, marked)
    for index, piece in enumerate(_SPLIT.split(marked)):
        if index % 2 == 0:
            pieces.append(piece)
            position += len(piece)
        elif piece == GENERATION_OPEN:
            opened = position
        elif piece == GENERATION_CLOSE:
            if position > opened:
                generation.append((opened, position))
        elif piece in table:
            pieces.append(table[piece])
            literal.append((position, position + len(table[piece])))
            position += len(table[piece])
        else:
            number = ord(piece) - _FIRST_MARK
            places.setdefault(number // 2, []).append(len(marks))
            marks.append(Mark(position, number // 2, number % 2 == 1))
    return MarkedText("".join(pieces), marks, generation, literal, places)


def _unescape(found: re.Match[str]) -> str:
    high, low = int(found[1], 16), int(found[2], 16)
    character = chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00)
    return character if RESERVED.match(character) else found[0]
