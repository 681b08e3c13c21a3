"""Rows that look trainable and are not, or that no format takes: each kind with its reason and the fix.

That includes rows with the columns of a format, and a value there that the format cannot take.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sftdata.errors import Fault, RowError
from sftdata.formats.chat import find_role
from sftdata.formats.fields import ANSWERS, QUESTIONS
from sftdata.formats.instructions import find_turn_markers, is_messages
from sftdata.formats.table import FORMATS, Format, chat_style
from sftdata.output import counted
from sftdata.pictures.rows import read_picture_row
from sftdata.sources.jsonrows import JsonObject, from_json, kind_of
from sftdata.wording import shell_quote

UNJUDGED = frozenset({"text", "lines", "tokens"})  # formats without an answer that a label could judge
MEDIA_COLUMNS = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "prompt")


def has_media(row: JsonObject) -> bool:
    """Return True for a row with a picture, sound or film in a column of its own."""
    return not MEDIA_COLUMNS.isdisjoint(row) and any(row[name] for name in MEDIA_COLUMNS & row.keys())


def unwanted_answer(row: JsonObject) -> str | None:
    """Return the column that marks the answer of a row as not wanted (KTO); None where none does.

    Only the boolean false says so: a label that is a text or a number is a class.
    """
    return next((name for name in ("label", "kto_tag") if row.get(name) is False), None)


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A kind of rows that a user may take for training rows.

    Attributes:
        fits: whether one row is such a row.
        explain: the reason and the fix, from the sampled rows of this kind.
    """

    name: str
    fits: Callable[[JsonObject], bool]
    explain: Callable[[Sequence[JsonObject]], tuple[str, str]]


# ---------------------------------------------------------------- media, several answers, none, wrapped rows


def _has_bad_media(row: JsonObject) -> bool:
    return _media_fault(row) is not None


def _media_fault(row: JsonObject) -> Fault | None:
    """Return what is wrong with the pictures of a row, or that it has other media; no file is opened."""
    try:
        read_picture_row(row)
    except RowError as error:
        return error.fault
    return None


def _explain_bad_media(rows: Sequence[JsonObject]) -> tuple[str, str]:
    faults = [fault for fault in map(_media_fault, rows) if fault is not None]
    first = faults[0]
    return f"{first.code}: {first.reason.rstrip('.')}", first.fix


def _is_several_answers(row: JsonObject) -> bool:
    return isinstance(row.get("completions"), list)


def _explain_several_answers(rows: Sequence[JsonObject]) -> tuple[str, str]:
    return (
        "'completions' is a list of answers; a training row has one completion",
        by_formatter('{"prompt": row["prompt"], "completion": row["completions"][0]}'),
    )


def _is_lone_message(row: JsonObject) -> bool:
    return isinstance(row.get("role"), str) and isinstance(row.get("content"), str)


def _explain_lone_message(rows: Sequence[JsonObject]) -> tuple[str, str]:
    return "each row is one message of a conversation", 'write one conversation a row: {"messages": [...]}.'


def _is_unanswered(row: JsonObject) -> bool:
    return any(row.get(name) is not None for name in QUESTIONS) and all(
        row.get(name) is None for name in ANSWERS
    )


