"""Run slices on the cores of this machine: worker processes started clean, each taking whole slices.

An engine only maps a pure function over slices. It yields results as they finish; nothing about a set depends on their order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from multiprocessing.connection import wait as wait_for_handles
from typing import TypeVar

from sftdata.errors import SftError

Job = TypeVar("Job")
Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that take whole slices; none are started for one worker or one task.

    Args:
        number: how many.
        warm: start them now and let them import `module`, so that they are ready when the plan is.
    """

    def __init__(self, number: int, warm: str | None = None) -> None:
        self._number = number
        self._pool: ProcessPoolExecutor | None = None
        if warm is not None and number > 1:
            with _no_main_module():
                for _ in range(number):
                    self._started().submit(import_module, warm)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Job, Task], Result], job: Job, tasks: Sequence[Task]) -> Iterator[Result]:
        """Yield `function(job, task)` for every task, in the order they finish.

        Args:
            function: pure, importable by name.
            job: what all tasks share; small, as it goes with each of them.

        Raises:
            SftError: a worker died. Whatever a task raises is passed on; tasks already begun are finished first.
        """
        if min(self._number, len(tasks)) <= 1:
            yield from (function(job, task) for task in tasks)
            return
        queue = iter(tasks)
        try:
            with _no_main_module():
                pool = self._started()
                # One more than there are workers: none is idle, and a failure leaves little to wait for.
                waiting = {pool.submit(function, job, task) for task in islice(queue, self._number + 1)}
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    waiting |= {pool.submit(function, job, task) for task in islice(queue, len(done))}
                    for future in done:
                        yield future.result()
        except BrokenProcessPool:
            raise SftError(
                "A worker process was killed, most likely for want of memory; finished slices are kept.",
                "run the same command again with fewer workers (--workers 1) or a smaller --set slice_bytes.",
            ) from None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._number, multiprocessing.get_context("spawn"), initializer=_start_worker)
        return self._pool


def _start_worker() -> None:
    # Ctrl-C goes to the whole group: the parent decides, workers finish the slice they are at.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when its parent is killed: nobody would take its results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_handles([parent.sentinel])
        os._exit(1)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep workers from importing the caller's script, which need not be written for that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
