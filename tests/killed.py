"""A process that is killed at the n-th change of a name on disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

NAMES = ("replace", "rename", "unlink", "rmdir")  # of functions of os


def killed_at(make: Callable[[], object], number: int, names: tuple[str, ...] = NAMES) -> int:
    """Run in a process that is killed at its n-th call of these; return its exit, or minus how many it made."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def counting(function: Any) -> Any:
            def changed(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return changed

        for name in names:
            setattr(os, name, counting(getattr(os, name)))
        try:
            make()
            os.write(write, str(count).encode())
        finally:
            os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as told:
        text = told.read()
    return -int(text) if text else -os.WTERMSIG(status)
