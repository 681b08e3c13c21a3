"""Recipes: how a chat template lays out conversations of one shape, learnt once and then filled in without rendering.

A template is a program; what it writes may depend on what a message says. So before a shape (the roles of its messages, in
order) gets a recipe, its template is run on opaque texts: strings that refuse every question but those whose answer can be
noted down as a condition (`'</think>' in content`, `content | trim`). If the program asks nothing else, then it lays out every
conversation of that shape alike, as long as the conditions hold: no text holds a string that was looked for, none has outer
white space where it was trimmed. A row that meets them is put together from the recipe; any other row is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sftdata.batches import Conversation
from sftdata.render.environment import GENERATION_CLOSE, GENERATION_OPEN
from sftdata.render.marks import RESERVED, MarkedText
from sftdata.render.opaque import Asked, Conditions, Opaque, watch
from sftdata.render.proof import any_of
from sftdata.render.template import ChatTemplate

MAX_RECIPES = 4096
_PLAIN = {"role", "content"}


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a filled-in recipe: `offset` characters into literal number `literal`."""

    literal: int
    offset: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Literals and the messages whose content stands between them.

    Attributes:
        literals: one more than slots.
        slots: message number behind each literal but the last.
        spans: start and stop of each turn, in the order of the turns that were learnt.
        absent: strings that no content may hold.
        trimmed: no content may have outer white space.
    """

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    spans: tuple[tuple[Place, Place], ...]
    absent: tuple[str, ...]
    trimmed: bool

    def fill(self, contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the (start, stop) characters of each turn."""
        pieces: list[str] = []
        starts, position = [], 0
        for literal, slot in zip(self.literals, self.slots, strict=False):
            content = contents[slot]
            pieces += (literal, content)
            starts.append(position)
            position += len(literal) + len(content)
        starts.append(position)
        pieces.append(self.literals[-1])
        spans = [(starts[a.literal] + a.offset, starts[b.literal] + b.offset) for a, b in self.spans]
        return "".join(pieces), spans


class RecipeBook:
    """The recipes of one template.

    Args:
        template: the chat template.
        control_tokens: strings that data must not hold, because they need care; none to trust them.
    """

    def __init__(self, template: ChatTemplate, control_tokens: Iterable[str] = ()) -> None:
        tokens = [token for token in control_tokens if token.strip()]
        self._template = template
        self._tokens = any_of(tokens) or re.compile("(?!)")
        self._first = tuple(sorted({token[0] for token in tokens}))  # most texts hold no such character: a quick way out
        self._watched = watch(template.text, template.date)

    @staticmethod
    def shape(row: Conversation) -> tuple[str, ...] | None:
        """Return the shape of a row that has nothing but roles and contents; None for others."""
        if row.tools is not None or row.template_kwargs:
            return None
        for message in row.messages:
            if message.keys() != _PLAIN or type(message["content"]) is not str:
                return None
        return tuple([message["role"] for message in row.messages])

    def admits(self, recipe: Recipe, contents: list[str]) -> bool:
        """Say whether a recipe holds for these contents."""
        for content in contents:
            if not content or content.isspace() or (recipe.trimmed and (content[0].isspace() or content[-1].isspace())):
                return False
            if not content.isascii() and RESERVED.search(content):
                return False
            for text in recipe.absent:
                if text in content:
                    return False
            for first in self._first:
                if first in content and self._tokens.search(content):
                    return False
        return True

    def learn(self, row: Conversation, marked: MarkedText, spans: list[tuple[int, int]]) -> Recipe | None:
        """Learn the recipe of a row's shape from its proven render; None where the template looks into texts.

        Args:
            row: every content without outer white space.
            marked: its render, with where each content opens and closes.
            spans: (start, stop) characters of its turns.
        """
        text, marks = marked.text, marked.marks
        contents = [message["content"] for message in row.messages]
        pairs = [
            (one, two) for one, two in zip(marks[::2], marks[1::2], strict=False) if one.message == two.message and two.closes
        ]
        if 2 * len(pairs) != len(marks):
            return None
        if any(text[one.position : two.position] != contents[one.message] for one, two in pairs):
            return None
        conditions = Conditions()
        opaque = [{"role": message["role"], "content": Opaque.of(message["content"], conditions)} for message in row.messages]
        try:
            watched = "".join(self._watched.root_render_func(self._watched.new_context(self._template.arguments(opaque))))
            if watched.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "") != text:
                return None
        except Asked:
            return None
        edges = [0, *(edge.position for pair in pairs for edge in pair), len(text)]
        literals = tuple(text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True))
        places = [[_place(edges[::2], edges[1::2], position) for position in span] for span in spans]
        if any(place is None for span in places for place in span):
            return None
        recipe = Recipe(
            literals,
            tuple(one.message for one, _ in pairs),
            tuple((start, stop) for start, stop in places if start is not None and stop is not None),
            tuple(sorted(conditions.absent)),
            conditions.trimmed,
        )
        # The row that taught it must be one that it admits: else the conditions are not those of this row.
        return recipe if self.admits(recipe, contents) and recipe.fill(contents) == (text, spans) else None


def _place(starts: list[int], stops: list[int], position: int) -> Place | None:
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        if start <= position <= stop:
            return Place(number, position - start)
    return None
