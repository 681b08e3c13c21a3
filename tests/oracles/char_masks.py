"""The trained characters of a rendered conversation, found the slow and obvious way.

Nothing here comes from the code under test. Rendering is transformers' own. Whose text stands where is found by writing other
letters into one message, rendering again and looking where the two renders differ. The prompt of each turn is rendered for each
turn. Which strings end a turn is told by hand, template by template. Cost: quadratic in the number of turns.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from transformers.utils import chat_template_utils

Messages = list[dict[str, Any]]
TAG = re.compile(r"<[^<>\s]+>")


class _Clock(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return cls(2025, 1, 1, tzinfo=tz)


def fixed_clock() -> AbstractContextManager[object]:
    """Let it be 2025-01-01 for every template that transformers renders."""
    return mock.patch.object(chat_template_utils, "datetime", _Clock)


class Unsure(Exception):
    """The oracle cannot tell."""


@dataclass
class Format:
    """A chat template as a tester knows it: its source, the arguments it needs, and the strings that end a turn.

    `parts`: it takes contents as lists of parts only; `text_arguments`: it takes tool arguments as JSON text only.
    """

    source: str
    stops: Sequence[str] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    parts: bool = False
    text_arguments: bool = False

    def spell(self, messages: Messages) -> Messages:
        """Return messages as this template takes them, nulls left out."""
        messages = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        for message in messages:
            if self.parts and isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            if self.text_arguments and "tool_calls" in message:
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        return messages

    def render(
        self, messages: Messages, tools: list[dict[str, Any]] | None = None, prompt: bool = False
    ) -> str:
        """Render as `apply_chat_template(tokenize=False)` does, on 2025-01-01."""
        messages = self.spell(messages)
        with fixed_clock():
            texts, _ = chat_template_utils.render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                **self.arguments,
            )
        return str(texts[0])

    def generated(
        self, messages: Messages, tools: list[dict[str, Any]] | None = None
    ) -> list[tuple[int, int]]:
        """Return transformers' own character ranges of the `{% generation %}` blocks."""
        messages = self.spell(messages)
        with fixed_clock():
            _, ranges = chat_template_utils.render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.arguments,
            )
        return [(start, stop) for start, stop in ranges[0] if start < stop]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def trained_spans(
    form: Format, messages: Messages, tools: list[dict[str, Any]] | None = None
) -> dict[int, tuple[int, int]]:
    """Return (start, stop) of what the model must generate for each assistant message, characters of the rendered text."""
    text = form.render(messages, tools)
    places = [_place(form, messages, tools, index) for index in range(len(messages))]
    spans = {}
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        own = places[index]
        earlier = [place[1] for place in places[:index] if place]
        since = own[1] if own else max(earlier, default=0)
        limit = min((place[0] for place in places if place and place[0] >= since), default=len(text))
        start = _start(form, messages, tools, index, text, places, own[0] if own else limit)
        answered = max(start, own[1]) if own else start
        spans[index] = (start, _stop(form.stops, message, text, answered, limit))
    return spans


def _stop(stops: Sequence[str], message: dict[str, Any], text: str, answered: int, limit: int) -> int:
    ends = [(text.find(stop, answered, limit), len(stop)) for stop in stops]
    found = [(at, -length) for at, length in ends if at >= 0]
    if found:
        at, length = min(found)
        return at - length
    content = str(message.get("content") or "")
    blank = content[len(content.rstrip()) :] if content.strip() else ""
    return answered + _common(blank, text[answered:]) if "tool_calls" not in message else len(text)


def _start(
    form: Format,
    messages: Messages,
    tools: list[dict[str, Any]] | None,
    index: int,
    text: str,
    places: list[tuple[int, int] | None],
    limit: int,
) -> int:
    prompt = _prompt(form, messages[:index], tools)
    if prompt is None:
        return _behind(_usual_header(form), text, _opening(_usual_header(form), text[:limit]), limit)
    if text.startswith(prompt) and len(prompt) <= limit:
        return len(prompt)
    # The template wrote the messages before differently, or the prompt opens what the text does not: compare what follows the
    # last of their data.
    for before in reversed(range(index)):
        there = _place(form, messages[:index], tools, before, prompt=True)
        here = places[before]
        if here and there:
            return _behind(prompt[there[1] :], text, here[1], limit)
    return _behind(prompt, text, 0, limit)


