"""The table of row formats: how each is recognised, and what it becomes.

To add a format, add one entry to FORMATS: its columns with their spellings, a test that the values fit, and a
function from `Fields` to a canonical row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

from sftdata.batches import Row, Text
from sftdata.errors import RowError
from sftdata.formats.chat import REASONING, read_conversation, read_messages, read_xtuner
from sftdata.formats.fields import ANSWERS, Fields, FormatOptions
from sftdata.formats.instructions import is_messages, read_instruction, read_prompt_completion
from sftdata.formats.tokenrows import BESIDE_IDS, convert_tokens, fits_tokens
from sftdata.sources.jsonrows import JsonObject, from_json
from sftdata.wording import shell_quote

ColumnNames = Mapping[str, str]  # canonical column -> column in the data
LINE = ""  # the one column of a row that is a line of plain text


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a format; the first spelling is the one to show."""

    name: str
    spellings: tuple[str, ...]
    required: bool = True

    def found(self, row: Mapping[str, object], pinned: ColumnNames) -> list[str]:
        """Return the names under which a row has this column: as spelt here, else in any case (`Answer`)."""
        wanted = [name for name in self.spellings if name in pinned] or self.spellings
        return [name for name in wanted if name in row] or [name for name in row if name.lower() in wanted]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a training row.

    Attributes:
        fits: whether the values look like this format, given its columns are there.
        convert: the canonical row; raises RowError for a bad one.
    """

    name: str
    about: str
    columns: tuple[Column, ...]
    fits: Callable[[Fields], bool]
    convert: Callable[[Fields, FormatOptions], Row]

    def spelling(self, column: Column, row: Mapping[str, object], pinned: ColumnNames) -> list[str]:
        """Return the names under which a row has this column; null ones only when there is no other."""
        present = column.found(row, pinned)
        return [name for name in present if row[name] is not None] or present[:1]

    def readings(self, row: Mapping[str, object], pinned: ColumnNames) -> list[dict[str, str]]:
        """Return every way to find this format's columns in a row; more than one is an ambiguity."""
        return [names for names in self.candidates(row, pinned) if self.fits(Fields(dict(row), names))]

    def candidates(self, row: Mapping[str, object], pinned: ColumnNames) -> list[dict[str, str]]:
        """Return the readings of a row by which columns there are, and which of them are null."""
        choices = {column.name: self.spelling(column, row, pinned) for column in self.columns}
        required = [column.name for column in self.columns if column.required and choices[column.name]]
        if len(required) < sum(column.required for column in self.columns):
            return []
        rest = {name: found[0] for name, found in choices.items() if name not in required and found}
        found = [
            dict(zip(required, names, strict=True)) | rest
            for names in product(*(choices[name] for name in required))
        ]
        return [names for names in found if any(row[names[name]] is not None for name in required)]

    def locate(self, row: Mapping[str, object], pinned: ColumnNames) -> dict[str, str]:
        """Return where a row has this format's columns.

        Raises:
            RowError: a required column is missing, or is there twice.
        """
        names: dict[str, str] = {}
        for column in self.columns:
            found = self.spelling(column, row, pinned)
            if len(found) > 1 and column.required:
                what = f"{' and '.join(found)} both hold the {column.name} column of {self.name}."
                fix = f"choose one, as with --map {column.spellings[0]}={shell_quote(found[0])}."
                raise RowError("two-columns", what, fix)
            if found:
                names[column.name] = found[0]
            elif column.required:
                present = ", ".join(sorted(row)) or "none"
                what = f"no {' or '.join(column.spellings)} column; the row has {present}."
                fix = f"add it, or name its stand-in with --map {column.spellings[0]}=COLUMN."
                raise RowError("missing-column", what, fix)
        return names


def rename(row: JsonObject, columns: ColumnNames) -> JsonObject:
    """Return a row with the user's columns under their canonical names; a column they shadow is renamed."""
    if not columns or not any(actual in row for actual in columns.values()):
        return row
    taken = {actual: canonical for canonical, actual in columns.items() if actual in row}
    moved = {canonical: row[actual] for actual, canonical in taken.items()}
    rest = {
        (f"{name} (not mapped)" if name in moved else name): value
        for name, value in row.items()
        if name not in taken
    }
    return moved | rest


# ------------------------------------------------------------------------------------------------- what fits


