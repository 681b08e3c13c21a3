"""The jinja environment of chat templates: that of transformers' `render_jinja_template`, with three changes.

`strftime_now` yields the run's date, never today's. `{% generation %}` blocks come out between two sentinels,
so that spans are read off the text itself. And a render has a budget: jinja's sandbox keeps a template from
reaching the machine, not from wasting it. Every pass of a loop takes a step, every call some; long values
take more, and what could make a huge one is measured before it is made. The budget counts steps, not seconds:
a row is refused on every machine or on none.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from operator import add
from typing import Any, TypeVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

Value = TypeVar("Value")

GENERATION_OPEN, GENERATION_CLOSE = "\U0010fff0", "\U0010fff1"


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: put sentinels around what the block renders."""

    tags = {"generation"}  # noqa: RUF012  jinja2 reads this name from the class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Macro) -> str:
        return f"{GENERATION_OPEN}{caller()}{GENERATION_CLOSE}"


class _TemplateDict:
    """`dict(...)` for templates, without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace(...)` that refuses underscore names, so that no template reaches Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > 100:
        raise jinja2.exceptions.SecurityError("tojson with an indent above 100")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@cache
def make_environment(
    date: str, kind: type[ImmutableSandboxedEnvironment] = ImmutableSandboxedEnvironment
) -> ImmutableSandboxedEnvironment:
    """Return the environment that templates run in, on a day (ISO date) that `strftime_now` formats."""
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    clock = datetime.datetime.fromisoformat(date)
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": clock.strftime,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    return environment


# ---------------------------------------------------------------------------------------------- the budget

# Of a render, or of one value in it: twice the longest line, and within 512 MB with its copies.
MAX_CHARS = 128 << 20
MAX_STEPS = 1_000_000  # eighty turns with tools take some thousands
_CHARS_PER_STEP = 16384
_STEPS_PER_CALL = 8  # a call takes that many times as long as a pass of a loop
_MAX_INTEGER = 1_000_000  # given to a function, filter or format: a width, an indent, a count
_MAX_BITS = 4096
_WIDE = re.compile(r"\d{7}|%[^%\w]*\*")  # in a format string


class _Left(threading.local):
    steps = MAX_STEPS


_left = _Left()


def join_bounded(pieces: Iterator[str]) -> str:
    """Join the pieces of a render, lazily made, within a fresh budget.

    Raises:
        SecurityError: the template works or writes without end.
    """
    _left.steps = MAX_STEPS
    written, total = [], 0
    for piece in pieces:
        written.append(piece)
        total += len(piece)
        if total > MAX_CHARS:
            raise SecurityError(f"the template writes more than {MAX_CHARS >> 20} million characters")
    return "".join(written)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with a budget, and without what differs from run to run (`lipsum`, `random`)."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.globals["lipsum"], self.filters["random"]
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"_each": _each, "_whole": _whole}

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        return super()._generate(_Instrument().visit(source), name, filename, defer_init)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """Measure, then compute; a sum is at most as long as its parts, and is measured after."""
        if operator == "+":
            return _charged(add(left, right))
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, int | float):
                    _spend(_size(value) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _spend(left.bit_length() * max(right, 0) * MAX_CHARS // _MAX_BITS)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        """Check the arguments, then call; the names of the parameters are jinja's own."""
        if args or kwargs:
            _check_integers(args, kwargs)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and args:
            _foresee(name, owner, args)
        _spend(steps=_STEPS_PER_CALL)
        return _charged(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse wide fields in `str.format`."""
        wrapper = super().wrap_str_format(value)
        if wrapper is not None:
            _check_format(value.__self__)
        return wrapper


class _Instrument(NodeTransformer):
    """Let loops, concatenations, captured blocks and literals of a template take from the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Count the passes."""
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        """Charge the captured text."""
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "_whole")
        return node

    def _visit_value(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_whole") if getattr(node, "ctx", "load") == "load" else node

    visit_Concat = visit_List = visit_Tuple = visit_Dict = _visit_value


def _filtered(node: nodes.Node | None, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=getattr(node, "lineno", 1))


def _spend(size: int = 0, steps: int = 1) -> None:
    _left.steps -= steps + size // _CHARS_PER_STEP
    if _left.steps < 0 or size > MAX_CHARS:
        raise SecurityError("the template works or writes without end")


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return 64 * len(value) if isinstance(value, list | tuple | dict) else 0


def _charged(value: Value) -> Value:
    if type(value) is str and len(value) < _CHARS_PER_STEP:  # type: ignore[arg-type]  # a str
        return value  # loops and calls are counted, so what is between them is too
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise SecurityError("the template computes a number without end")
    _spend(_size(value))
    return value


def _each(values: Iterable[Value]) -> Iterator[Value]:
    for value in values:
        _spend()
        yield value


def _whole(value: Value) -> Value:
    """Charge a value with all that it holds: a list that holds another twice is printed with it twice."""
    if isinstance(value, str):
        return _charged(value)
    stack: list[object] = [value]
    while stack:
        item = stack.pop()
        _spend(_size(item))
        if isinstance(item, list | tuple | dict):
            stack += item.values() if isinstance(item, dict) else item
    return value


def _check_integers(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_INTEGER for value in (*args, *kwargs.values())):
        raise SecurityError(f"the template passes an integer above {_MAX_INTEGER}")


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise SecurityError("the template formats with a field without end")


def _foresee(name: str, text: str, args: tuple[object, ...]) -> None:
    """Charge what `replace` and `join` are about to write."""
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _spend(text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], list | tuple):
        _spend(len(args[0]) * len(text) + sum(map(_size, args[0])))


def _bounded_filter(name: str, function: Callable[..., Value]) -> Callable[..., Value]:
    @functools.wraps(function)
    def bounded(*args: object, **kwargs: object) -> Value:
        if len(args) == 1 and not kwargs:
            return _charged(function(*args))
        _check_integers(args, kwargs)
        texts = [value for value in args if isinstance(value, str)]
        if name == "replace" and len(texts) > 2:
            _foresee(name, texts[0], tuple(texts[1:]))
        elif name == "join":
            values = next((value for value in args if isinstance(value, list | tuple)), ())
            _foresee(name, str(texts[-1]) if texts else "", (values,))
        elif name == "format" and texts:
            _check_format(texts[0])
        return _charged(function(*args, **kwargs))

    return bounded
