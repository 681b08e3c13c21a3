"""The shape cache: how a chat template lays out conversations of one shape, learned once, then filled without rendering.

A template is a program; what it writes may depend on what a message says. So before a shape (the roles of its
messages, in order, and which of them are empty) is cached, the template is run on symbolic texts: strings that
refuse every question but those whose answer can be noted down as a condition (`'</think>' in content`,
`content | trim`). If the program asks nothing else, then it lays out every conversation of that shape alike, as
long as the conditions hold: no text holds a string that was looked for, none has outer white space where it was
trimmed. A row that meets them is put together from the cached shape; any other row is rendered.

A refusal must not be missed, so whatever could read characters behind a symbolic text's back (C code in filters,
tests, joins and formats) is guarded: it may take symbolic texts only where it is known to ask by their own
methods, or not at all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sftdata.batches import Conversation
from sftdata.render.environment import GENERATION_CLOSE, GENERATION_OPEN, make_environment
from sftdata.render.marks import RESERVED, MarkedText
from sftdata.render.proof import any_of
from sftdata.render.template import ChatTemplate


class Asked(BaseException):
    """The template asked something of a text that no condition can stand for; not for Jinja's own `except Exception`."""


@dataclass(slots=True)
class Conditions:
    """What must hold for texts so that the template answers its own questions the same way.

    Attributes:
        absent: strings that no text may hold.
        trimmed: no text may have outer white space.
    """

    absent: set[str] = field(default_factory=set)
    trimmed: bool = False


