"""Rows as parsed -> canonical rows; a bad row becomes a fault, and columns that nothing reads are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from sftdata.batches import FILTERED, Completion, Conversation, Int64, Row, RowBatch, Tally, Text, Tokens
from sftdata.errors import RowError, UsageError
from sftdata.formats.calls import WITH_PROCESSOR
from sftdata.formats.chat import find_role
from sftdata.formats.fields import Fields, FormatOptions
from sftdata.formats.formatter import load_formatter
from sftdata.formats.instructions import is_messages
from sftdata.formats.table import FORMATS, LINE, Format, rename
from sftdata.formats.unsupported import UNJUDGED, has_media, unwanted_answer
from sftdata.pictures.references import Reference
from sftdata.pictures.rows import COLUMNS, PicturedConversation, marks_pictures, read_picture_row
from sftdata.sources.chunks import RawRow
from sftdata.sources.jsonrows import JsonObject, kind_of


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """The rows of a batch that can be used; the tally has the others.

    Attributes:
        rows: canonical rows.
        row: int64[N], index of each in the batch.
        pictures: how many pictures a row of the batch names, by index; of rejected rows, too.
    """

    rows: list[Row]
    row: Int64
    pictures: dict[int, int] = field(default_factory=dict)


def convert_rows(batch: RowBatch, format_name: str, options: FormatOptions, tally: Tally) -> Converted:
    """Convert a batch of one format, as detected or named; with `options.formatter`, what that returns.

    Args:
        tally: takes the rows that cannot be used, those that the formatter leaves out, and the columns that
            nothing reads.

    Raises:
        UsageError: the formatter cannot be imported.
    """
    convert = _Converter(format_name, options)
    rows: list[Row] = []
    kept: list[int] = []
    pictures: dict[int, int] = {}
    for index, row in enumerate(batch.rows):
        try:
            canonical = convert(row)
        except RowError as error:
            tally.reject(index, error.fault)
            continue
        finally:
            if convert.pictures:
                pictures[index] = convert.pictures
            tally.count("image_markers_as_text", index, convert.marked)
            tally.count("animated_pictures", index, convert.animated)
        if canonical is None:
            tally.drop(index, FILTERED)
        else:
            rows.append(canonical)
            kept.append(index)
    tally.counts.update({f"column_unused:{name}": count for name, count in convert.unused().items()})
    return Converted(rows, np.array(kept, np.int64), pictures)


class _Converter:
    """Convert single rows; remember where rows with the same columns keep them.

    Attributes:
        pictures: of the last row, as many as it names.
        animated: of these, as many as have several frames.
        marked: the last row marks pictures, and names none.
    """

    def __init__(self, format_name: str, options: FormatOptions) -> None:
        self.format = None if options.formatter else FORMATS.get(format_name)
        self.options = options
        self.formatter = (
            load_formatter(options.formatter, options.formatter_sha256) if options.formatter else None
        )
        if self.format is None and self.formatter is None:
            what = f"No row format is called {format_name!r}."
            raise UsageError(what, f"choose one of {', '.join(FORMATS)}.")
        self._names: dict[tuple[str, ...], dict[str, str]] = {}
        self._rows: Counter[tuple[str, ...]] = Counter()  # with these columns
        self._unused: Counter[str] = Counter()  # of the other rows
        self.pictures = self.animated = 0
        self.marked = False

    def __call__(self, row: RawRow) -> Row | None:
        """Return the canonical row, or None when the user's formatter leaves the row out."""
        self.pictures = self.animated = 0
        self.marked = False
        if self.formatter is None:
            assert self.format is not None
            row = rename({LINE: row} if isinstance(row, str) else row, self.options.columns)
            row, pictures = self._take_pictures(row)
            return self._pictured(self._convert(self.format, row, self._locate(self.format, row)), pictures)
        formatted = self._format(row)
        if isinstance(formatted, Conversation) and not self.options.loss_weights:
            _refuse_weights(formatted)
        if formatted is None or isinstance(formatted, Conversation | Completion | Text | Tokens):
            return formatted
        formatted, pictures = self._take_pictures(formatted)
        chosen = self._recognise(formatted)
        return self._pictured(self._convert(chosen, formatted, chosen.locate(formatted, {})), pictures)

    def unused(self) -> dict[str, int]:
        """Return how many rows have each column that was not read."""
        counts = self._unused.copy()
        for keys, rows in self._rows.items():
            counts.update(dict.fromkeys(set(keys) - set(self._names[keys].values()), rows))
        return dict(sorted(counts.items()))

    def _convert(self, chosen: Format, row: JsonObject, names: dict[str, str]) -> Row:
        if self.options.labels_judge and chosen.name not in UNJUDGED and (column := unwanted_answer(row)):
            what = f"{column} is false, which marks an answer that is not wanted (KTO)."
            fix = f"leave the row out, or name the format where {column} means something else."
            raise RowError("unwanted-answer", what, fix)
        try:
            return chosen.convert(Fields(row, names), self.options)
        except RowError:
            self._refuse_other_format(row)
            raise

    def _take_pictures(self, row: JsonObject) -> tuple[JsonObject, Sequence[Reference]]:
        """Return a row without its pictures, and these."""
        if self.options.pictures is None and not has_media(row):
            return row, ()
        read = read_picture_row(row, self._is_answer)
        if read is None:
            self.marked = self.options.pictures is not None and marks_pictures(row, self._is_answer)
            return {name: value for name, value in row.items() if name not in COLUMNS}, ()
        if self.options.pictures is None:
            several = "a picture" if len(read.pictures) == 1 else f"{len(read.pictures)} pictures"
            what = f"the row has {several}, and no processor says what stands for one."
            raise RowError("no-processor", what, WITH_PROCESSOR)
        self.pictures = len(read.pictures)
        self._unused.update(read.unused)
        return read.row, read.pictures

    def _is_answer(self, role: object) -> bool:
        return find_role(role, self.options.roles) == "assistant"

    def _pictured(self, row: Row, references: Sequence[Reference]) -> Row:
        """Return a row with its pictures, as the chat template takes its contents."""
        if not isinstance(row, Conversation):
            return row
        if self.options.parts_only:
            row = msgspec.structs.replace(row, messages=[_in_parts(message) for message in row.messages])
        if not references or self.options.pictures is None:
            return row
        pictures = tuple(map(self.options.pictures.load, references))
        self.animated = sum(picture.animated for picture in pictures)
        return PicturedConversation(**msgspec.structs.asdict(row), pictures=pictures)

    def _locate(self, chosen: Format, row: JsonObject) -> dict[str, str]:
        keys = tuple(row)
        names = self._names.get(keys)
        if names is not None:
            self._rows[keys] += 1
            return names
        try:
            names = chosen.locate(row, self.options.columns)
        except RowError:
            self._refuse_other_format(row)
            raise
        if not self.options.as_conversation:
            names.pop("reasoning", None)  # running text has no place for it; it is counted as unread
        if all(len(column.found(row, {})) < 2 for column in chosen.columns):
            self._names[keys] = names
            self._rows[keys] += 1
        else:
            self._unused.update(row.keys() - set(names.values()))
        return names

    def _refuse_other_format(self, row: JsonObject) -> None:
        """Name the format that a row has when it is not the input's own."""
        if self.format is None or self.format.readings(row, self.options.columns):
            return
        others = [other.name for other in FORMATS.values() if other.readings(row, self.options.columns)]
        if others:
            what = f"the row reads as {' or '.join(others)}, the input as {self.format.name}."
            fix = f"prepare such rows apart, with --format {others[0]}."
            raise RowError("wrong-format", what, fix) from None

    def _format(self, row: RawRow) -> Row | JsonObject | None:
        """Return what the user's function makes of a row: None, a canonical row, or a dict."""
        assert self.formatter is not None
        try:
            formatted = self.formatter(dict(row) if isinstance(row, dict) else row)
        except Exception as error:  # the user's own code may raise anything
            what = f"{self.options.formatter} raised {type(error).__name__}: {error}"
            fix = "fix the function; it may return None to leave a row out."
            raise RowError("formatter-error", what, fix) from None
        if isinstance(formatted, str):
            return {"text": formatted}
        if is_messages(formatted):
            return {"messages": formatted}
        if formatted is None or isinstance(formatted, dict | Conversation | Completion | Text | Tokens):
            return formatted
        found = f"{self.options.formatter} returned {kind_of(formatted)}"
        what = f"{found}; expected a string, a dict, a list of messages or None."
        fix = "return one example for each row; mark a function of columns with @sftdata.by_columns."
        raise RowError("formatter-output", what, fix)

    def _recognise(self, row: JsonObject) -> Format:
        readings = [entry for entry in FORMATS.values() for _ in entry.readings(row, {})]
        if len(readings) == 1:
            self._unused.update(row.keys() - set(readings[0].locate(row, {}).values()))
            return readings[0]
        names = " and ".join(dict.fromkeys(entry.name for entry in readings)) or "no format"
        columns = ", ".join(sorted(map(str, row)))
        what = f"{self.options.formatter} returned the columns {columns}, which read as {names}."
        raise RowError("formatter-output", what, "return the columns of one format.")


def _in_parts(message: JsonObject) -> JsonObject:
    """Return a message whose content is a list of parts."""
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _refuse_weights(row: Conversation) -> None:
    """Refuse weights of a formatter's own row that would be left out, as those of messages are."""
    for index, weight in enumerate(row.trained):
        if isinstance(weight, float) and weight not in (0, 1):
            what = f"trained[{index}] of the formatter's row is {weight!r}; expected True, False or None."
            raise RowError("fractional-weight", what, "round the weight, or keep it with --loss-weights.")
