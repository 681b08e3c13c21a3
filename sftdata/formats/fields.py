"""The columns of one row under their canonical names, with errors that name the column as the data spells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from sftdata.errors import RowError
from sftdata.formats.prompts import ALPACA, PromptTemplate
from sftdata.sources.jsonrows import kind_of

Kind = Literal["auto", "conversation", "completion", "text"]


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What the user says about the rows; small and picklable.

    Attributes:
        columns: canonical column = column in the data.
        roles: role in the data = role for the template.
        kind: what instruction-like rows become; auto: a conversation when `chat`, else prompt and completion.
        chat: True when a chat template is in use.
        template: lays out instruction-like rows that do not become conversations.
        need_assistant: False lets a conversation without an assistant message through (everything is trained).
        formatter: `module:function` that turns a row into one of a known format.
        formatter_sha256: hash of its code, where it has a file.
        loss_weights: messages may have weights other than 0 and 1.
        labels_judge: a label that is false says that the answer is not wanted.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    kind: Kind = "auto"
    chat: bool = True
    template: PromptTemplate = ALPACA
    need_assistant: bool = True
    formatter: str | None = None
    formatter_sha256: str | None = None
    loss_weights: bool = False
    labels_judge: bool = True

    @property
    def as_conversation(self) -> bool:
        """Whether instruction-like rows become conversations."""
        return self.kind == "conversation" or (self.kind == "auto" and self.chat)


class Fields(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        names: each canonical column that the row has, and its own name.
        counted: what had to be put right to read the row, by the names of counters; grows while it is read.
    """

    row: dict[str, Any]
    names: Mapping[str, str]
    counted: list[str] = msgspec.field(default_factory=list)

    def get(self, column: str) -> Any:
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
            raise RowError(
                "null-field", f"{name} is null; expected a string.", "fill it in, or remove the row."
            )
        found = f"{name} is {kind_of(value)}; expected a string."
        raise RowError(
            "not-text", found, "write it as a string, or convert rows with --formatter module:function."
        )

    def optional_text(self, column: str) -> str:
        """Return the text of a column that may be absent or null, as "" then."""
        return "" if self.get(column) is None else self.text(column)
