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
from itertools import islice
from multiprocessing.connection import wait as wait_for_handles
from typing import Any, TypeVar

from sftdata.errors import SftError

Job = TypeVar("Job")
Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_tasks(function: Callable[[Job, Task], Result], job: Job, tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield `function(job, task)` for every task, in the order they finish.

    Args:
        function: pure, importable by name.
        job: what all tasks share; sent once to each worker.
        workers: processes; with one worker, or one task, everything happens in this process.

    Raises:
        SftError: a worker died. Whatever a task raises is passed on; tasks already begun are finished first.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for task in tasks:
            yield function(job, task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function, job))
    try:
        queue = iter(tasks)
        with _no_main_module():
            # One more than there are workers: none is idle, and a failure leaves little to wait for.
            waiting = {pool.submit(_run, task) for task in islice(queue, workers + 1)}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(_run, task) for task in islice(queue, len(done))}
                for future in done:
                    yield future.result()
    except BrokenProcessPool:
        raise SftError(
            "A worker process was killed, most likely for want of memory; finished slices are kept.",
            "run the same command again with fewer workers (--workers 1) or a smaller --set slice_bytes.",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: Callable[[object], object]


def _start_worker(function: Callable[[Job, Task], Result], job: Job) -> None:
    global _work
    # Ctrl-C goes to the whole group: the parent decides, workers finish the slice they are at.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    def work(task: object) -> object:
        return function(job, task)  # type: ignore[arg-type]

    _work = work


def _run(task: object) -> Any:
    return _work(task)


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
