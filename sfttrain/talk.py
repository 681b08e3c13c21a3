"""What a run says on standard error: one sentence a line, by the main process alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

Say = Callable[[str], None]


def rank() -> int:
    """Return this process's number among those of a launcher, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Print a sentence, where this is the main process."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)