def _explain_unanswered(rows: Sequence[JsonObject]) -> tuple[str, str]:
    question = next(name for name in QUESTIONS if any(row.get(name) is not None for row in rows))
    reason = f"the column {question!r} asks, but there is no answer column ({', '.join(ANSWERS)})"
    if not isinstance(rows[0].get(question), str):
        return (
            reason,
            'write each row as {"messages": [...]} that ends in the answer,'
            " as with --formatter module:function.",
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
        return reason, f"if {likely[0]!r} is the answer: --map answer={shell_quote(likely[0])}."
    answer = as_text(value, likely[0])
    given = '"context": row["context"], ' if isinstance(rows[0].get("context"), str) else ""
    made = by_formatter(f'{{"instruction": row["{question}"], {given}"response": {answer}}}')
    return f"{reason}; {likely[0]!r} is {shape(value)}", made


def _names_an_answer(column: str) -> bool:
    """Return whether a column has a name of an answer; a context, a title or a rationale does not."""
    return any(word in column.lower() for word in (*ANSWERS, "solution", "target", "reply", "chosen"))


def _wrapping(row: JsonObject) -> tuple[str, bool] | None:
    """Return the column that holds a training row, or a list of them, and whether it is a list."""
    for name, value in row.items():
        if name in (*_CHAT_COLUMNS, "completion"):  # what it holds is meant as messages
            continue
        several = isinstance(value, list)
        first = value[0] if isinstance(value, list) and value else value
        # A text inside an object is more often a remark than a row.
        if isinstance(first, dict) and any(
            entry.readings(first, {}) for entry in FORMATS.values() if several or entry.name not in UNJUDGED
        ):
            return name, several
    return None


def _explain_wrapped(rows: Sequence[JsonObject]) -> tuple[str, str]:
    column, several = _wrapping(rows[0]) or ("", False)
    if several:
        fix = f"take them out, as with jq -c '.{column}[]' FILE > rows.jsonl."
        return f"the rows are inside one object, under {column!r}", fix
    return f"each row is inside an object, under {column!r}", by_formatter(f'row["{column}"]')


# ------------------------------------------------------------------------------- turns with keys of their own


def _turns_in(row: JsonObject) -> tuple[str, str, str] | None:
    """Return the column that holds turns, and their keys of who speaks and of what is said; None for none."""
    for name, value in row.items():
        if keys := _keys_of_turns(value):
            return name, *keys
    return None


def _keys_of_turns(value: object) -> tuple[str, str] | None:
    """Return the keys under which turns have their speaker and their text; None for what holds none."""
    if not isinstance(value, list) or not value or chat_style(value) is not None:
        return None
    turns = [turn for turn in value if isinstance(turn, dict)]
    if len(turns) < len(value):
        return None
    texts = [key for key in turns[0] if all(isinstance(turn.get(key), str) for turn in turns)]
    speaker = max(texts, key=lambda key: _speaks(turns, key), default=None)
    said = [key for key in texts if key != speaker]
    return (speaker, max(said, key=lambda key: _says(turns, key))) if speaker and said else None


def _speaks(turns: Sequence[JsonObject], key: str) -> tuple[bool, bool, int]:
    """Rank a key by whether it says who speaks: it holds roles, is named so, or holds few different texts."""
    named = any(word in key.lower() for word in ("role", "speaker", "from", "author", "sender", "who"))
    return any(find_role(turn[key], {}) for turn in turns), named, -len({turn[key] for turn in turns})


def _says(turns: Sequence[JsonObject], key: str) -> tuple[bool, int, int]:
    """Rank a key by whether it holds what is said: it is named so, or holds many different or long texts."""
    named = any(word in key.lower() for word in ("text", "content", "said", "message", "value", "utter"))
    return named, len({turn[key] for turn in turns}), sum(len(str(turn[key])) for turn in turns)


def _explain_turns(rows: Sequence[JsonObject]) -> tuple[str, str]:
    name, speaker, said = _turns_in(rows[0]) or ("", "", "")
    found = f"the column {name!r} is {shape(rows[0][name])}; expected a list of objects with role and content"
    return found, _by_turns(name, speaker, said)


def _by_turns(name: str, speaker: str, said: str) -> str:
    """Return the fix that gives the turns of a column the keys role and content."""
    turn = f'{{"role": turn[{_quoted(speaker)}], "content": turn[{_quoted(said)}]}}'
    return by_formatter(f'{{"messages": [{turn} for turn in row[{_quoted(name)}]]}}')


# ------------------------------------------------------------------------ chosen and rejected, wanted or not


def explain_unwanted(rows: Sequence[JsonObject]) -> tuple[str, str]:
    """Return reason and fix for rows with an answer that is not wanted."""
    column = unwanted_answer(rows[0])
    fix = by_formatter(f'None if row.get("{column}") is False else row')
    return (
        f"the column {column!r} is false, which marks answers that are not wanted (KTO);"
        " they would be trained as if they were",
        f"keep the others: {fix}; or, where {column!r} says nothing about the answer,"
        " name the format with --format.",
    )


def is_preference(row: JsonObject) -> bool:
    """Return whether a row has a chosen and a rejected answer."""
    return row.get("chosen") is not None and row.get("rejected") is not None


def is_unanswered_preference(row: JsonObject) -> bool:
    """Return whether a row has chosen and rejected answers, and its messages end in a question."""
    if not is_preference(row):
        return False
    messages = next((from_json(row[name]) for name in _CHAT_COLUMNS if row.get(name) is not None), None)
    return isinstance(messages, list) and is_messages(messages) and not _is_answer(messages[-1])


def _is_answer(message: object) -> bool:
    return isinstance(message, dict) and str(message.get("role", message.get("from"))).lower() in (
        "assistant",
        "gpt",
        "chatgpt",
    )


def explain_preference(rows: Sequence[JsonObject]) -> tuple[str, str]:
    """Return reason and fix for preference pairs."""
    return (
        "the rows are preference pairs (chosen, rejected)",
        f"train on the chosen answers: {_chosen_fix(rows[0])}",
    )


def _chosen_fix(row: JsonObject) -> str:
    """Return the fix that makes the chosen answer the row's own: the first one that works for this row."""
    given = row["chosen"]
    chosen = [given] if isinstance(given, dict) else given
    asked = next((name for name in _CHAT_COLUMNS if is_messages(row.get(name)) and row.get(name)), None)
    if is_messages(chosen) and _is_answer(chosen[0]) and asked:
        answer = '[row["chosen"]]' if isinstance(given, dict) else 'row["chosen"]'
        return by_formatter(f'{{"messages": row["{asked}"] + {answer}}}')
    if is_messages(given) and not _is_answer(given[0]):
        return "--map messages=chosen."
    if any(row.get(name) is not None for name in QUESTIONS):
        return "--map completion=chosen."
    markers = find_turn_markers([str(given)])
    if markers is None:
        return "write each row as a prompt and its completion."
    instruction, response = map(shell_quote, markers)
    return f"--map text=chosen --response-template {response} --instruction-template {instruction}"


# ------------------------------------------------------------------------------------ a table by its columns

_FIXES = {
    "lists": "jq -c '. as $all | range([.[]][0] | length) as $i | $all | map_values(.[$i])' FILE",
    "objects": "jq -c '. as $all | ([.[]][0] | keys_unsorted[]) as $i | $all | map_values(.[$i])' FILE",
    "split": "jq -c '.columns as $names | .data[] | [$names, .] | transpose"
    " | map({(.[0]): .[1]}) | add' FILE",
    "index": "jq -c '.[]' FILE",
}
_SHAPES = {
    "lists": "one object holds the whole table by columns: each is a list of its values",
    "objects": "one object holds the whole table by columns:"
    " each is an object of its values by row (pandas to_json)",
    "split": "one object holds the whole table as the lists columns and data (pandas orient=split)",
    "index": "one object holds the rows by their number (pandas orient=index)",
}


def shape_of(row: JsonObject) -> str | None:
    """Return how an object holds a table (told by its first row); None for one that does not."""
    return next((shape for shape, first in _first_rows(row) if _is_row(first)), None)


def explain_columnwise(rows: Sequence[JsonObject]) -> tuple[str, str]:
    """Return the shape and the command that writes its rows as lines."""
    shape = shape_of(rows[0]) or "lists"
    return _SHAPES[shape], f"write it as rows: {_FIXES[shape]} > rows.jsonl"


def _first_rows(row: JsonObject) -> list[tuple[str, JsonObject]]:
    """Return how an object may hold a table, and the row that it would have first."""
    lists = [value for value in row.values() if isinstance(value, list) and value]
    if row and len(lists) == len(row) and len({len(value) for value in lists}) == 1:
        return [("lists", {name: value[0] for name, value in zip(row, lists, strict=True)})]
    objects = [value for value in row.values() if isinstance(value, dict) and value]
    if row and len(objects) == len(row) and all(value.keys() == objects[0].keys() for value in objects):
        if next(iter(row)).isdecimal():
            return [("index", objects[0])]
        number = next(iter(objects[0]))
        return [("objects", {name: value[number] for name, value in zip(row, objects, strict=True)})]
    names, data = row.get("columns"), row.get("data")
    first = data[0] if isinstance(data, list) and data else None
    if isinstance(names, list) and isinstance(first, list) and len(first) == len(names):
        return [("split", dict(zip(map(str, names), first, strict=True)))]
    return []


def _is_row(row: JsonObject) -> bool:
    return any(entry.readings(row, {}) for entry in FORMATS.values())


# --------------------------------------------------------------------------------------------- one odd value


def by_formatter(expression: str) -> str:
    """Return the fix that converts rows with a function of one expression of `row`."""
    return f"--formatter rows:fix, with a file rows.py that holds: def fix(row): return {expression}"


def explain_odd_value(
    rows: Sequence[JsonObject], formats: Iterable[Format], pinned: Mapping[str, str]
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
                        found = f"the column {actual[column]!r} of {entry.name} rows is {odd[0]}"
                        beside = "; and leave --map out" if pinned and "rows:fix" in odd[1] else ""
                        return found, odd[1] + beside
    return None


def _odd(entry: Format, column: str, value: object, name: str) -> tuple[str, str] | None:
    """Return what is odd about a value, and the fix; None where nothing is."""
    if value is None:
        return None
    if column == "messages":
        return _odd_messages(value, name) if chat_style(value) is None else None
    if entry.name == "tokens":
        odd = column == "input_ids" and not (isinstance(value, list) and set(map(type, value)) == {int})
        if not odd:
            return None
        return f"{shape(value)}; expected a list of integers", "write it as a list of integers."
    if isinstance(value, str) or column not in ("question", "answer", "prompt", "input", "text"):
        return None
    if entry.name == "prompt-completion" and is_messages(value):
        return None
    return f"{shape(value)}; expected a string", by_formatter(
        f"{{**row, {_quoted(name)}: {as_text(value, name)}}}"
    )


def _odd_messages(value: object, name: str) -> tuple[str, str]:
    expected = "expected a list of objects with role and content"
    if isinstance(value, str):
        if value.lstrip()[:2] in ("[{", "{'", "['") and not isinstance(from_json(value), list):
            fix = by_formatter(
                f"{{**row, {_quoted(name)}: __import__('ast').literal_eval(row[{_quoted(name)}])}}"
            )
            found = "text that is no JSON, as Python prints a list (single quotes)"
            return f"{found}; {expected}, or that list as JSON text", fix
        return (
            f"a string that is no list of messages ({value[:40]!r}); {expected}",
            "write one object for each turn.",
        )
    if isinstance(value, dict) and chat_style([value]):
        return f"one message; {expected}", by_formatter(f"{{**row, {_quoted(name)}: [row[{_quoted(name)}]]}}")
    if isinstance(value, list) and value and isinstance(value[0], list) and chat_style(value[0]):
        return f"a list of lists of messages; {expected}", "write one conversation a row."
    if keys := _keys_of_turns(value):
        return f"{shape(value)}; {expected}", _by_turns(name, *keys)
    return f"{shape(value)}; {expected}", 'write each message as {"role": ..., "content": ...}.'


def shape(value: object) -> str:
    """Name a value as far as its shape goes: `a list of 2 strings`, `an object of text, answer_start`."""
    if isinstance(value, dict):
        return f"an object of {', '.join(map(str, list(value)[:4]))}" if value else "an empty object"
    if not isinstance(value, list):
        return f"{kind_of(value)} ({value})" if isinstance(value, int | float) else kind_of(value)
    if not value:
        return "an empty list"
    first = value[0]
    if isinstance(first, dict):
        return f"a list of {counted(len(value), 'object')} of {', '.join(map(str, list(first)[:4]))}"
    kinds = {str: "strings", bool: "booleans", int: "numbers", float: "numbers", list: "lists"}
    return f"a list of {len(value)} {kinds.get(type(first), 'nulls')}"


def as_text(value: object, name: str) -> str:
    """Return an expression that makes text of a value: the first of a list, the text inside an object."""
    found = f"row[{_quoted(name)}]"
    while isinstance(value, list | dict) and value:
        if isinstance(value, list):
            found, value = f"{found}[0]", value[0]
        else:
            key = "text" if "text" in value else next(iter(value))
            found, value = f"{found}[{_quoted(key)}]", value[key]
    if isinstance(value, bytes):
        return f"{found}.decode()"
    return found if isinstance(value, str) else f"str({found})"


def _quoted(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------- the table

BAD_MEDIA = Unsupported("media that cannot be used", _has_bad_media, _explain_bad_media)
UNWANTED = Unsupported(
    "answers that are not wanted", lambda row: unwanted_answer(row) is not None, explain_unwanted
)
PREFERENCE = Unsupported("preference pairs", is_preference, explain_preference)
BY_COLUMNS = "a table by columns"
OWN_KEYS = "turns with keys of their own"
UNSUPPORTED = {
    entry.name: entry
    for entry in (
        Unsupported("several answers", _is_several_answers, _explain_several_answers),
        PREFERENCE,
        Unsupported("lone messages", _is_lone_message, _explain_lone_message),
        Unsupported(BY_COLUMNS, lambda row: shape_of(row) is not None, explain_columnwise),
        Unsupported("rows inside an object", lambda row: _wrapping(row) is not None, _explain_wrapped),
        Unsupported("prompts without answers", _is_unanswered, _explain_unanswered),
        Unsupported(OWN_KEYS, lambda row: _turns_in(row) is not None, _explain_turns),
    )
}