def _behind(written: str, text: str, origin: int, limit: int) -> int:
    """Return where the turn starts whose generation prompt wrote `written`; the text's own version of it begins at `origin`."""
    region = text[origin:limit]
    if region.startswith(written):
        return origin + len(written)
    parting = _common(written, region)
    for side in (written, region):
        parting = min(
            [tag.start() for tag in TAG.finditer(side) if tag.start() < parting < tag.end()], default=parting
        )
    # What is left of the prompt, or the last of its tags with all behind them, may stand there after other text.
    for cut in [0, *(tag.start() for tag in TAG.finditer(written[parting:]))]:
        header = written[parting + cut :].strip()
        if header and header in region[parting:]:
            end = region.index(header, parting) + len(header)
            blank = written[len(written.rstrip()) :]
            return origin + end + _common(blank, region[end:])
    return origin + parting


def _prompt(form: Format, messages: Messages, tools: list[dict[str, Any]] | None) -> str | None:
    try:
        return form.render(messages, tools, prompt=True)
    except Exception:  # templates raise whatever they like
        return None


def _usual_header(form: Format) -> str:
    question = [{"role": "user", "content": "A"}]
    before, after = form.render(question), form.render(question, prompt=True)
    return after[len(before) :].lstrip() if after.startswith(before) else ""


def _opening(header: str, text: str) -> int:
    first_line = header.split("\n")[0]
    if not first_line or first_line not in text:
        raise Unsure("no header before the first answer")
    return text.rindex(first_line)


# ------------------------------------------------------------------------------------------ who wrote which character


def _place(
    form: Format, messages: Messages, tools: list[dict[str, Any]] | None, index: int, prompt: bool = False
) -> tuple[int, int] | None:
    """Return where the texts of one message begin and end in the render; None where none of them shows."""
    text = form.render(messages, tools, prompt)
    other = [*messages[:index], _vary(messages[index]), *messages[index + 1 :]]
    varied = form.render(other, tools, prompt)
    if len(varied) != len(text):
        raise Unsure(f"other words in message {index} change more than themselves")
    differing = [at for at, (one, two) in enumerate(zip(text, varied, strict=True)) if one != two]
    if not differing:
        return None
    first, last = differing[0], differing[-1] + 1
    pieces = _pieces(messages[index])
    before = max((_common(_head(piece)[::-1], text[:first][::-1]) for piece in pieces), default=0)
    behind = max(
        (_common(_tail(piece), text[last:]) for piece in pieces if _same_end(piece, text[:last])), default=0
    )
    return first - before, last + behind


def _varies(character: str) -> bool:
    return character.isalnum() or (ord(character) > 127 and not character.isspace())


def _vary(value: Any) -> Any:
    """Write other letters into every text, tags aside; lengths stay."""
    if isinstance(value, str):
        kept = {at for tag in TAG.finditer(value) for at in range(*tag.span())}
        return "".join(
            character if at in kept or not _varies(character) else ("y" if character == "x" else "x")
            for at, character in enumerate(value)
        )
    if isinstance(value, list):
        return [_vary(item) for item in value]
    if isinstance(value, dict):
        kept_keys = ("role", "name", "type", "id", "tool_call_id")
        return {key: item if key in kept_keys else _vary(item) for key, item in value.items()}
    return value


def _pieces(message: dict[str, Any]) -> list[str]:
    """Return the texts of a message; reasoning written inside an answer is a text of its own."""
    content = message.get("content")
    texts = [part.get("text") for part in content] if isinstance(content, list) else [content]
    texts.append(message.get("reasoning_content"))
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        texts += [arguments] if isinstance(arguments, str) else arguments.values()
    split = [
        re.split("</?think>", text) if "</think>" in text else [text]
        for text in texts
        if isinstance(text, str)
    ]
    pieces = [piece.strip() for parts in split for piece in parts]
    return [piece for piece in pieces if _vary(piece) != piece]


def _tail(piece: str) -> str:
    kept = _vary(piece)
    return piece[max(at for at, (one, two) in enumerate(zip(piece, kept, strict=True)) if one != two) + 1 :]


def _head(piece: str) -> str:
    kept = _vary(piece)
    return piece[: min(at for at, (one, two) in enumerate(zip(piece, kept, strict=True)) if one != two)]


def _same_end(piece: str, text: str) -> bool:
    core = piece[: len(piece) - len(_tail(piece))]
    return text.endswith(core.split()[-1])


def _common(one: str, two: str) -> int:
    length = 0
    while length < min(len(one), len(two)) and one[length] == two[length]:
        length += 1
    return length