class Opaque(str):
    """A text that answers only what can be noted as a condition; made of several texts, it answers nothing."""

    __slots__ = ("conditions", "whole")

    conditions: Conditions
    whole: bool

    @classmethod
    def of(cls, text: str, conditions: Conditions, *, whole: bool = True) -> Opaque:
        """Make a text opaque; `whole` when it is a message's own, not made of several."""
        made = str.__new__(cls, text)
        made.conditions, made.whole = conditions, whole
        return made

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        if spec:
            raise Asked
        return str.__str__(self)

    def __add__(self, other: str) -> str:
        return Opaque.of(str.__add__(self, other), self.conditions, whole=False)

    def __radd__(self, other: str) -> str:
        return Opaque.of(str.__add__(other, self), self.conditions, whole=False)

    def __contains__(self, other: object) -> bool:
        return self._without(other)

    def __eq__(self, other: object) -> bool:
        return False if other == "" or not isinstance(other, str) else self._without(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise Asked

    def startswith(self, other: Any, *limits: Any) -> bool:
        """Answer False, and note it."""
        return self._without(other, *limits)

    def endswith(self, other: Any, *limits: Any) -> bool:
        """Answer False, and note it."""
        return self._without(other, *limits)

    def split(self, separator: Any = None, maxsplit: Any = -1) -> list[str]:
        """Answer the text in one piece, and note what is absent."""
        self._without(separator)
        return [self]

    def rsplit(self, separator: Any = None, maxsplit: Any = -1) -> list[str]:
        """Answer the text in one piece, and note what is absent."""
        self._without(separator)
        return [self]

    def replace(self, old: Any, new: Any, *count: Any) -> str:
        """Answer the text as it is, and note what is absent."""
        self._without(old)
        return self

    def strip(self, characters: Any = None) -> str:
        """Answer the text as it is, and note that it has no outer white space."""
        if not self.whole or not (characters is None or str.isspace(characters)):
            raise Asked
        self.conditions.trimmed = True
        return self

    lstrip = rstrip = strip

    def _without(self, other: object, *limits: Any) -> bool:
        """Answer as for a text that does not hold `other`, and note it."""
        if not self.whole or limits or type(other) is not str or not other:
            raise Asked
        self.conditions.absent.add(other)
        return False


def _refusing() -> Any:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Asked

    return refuse  # nameless: the sandbox gives methods called "format" another body


_HARMLESS = {
    "__new__",
    "__init__",
    "__class__",
    "__getattribute__",
    "__setattr__",
    "__delattr__",
    "__doc__",
    "__init_subclass__",
}
_HARMLESS |= {
    "__subclasshook__",
    "__reduce__",
    "__reduce_ex__",
    "__getnewargs__",
    "__dir__",
    "__sizeof__",
    "__repr__",
    "__getstate__",
}
for _name in dir(str):
    if _name not in _HARMLESS and _name not in vars(Opaque):
        setattr(Opaque, _name, _refusing())


# ---------------------------------------------------------------------------------- watched templates


def _concat(parts: Iterable[str]) -> str:
    """Join what a macro or a block wrote, keeping opaque what is: Jinja's own join would uncover it."""
    parts = [part for part in parts if type(part) is Opaque or part]
    opaque = [part for part in parts if type(part) is Opaque]
    if not opaque:
        return "".join(parts)
    if len(parts) == 1:
        return parts[0]
    return Opaque.of("".join(parts), opaque[0].conditions, whole=False)


class _Generator(CodeGenerator):
    """Compile `a ~ b` to the guarded join."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class _Watched(ImmutableSandboxedEnvironment):
    """Chat templates' environment with every way around an opaque text guarded."""

    code_generator_class = _Generator
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _holds_opaque(left) or _holds_opaque(right):
            raise Asked
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Macros and loops hand texts on; an opaque text's own methods decide for themselves; anything else might read them.
        passes_on = (
            isinstance(obj, Macro | LoopContext)
            or obj is Namespace
            or isinstance(getattr(obj, "__self__", None), Opaque)
        )
        passes_on = passes_on or (isinstance(obj, type) and issubclass(obj, Namespace))
        if not passes_on and _holds_opaque(
            [*args, *(value for name, value in kwargs.items() if name not in _FRAME)]
        ):
            raise Asked
        return super().call(context, obj, *args, **kwargs)


# What compiled templates hand to every call beside its arguments.
_FRAME = ("_loop_vars", "_block_vars")

# Filters and tests that ask an opaque text by its own methods, or only whether it is a text.
_FILTERS = {"trim", "string", "default", "d"}
_TESTS = {
    "string",
    "defined",
    "undefined",
    "none",
    "mapping",
    "number",
    "boolean",
    "true",
    "false",
    "integer",
    "float",
}
_TESTS |= {"iterable", "sequence", "in", "eq", "equalto", "==", "ne", "!="}
# Those that hand on what a list or a dict holds without looking at it.
_HANDING_ON = {
    "length",
    "count",
    "first",
    "last",
    "list",
    "items",
    "selectattr",
    "rejectattr",
    "map",
    "select",
    "reject",
    "reverse",
}


@functools.cache
def _environment(date: str) -> ImmutableSandboxedEnvironment:
    environment = make_environment(date, _Watched)
    for name, function in environment.filters.items():
        environment.filters[name] = _guard(function, direct=name in _FILTERS, inside=name in _HANDING_ON)
    for name, function in environment.tests.items():
        environment.tests[name] = _guard(function, direct=name in _TESTS, inside=True)
    return environment


def watch(text: str, date: str) -> Template:
    """Compile a chat template so that it can be run on opaque texts."""
    return _environment(date).from_string(text)


def _guard(function: Any, *, direct: bool, inside: bool) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks by which Jinja passes the environment
    def guarded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if type(value) is Opaque:
                if not direct:
                    raise Asked
            elif not inside and _holds_opaque(value):
                raise Asked
        return function(*args, **kwargs)

    return guarded


def _holds_opaque(value: Any) -> bool:
    """Say whether an opaque text stands in a value, at any depth; what cannot be looked into counts as holding one."""
    held = [value]
    while held:
        item = held.pop()
        if type(item) is Opaque or isinstance(item, Iterator):
            return True
        if isinstance(item, dict):
            held += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            held += item
    return False


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
