"""Notes of a run on standard error: one sentence a line, by the main process alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Say = Callable[[str], object]

_listener: Say | None = None


def rank() -> int:
    """Return this process's number among those of a launcher, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Pass a note to the listener, or print it, where this is the main process."""
    if rank() == 0:
        if _listener is None:
            print(text, file=sys.stderr, flush=True)
        else:
            _listener(text)


@contextmanager
def notes_to(listener: Say | None) -> Iterator[None]:
    """Pass notes to `listener` while the block runs; None leaves them on standard error."""
    global _listener
    _listener, before = listener, _listener
    try:
        yield
    finally:
        _listener = before
