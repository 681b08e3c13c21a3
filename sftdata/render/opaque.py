"""Opaque texts: run a chat template on strings that note what it asks of them, and refuse what cannot be noted.

A refusal must not be missed, so whatever could read characters behind an opaque text's back (C code in filters, tests,
joins and formats) is guarded: it may take opaque texts only where it is known to ask by their own methods, or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sftdata.render.environment import make_environment


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
