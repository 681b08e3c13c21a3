"""What leaves the process: where it may be written, how text and names are spelled, and the progress of long work.

Rows, columns, file names and arguments may hold terminal escapes, carriage returns and direction overrides. Every
command runs inside `guarded`, so what prints them prints their names instead. Styled output (rich) asks for the
stream behind it with `unguarded` and escapes its data itself.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from sftdata.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

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


_SCHEME = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]+:/"
)  # two letters at least, and one slash: Path makes one of two

_FOLDERS = re.compile(r"(?<![\w/:.~-])/(?:[^\s/:]+/)+")


def local_output(path: str | Path, flag: str = "-o") -> Path:
    """Return an output as a path of this machine.

    Args:
        path: what was asked for.
        flag: that named it.

    Raises:
        UsageError: it is an address of an object store or a server, or no text.

    >>> local_output("sets/chats").name
    'chats'
    """
    text = os.fspath(path)
    if found := _SCHEME.match(text):
        scheme = found[0].removesuffix(":/")
        copy = (
            "leave out `file://`."
            if scheme == "file"
            else f"choose a local folder, and copy it to {scheme} afterwards."
        )
        raise UsageError(
            f"{flag} {text}: is the URL of {scheme}; outputs are written to local paths only.", copy
        )
    if written(text) != text:
        raise UsageError(f"{flag} {written(text)}: the name is not UTF-8.", "choose another name.")
    return Path(path)


def written(name: str) -> str:
    r"""Return a name as it is written down: bytes that are not UTF-8, which Python holds as surrogates, as escapes.

    >>> written("sur\udcff.jsonl")
    'sur\\xff.jsonl'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def without_folders(text: str) -> str:
    """Return text in which absolute paths are cut to their last part, so that it tells nothing of the machine.

    >>> without_folders("/data/mine/a.jsonl: text; s3://bucket/b.jsonl and c/d stay.")
    'a.jsonl: text; s3://bucket/b.jsonl and c/d stay.'
    """
    return _FOLDERS.sub("", written(text))


def behind_links(output: Path) -> Path:
    """Return the folder that an output stands for: itself, or what a link in its place points to.

    Raises:
        UsageError: the link points to nothing, or in a circle.
    """
    if not output.is_symlink():
        return output
    try:
        return output.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 raise the latter for a circle
        if isinstance(error, FileNotFoundError):
            target = os.path.realpath(output)
            raise UsageError(
                f"{output}: a link to {target}, which is not there.", f"mkdir -p {target}, or another -o."
            ) from None
        raise UsageError(
            f"{output}: a link that leads in a circle.", "remove the link, or choose another -o."
        ) from None


PLAIN_SECONDS = 10.0


class Progress(NamedTuple):
    """How far a run of `prepare` has come.

    Attributes:
        done: shard tasks finished by this run.
        total: shard tasks that this run has to do; a resumed one does what is left.
        tokens: tokens in the finished ones.
        rejected: rows rejected in them.
    """

    done: int
    total: int
    tokens: int
    rejected: int


class Meter:
    """Show progress, from when it is made.

    Args:
        label: how the count is written, as `{done}/{total} slices`.
        before: how much was done earlier, and says nothing about speed.
    """

    def __init__(self, label: str, before: int = 0) -> None:
        self._label, self._before = label, before
        self._started = self._last = time.monotonic()
        self._bar: Bar | None = None

    @property
    def drawn(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    def show(self, done: int, total: int, figures: str, *, line: bool = False) -> None:
        """Show that `done` of `total` are done, with figures.

        Args:
            line: write a line now, rather than when it is time, where there is no terminal.
        """
        count = self._label.format(done=done, total=total)
        text = ", ".join(filter(None, [count, figures]))
        if sys.stderr.isatty():
            self._draw(done, total, text)
        elif line or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            left = self.seconds / max(done - self._before, 1) * (total - done)
            self.say(f"{text}, {_clock(left)} left")

    def say(self, sentence: str) -> None:
        """Print one sentence, above the bar where there is one; what would act on the terminal is spelled out."""
        if self._bar is None:
            print(one_line(sentence), file=sys.stderr, flush=True)
        else:
            self._bar.console.print(one_line(sentence), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False)
            self._bar = Progress(
                *columns,
                console=Console(file=unguarded(sys.stderr)),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task("", completed=self._before)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=one_line(text))
        self._bar.start()  # once; again it does nothing


def _clock(seconds: float) -> str:
    """Return a duration as h:mm:ss.

    >>> _clock(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def print_json(data: Any) -> None:
    """Print data to stdout as indented JSON."""
    try:
        text = msgspec.json.format(msgspec.json.encode(data), indent=2).decode()
    except UnicodeEncodeError:  # half a character, as in a file name that is not UTF-8
        text = json.dumps(msgspec.to_builtins(data), indent=2, ensure_ascii=False)
    sys.stdout.write(json_visible(text) + "\n")


def print_line(text: str, *, err: bool = False) -> None:
    """Print one line to stdout, or to stderr; what would break or redraw it is spelled out."""
    print(one_line(text), file=sys.stderr if err else sys.stdout)
