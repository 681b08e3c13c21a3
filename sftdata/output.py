"""What leaves the process: text on a terminal, the paths of outputs, and the progress of long work.

Rows, columns, file names and arguments may hold terminal escapes, carriage returns and direction overrides.
Every command runs inside `guarded`, which prints the names of such characters instead. Styled output (rich)
takes the stream behind it with `unguarded` and escapes its data itself.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from sftdata.errors import UsageError, without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_JOINERS = "\u200c\u200d"  # invisible by nature, and part of Persian words and of emoji
_ACTING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SUSPECT = re.compile(r"[^\x20-\x7e\n\u00c0-\u024f\u4e00-\u9fff]")
_STOPS = ("SIGTERM", "SIGHUP", "SIGQUIT")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters, and one slash: Path makes one of two
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_FOLDERS = re.compile(r"(?<![\w/:.~-])/(?:[^\s/:]+/)+")

# What matters in messages, and its colour (SGR) on a terminal.
_MATTERS = re.compile(
    r"(?P<fix>\bFix: .*)|(?P<command>`sft(?:data|train) [^`\n]+`|(?<=  )sft(?:data|train) .+)"
    r"|(?P<lost>^  rejects\b)|(?P<figure>\bloss \d[\d.]*)"
    r"|(?P<label>^[a-z]+(?=: |  +\S)|^  [a-z]+(?= +\S))",
    re.MULTILINE,
)
_COLOURS = {"fix": "32", "command": "36", "lost": "33", "figure": "1", "label": "90"}

PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal

# ---------------------------------------------------------------------------------- text on a terminal


def visible(text: str) -> str:
    r"""Return text without characters that act on a terminal, newlines aside.

    >>> visible("a\x1b[31mred\x07 \u202egnol\r\n")
    'a␛[31mred␇ \\u202egnol␍\n'
    """
    return _SUSPECT.sub(_spelled, text)


def counted(count: int, thing: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "step"), counted(2000, "row")
    ('1 step', '2,000 rows')
    """
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def one_line(text: str) -> str:
    r"""Return text that stays on one line and does not act on a terminal.

    >>> one_line("rows\n2.jsonl")
    'rows␊2.jsonl'
    """
    return visible(text).replace("\n", "\u240a")


def json_visible(text: str) -> str:
    r"""Return the same JSON with every character that acts on a terminal escaped.

    >>> json_visible('{"a\x9b": 1}')
    '{"a\\u009b": 1}'
    """
    return _SUSPECT.sub(_spelled_in_json, text)


def coloured(text: str) -> str:
    r"""Return the lines of a message with what matters in colour: the fix, commands, the loss, labels.

    >>> coloured("a.jsonl:3: no answer. Fix: add it.")
    'a.jsonl:3: no answer. \x1b[32mFix: add it.\x1b[0m'
    """
    return _MATTERS.sub(lambda match: f"\x1b[{_COLOURS[str(match.lastgroup)]}m{match[0]}\x1b[0m", text)


