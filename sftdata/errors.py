"""Errors and faults: where, what was found, what was expected, the fix; one line.

    SftError                 exit code
    ├── UsageError           2    a wrong flag, setting, file name or format choice
    ├── DataError            3    too many rejected rows, nothing trainable
    └── IntegrityError       4    a set whose bytes do not match its manifest

A bad *row* is not an error: a stage reports it as a `Fault` and goes on with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


class SftError(Exception):
    """Say in one line what went wrong and how to mend it.

    Args:
        message: where, what was found, what was expected.
        fix: what to do, without the word "Fix"; empty when the message says it all.
    """

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.message} Fix: {self.fix}" if self.fix else self.message
        return " ".join(text.split())


class UsageError(SftError):
    """A flag, setting, path or format choice is wrong; nothing was done."""

    exit_code = 2


class DataError(SftError):
    """The data cannot make a set: too many rejected rows, or nothing to train on."""

    exit_code = 3


class IntegrityError(SftError):
    """A set does not match its manifest."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one row cannot be used: the body of a line in `rejects.jsonl`.

    `code` is a stable kebab-case name (`unknown-role`), `reason` says what was found and expected, `fix` what mends it.
    """

    code: str
    reason: str
    fix: str


class RowError(Exception):
    """Carry a `Fault` out of a per-row function; the stage that called it turns it into a reject."""

    def __init__(self, code: str, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fault = Fault(code, reason, fix)
