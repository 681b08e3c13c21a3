"""Rows that judge answers: a chosen and a rejected one, or one that is wanted or not. As they are, they teach the wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftdata.formats.instructions import is_messages
from sftdata.formats.odd_values import by_formatter
from sftdata.formats.prompts import QUESTIONS
from sftdata.formats.turn_markers import find_turn_markers
from sftdata.sources.jsonrows import from_json

RowDict = dict[str, Any]
UNJUDGED = frozenset({"text", "lines", "tokens"})  # formats without an answer that a label could judge
CHAT_COLUMNS = ("messages", "conversations", "conversation", "prompt")


def unwanted_answer(row: RowDict) -> str | None:
    """Return the column that marks the answer of a row as not wanted (KTO); None where none does.

    Only the boolean false says so: a label that is a text or a number is a class.
    """
    return next((name for name in ("label", "kto_tag") if row.get(name) is False), None)


def explain_unwanted(rows: Sequence[RowDict]) -> tuple[str, str]:
    """Return reason and fix for rows with an answer that is not wanted."""
    column = unwanted_answer(rows[0])
    fix = by_formatter(f'None if row.get("{column}") is False else row')
    return (
        f"the column {column!r} is false, which marks answers that are not wanted (KTO); they would be trained as if they were",
        f"keep the others: {fix}; or, where {column!r} says nothing about the answer, name the format with --format.",
    )


def is_preference(row: RowDict) -> bool:
    """Say whether a row has a chosen and a rejected answer."""
    return row.get("chosen") is not None and row.get("rejected") is not None


def is_unanswered_preference(row: RowDict) -> bool:
    """Say whether a row has a chosen and a rejected answer, and none of its own: its messages end in a question."""
    if not is_preference(row):
        return False
    messages = next((from_json(row[name]) for name in CHAT_COLUMNS if row.get(name) is not None), None)
    return isinstance(messages, list) and is_messages(messages) and not _is_answer(messages[-1])


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and str(message.get("role", message.get("from"))).lower() in (
        "assistant",
        "gpt",
        "chatgpt",
    )


def explain_preference(rows: Sequence[RowDict]) -> tuple[str, str]:
    """Return reason and fix for preference pairs."""
    return (
        "the rows are preference pairs (chosen, rejected)",
        f"train on the chosen answers: {_chosen_fix(rows[0])}",
    )


def _chosen_fix(row: RowDict) -> str:
    """Return what makes the chosen answer the row's own: the first way that reads, and reads whole."""
    chosen = row["chosen"] if not isinstance(row["chosen"], dict) else [row["chosen"]]
    asked = next((name for name in CHAT_COLUMNS if is_messages(row.get(name)) and row.get(name)), None)
    if is_messages(chosen) and _is_answer(chosen[0]) and asked:
        answer = '[row["chosen"]]' if isinstance(row["chosen"], dict) else 'row["chosen"]'
        return by_formatter(f'{{"messages": row["{asked}"] + {answer}}}')
    if is_messages(row["chosen"]) and not _is_answer(chosen[0]):
        return "--map messages=chosen."
    if any(row.get(name) is not None for name in QUESTIONS):
        return "--map completion=chosen."
    markers = find_turn_markers([str(row["chosen"])])
    if markers is None:
        return "write each row as a prompt and its completion."
    instruction, response = map(_shell_quoted, markers)
    return f"--map text=chosen --response-template {response} --instruction-template {instruction}"


def _shell_quoted(marker: str) -> str:
    return f"$'{marker.encode('unicode_escape').decode()}'" if "\n" in marker else f"'{marker}'"
