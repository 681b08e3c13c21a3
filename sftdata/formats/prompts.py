"""Lay out an instruction as text, for models without a chat template: `{field}` slots, filled once, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sftdata.errors import RowError, UsageError

_SLOT = re.compile(r"\{([A-Za-z_]\w*)\}")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "response", "completion", "answer")
INPUTS = ("input", "context")


@dataclass(frozen=True, slots=True)
class Layout:
    """A text with slots: literal i is followed by slot i; the last literal by nothing."""

    literals: tuple[str, ...]
    slots: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Split a text at its `{field}` slots; other braces are text.

        >>> Layout.parse("Q: {question} {1}").literals
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
            what = f"the prompt template asks for {{{missing.args[0]}}}; the row has {', '.join(sorted(values))}."
            raise RowError(
                "missing-column", what, "add the column, or take the slot out of the template."
            ) from None
        return "".join(filled) + self.literals[-1]


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The text before the answer, with an input and without one, and the text after the answer; `text` as in the user's file."""

    with_input: Layout
    without_input: Layout
    after: Layout
    text: str | None = None

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Split a template at its answer slot (`{output}`, `{response}`, `{completion}`, `{answer}`), if it has one."""
        for match in _SLOT.finditer(text):
            if match.group(1) in ANSWERS:
                before = Layout.parse(text[: match.start()])
                return cls(before, before, Layout.parse(text[match.end() :].removesuffix("\n")))
        before = Layout.parse(text)
        return cls(before, before, Layout.parse(""))

    def lay_out(self, values: Mapping[str, str], answer: str) -> tuple[str, str]:
        """Return prompt and completion of one turn."""
        layout = self.with_input if any(values.get(name) for name in INPUTS) else self.without_input
        return layout.fill(values), answer + self.after.fill(values)

    @property
    def slots(self) -> frozenset[str]:
        """The columns that it shows."""
        return frozenset(self.with_input.slots + self.without_input.slots + self.after.slots)


# The prompt of Stanford Alpaca, as its data set spells it in the `text` column: the answer begins on a line of its own.
# Source: https://github.com/tatsu-lab/stanford_alpaca
ALPACA = PromptTemplate(
    Layout.parse(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    Layout.parse(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    ),
    Layout.parse(""),
)


def load_prompt_template(path: str) -> PromptTemplate:
    """Read a prompt template from a UTF-8 file, taken to the byte (one final newline after an answer slot aside).

    Raises:
        UsageError: no such file, or no `{field}` slot in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: the prompt template cannot be read ({error}).", "give a UTF-8 text file."
        ) from None
    template = PromptTemplate.parse(text)
    if not template.slots:
        raise UsageError(
            f"{path}: no {{field}} slot in the prompt template.",
            "write slots such as {instruction} and {input}.",
        )
    return replace(template, text=text)
