"""Render a conversation bare and with sentinels, and prove both equal: each character's author is known.

Sentinels are private characters put around data before a render. A pair of them (open, close) is put just
inside the outer whitespace of each text that a message brings: a template that trims the text still leaves
both. A placeholder stands for a control token typed inside data, so that the template's own control tokens
and the data's can be told apart. Stripping sentinels and placeholders again must give the bare render,
character for character; that equality proves that they changed nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from msgspec.structs import replace

from sftdata.batches import Conversation, Ranges
from sftdata.errors import RowError
from sftdata.render.environment import GENERATION_CLOSE, GENERATION_OPEN
from sftdata.render.spellings import CALLS_FIX, explain_refusal, misprinted, needs_spelling, spellings
from sftdata.render.template import (
    REASONING_FIELDS,
    ChatTemplate,
    Message,
    TemplateRefusal,
    content_of,
    has_untracked_keys,
    message_texts,
    reasoning_of,
    unread_names,
)

_FIRST_SENTINEL, _FIRST_PLACEHOLDER = 0x108000, 0x10E000
MAX_MESSAGES = (_FIRST_PLACEHOLDER - _FIRST_SENTINEL) // 2
RESERVED = re.compile("[\U00108000-\U0010efff\U0010fff0\U0010fff1]")
_SPLIT = re.compile(f"({RESERVED.pattern})")
# A reserved character as `tojson(ensure_ascii=True)` writes it: two halves of a surrogate pair.
_ESCAPED = re.compile(r"\\u(db[ef][0-9a-f])\\u(d[c-f][0-9a-f]{2})")

SkipText = Callable[[str], object]
"""Returns something true for a text that stays without sentinels."""


@dataclass(frozen=True, slots=True)
class Sentinel:
    """Where a text of message `message` opens or closes in the rendered text, in characters."""

    position: int
    message: int
    closes: bool


@dataclass(frozen=True, slots=True)
class TracedText:
    """A rendered text, and which of its characters came from which message.

    Attributes:
        text: the plain render.
        sentinels: where the messages' texts open and close, in the order of `text`.
        generation: (start, stop) of each `{% generation %}` block, characters.
        literal: (start, stop) of each control token that data spells, characters.
        by_message: message -> indices of its own in `sentinels`.
    """

    text: str
    sentinels: list[Sentinel]
    generation: Ranges
    literal: Ranges
    by_message: dict[int, list[int]]


# ------------------------------------------------------------------------------------- sentinels put in


def wrap_text(text: str, message: int) -> str:
    """Put a pair of sentinels inside the outer whitespace of `text`; leave a blank text alone."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    opening, closing = chr(_FIRST_SENTINEL + 2 * message), chr(_FIRST_SENTINEL + 2 * message + 1)
    return f"{text[:start]}{opening}{core}{closing}{text[start + len(core) :]}"


def wrap_messages(messages: Sequence[Message], skip: SkipText) -> list[Message]:
    """Wrap the texts of every message: content, reasoning and the strings in the arguments of its tool calls.

    Names of functions stay bare: templates compare them, and repeat them in the header of the tool's answer.

    Args:
        messages: in the canonical form.
        skip: matches the texts to leave bare.
    """
    return [_wrap_message(message, index, skip) for index, message in enumerate(messages)]


def _wrap_message(message: Message, index: int, skip: SkipText) -> Message:
    copy = dict(message)
    for key in ("content", *REASONING_FIELDS):
        if key in copy:
            copy[key] = _wrap_value(copy[key], index, skip)
    if isinstance(parts := message.get("content"), list):
        copy["content"] = [_wrap_part(part, index, skip) for part in parts]
    if isinstance(calls := copy.get("tool_calls"), list):
        copy["tool_calls"] = [_wrap_call(call, index, skip) for call in calls]
    return copy


def _wrap_part(part: object, index: int, skip: SkipText) -> object:
    """Wrap the text of a part; its type, and a picture, are for the template to look at."""
    if isinstance(part, dict) and "text" in part:
        return part | {"text": _wrap_value(part["text"], index, skip)}
    return part


def _wrap_call(call: object, index: int, skip: SkipText) -> object:
    if not isinstance(call, dict):
        return call
    inside = {"function": _wrap_call, "arguments": _wrap_value}
    return {key: inside[key](item, index, skip) if key in inside else item for key, item in call.items()}


