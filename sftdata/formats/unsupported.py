"""Rows that look trainable and are not: each with its reason and the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sftdata.formats.columnwise import explain_columnwise, shape_of
from sftdata.formats.convert import MEDIA_COLUMNS, has_media
from sftdata.formats.instructions import is_messages
from sftdata.formats.odd_values import as_text, by_formatter, shape
from sftdata.formats.parts import MEDIA
from sftdata.formats.preferences import (
    UNJUDGED,
    explain_preference,
    explain_unwanted,
    is_preference,
    unwanted_answer,
)
from sftdata.formats.prompts import ANSWERS, QUESTIONS
from sftdata.formats.registry import FORMATS

RowDict = dict[str, Any]
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "prompt", "completion")


@dataclass(frozen=True, slots=True)
class NearMiss:
    """Rows that a user may take for training rows.

    Attributes:
        fits: whether one row is such a row.
        explain: the reason and the fix, from the sampled rows of this kind.
    """

    name: str
    fits: Callable[[RowDict], bool]
    explain: Callable[[Sequence[RowDict]], tuple[str, str]]


def _is_vision(row: RowDict) -> bool:
    return has_media(row) or any(_has_media_part(row.get(column)) for column in _CHAT_COLUMNS)


def _has_media_part(messages: Any) -> bool:
    if not is_messages(messages):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") in MEDIA for part in parts)


def _explain_vision(rows: Sequence[RowDict]) -> tuple[str, str]:
    columns = sorted({name for row in rows for name in MEDIA_COLUMNS & row.keys()})
    place = f"the column {columns[0]!r}" if columns else "the content of messages"
    return (
        f"the rows hold pictures, sound or film in {place}; only text can be prepared",
        "leave the media out of each row with --formatter module:function.",
    )


def _is_several_answers(row: RowDict) -> bool:
    return isinstance(row.get("completions"), list)


def _explain_several_answers(rows: Sequence[RowDict]) -> tuple[str, str]:
    return (
        "'completions' is a list of answers; a training row has one completion",
        by_formatter('{"prompt": row["prompt"], "completion": row["completions"][0]}'),
    )


def _is_lone_message(row: RowDict) -> bool:
    return isinstance(row.get("role"), str) and isinstance(row.get("content"), str)


def _explain_lone_message(rows: Sequence[RowDict]) -> tuple[str, str]:
    return "each row is one message of a conversation", 'write one conversation a row: {"messages": [...]}.'


def _is_unanswered(row: RowDict) -> bool:
    return any(row.get(name) is not None for name in QUESTIONS) and all(
        row.get(name) is None for name in ANSWERS
    )


def _explain_unanswered(rows: Sequence[RowDict]) -> tuple[str, str]:
    question = next(name for name in QUESTIONS if any(row.get(name) is not None for row in rows))
    reason = f"the column {question!r} asks, but there is no answer column ({', '.join(ANSWERS)})"
    if not isinstance(rows[0].get(question), str):
        return (
            reason,
            'write each row as {"messages": [...]} that ends in the answer, as with --formatter module:function.',
        )
    others = Counter(
        name for row in rows for name, value in row.items() if value is not None and name != question
    )
    likely = sorted(
        (name for name in others if _names_an_answer(name)), key=lambda name: (-others[name], name)
    )
    if not likely:
        return (
            reason,
            "name the column that holds the answer, as --map answer=COLUMN, or add an answer to each row.",
        )
    value = next(row[likely[0]] for row in rows if row.get(likely[0]) is not None)
    if isinstance(value, str):
        return reason, f"if {likely[0]!r} is the answer: --map answer={likely[0]}."
    answer = as_text(value, likely[0])
    given = '"context": row["context"], ' if isinstance(rows[0].get("context"), str) else ""
    made = by_formatter(f'{{"instruction": row["{question}"], {given}"response": {answer}}}')
    return f"{reason}; {likely[0]!r} is {shape(value)}", made


def _names_an_answer(column: str) -> bool:
    """Say whether a column is called as an answer may be: a context, a title or a rationale is none."""
    return any(word in column.lower() for word in (*ANSWERS, "solution", "target", "reply", "chosen"))


def _wrapping(row: RowDict) -> tuple[str, bool] | None:
    """Return the column that holds a training row, or a list of them, and whether it is a list."""
    for name, value in row.items():
        if name in _CHAT_COLUMNS:  # what it holds is meant as messages
            continue
        several = isinstance(value, list)
        first = value[0] if several and value else value
        # A text inside an object is more often a remark than a row.
        if isinstance(first, dict) and any(
            entry.readings(first, {}) for entry in FORMATS.values() if several or entry.name not in UNJUDGED
        ):
            return name, several
    return None


def _explain_wrapped(rows: Sequence[RowDict]) -> tuple[str, str]:
    column, several = _wrapping(rows[0]) or ("", False)
    if several:
        fix = f"take them out, as with jq -c '.{column}[]' FILE > rows.jsonl."
        return f"the rows are inside one object, under {column!r}", fix
    return f"each row is inside an object, under {column!r}", by_formatter(f'row["{column}"]')


VISION = NearMiss("vision", _is_vision, _explain_vision)
UNWANTED = NearMiss(
    "answers that are not wanted", lambda row: unwanted_answer(row) is not None, explain_unwanted
)
PREFERENCE = NearMiss("preference pairs", is_preference, explain_preference)
BY_COLUMNS = "a table by columns"
NEAR_MISSES = {
    entry.name: entry
    for entry in (
        NearMiss("several answers", _is_several_answers, _explain_several_answers),
        PREFERENCE,
        NearMiss("lone messages", _is_lone_message, _explain_lone_message),
        NearMiss(BY_COLUMNS, lambda row: shape_of(row) is not None, explain_columnwise),
        NearMiss("rows inside an object", lambda row: _wrapping(row) is not None, _explain_wrapped),
        NearMiss("prompts without answers", _is_unanswered, _explain_unanswered),
    )
}
