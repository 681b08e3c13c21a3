"""Rows that look trainable and are not: each with its reason and the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sftdata.read.convert import MEDIA_COLUMNS, has_media
from sftdata.read.formats import FORMATS
from sftdata.read.instructions import is_messages
from sftdata.read.parts import MEDIA
from sftdata.read.prompts import ANSWERS, QUESTIONS

RowDict = dict[str, Any]
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "prompt", "completion")
_LABELS = {"id", "idx", "index", "source", "category", "type", "split", "lang", "language"}


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
        "pick one answer for each row with --formatter module:function.",
    )


def _is_preference(row: RowDict) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _explain_preference(rows: Sequence[RowDict]) -> tuple[str, str]:
    column = "messages" if is_messages(rows[0]["chosen"]) else "completion"
    return "the rows are preference pairs (chosen, rejected)", f"train on the chosen answers with --map {column}=chosen."


def _is_lone_message(row: RowDict) -> bool:
    return isinstance(row.get("role"), str) and isinstance(row.get("content"), str)


def _explain_lone_message(rows: Sequence[RowDict]) -> tuple[str, str]:
    return "each row is one message of a conversation", 'write one conversation a row: {"messages": [...]}.'


def _is_unanswered(row: RowDict) -> bool:
    return any(row.get(name) is not None for name in QUESTIONS) and all(row.get(name) is None for name in ANSWERS)


def _explain_unanswered(rows: Sequence[RowDict]) -> tuple[str, str]:
    question = next(name for name in QUESTIONS if any(row.get(name) is not None for row in rows))
    others = Counter(name for row in rows for name, value in row.items() if isinstance(value, str) and name != question)
    likely = sorted((name for name in others if name not in _LABELS), key=lambda name: (-others[name], name))
    reason = f"the column {question!r} asks, but there is no answer column ({', '.join(ANSWERS)})"
    if not isinstance(rows[0].get(question), str):
        return reason, 'write each row as {"messages": [...]} that ends in the answer, as with --formatter module:function.'
    if likely:
        return reason, f"if {likely[0]!r} is the answer: --map answer={likely[0]}."
    return reason, "add an answer to each row; without one there is nothing to train on."


def _wrapping(row: RowDict) -> str | None:
    """Return the column that holds a list of training rows."""
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and any(entry.readings(first, {}) for entry in FORMATS.values()):
            return name
    return None


def _explain_wrapped(rows: Sequence[RowDict]) -> tuple[str, str]:
    column = _wrapping(rows[0])
    return f"the rows are inside one object, under {column!r}", f"take them out, as with jq -c '.{column}[]' FILE > rows.jsonl."


VISION = NearMiss("vision", _is_vision, _explain_vision)
NEAR_MISSES = {
    entry.name: entry
    for entry in (
        NearMiss("several answers", _is_several_answers, _explain_several_answers),
        NearMiss("preference pairs", _is_preference, _explain_preference),
        NearMiss("lone messages", _is_lone_message, _explain_lone_message),
        NearMiss("rows inside an object", lambda row: _wrapping(row) is not None, _explain_wrapped),
        NearMiss("prompts without answers", _is_unanswered, _explain_unanswered),
    )
}
