"""The shape cache: how a chat template lays out conversations of one shape, learned once, then filled in.

A template is a program; what it writes may depend on what a message says. So before a shape (the roles of its
messages, in order, which of them are empty, and where pictures stand between texts) is cached, the template
runs on symbolic texts (symbolic.py): strings that refuse every question but those whose answer can be noted
as a condition (`'</think>' in content`, `content | trim`). If it asks nothing else, it lays out every
conversation of that shape alike, as long as the conditions hold: no text holds a string that was looked for,
none has outer whitespace where it was trimmed. A row that meets them is put together from its shape; any
other is rendered.
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
_PLAIN_KEYS, _TEXT_KEYS = {"role", "content"}, {"type", "text"}
_PICTURE = "image"

Layout = tuple[tuple[str | None, ...] | None, ...]
"""Of each message None for a text, or its parts: None for a text, a picture's type, a blank text as it is."""


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
    """Literals, and the texts that fill the slots between them.

    Attributes:
        literals: one more than slots.
        slots: number of the text after each literal but the last.
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
        self._shapes: dict[tuple[object, ...], ShapeTemplate | None] = {}

    def render(self, row: Conversation) -> tuple[ShapeTemplate, str, Ranges] | None:
        """Return a row's shape, its text and the characters of its turns; None where it must be rendered."""
        plain = plain_contents(row)
        if plain is None:
            return None
        contents, layout = plain
        empty = (
            tuple([index for index, content in enumerate(contents) if not content]) if "" in contents else ()
        )
        shape = self.shape_of(tuple([message["role"] for message in row.messages]), empty, layout)
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

    def shape_of(
        self, roles: tuple[str, ...], empty: tuple[int, ...] = (), layout: Layout | None = None
    ) -> ShapeTemplate | None:
        """Return the template of a shape; None where the template looks into texts, or the cache is full.

        Args:
            roles: of the messages.
            empty: numbers of the texts that are empty.
            layout: of the messages; None where the content of each is a text.
        """
        key = roles, empty, layout
        if key not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                return None
            layout = layout or (None,) * len(roles)
            slots = sum(1 if parts is None else parts.count(None) for parts in layout)
            texts = ["" if number in empty else f"Text {number}." for number in range(slots)]
            row = Conversation(_messages(roles, layout, texts), [])
            proven = self._prove(row)
            self._shapes[key] = None if proven is None else self._learn(row, layout, texts, proven)
        return self._shapes[key]

    def _learn(
        self, row: Conversation, layout: Layout, contents: list[str], proven: ProvenRender
    ) -> ShapeTemplate | None:
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
        numbers = {content: number for number, content in enumerate(contents) if content}
        slots = [numbers.get(text[one.position : two.position]) for one, two in pairs]
        roles = [message["role"] for message in row.messages]
        conditions = None if None in slots else self._conditions(roles, layout, contents, text)
        if conditions is None:
            return None
        edges = [0, *(edge.position for pair in pairs for edge in pair), len(text)]
        literals = tuple(text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True))
        spans = [(turn.start, turn.stop) for turn in proven.turns]
        anchors = [(_anchor(literals, edges, start), _anchor(literals, edges, stop)) for start, stop in spans]
        shape = ShapeTemplate(
            literals,
            tuple(slot for slot in slots if slot is not None),
            tuple(proven.turns),
            tuple((start, stop) for start, stop in anchors if start is not None and stop is not None),
            tuple(sorted(conditions.absent.union(proven.absent))),
            conditions.trimmed,
        )
        # The row must meet the conditions that it taught: else they are not the conditions of its render.
        return shape if self.accepts(shape, contents) and shape.render(contents) == (text, spans) else None

    def _conditions(
        self, roles: Sequence[str], layout: Layout, contents: Sequence[str], text: str
    ) -> Conditions | None:
        """Run the template on symbolic texts; return what it asked, None where no conditions state it."""
        conditions = Conditions()
        messages = _messages(roles, layout, [_symbolic(content, conditions) for content in contents])
        try:
            context = self._guarded.new_context(self._template.arguments(messages))
            written = "".join(self._guarded.root_render_func(context))
        except ContentDependent:
            return None
        written = written.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "")
        return conditions if written == text else None


def plain_contents(row: Conversation) -> tuple[list[str], Layout | None] | None:
    """Return the texts of a row whose messages have nothing but a role, texts and pictures; None for others.

    The layout of its messages comes with them; None where the content of each is a text.
    """
    if row.tools is not None or row.template_kwargs:
        return None
    contents, layout, pictured = list[str](), list[tuple[str | None, ...] | None](), False
    for message in row.messages:
        if message.keys() != _PLAIN_KEYS:
            return None
        content = message["content"]
        if type(content) is str:
            contents.append(content)
            layout.append(None)
        elif type(content) is list and (parts := _parts(content)) is not None:
            contents += [part["text"] for part, text in zip(content, parts, strict=True) if text is None]
            layout.append(parts)
            pictured = True
        else:
            return None
    return contents, tuple(layout) if pictured else None


def _parts(content: Sequence[object]) -> tuple[str | None, ...] | None:
    """Return the layout of parts; None where one is neither a text nor a picture taken out of its row."""
    parts: list[str | None] = []
    for part in content:
        if not isinstance(part, dict):
            return None
        if part.keys() == _TEXT_KEYS and part["type"] == "text" and type(text := part["text"]) is str:
            parts.append(None if text.strip() else text)
        elif part == {"type": _PICTURE}:
            parts.append(_PICTURE)
        else:
            return None
    return tuple(parts)


def _messages(roles: Sequence[str], layout: Layout, texts: Sequence[str]) -> list[dict[str, object]]:
    """Return messages of this layout with these texts."""
    coming = iter(texts)

    def part(kind: str | None) -> dict[str, object]:
        if kind == _PICTURE:
            return {"type": _PICTURE}
        return {"type": "text", "text": next(coming) if kind is None else kind}

    return [
        {"role": role, "content": next(coming) if parts is None else [part(kind) for kind in parts]}
        for role, parts in zip(roles, layout, strict=True)
    ]


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
