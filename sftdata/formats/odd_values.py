"""Rows with the columns of a format, and a value there that the format cannot take: which, what it is, and the way out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sftdata.formats.instructions import is_messages
from sftdata.formats.registry import Format, chat_style
from sftdata.sources.jsonrows import from_json, kind_of

RowDict = dict[str, Any]


def by_formatter(expression: str) -> str:
    """Return the fix that converts rows with a function of one expression, from `row` to the row that is meant."""
    return f"--formatter rows:fix, with a file rows.py that holds: def fix(row): return {expression}"


def explain_odd_value(
    rows: Sequence[RowDict], formats: Iterable[Format], pinned: Mapping[str, str]
) -> tuple[str, str] | None:
    """Return reason and fix for the first row that has the columns of a format; None where no row has.

    Args:
        rows: rows that fit no format, the user's columns under their canonical names.
        formats: in the order in which they are tried.
        pinned: canonical column = column in the data, as the user maps them.
    """
    for entry in formats:
        for row in rows:
            for names in entry.candidates(row, pinned):
                actual = {column: pinned.get(name, name) for column, name in names.items()}
                for column, name in names.items():
                    if odd := _odd(entry, column, row[name], actual[column]):
                        return f"the column {actual[column]!r} of {entry.name} rows is {odd[0]}", odd[1]
    return None


def _odd(entry: Format, column: str, value: Any, name: str) -> tuple[str, str] | None:
    """Return what is odd about a value, and the fix; None where nothing is."""
    if value is None:
        return None
    if column == "messages":
        return _odd_messages(value, name) if chat_style(value) is None else None
    if entry.name == "tokens":
        odd = column == "input_ids" and not (isinstance(value, list) and set(map(type, value)) == {int})
        return (
            (f"{shape(value)}; expected a list of integers", "write it as a list of integers.")
            if odd
            else None
        )
    if isinstance(value, str) or column not in ("question", "answer", "prompt", "input", "text"):
        return None
    if entry.name == "prompt-completion" and is_messages(value):
        return None
    return f"{shape(value)}; expected a string", by_formatter(
        f"{{**row, {_quoted(name)}: {as_text(value, name)}}}"
    )


def _odd_messages(value: Any, name: str) -> tuple[str, str]:
    expected = "expected a list of objects with role and content"
    if isinstance(value, str):
        if value.lstrip()[:2] in ("[{", "{'", "['") and not isinstance(from_json(value), list):
            fix = by_formatter(
                f"{{**row, {_quoted(name)}: __import__('ast').literal_eval(row[{_quoted(name)}])}}"
            )
            return (
                f"text that is no JSON, as Python prints a list (single quotes); {expected}, or that list as JSON text",
                fix,
            )
        return (
            f"a string that is no list of messages ({value[:40]!r}); {expected}",
            "write one object for each turn.",
        )
    if isinstance(value, dict) and chat_style([value]):
        return f"one message; {expected}", by_formatter(f"{{**row, {_quoted(name)}: [row[{_quoted(name)}]]}}")
    if isinstance(value, list) and value and isinstance(value[0], list) and chat_style(value[0]):
        return f"a list of lists of messages; {expected}", "write one conversation a row."
    return f"{shape(value)}; {expected}", 'write each message as {"role": ..., "content": ...}.'


def shape(value: Any) -> str:
    """Name a value as far as its shape goes: `a list of 2 strings`, `an object of text, answer_start`."""
    if isinstance(value, dict):
        return f"an object of {', '.join(map(str, list(value)[:4]))}" if value else "an empty object"
    if not isinstance(value, list):
        return f"{kind_of(value)} ({value})" if isinstance(value, int | float) else kind_of(value)
    if not value:
        return "an empty list"
    first = value[0]
    if isinstance(first, dict):
        return f"a list of {len(value)} objects of {', '.join(map(str, list(first)[:4]))}"
    kinds = {str: "strings", bool: "booleans", int: "numbers", float: "numbers", list: "lists"}
    return f"a list of {len(value)} {kinds.get(type(first), 'nulls')}"


def as_text(value: Any, name: str) -> str:
    """Return an expression that makes text of such a value: the first of a list, the text inside an object."""
    found = f"row[{_quoted(name)}]"
    while isinstance(value, list | dict) and value:
        if isinstance(value, list):
            found, value = f"{found}[0]", value[0]
        else:
            key = "text" if "text" in value else next(iter(value))
            found, value = f"{found}[{_quoted(key)}]", value[key]
    return found if isinstance(value, str) else f"str({found})"


def _quoted(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)
