"""The shape cache: how a chat template lays out conversations of one shape, learned once, then filled in.

A template is a program; what it writes may depend on what a message says. So before a shape (the roles of its
messages, in order, and which of them are empty) is cached, the template runs on symbolic texts (symbolic.py):
strings that refuse every question but those whose answer can be noted as a condition
(`'</think>' in content`, `content | trim`). If it asks nothing else, it lays out every conversation of that
shape alike, as long as the conditions hold: no text holds a string that was looked for, none has outer
whitespace where it was trimmed. A row that meets them is put together from its shape; any other is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

from sftdata.batches import Conversation, Ranges
from sftdata.render.environment import GENERATION_CLOSE, GENERATION_OPEN
from sftdata.render.proof import RESERVED, TracedText, any_of
from sftdata.render.symbolic import Conditions, ContentDependent, SymbolicText, compile_guarded
from sftdata.render.template import ChatTemplate

MAX_SHAPES = 4096
_RESERVED_BYTE = "\U00108000".encode()[:1]  # every reserved character begins with it, and few others
_PLAIN_KEYS = {"role", "content"}


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model generates for one assistant message; characters of the rendered text, half-open.

    Attributes:
        message: its index.
        ended: the span ends in a stop token.
        diverges: the rendered text does not begin with the generation prompt; the span starts where they
            diverge.
    """

    message: int
    start: int
    stop: int
    ended: bool
    diverges: bool


Anchor = tuple[int, int]
"""A position in any row of a shape: how many contents, and how many characters of literals, precede it."""


@dataclass(frozen=True, slots=True, eq=False)
class ShapeTemplate:
    """Literals, and the messages whose contents fill the slots between them.

    Attributes:
        literals: one more than slots.
        slots: message number after each literal but the last.
        turns: those of the conversation it was learned from.
        spans: anchors where each turn starts and stops.
        absent: strings that no content may hold.
        trimmed: no content may have outer whitespace.
    """

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    turns: tuple[Turn, ...]
    spans: tuple[tuple[Anchor, Anchor], ...]
    absent: tuple[str, ...]
    trimmed: bool

    def render(self, contents: Sequence[str]) -> tuple[str, Ranges]:
        """Return the text, and the (start, stop) characters of each turn."""
        chosen = [contents[slot] for slot in self.slots]
        pieces = [*chain.from_iterable(zip(self.literals, chosen, strict=False)), self.literals[-1]]
        before = [0, *accumulate(map(len, chosen))]
        spans = [(before[one] + start, before[two] + stop) for (one, start), (two, stop) in self.spans]
        return "".join(pieces), spans


class ProvenRender(NamedTuple):
    """A conversation rendered and proven, to learn its shape from.

    Attributes:
        traced: its text.
        turns: its turns.
        absent: strings that no content may hold, besides those that the template looks for.
    """

    traced: TracedText
    turns: list[Turn]
    absent: Iterable[str] = ()


