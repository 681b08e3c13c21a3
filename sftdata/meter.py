"""How far long work has come: a bar on a terminal, a plain line every ten seconds elsewhere, both on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from sftdata.outlet import one_line, unguarded

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

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
