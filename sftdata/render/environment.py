"""The jinja environment of chat templates: that of transformers' `render_jinja_template`, but for two things.

`strftime_now` yields the run's date, never today's; and `{% generation %}` blocks come out between two marks, so that spans are
read off the text itself.
"""

from __future__ import annotations

import datetime
import json
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

GENERATION_OPEN, GENERATION_CLOSE = "\U0010fff0", "\U0010fff1"


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: put marks around what the block renders."""

    tags = {"generation"}  # noqa: RUF012  jinja2 reads this name from the class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
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

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
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