class ShapeCache:
    """The shapes of one template, each learned from a made-up conversation when it comes first.

    Args:
        template: the chat template.
        control_tokens: strings that no content may hold, because they need care; none to trust them.
        prove: renders a conversation and finds its turns; None where it cannot.
    """

    def __init__(
        self,
        template: ChatTemplate,
        control_tokens: Iterable[str],
        prove: Callable[[Conversation], ProvenRender | None],
    ) -> None:
        tokens = [token for token in control_tokens if token.strip()]
        self._template = template
        self._prove = prove
        self._tokens = any_of(tokens) or re.compile("(?!)")
        # Most texts hold no such character: a quick way out.
        self._first_characters = tuple(sorted({token[0] for token in tokens}))
        self._guarded = compile_guarded(template.text, template.date)
        self._shapes: dict[tuple[tuple[str, ...], tuple[int, ...]], ShapeTemplate | None] = {}

    def render(self, row: Conversation) -> tuple[ShapeTemplate, str, Ranges] | None:
        """Return a row's shape, its text and the characters of its turns; None where it must be rendered."""
        contents = plain_contents(row)
        if contents is None:
            return None
        empty = (
            tuple([index for index, content in enumerate(contents) if not content]) if "" in contents else ()
        )
        shape = self.shape_of(tuple([message["role"] for message in row.messages]), empty)
        if shape is None or not self.accepts(shape, contents):
            return None
        return shape, *shape.render(contents)

    def accepts(self, shape: ShapeTemplate, contents: Sequence[str]) -> bool:
        """Return whether these contents meet the conditions of their shape."""
        for content in contents:
            inner = content.strip()
            if len(inner) != len(content) and (shape.trimmed or not inner):
                return False
        text = "\0".join(contents)  # one search for all
        if (
            not text.isascii()
            and _RESERVED_BYTE in text.encode("utf-8", "surrogatepass")
            and RESERVED.search(text)
        ):
            return False
        for absent in shape.absent:
            if absent in text:
                return False
        for first in self._first_characters:
            if first in text:
                return not self._tokens.search(text)
        return True

    def shape_of(self, roles: tuple[str, ...], empty: tuple[int, ...] = ()) -> ShapeTemplate | None:
        """Return the template of a shape; None where the template looks into texts, or the cache is full.

        Args:
            roles: of the messages.
            empty: indices of the messages without content.
        """
        key = roles, empty
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                return None
            texts = ["" if number in empty else f"Text {number}." for number in range(len(roles))]
            messages: list[dict[str, object]] = [
                {"role": role, "content": text} for role, text in zip(roles, texts, strict=True)
            ]
            row = Conversation(messages, [])
            proven = self._prove(row)
            self._shapes[key] = None if proven is None else self._learn(row, texts, proven)
        return self._shapes[key]

    def _learn(self, row: Conversation, contents: list[str], proven: ProvenRender) -> ShapeTemplate | None:
        """Learn a shape from the proven render of a row; None where the template looks into its texts.

        None, too, where an assistant message has no turn (no `{% generation %}` block): such rows are counted
        one by one.
        """
        text, sentinels = proven.traced.text, proven.traced.sentinels
        if {turn.message for turn in proven.turns} != {*assistant_messages(row)}:
            return None
        pairs = [
            (one, two)
            for one, two in zip(sentinels[::2], sentinels[1::2], strict=False)
            if one.message == two.message and two.closes
        ]
        if 2 * len(pairs) != len(sentinels):
            return None
        if any(text[one.position : two.position] != contents[one.message] for one, two in pairs):
            return None
        conditions = self._conditions(row, text)
        if conditions is None:
            return None
        edges = [0, *(edge.position for pair in pairs for edge in pair), len(text)]
        literals = tuple(text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True))
        spans = [(turn.start, turn.stop) for turn in proven.turns]
        anchors = [(_anchor(literals, edges, start), _anchor(literals, edges, stop)) for start, stop in spans]
        shape = ShapeTemplate(
            literals,
            tuple(one.message for one, _ in pairs),
            tuple(proven.turns),
            tuple((start, stop) for start, stop in anchors if start is not None and stop is not None),
            tuple(sorted(conditions.absent.union(proven.absent))),
            conditions.trimmed,
        )
        # The row must meet the conditions that it taught: else they are not the conditions of its render.
        return shape if self.accepts(shape, contents) and shape.render(contents) == (text, spans) else None

    def _conditions(self, row: Conversation, text: str) -> Conditions | None:
        """Run the template on symbolic texts; return what it asked, None where no conditions state it."""
        conditions = Conditions()
        messages = [
            {"role": message["role"], "content": _symbolic(message["content"], conditions)}
            for message in row.messages
        ]
        try:
            context = self._guarded.new_context(self._template.arguments(messages))
            written = "".join(self._guarded.root_render_func(context))
        except ContentDependent:
            return None
        written = written.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "")
        return conditions if written == text else None


def plain_contents(row: Conversation) -> list[str] | None:
    """Return the contents of a row whose messages have nothing but a role and a text; None for others."""
    if row.tools is not None or row.template_kwargs:
        return None
    contents = []
    for message in row.messages:
        if message.keys() != _PLAIN_KEYS or type(content := message["content"]) is not str:
            return None
        contents.append(content)
    return contents


def assistant_messages(row: Conversation) -> list[int]:
    """Return the indices of a conversation's assistant messages."""
    return [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]


def _symbolic(content: str, conditions: Conditions) -> str:
    """Make a content symbolic; an empty one is part of the shape, and hides nothing."""
    return SymbolicText.of(content, conditions) if content else content


def _anchor(literals: tuple[str, ...], edges: list[int], position: int) -> Anchor | None:
    """Return the anchor of a position; None inside a content."""
    before = 0
    for number, literal in enumerate(literals):
        start = edges[2 * number]
        if start <= position <= start + len(literal):
            return number, before + position - start
        before += len(literal)
    return None
