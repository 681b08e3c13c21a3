"""What formats read with: prompt templates, the user's options, and the columns of one row.

A prompt template lays out an instruction as text, for models without a chat template: `{field}` slots, filled
once, never evaluated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from sftdata.errors import RowError, UsageError
from sftdata.pictures.loaded import PictureFolder
from sftdata.sources.jsonrows import JsonObject, kind_of

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "response", "completion", "answer")
INPUTS = ("input", "context")


@dataclass(frozen=True, slots=True)
class SlotText:
    """A text with slots: literal i is followed by slot i; the last literal by nothing."""

    literals: tuple[str, ...]
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> SlotText:
        """Split a text at its `{field}` slots; other braces are text.

        >>> SlotText.parse("Q: {question} {1}").literals
        ('Q: ', ' {1}')
        """
        parts = _SLOT.split(text)
        return cls(tuple(parts[::2]), tuple(parts[1::2]))

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with every slot filled; braces in values are text.

        Raises:
            RowError: the row has no such column.
        """
        try:
            filled = [
                part
                for literal, slot in zip(self.literals, self.slots, strict=False)
                for part in (literal, values[slot])
            ]
        except KeyError as missing:
            slot = f"the prompt template asks for {{{missing.args[0]}}}"
            what = f"{slot}; the row has {', '.join(sorted(values))}."
            fix = "add the column, or take the slot out of the template."
            raise RowError("missing-column", what, fix) from None
        return "".join(filled) + self.literals[-1]


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The text before the answer, with and without an input, and after it; `text` as in the user's file."""

    with_input: SlotText
    without_input: SlotText
    after: SlotText
    text: str | None = None

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Split a template at its answer slot (any of ANSWERS, as `{output}`), if it has one."""
        for match in _SLOT.finditer(text):
            if match.group(1) in ANSWERS:
                before = SlotText.parse(text[: match.start()])
                return cls(before, before, SlotText.parse(text[match.end() :].removesuffix("\n")))
        before = SlotText.parse(text)
        return cls(before, before, SlotText.parse(""))

    def lay_out(self, values: Mapping[str, str], answer: str) -> tuple[str, str]:
        """Return prompt and completion of one turn."""
        slots = self.with_input if any(values.get(name) for name in INPUTS) else self.without_input
        return slots.fill(values), answer + self.after.fill(values)

    @property
    def slots(self) -> frozenset[str]:
        """The columns that it shows."""
        return frozenset(self.with_input.slots + self.without_input.slots + self.after.slots)


# The prompt of Stanford Alpaca, as its data set spells it in the `text` column.
# Source: https://github.com/tatsu-lab/stanford_alpaca
ALPACA = PromptTemplate(
    SlotText.parse(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    SlotText.parse(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
    SlotText.parse(""),
)


def load_prompt_template(path: str) -> PromptTemplate:
    """Read a prompt template from a UTF-8 file, exactly but for one final newline after an answer slot.

    Where there is no such file, a text with slots is the template itself, as of a set that is repeated.

    Raises:
        UsageError: no such file, or no `{field}` slot in it.
    """
    given = "{" in path and not os.path.isfile(path)
    try:
        text = path if given else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path}: the prompt template cannot be read ({error})."
        raise UsageError(what, "give a UTF-8 text file.") from None
    template = PromptTemplate.parse(text)
    if not template.slots:
        what = f"{path}: no {{field}} slot in the prompt template."
        raise UsageError(what, "write slots such as {instruction} and {input}.")
    return replace(template, text=text)


# --------------------------------------------------------------------------- options, and one row

RowKind = Literal["auto", "conversation", "completion", "text"]


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the user says about the rows; small and picklable.

    Attributes:
        columns: canonical column = column in the data.
        roles: role in the data = role for the template.
        kind: what instruction-like rows become; auto: a conversation when `chat`, else prompt and completion.
        chat: True when a chat template is in use.
        template: lays out instruction-like rows that do not become conversations.
        need_assistant: False lets a conversation without an assistant message through (all is trained).
        formatter: `module:function` that turns a row into one of a known format.
        formatter_sha256: hash of its code, where it has a file.
        loss_weights: messages may have weights other than 0 and 1.
        labels_judge: a label that is false says that the answer is not wanted.
        pictures: where the pictures of rows are; None where no processor says what stands for one.
        parts_only: the chat template takes contents as lists of parts alone.
        packed: rows of ids are taken as they are, with padding and several documents.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    kind: RowKind = "auto"
    chat: bool = True
    template: PromptTemplate = ALPACA
    need_assistant: bool = True
    formatter: str | None = None
    formatter_sha256: str | None = None
    loss_weights: bool = False
    labels_judge: bool = True
    pictures: PictureFolder | None = None
    parts_only: bool = False
    packed: bool = False

    @property
    def as_conversation(self) -> bool:
        """Whether instruction-like rows become conversations."""
        return self.kind == "conversation" or (self.kind == "auto" and self.chat)


class Fields(msgspec.Struct, frozen=True):
    """One row, its columns under their canonical names; errors name a column as the data spells it.

    Attributes:
        names: each canonical column that the row has, and its own name.
        counted: what had to be put right to read the row, by the names of counters; grows while it is read.
    """

    row: JsonObject
    names: Mapping[str, str]
    counted: list[str] = msgspec.field(default_factory=list)

    def get(self, column: str) -> object:
        """Return the value, or None when the row has no such column."""
        name = self.names.get(column)
        return None if name is None else self.row[name]

    def text(self, column: str) -> str:
        """Return the text of a required column.

        Raises:
            RowError: null, or not a string.
        """
        value = self.get(column)
        if type(value) is str:
            return value
        name = self.names.get(column, column)
        if value is None:
            what = f"{name} is null; expected a string."
            raise RowError("null-field", what, "fill it in, or remove the row.")
        what = f"{name} is {kind_of(value)}; expected a string."
        fix = "write it as a string, or convert rows with --formatter module:function."
        raise RowError("not-text", what, fix)

    def optional_text(self, column: str) -> str:
        """Return the text of a column that may be absent or null, as "" then."""
        return "" if self.get(column) is None else self.text(column)