def _takes_colour(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


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
    """A text stream that writes the `visible` form of each text.

    A carriage return at the beginning of a write passes: progress bars begin each of theirs with one.

    Args:
        stream: `sys.stdout` or `sys.stderr`.
        in_colour: whether the texts are messages for a terminal that shows colours.
    """

    def __init__(self, stream: TextIO, *, in_colour: bool = False) -> None:
        self.unguarded, self._in_colour = stream, in_colour

    def __getattr__(self, name: str) -> object:
        return getattr(self.unguarded, name)

    def write(self, text: str) -> int:
        """Write text; return how many characters were taken, which is all."""
        start = "\r" * text.startswith("\r")
        shown = start + visible(text[len(start) :])
        shown = coloured(shown) if self._in_colour else shown
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


def unguarded(stream: TextIO | Guarded) -> TextIO:
    """Return the stream behind a guarded one, for writers that style and escape their own text."""
    return stream.unguarded if isinstance(stream, Guarded) else stream


@contextmanager
def guarded() -> Iterator[None]:
    """Guard stdout and stderr; text written to a closed one is dropped."""
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, messages = (io.StringIO() if stream is None else unguarded(stream) for stream in before)
    sys.stdout, sys.stderr = Guarded(out), Guarded(messages, in_colour=_takes_colour(messages))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _fill_closed_descriptors() -> None:
    """Open the null device where a standard stream is closed: the next file would take its descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


class StoppedError(BaseException):
    """A signal asks the process to end; no `Exception`, so that no handler takes it for a failure.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `StoppedError` on SIGTERM, SIGHUP and SIGQUIT: a run ends as on Ctrl-C. `nohup` is respected."""
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
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup of the first
    raise StoppedError(number)


# ----------------------------------------------------------------------------------------------- paths


class StoreUrl(str):
    """The URL of a folder in an object store, as `s3://bucket/set`."""

    __slots__ = ()

    def __truediv__(self, name: str) -> StoreUrl:
        return StoreUrl(f"{self}/{name}") if name else self


def output_at(path: str | Path, flag: str = "-o") -> Path | StoreUrl:
    """Return an output as a local path, or the URL of a store that sets can be built in.

    Raises:
        UsageError: it is another URL, or not UTF-8.

    >>> output_at(Path("s3://bucket/sets/")), output_at("gs://bucket/set").__class__.__name__
    ('s3://bucket/sets', 'StoreUrl')
    """
    scheme, colon, rest = os.fspath(path).partition(":")
    if not colon or scheme not in STORES or not f"{rest}/".startswith("/"):
        return local_output(path, flag)
    bucket, _, folder = rest.strip("/").partition("/")
    if ("@" in bucket and not scheme.startswith("abfs")) or "?" in rest:
        what = f"{flag} {without_secrets(f'{scheme}://{bucket}/{folder}')}: came with a login or a query."
        raise UsageError(what, "leave it out, and give the login by the environment.")
    url = StoreUrl(f"{scheme}://{bucket or 'BUCKET'}/{folder or 'set'}")
    if not folder:
        found = "a bucket" if bucket else "no bucket"
        raise UsageError(f"{flag} {scheme}://{bucket}: {found}; expected a folder in one.", f"{flag} {url}")
    if {"", ".", ".."}.intersection(folder.split("/")) or not folder.isprintable():
        what = f"{flag} {url}: names no folder."
        raise UsageError(what, "leave out what is empty, `.`, `..` and what is not printed.")
    return url


def local_output(path: str | Path, flag: str = "-o") -> Path:
    """Return an output as a local path.

    Args:
        path: as the user gave it.
        flag: the option that gave it.

    Raises:
        UsageError: it is a URL, standard output, or not UTF-8.

    >>> local_output("sets/chats").name
    'chats'
    """
    text = os.fspath(path)
    if match := _SCHEME.match(text):
        scheme = match[0].removesuffix(":/")
        fix = f"choose a local folder, and copy it to {scheme} afterwards."
        raise UsageError(
            f"{flag} {text}: is the URL of {scheme}; outputs are written to local paths only.",
            "leave out `file://`." if scheme == "file" else fix,
        )
    if text == "-":
        what = f"{flag} -: standard output; expected the name of a file or folder to be made."
        raise UsageError(what, f"name one, as {flag} out.")
    if written(text) != text:
        raise UsageError(f"{flag} {written(text)}: the name is not UTF-8.", "choose another name.")
    return Path(path)


SPOOLED = "rows"  # where rows lie in the cache that were given as objects


def claim_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder that is this process's as long as a descriptor is open; return both.

    Folders of that prefix that processes have left go first: a lock tells them, which ends with its process.
    """
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if folder.is_dir():  # another may have taken it for left
            return folder, descriptor
        os.close(descriptor)


def cache_folder(name: str) -> Path:
    """Return the folder, which may not be there yet, of what is remembered from run to run under a name."""
    if override := os.environ.get("SFTDATA_CACHE"):
        return Path(override) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sftdata" / name


def written(name: str) -> str:
    r"""Return a file name as UTF-8 text: undecodable bytes, which Python keeps as surrogates, as escapes.

    >>> written("sur\udcff.jsonl")
    'sur\\xff.jsonl'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def without_folders(text: str) -> str:
    """Return text that reveals nothing of the machine: paths cut to their last part, URLs without secrets.

    >>> without_folders("/data/mine/a.jsonl: text; s3://bucket/b.jsonl and c/d stay.")
    'a.jsonl: text; s3://bucket/b.jsonl and c/d stay.'
    """
    return _FOLDERS.sub("", without_secrets(written(text)))


def behind_links(output: Path) -> Path:
    """Return the folder behind an output: itself, or the target of a symbolic link.

    Raises:
        UsageError: the link is broken or circular.
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


# -------------------------------------------------------------------------------------------- progress


class Progress(NamedTuple):
    """The progress of a run of `prepare`.

    Attributes:
        done: shard tasks finished by this run.
        total: shard tasks of this run; a resumed run has those that are left.
        tokens: tokens in the finished tasks.
        rejected: rows rejected in them.
    """

    done: int
    total: int
    tokens: int
    rejected: int


class Meter:
    """Show progress on stderr: a bar on a terminal, else a plain line every ten seconds.

    Args:
        label: format of the count, as `{done}/{total} slices`.
        before: work done by an earlier run, which is not part of the speed.
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
        """Seconds since the meter was made."""
        return max(time.monotonic() - self._started, 1e-9)

    def show(self, done: int, total: int, figures: str, *, line: bool = False) -> None:
        """Show that `done` of `total` are done, followed by figures.

        Args:
            line: without a terminal, write a line now, however recent the last one is.
        """
        count = self._label.format(done=done, total=total)
        text = ", ".join(filter(None, [count, figures]))
        if sys.stderr.isatty():
            self._draw(done, total, text)
        elif line or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            left = self.seconds / max(done - self._before, 1) * (total - done)
            self.write(f"{text}, {as_clock(left)} left")

    def write(self, sentence: str) -> None:
        """Print one sentence, above the bar if there is one, as `one_line`."""
        if self._bar is None:
            print(one_line(sentence), file=sys.stderr, flush=True)
        else:
            self._bar.console.print(one_line(sentence), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False)
            console = Console(file=unguarded(sys.stderr))
            self._bar = Progress(
                *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._bar.add_task("", completed=self._before)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=one_line(text))
        self._bar.start()  # does nothing when it runs already


def as_clock(seconds: float) -> str:
    """Return a duration as h:mm:ss.

    >>> as_clock(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# ----------------------------------------------------------------------------------------- results


def print_json(data: object) -> None:
    """Print data to stdout as indented JSON."""
    import msgspec  # here: `import sftdata` needs this module, and not that one

    try:
        text = msgspec.json.format(msgspec.json.encode(data), indent=2).decode()
    except UnicodeEncodeError:  # a lone surrogate, as in a file name that is not UTF-8
        text = json.dumps(msgspec.to_builtins(data), indent=2, ensure_ascii=False)
    sys.stdout.write(json_visible(text) + "\n")


def print_line(text: str, *, err: bool = False) -> None:
    """Print text as `one_line` to stdout, or to stderr."""
    print(one_line(text), file=sys.stderr if err else sys.stdout)
