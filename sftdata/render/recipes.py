"""Recipes: how a chat template lays out conversations of one shape, learnt once and then filled in without rendering.

A template is a program; what it writes may depend on what a message says. So before a shape (the roles of its messages, in
order, and which of them are empty) gets a recipe, its template is run on opaque texts: strings that refuse every question but
those whose answer can be noted down as a condition (`'</think>' in content`, `content | trim`). If the program asks nothing
else, then it lays out every conversation of that shape alike, as long as the conditions hold: no text holds a string that was
looked for, none has outer white space where it was trimmed. A row that meets them is put together from the recipe; any other
row is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain

from sftdata.batches import Conversation
from sftdata.render.environment import GENERATION_CLOSE, GENERATION_OPEN
from sftdata.render.marks import RESERVED, MarkedText
from sftdata.render.opaque import Asked, Conditions, Opaque, watch
from sftdata.render.proof import any_of
from sftdata.render.template import ChatTemplate

MAX_RECIPES = 4096
_RESERVED_BYTE = "\U00108000".encode()[:1]  # every reserved character begins with it, and few others
_PLAIN = {"role", "content"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model generates for one assistant message; characters of the rendered text, half-open.

    Attributes:
        message: its index.
        ended: the span ends in a stop token.
        parted: the final text does not begin with the generation prompt; the span starts where they part.
    """

    message: int
    start: int
    stop: int
    ended: bool
    parted: bool


# A position in a filled-in recipe: how many contents, and how many characters of literals, stand before it.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """Literals and the messages whose content stands between them.

    Attributes:
        literals: one more than slots.
        slots: message number behind each literal but the last.
        turns: of the row that taught it.
        spans: places where each turn starts and stops.
        absent: strings that no content may hold.
        trimmed: no content may have outer white space.
    """

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    turns: tuple[Turn, ...]
    spans: tuple[tuple[Place, Place], ...]
    absent: tuple[str, ...]
    trimmed: bool

    def fill(self, contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the (start, stop) characters of each turn."""
        chosen = [contents[slot] for slot in self.slots]
        pieces = [*chain.from_iterable(zip(self.literals, chosen, strict=False)), self.literals[-1]]
        before = [0, *accumulate(map(len, chosen))]
        spans = [(before[one] + start, before[two] + stop) for (one, start), (two, stop) in self.spans]
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
        self._first = tuple(
            sorted({token[0] for token in tokens})
        )  # most texts hold no such character: a quick way out
        self._watched = watch(template.text, template.date)

    @staticmethod
    def contents(row: Conversation) -> list[str] | None:
        """Return the contents of a row that has nothing but roles and contents; None for others."""
        if row.tools is not None or row.template_kwargs:
            return None
        found = []
        for message in row.messages:
            if message.keys() != _PLAIN or type(content := message["content"]) is not str:
                return None
            found.append(content)
        return found

    def admits(self, recipe: Recipe, contents: list[str]) -> bool:
        """Say whether the recipe of their shape holds for these contents."""
        for content in contents:
            inner = content.strip()
            if len(inner) != len(content) and (recipe.trimmed or not inner):
                return False
        text = "\0".join(contents)  # one search for all
        if (
            not text.isascii()
            and _RESERVED_BYTE in text.encode("utf-8", "surrogatepass")
            and RESERVED.search(text)
        ):
            return False
        for absent in recipe.absent:
            if absent in text:
                return False
        for first in self._first:
            if first in text:
                return not self._tokens.search(text)
        return True

    def learn(
        self, row: Conversation, marked: MarkedText, turns: list[Turn], absent: Iterable[str] = ()
    ) -> Recipe | None:
        """Learn the recipe of a row's shape from its proven render; None where the template looks into texts.

        None too where an assistant message has no turn (no `{% generation %}` block): such rows are counted one by one.

        Args:
            row: every content without outer white space.
            marked: its render, with where each content opens and closes.
            turns: its turns.
            absent: strings that contents must not hold, besides those that the template looks for.
        """
        if {turn.message for turn in turns} != {*assistant_messages(row)}:
            return None
        text, marks = marked.text, marked.marks
        contents = [message["content"] for message in row.messages]
        pairs = [
            (one, two)
            for one, two in zip(marks[::2], marks[1::2], strict=False)
            if one.message == two.message and two.closes
        ]
        if 2 * len(pairs) != len(marks):
            return None
        if any(text[one.position : two.position] != contents[one.message] for one, two in pairs):
            return None
        conditions = Conditions()
        opaque = [
            {"role": message["role"], "content": _opaque(message["content"], conditions)}
            for message in row.messages
        ]
        try:
            watched = "".join(
                self._watched.root_render_func(self._watched.new_context(self._template.arguments(opaque)))
            )
            if watched.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "") != text:
                return None
        except Asked:
            return None
        edges = [0, *(edge.position for pair in pairs for edge in pair), len(text)]
        literals = tuple(text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True))
        spans = [(turn.start, turn.stop) for turn in turns]
        places = [(_place(literals, edges, start), _place(literals, edges, stop)) for start, stop in spans]
        recipe = Recipe(
            literals,
            tuple(one.message for one, _ in pairs),
            tuple(turns),
            tuple((start, stop) for start, stop in places if start is not None and stop is not None),
            tuple(sorted(conditions.absent.union(absent))),
            conditions.trimmed,
        )
        # The row that taught it must be one that it admits: else the conditions are not those of this row.
        return recipe if self.admits(recipe, contents) and recipe.fill(contents) == (text, spans) else None


def assistant_messages(row: Conversation) -> list[int]:
    """Return the indices of a conversation's assistant messages."""
    return [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]


def _opaque(content: str, conditions: Conditions) -> str:
    """Hide a text; an empty one is part of the shape, and hides nothing."""
    return Opaque.of(content, conditions) if content else content


def _place(literals: tuple[str, ...], edges: list[int], position: int) -> Place | None:
    """Return a position's place; None inside a content."""
    before = 0
    for number, literal in enumerate(literals):
        start = edges[2 * number]
        if start <= position <= start + len(literal):
            return number, before + position - start
        before += len(literal)
    return None