def _wrap_value(value: object, index: int, skip: SkipText) -> object:
    if isinstance(value, str):
        return value if skip(value) else wrap_text(value, index)
    if isinstance(value, dict):
        return {key: _wrap_value(item, index, skip) for key, item in value.items()}
    if isinstance(value, list):
        return [_wrap_value(item, index, skip) for item in value]
    return value


class Placeholders:
    r"""Replaces tokens that data spells by one private character each.

    Args:
        tokens: what to replace.
        keep: matches that stay.

    >>> placeholders = Placeholders(re.compile("<s>"))
    >>> placeholders.replace({"a": "<s>x<s>"}) == {"a": "\U0010e000x\U0010e000"}
    True
    >>> list(placeholders.table.values())
    ['<s>']
    """

    def __init__(self, tokens: re.Pattern[str], keep: frozenset[str] = frozenset()) -> None:
        self._tokens, self._keep = tokens, keep
        self._known: dict[str, str] = {}

    @property
    def table(self) -> dict[str, str]:
        """Placeholder -> the token it stands for."""
        return {placeholder: token for token, placeholder in self._known.items()}

    def replace(self, value: object) -> object:
        """Return a value with every token in its strings, keys too, replaced."""
        if isinstance(value, str):
            return self._tokens.sub(self._placeholder, value)
        if isinstance(value, dict):
            return {self.replace(key): self.replace(item) for key, item in value.items()}
        return [self.replace(item) for item in value] if isinstance(value, list) else value

    def _placeholder(self, found: re.Match[str]) -> str:
        token = found[0]
        if token in self._keep:
            return token
        return self._known.setdefault(token, chr(_FIRST_PLACEHOLDER + len(self._known)))


# -------------------------------------------------------------------------------------- stripped again


