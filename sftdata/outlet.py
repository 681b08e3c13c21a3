"""Where text leaves the process: one escape for all that reaches stdout and stderr, whoever wrote it.

Rows, columns, file names and arguments may hold terminal escapes, carriage returns and direction overrides. Every command runs
inside `guarded`, so what prints them prints their names instead. Styled output (rich) asks for the stream behind it
with `unguarded` and escapes its data itself.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_JOINERS = "\u200c\u200d"  # invisible by nature, and part of Persian words and of emoji
_ACTING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SUSPECT = re.compile(r"[^\x20-\x7e\n\u00c0-\u024f\u4e00-\u9fff]")
_STOPS = ("SIGTERM", "SIGHUP", "SIGQUIT")


def visible(text: str) -> str:
    r"""Return text that does nothing but show, newlines aside.

    >>> visible("a\x1b[31mred\x07 \u202egnol\r\n")
    'a␛[31mred␇ \\u202egnol␍\n'
    """
    return _SUSPECT.sub(_spelled, text)


def one_line(text: str) -> str:
    r"""Return text that shows on one line and does nothing else.

    >>> one_line("rows\n2.jsonl")
    'rows␊2.jsonl'
    """
    return visible(text).replace("\n", "\u240a")


def json_visible(text: str) -> str:
    r"""Return the same JSON with every character that acts on a terminal as an escape.

    >>> json_visible('{"a\x9b": 1}')
    '{"a\\u009b": 1}'
    """
    return _SUSPECT.sub(_spelled_in_json, text)


def _spelled(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if unicodedata.category(character) not in _ACTING or character in _JOINERS:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _spelled_in_json(match: re.Match[str]) -> str:
    character = match[0]
    if unicodedata.category(character) not in _ACTING or character in _JOINERS:
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


class Guarded:
    """A text stream that writes what is `visible` of each text.

    A carriage return at the very beginning of a write passes, since progress bars begin each of theirs with one.

    Args:
        stream: where the text goes, one of `sys.stdout` and `sys.stderr`.
    """

    def __init__(self, stream: Any) -> None:
        self.unguarded = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)

    def write(self, text: str) -> int:
        """Write text, and return how many characters of it were taken: all."""
        start = "\r" * text.startswith("\r")
        shown = start + visible(text[len(start) :])
        try:
            self.unguarded.write(shown)
        except UnicodeEncodeError:
            encoding = self.unguarded.encoding
            self.unguarded.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)


def unguarded(stream: Any) -> Any:
    """Return the stream behind a guarded one, for writers that style and escape what they write themselves."""
    return getattr(stream, "unguarded", stream)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard stdout and stderr; one that is closed swallows what is written to it."""
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        Guarded(io.StringIO() if stream is None else unguarded(stream)) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _fill_closed_descriptors() -> None:
    """Open the null device where a standard stream is closed: else the next file opened takes its number, and its output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class StoppedError(BaseException):
    """A signal asks the process to end; not an `Exception`, so that nothing on the way takes it for a failure.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `StoppedError` on SIGTERM, SIGHUP and SIGQUIT, so that a run ends as it does on Ctrl-C; `nohup` is respected."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _STOPS if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):
                signal.signal(number, handler)


def _stop(number: int, _: object) -> None:
    signal.signal(
        number, signal.SIG_IGN
    )  # a second one must not break into what the first began to put in order
    raise StoppedError(number)
