"""Errors and faults, each one line: where, what was found, what was expected, the fix.

    SftError                 exit code
    ├── UsageError           2    a wrong flag, setting, file name or format choice
    ├── DataError            3    too many rejected rows, nothing trainable
    └── IntegrityError       4    a set whose bytes do not match its manifest

A bad *row* is not an error: a stage passes its `Fault` to the tally, which makes a `Reject` of it, and
continues with the rest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from sftdata.wording import worded


class SftError(Exception):
    """The base of all errors: one line with the problem and its fix, in the words of the caller.

    Args:
        message: where, what was found, what was expected; settings as flags.
        fix: what to do, without the word "Fix"; empty if the message makes it clear.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        self.message, self.fix = without_secrets(message), without_secrets(fix)
        super().__init__(self.message, self.fix)

    def __str__(self) -> str:
        text = worded(self.message)
        text = f"{text} Fix: {worded(self.fix)}" if self.fix else text
        return " ".join(text.split())


class UsageError(SftError):
    """A flag, setting, path or format choice is wrong; nothing was done."""

    exit_code = 2


class DataError(SftError):
    """The data cannot make a set: too many rejected rows, or nothing to train on."""

    exit_code = 3


class InputChangedError(DataError):
    """An input holds other bytes than when it was planned."""


class IntegrityError(SftError):
    """A set does not match its manifest."""

    exit_code = 4


# What mends a set that is damaged.
ANEW = "repeat the command that made the set, with --overwrite."
RESTORE = "restore the file, or repeat the command that made the set, with --overwrite."
VERIFY = "run `sftdata verify`, or repeat the command that made the set, with --overwrite."


def changed(path: str) -> InputChangedError:
    """Return the error that names an input which was changed."""
    what = f"{path}: changed while it was read; no set is made of two versions."
    return InputChangedError(what, "run the same command again once nothing writes to it any more.")


def no_rows(inputs: Iterable[str]) -> DataError:
    """Return the error that names inputs without a row."""
    return DataError(f"{', '.join(inputs)}: no rows.", "give a file that holds rows.")


_LOGIN = re.compile(
    r"\b(?!abfss?://)([A-Za-z][\w+.-]*://)[^/\s@'\"]*@"
)  # there it is the name of a container
_QUERY = re.compile(r"([A-Za-z][\w+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>]*?(?=[:;,.)]*(?:$|[\s'\"<>]))")


def without_secrets(text: str) -> str:
    """Return text whose URLs hold no user, password or query, which may be a signature.

    >>> without_secrets("https://me:pw@host/a.jsonl?sig=12: damaged; s3://bucket/b.jsonl is not.")
    'https://host/a.jsonl: damaged; s3://bucket/b.jsonl is not.'
    """
    return _QUERY.sub(r"\1", _LOGIN.sub(r"\1", text))


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row cannot be used: the body of a line in `rejects.jsonl`.

    Attributes:
        code: stable kebab-case name, as `unknown-role`.
        reason: what was found and expected.
        fix: what to do.
    """

    code: str
    reason: str
    fix: str


class RowError(Exception):
    """Carry a `Fault` out of a per-row function; the stage that called it turns it into a reject."""

    def __init__(self, code: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fault = Fault(code, reason, fix)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the fix for an unknown word: the nearest known one, or `otherwise` if none is near.

    >>> did_you_mean("packin", ["packing", "split"]), did_you_mean("x", ["packing"], "choose one of packing.")
    ("did you mean 'packing'?", 'choose one of packing.')
    """
    near = nearest(word, known)
    return otherwise if near is None else f"did you mean {near!r}?"


def nearest(word: str, known: Iterable[str], similarity: float = 0.6) -> str | None:
    """Return the known word nearest to this one; None if none reaches this ratio of `difflib`."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=similarity)), None)


def explain(code: str) -> str:
    """Return the paragraph of a code, with its kind.

    >>> print(explain("empty-row"))
    empty-row (rejected rows): Prompt and completion are both empty. Remove the row.

    Raises:
        UsageError: there is no such code.
    """
    codes = read_codes()
    name = code.strip().partition(":")[0]  # the counter of a column is `column_unused:NAME`
    known = {name.replace("_", "-"): name for name in codes}  # the summary writes counters with spaces
    entry = known.get(name.lower().replace("_", "-").replace(" ", "-"))
    if entry is None:
        fix = did_you_mean(name, codes, "`sftdata explain` lists them all.")
        raise UsageError(f"{code}: no such code.", fix)
    section, paragraph = codes[entry]
    return f"{entry} ({section[0].lower()}{section[1:]}): {paragraph}"


@cache
def read_codes() -> dict[str, tuple[str, str]]:
    """Return code -> (section, paragraph), in the order of the file."""
    codes: dict[str, tuple[str, str]] = {}
    text = Path(__file__).with_name("codes.md").read_text("utf-8")
    for section in f"\n{text}".split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for entry in body.split("\n### ")[1:]:
            code, _, paragraph = entry.partition("\n")
            codes[code] = (title, " ".join(paragraph.split()))
    return codes


Unit = Literal["line", "record", "element", "row"]
"""What a source is counted in, from 1: lines, records of a CSV, elements of a JSON array, rows of a table."""

UNITS: dict[str, Unit] = {
    "csv": "record", "json": "element", "parquet": "row", "arrow": "row", "saved": "row", "hub": "row",
}  # fmt: skip
"""The unit of each container that is not read line by line."""


def place(file: str, number: int, unit: Unit = "line", line: int | None = None) -> str:
    """Return the place of a row in words: `file:line`, which editors follow, if the line is known.

    Args:
        number: of the row in its file, in this unit.
        line: where the row starts, if it is not a line but begins on one.

    >>> place("rows.jsonl", 3), place("rows.parquet", 3, "row"), place("rows.csv", 3, "record", line=6)
    ('rows.jsonl:3', 'rows.parquet, row 3', 'rows.csv:6 (record 3)')
    """
    if unit == "line":
        return f"{file}:{number}"
    return f"{file}, {unit} {number}" if line is None else f"{file}:{line} ({unit} {number})"


def need(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional package.

    Args:
        extra: the extra of sftdata that installs it.
        why: what needs it, as the beginning of a sentence.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        absent = isinstance(error, ModuleNotFoundError)
        problem = "is not installed" if absent else f"cannot be imported ({error})"
        fix = f"pip install 'sftdata[{extra}]'"
        raise UsageError(f"{why}, and the package {missing} {problem}.", fix) from None