def chat_style(value: object) -> str | None:
    """Return "role", "from" or "turns" by the first message of a list (or of its JSON text), or None."""
    value = from_json(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return None
    return next((style for key, style in _STYLES if key in first), None)


_STYLES = (("role", "role"), ("from", "from"), ("output", "turns"), ("input", "turns"))


def _styled(style: str) -> Callable[[Fields], bool]:
    return lambda fields: chat_style(fields.get("messages")) == style


def _texts(*columns: str) -> Callable[[Fields], bool]:
    def fits(fields: Fields) -> bool:
        return all(fields.get(column) is None or isinstance(fields.get(column), str) for column in columns)

    return fits


def _fits_text(fields: Fields) -> bool:
    """A lone message of a conversation has a content too, but beside a role."""
    return _texts("text")(fields) and not (
        fields.names["text"].lower() == "content" and {"role", "Role"} & fields.row.keys()
    )


def _fits_alpaca(fields: Fields) -> bool:
    if not _texts("question", "answer")(fields):
        return False
    return "input" in fields.names or "context" not in map(str.lower, fields.row)


def _fits_prompt(fields: Fields) -> bool:
    return all(
        value is None or isinstance(value, str) or is_messages(value)
        for value in map(fields.get, ("prompt", "answer"))
    )


# ------------------------------------------------------------------------------------------------ conversion


def _convert_messages(fields: Fields, options: FormatOptions) -> Row:
    value = fields.get("messages")
    return read_conversation(
        read_messages(value, fields.names["messages"], options, fields.counted), fields, options
    )


def _convert_xtuner(fields: Fields, options: FormatOptions) -> Row:
    turns = read_xtuner(fields.get("messages"), fields.names["messages"], weighted=options.loss_weights)
    return read_conversation(turns, fields, options)


def _convert_text(fields: Fields, options: FormatOptions) -> Row:
    text = fields.text("text")
    if not text.strip():
        raise RowError("empty-text", f"{fields.names['text'] or 'the line'} is empty.", "remove the row.")
    return Text(text)


# ------------------------------------------------------------------------------------------------- the table


def _optional(*names: str) -> tuple[Column, ...]:
    return tuple(Column(name, (name,), required=False) for name in names)


_CHAT = Column("messages", ("messages", "conversations", "conversation"))
_TOOLS = Column("tools", ("tools", "functions", "tool_defs"), required=False)
_BESIDE_CHAT = (*_optional("system"), _TOOLS, *_optional("chat_template_kwargs"))
_BESIDE = (*_BESIDE_CHAT, *_optional("history"), Column("reasoning", REASONING, required=False))


def _answer(first: str) -> Column:
    return Column("answer", (first, *(name for name in ANSWERS if name != first)))


def _input(name: str, *, required: bool) -> Column:
    return Column("input", (name,), required)


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format(
            "messages",
            "messages of role and content, as the OpenAI API has them",
            (_CHAT, *_BESIDE_CHAT),
            _styled("role"),
            _convert_messages,
        ),
        Format(
            "sharegpt",
            "messages of from and value",
            (_CHAT, *_BESIDE_CHAT),
            _styled("from"),
            _convert_messages,
        ),
        Format(
            "xtuner",
            "turns of system, input and output",
            (_CHAT, *_BESIDE_CHAT),
            _styled("turns"),
            _convert_xtuner,
        ),
        Format(
            "prompt-completion",
            "prompt and completion, as rendered text or as messages",
            (Column("prompt", ("prompt",)), _answer("completion"), *_BESIDE_CHAT),
            _fits_prompt,
            read_prompt_completion,
        ),
        Format(
            "alpaca",
            "instruction, optional input, output",
            (
                Column("question", ("instruction",)),
                _answer("output"),
                _input("input", required=False),
                *_BESIDE,
            ),
            _fits_alpaca,
            read_instruction,
        ),
        Format(
            "dolly",
            "instruction, context, response",
            (
                Column("question", ("instruction",)),
                _answer("response"),
                _input("context", required=True),
                *_BESIDE,
            ),
            _texts("question", "answer", "input"),
            read_instruction,
        ),
        Format(
            "question-answer",
            "question and answer",
            (Column("question", ("question",)), _answer("answer"), *_BESIDE),
            _texts("question", "answer"),
            read_instruction,
        ),
        Format(
            "query-response",
            "query and response",
            (Column("question", ("query",)), _answer("response"), *_BESIDE),
            _texts("question", "answer"),
            read_instruction,
        ),
        Format("text", "running text", (Column("text", ("text", "content")),), _fits_text, _convert_text),
        Format(
            "lines",
            "plain text, one document a line",
            (Column("text", (LINE,)),),
            _texts("text"),
            _convert_text,
        ),
        Format(
            "tokens",
            "input_ids, with labels or a mask of what is trained",
            (Column("input_ids", ("input_ids",)), *_optional(*BESIDE_IDS)),
            fits_tokens,
            convert_tokens,
        ),
    )
}
