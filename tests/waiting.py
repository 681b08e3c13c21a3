"""Waiting and cost, told in ways that do not depend on how fast or how busy a machine is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

HANGS = 900  # seconds after which a process is taken to hang; nothing that works comes near it on any machine


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what must come about, however long it takes."""
    until = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < until, "what was waited for does not come"
        time.sleep(0.005)


def steps(function: Callable[[], Any]) -> int:
    """Count the lines of Python that a call runs: a cost that is the same on every machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def pace() -> float:
    """CPU seconds that this machine, as busy as it is now, takes for ten million additions."""
    begun, total = time.process_time(), 0
    for number in range(10_000_000):
        total += number
    return time.process_time() - begun
