"""Render a conversation twice, plain and marked, and prove that both say the same: then every character has a known author."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.render import marks
from sftdata.render.spellings import CALLS_FIX, explain_refusal, misprinted, needs_spelling, spellings
from sftdata.render.template import REASONING_FIELDS, ChatTemplate, TemplateRefusal, has_more, unread_names

Skip = Callable[[str], object]
_START = marks.Mark(0, -1, closes=True)


class ProvenRenderer:
    """Render conversations with one chat template, marked and proven.

    Args:
        template: the chat template.
        guarded: tokens that are control tokens when the template writes them and text when a message does (control_tokens.py);
            none to trust them in messages too.
        plain: tokens that count in messages too. A guarded token inside a longer one of these does not.
    """

    def __init__(
        self, template: ChatTemplate, guarded: Iterable[str] = (), plain: Iterable[str] = ()
    ) -> None:
        self.template = template
        # Whitespace tokens (Gemma's newlines, GPT-NeoX's indents) are how ordinary text is written, not control.
        guarded = [token for token in guarded if token.strip()]
        self._plain = frozenset(plain).difference(guarded)
        self._tokens = any_of([*guarded, *self._plain]) if guarded else None
        # What the template can tell contents apart by; single words are roles and keys, compared with other things.
        self._constants = tuple(text for text in template.constants if not text.isidentifier())
        self._compared = any_of(self._constants)
        self._skips: tuple[Skip, ...] = (
            (_skip_none, self._compared.search) if self._compared else (_skip_none,)
        )

    def render(self, row: Conversation) -> tuple[marks.MarkedText, Conversation]:
        """Render a row; return the marked text and the row as the template read it.

        Where the template cuts an answer at `</think>`, its reasoning is handed over as `reasoning_content`, which is what such
        templates make of it. Where marks change what the template finds, texts that hold a string it looks for stay unmarked.

        Raises:
            RowError: the template refuses the row, or marking changes what it renders.
        """
        if len(row.messages) > marks.MAX_MESSAGES:
            raise RowError(
                "too-many-messages",
                f"{len(row.messages)} messages; at most {marks.MAX_MESSAGES} fit",
                "split the row",
            )
        text, row = self._spell(row)
        if marks.RESERVED.search(text):
            raise RowError(
                "reserved-characters",
                "text holds characters of U+108000..U+10EFFF",
                "remove these characters",
            )
        attempts = (row, *_reasoning_apart(row))
        for skip in self._skips:
            proven = None
            for attempt in attempts:
                marked = self._marked(attempt, text, skip)
                if marked is not None and _all_whole(marked.marks):
                    return marked, attempt
                proven = proven or (marked and (marked, attempt))
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
            watched = self.template.watch(attempt.messages) if has_more(attempt.messages) else []
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
        what = "the chat template writes tool arguments as Python prints them, or encodes or braces their JSON twice"
        raise RowError("arguments-misprinted", what, CALLS_FIX)

    def prompt(self, row: Conversation, index: int) -> marks.MarkedText | None:
        """Render what inference feeds before message `index`; None where the template refuses.

        Raises:
            RowError: marking changes what it renders.
        """
        before = replace(row, messages=row.messages[:index])
        try:
            text = self.template.render(
                before.messages, row.tools, row.template_kwargs, add_generation_prompt=True
            )
        except TemplateRefusal:
            return None
        for skip in self._skips:
            marked = self._marked(before, text, skip, add_generation_prompt=True)
            if marked is not None:
                return marked
        raise self._unproven(row)

    def shape(self, message: dict[str, Any]) -> tuple[Any, ...]:
        """Describe a message by all that a template can tell it apart by, other than what it copies out."""
        keys = tuple(
            (key, type(value).__name__, bool(value))
            for key, value in sorted(message.items())
            if value is not None
        )
        return (message["role"], keys, tuple(text for text in self._constants if text in _content(message)))

    def swallowed(self, row: Conversation, marked: marks.MarkedText) -> tuple[list[int], list[int]]:
        """Return the messages of which the template left a text out, and those of which it left the reasoning out.

        Texts that the template looks into may stand there unmarked; they are not counted.
        """
        shown = Counter(mark.message for mark in marked.marks if mark.closes)
        opened = Counter(mark.message for mark in marked.marks if not mark.closes)
        skip = self._skips[-1]
        texts: list[int] = []
        reasoning: list[int] = []
        for index, message in enumerate(row.messages):
            lost = sum(not skip(text) for text in marks.message_texts(message)) - shown[index]
            if lost > 0 and self._lost_reasoning(message, index, marked):
                reasoning.append(index)
                lost -= 1
            elif (
                opened[index] < shown[index]
            ):  # a text lost its beginning, as where a template cuts it at `</think>`
                (reasoning if "</think>" in _content(message) else texts).append(index)
            if lost > 0:
                texts.append(index)
        return texts, reasoning

    def _lost_reasoning(self, message: dict[str, Any], index: int, marked: marks.MarkedText) -> bool:
        """Say whether fewer of a message's own texts are its reasoning, word for word, than should be."""
        thought = marks.reasoning_of(message)
        if not isinstance(thought, str) or not thought.strip() or self._skips[-1](thought):
            return False
        own = [marked.marks[place] for place in marked.places.get(index, ())]
        shown = [
            marked.text[one.position : two.position]
            for one, two in pairwise(own)
            if two.closes and not one.closes
        ]
        same = [text for text in marks.message_texts(message) if text.strip() == thought.strip()]
        return shown.count(thought.strip()) < len(same)

    def _marked(
        self, row: Conversation, text: str, skip: Skip, *, add_generation_prompt: bool = False
    ) -> marks.MarkedText | None:
        """Render with marks; None where that says something else than `text`."""
        table: dict[str, str] = {}
        messages, tools = marks.mark_messages(row.messages, skip), row.tools
        if self._tokens is not None:
            messages = marks.substitute_tokens(messages, self._tokens, table, self._plain)
            tools = marks.substitute_tokens(tools, self._tokens, table, self._plain)
        try:
            rendered = self.template.render(
                messages,
                tools,
                row.template_kwargs,
                add_generation_prompt=add_generation_prompt,
                keep_marks=True,
            )
        except TemplateRefusal:
            return None
        marked = marks.take_out(rendered, table)
        return marked if marked.text == text else None

    def _unproven(self, row: Conversation) -> RowError:
        typed: dict[str, str] = {}
        if self._tokens is not None:
            marks.substitute_tokens([row.messages, row.tools], self._tokens, typed, self._plain)
        if typed:
            return RowError(
                "control-token-ambiguous",
                "control tokens inside the data steer the chat template, so its own cannot be told from them",
                "--trust-control-tokens, or take them out of the data",
            )
        return RowError(
            "spans-unproven",
            "the chat template renders the data differently once it is marked",
            "give a template with {% generation %} blocks",
        )


def any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    """Compile a pattern that finds any of the strings, the longest first; None for no strings."""
    ordered = sorted(set(strings), key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _all_whole(found: list[marks.Mark]) -> bool:
    """Say whether every text that ends in a render also begins in it."""
    return all(before.message == mark.message for before, mark in pairwise([_START, *found]) if mark.closes)


def _skip_none(_: str) -> bool:
    return False


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _reasoning_apart(row: Conversation) -> Iterator[Conversation]:
    """Hand `<think>...</think>` at the head of answers over as `reasoning_content`, blank lines behind it out or in."""
    for blank in ("\n", ""):
        messages = [_without_thinking(message, blank) for message in row.messages]
        if messages != row.messages:
            yield replace(row, messages=messages)


def _without_thinking(message: dict[str, Any], blank: str) -> dict[str, Any]:
    content = _content(message)
    if (
        message["role"] != "assistant"
        or "</think>" not in content
        or any(key in message for key in REASONING_FIELDS)
    ):
        return message
    head, _, answer = content.rpartition("</think>")
    reasoning = head.partition("</think>")[0].rstrip("\n").rpartition("<think>")[2].lstrip("\n")
    return {**message, "content": answer.lstrip(blank) if blank else answer, "reasoning_content": reasoning}