def strip_sentinels(rendered: str, placeholders: Mapping[str, str]) -> TracedText:
    """Strip sentinels and placeholders from a rendered text; return where they stood.

    >>> traced = strip_sentinels("a" + wrap_text(" b ", 3) + "c", {})
    >>> traced.text, [(sentinel.position, sentinel.message, sentinel.closes) for sentinel in traced.sentinels]
    ('a b c', [(2, 3, False), (3, 3, True)])
    """
    pieces: list[str] = []
    sentinels: list[Sentinel] = []
    literal: Ranges = []
    generation: Ranges = []
    by_message: dict[int, list[int]] = {}
    opened = position = 0
    if "\\udb" in rendered:
        rendered = _ESCAPED.sub(_unescape, rendered)
    # Odd pieces are the reserved characters, even ones the text between them.
    for index, piece in enumerate(_SPLIT.split(rendered)):
        if index % 2 == 0:
            pieces.append(piece)
            position += len(piece)
        elif piece == GENERATION_OPEN:
            opened = position
        elif piece == GENERATION_CLOSE:
            if position > opened:
                generation.append((opened, position))
        elif piece in placeholders:
            token = placeholders[piece]
            pieces.append(token)
            literal.append((position, position + len(token)))
            position += len(token)
        else:
            number = ord(piece) - _FIRST_SENTINEL
            by_message.setdefault(number // 2, []).append(len(sentinels))
            sentinels.append(Sentinel(position, number // 2, number % 2 == 1))
    return TracedText("".join(pieces), sentinels, generation, literal, by_message)


def _unescape(found: re.Match[str]) -> str:
    """Return the reserved character that JSON spells as a surrogate pair; any other pair as it is."""
    high, low = int(found[1], 16), int(found[2], 16)
    character = chr(0x10000 + ((high - 0xD800) << 10) + low - 0xDC00)
    return character if RESERVED.match(character) else found[0]


# ------------------------------------------------------------------------------------------------- proof


class ProvenRenderer:
    """Render conversations with one chat template, traced and proven.

    Args:
        template: the chat template.
        guarded: tokens that are control tokens when the template writes them and text when a message does
            (control_tokens.py); none to trust them in messages too.
        plain: tokens that count in messages too. A guarded token inside a longer one of these does not.
    """

    def __init__(
        self, template: ChatTemplate, guarded: Iterable[str] = (), plain: Iterable[str] = ()
    ) -> None:
        self.template = template
        # Whitespace tokens (Gemma's newlines, GPT-NeoX's indents) are how ordinary text is written, not
        # control.
        guarded = [token for token in guarded if token.strip()]
        self._plain = frozenset(plain).difference(guarded)
        self._tokens = any_of([*guarded, *self._plain]) if guarded else None
        # What the template can tell contents apart by; single words are roles and keys, compared with other
        # things than contents.
        self._constants = tuple(text for text in template.constants if not text.isidentifier())
        compared = any_of(self._constants)
        self._skips: tuple[SkipText, ...] = (_skip_none, compared.search) if compared else (_skip_none,)

    def render(self, row: Conversation) -> tuple[TracedText, Conversation]:
        """Render a row; return the traced text, and the row as the template read it.

        Where the template cuts an answer at `</think>`, its reasoning is passed as `reasoning_content`, which
        is what such templates make of it. Where sentinels change what the template finds, texts that hold a
        string it looks for stay bare.

        Raises:
            RowError: the template refuses the row, or sentinels change what it renders.
        """
        if len(row.messages) > MAX_MESSAGES:
            what = f"{len(row.messages)} messages; at most {MAX_MESSAGES} fit"
            raise RowError("too-many-messages", what, "split the row")
        text, row = self._spell(row)
        if RESERVED.search(text):
            what = "text holds characters of U+108000..U+10EFFF"
            raise RowError("reserved-characters", what, "remove these characters")
        attempts = (row, *_reasoning_apart(row))
        for skip in self._skips:
            proven = None
            for attempt in attempts:
                traced = self._trace(attempt, text, skip)
                if traced is not None and _all_whole(traced.sentinels):
                    return traced, attempt
                proven = proven or (traced and (traced, attempt))
            if proven:
                return proven
        raise self._unproven(row)

    def _spell(self, row: Conversation) -> tuple[str, Conversation]:
        """Render a row in the first of its spellings that comes out right; return the text and that spelling.

        Raises:
            RowError: the template refuses the row, or writes tool arguments as no model should.
        """
        refusals = []
        for attempt in spellings(row) if needs_spelling(row) else (row,):
            watched = self.template.watch(attempt.messages) if has_untracked_keys(attempt.messages) else []
            try:
                text = self.template.render(watched or attempt.messages, row.tools, row.template_kwargs)
            except TemplateRefusal as refusal:
                refusals.append(refusal)
                continue
            if not misprinted(attempt, text):
                unread = unread_names(watched, row.template_kwargs, self.template.names)
                return text, replace(attempt, counted=(*attempt.counted, *unread)) if unread else attempt
        if refusals:
            raise explain_refusal(self.template, row, refusals[0])
        raise RowError(
            "arguments-misprinted",
            "the chat template writes tool arguments as Python prints them,"
            " or encodes or braces their JSON twice",
            CALLS_FIX,
        )

    def prompt(self, row: Conversation, index: int) -> TracedText | None:
        """Render what inference feeds before message `index`; None where the template refuses.

        Raises:
            RowError: sentinels change what it renders.
        """
        before = replace(row, messages=row.messages[:index])
        try:
            text = self.template.render(
                before.messages, row.tools, row.template_kwargs, add_generation_prompt=True
            )
        except TemplateRefusal:
            return None
        for skip in self._skips:
            traced = self._trace(before, text, skip, add_generation_prompt=True)
            if traced is not None:
                return traced
        raise self._unproven(row)

    def kind_of(self, message: Message) -> tuple[object, ...]:
        """Describe a message by all that a template can tell it apart by, other than what it copies out."""
        keys = tuple(
            (key, type(value).__name__, bool(value))
            for key, value in sorted(message.items())
            if value is not None
        )
        content = content_of(message)
        return (message["role"], keys, tuple([text for text in self._constants if text in content]))

    def dropped(self, row: Conversation, traced: TracedText) -> tuple[list[int], list[int]]:
        """Return the messages of which the template dropped a text, and those whose reasoning it dropped.

        Texts that the template looks into may be rendered bare; they are not counted.
        """
        closed = Counter(sentinel.message for sentinel in traced.sentinels if sentinel.closes)
        opened = Counter(sentinel.message for sentinel in traced.sentinels if not sentinel.closes)
        skip = self._skips[-1]
        texts: list[int] = []
        reasoning: list[int] = []
        for index, message in enumerate(row.messages):
            lost = sum(not skip(text) for text in message_texts(message)) - closed[index]
            if lost > 0 and self._lost_reasoning(message, index, traced):
                reasoning.append(index)
                lost -= 1
            elif opened[index] < closed[index]:
                # A text lost its beginning, as where a template cuts it at `</think>`.
                (reasoning if "</think>" in content_of(message) else texts).append(index)
            if lost > 0:
                texts.append(index)
        return texts, reasoning

    def _lost_reasoning(self, message: Message, index: int, traced: TracedText) -> bool:
        """Return whether fewer of a message's own texts are its reasoning, word for word, than should be."""
        reasoning = reasoning_of(message)
        if not isinstance(reasoning, str) or not reasoning.strip() or self._skips[-1](reasoning):
            return False
        own = [traced.sentinels[number] for number in traced.by_message.get(index, ())]
        shown = [
            traced.text[one.position : two.position]
            for one, two in pairwise(own)
            if two.closes and not one.closes
        ]
        same = [text for text in message_texts(message) if text.strip() == reasoning.strip()]
        return shown.count(reasoning.strip()) < len(same)

    def _trace(
        self, row: Conversation, text: str, skip: SkipText, *, add_generation_prompt: bool = False
    ) -> TracedText | None:
        """Render with sentinels; None where that, stripped, is another text than `text`."""
        messages: Sequence[Message] = wrap_messages(row.messages, skip)
        tools: Sequence[Message] | None = row.tools
        table: Mapping[str, str] = {}
        if self._tokens is not None:
            placeholders = Placeholders(self._tokens, self._plain)
            messages = cast("list[Message]", placeholders.replace(messages))
            tools = cast("list[Message] | None", placeholders.replace(tools))
            table = placeholders.table
        try:
            rendered = self.template.render(
                messages,
                tools,
                row.template_kwargs,
                add_generation_prompt=add_generation_prompt,
                keep_generation=True,
            )
        except TemplateRefusal:
            return None
        traced = strip_sentinels(rendered, table)
        return traced if traced.text == text else None

    def _unproven(self, row: Conversation) -> RowError:
        if self._tokens is not None:
            placeholders = Placeholders(self._tokens, self._plain)
            placeholders.replace([row.messages, row.tools])
            if placeholders.table:
                return RowError(
                    "control-token-ambiguous",
                    "control tokens inside the data steer the chat template,"
                    " so its own cannot be told from them",
                    "--trust-control-tokens, or take them out of the data",
                )
        what = "the chat template renders the data differently once sentinels are in it"
        return RowError("spans-unproven", what, "give a template with {% generation %} blocks")


def any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern that finds any of the strings, the longest first; None for no strings."""
    ordered = sorted(set(strings), key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _all_whole(sentinels: list[Sentinel]) -> bool:
    """Return whether every text that ends in a render also begins in it."""
    first = Sentinel(0, -1, closes=True)
    return all(
        before.message == sentinel.message
        for before, sentinel in pairwise([first, *sentinels])
        if sentinel.closes
    )


def _skip_none(_: str) -> bool:
    return False


def _reasoning_apart(row: Conversation) -> Iterator[Conversation]:
    """Yield a row with the `<think>...</think>` of answers as `reasoning_content`, trimmed and untrimmed."""
    for blank in ("\n", ""):
        messages = [_reasoning_split_off(message, blank) for message in row.messages]
        if messages != row.messages:
            yield replace(row, messages=messages)


def _reasoning_split_off(message: Message, blank: str) -> Message:
    content = content_of(message)
    if (
        message["role"] != "assistant"
        or "</think>" not in content
        or any(key in message for key in REASONING_FIELDS)
    ):
        return message
    head, _, answer = content.rpartition("</think>")
    reasoning = head.partition("</think>")[0].rstrip("\n").rpartition("<think>")[2].lstrip("\n")
    return {**message, "content": answer.lstrip(blank) if blank else answer, "reasoning_content": reasoning}
