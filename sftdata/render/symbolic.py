"""Symbolic texts: run a chat template on strings that note what it asks of them, or refuse to answer.

No question may go unnoticed, so whatever could read characters behind a symbolic text's back (C code in
filters, tests, joins and formats) is guarded: it may take symbolic texts only where it is known to ask
through their own methods, or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from jinja2.compiler import CodeGenerator
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sftdata.render.environment import make_environment

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.compiler import Frame
    from jinja2.runtime import Context


class ContentDependent(BaseException):
    """What is written depends on a text in a way no condition states; Jinja itself catches any Exception."""


@dataclass(slots=True)
class Conditions:
    """What must hold for texts so that the template answers its own questions the same way.

    Attributes:
        absent: strings that no text may hold.
        trimmed: no text may have outer whitespace.
    """

    absent: set[str] = field(default_factory=set)
    trimmed: bool = False


class SymbolicText(str):
    """A text that answers only what can be noted as a condition; joined from several, it answers nothing.

    Attributes:
        conditions: where it notes them.
        whole: it is a message's own text, not joined from several.
    """

    __slots__ = ("conditions", "whole")

    conditions: Conditions
    whole: bool

    @classmethod
    def of(cls, text: str, conditions: Conditions, *, whole: bool = True) -> SymbolicText:
        """Make a text symbolic."""
        made = str.__new__(cls, text)
        made.conditions, made.whole = conditions, whole
        return made

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        if spec:
            raise ContentDependent
        return str.__str__(self)

    def __add__(self, other: str) -> str:
        return SymbolicText.of(str.__add__(self, other), self.conditions, whole=False)

    def __radd__(self, other: str) -> str:
        return SymbolicText.of(str.__add__(other, self), self.conditions, whole=False)

    def __contains__(self, other: object) -> bool:
        return self._lacks(other)

    def __eq__(self, other: object) -> bool:
        return False if other == "" or not isinstance(other, str) else self._lacks(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        raise ContentDependent

    def startswith(self, other: object, *limits: object) -> bool:
        """Answer False, and note it."""
        return self._lacks(other, *limits)

    endswith = startswith

    def split(self, sep: object = None, maxsplit: object = -1) -> list[str]:
        """Answer the text in one piece, and note what is absent."""
        self._lacks(sep)
        return [self]

    rsplit = split

    def replace(self, old: object, new: object, *count: object) -> str:
        """Answer the text as it is, and note what is absent."""
        self._lacks(old)
        return self

    def strip(self, characters: object = None) -> str:
        """Answer the text as it is, and note that it has no outer whitespace."""
        blank = characters is None or (isinstance(characters, str) and characters.isspace())
        if not self.whole or not blank:
            raise ContentDependent
        self.conditions.trimmed = True
        return self

    lstrip = rstrip = strip

    def _lacks(self, other: object, *limits: object) -> bool:
        """Answer as for a text that does not hold `other`, and note it."""
        if not self.whole or limits or type(other) is not str or not other:
            raise ContentDependent
        self.conditions.absent.add(other)
        return False


def _refuse(*_: object, **__: object) -> object:
    # Under this name for every method: the sandbox gives those called "format" another body.
    raise ContentDependent


_HARMLESS = {
    "__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__", "__doc__",
    "__repr__", "__init_subclass__", "__subclasshook__", "__reduce__", "__reduce_ex__", "__getnewargs__",
    "__dir__", "__sizeof__", "__getstate__",
}  # fmt: skip
for _name in dir(str):
    if _name not in _HARMLESS and _name not in vars(SymbolicText):
        setattr(SymbolicText, _name, _refuse)


# --------------------------------------------------------------------------------------- guarded templates

# What compiled templates hand to every call beside its arguments.
_FRAME = ("_loop_vars", "_block_vars")
# Filters and tests that ask a symbolic text by its own methods, or only whether it is a text.
_ASKING_FILTERS = {"trim", "string", "default", "d"}
_ASKING_TESTS = {
    "string", "defined", "undefined", "none", "mapping", "number", "boolean", "true", "false", "integer",
    "float", "iterable", "sequence", "in", "eq", "equalto", "==", "ne", "!=",
}  # fmt: skip
# Filters that pass on what a list or a dict holds without looking at it.
_PASSING_FILTERS = {
    "length", "count", "first", "last", "list", "items", "selectattr", "rejectattr", "map", "select",
    "reject", "reverse",
}  # fmt: skip


def _concat(parts: Iterable[str]) -> str:
    """Join what a macro or a block wrote, symbolic where a part is: Jinja's own join would lose that."""
    parts = [part for part in parts if type(part) is SymbolicText or part]
    symbolic = [part for part in parts if type(part) is SymbolicText]
    if not symbolic:
        return "".join(parts)
    if len(parts) == 1:
        return parts[0]
    return SymbolicText.of("".join(parts), symbolic[0].conditions, whole=False)


class _GuardedCodeGenerator(CodeGenerator):
    """Compile `a ~ b` to the guarded join."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")


class _GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates with every way around a symbolic text guarded."""

    code_generator_class = _GuardedCodeGenerator
    concat = staticmethod(_concat)
    intercepted_binops = frozenset({"%"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if _holds_symbolic(left) or _holds_symbolic(right):
            raise ContentDependent
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: object, *args: object, **kwargs: object) -> object:
        # Macros and loops pass texts on, and a symbolic text's methods decide for themselves; any other
        # function might read them.
        passes_on = (
            isinstance(obj, Macro | LoopContext)
            or isinstance(getattr(obj, "__self__", None), SymbolicText)
            or (isinstance(obj, type) and issubclass(obj, Namespace))
        )
        given = (value for name, value in kwargs.items() if name not in _FRAME)
        if not passes_on and _holds_symbolic([*args, *given]):
            raise ContentDependent
        return super().call(context, obj, *args, **kwargs)


@functools.cache
def _guarded_environment(date: str) -> ImmutableSandboxedEnvironment:
    environment = make_environment(date, _GuardedEnvironment)
    for name, function in environment.filters.items():
        environment.filters[name] = _guard(
            function, asks=name in _ASKING_FILTERS, passes_on=name in _PASSING_FILTERS
        )
    tests = cast("dict[str, Callable[..., object]]", environment.tests)
    for name, function in tests.items():
        tests[name] = _guard(function, asks=name in _ASKING_TESTS, passes_on=True)
    return environment


def compile_guarded(text: str, date: str) -> Template:
    """Compile a chat template so that it can run on symbolic texts."""
    return _guarded_environment(date).from_string(text)


def _guard(function: Callable[..., object], *, asks: bool, passes_on: bool) -> Callable[..., object]:
    """Let a filter or test take a symbolic text only where it `asks` it, a container where it `passes_on`."""

    @functools.wraps(function)  # keeps the attributes by which Jinja passes the environment
    def guarded(*args: object, **kwargs: object) -> object:
        for value in (*args, *kwargs.values()):
            if type(value) is SymbolicText:
                if not asks:
                    raise ContentDependent
            elif not passes_on and _holds_symbolic(value):
                raise ContentDependent
        return function(*args, **kwargs)

    return guarded


def _holds_symbolic(value: object) -> bool:
    """Return whether a value holds a symbolic text at any depth; an iterator counts as if it does."""
    stack = [value]
    while stack:
        item = stack.pop()
        if type(item) is SymbolicText or isinstance(item, Iterator):
            return True
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            stack += item
    return False
