"""Run tasks on the cores of this machine: worker processes, forked from one clean leader, take whole tasks.

    this process ── spawns ──> leader: imports, loads what all tasks share ── forks ──> workers

The leader starts as a fresh interpreter and has one thread when it forks, so no lock of a thread pool is
copied; what it loaded is in memory once, however many workers there are. It takes longest to get ready, so a
large run starts it first: it imports the pipeline and loads the tokenizer's engine while this process imports
what it needs itself, reads the input through and plans. Results come back as they finish: nothing about a set
depends on their order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_handles
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from sftdata.config import FAST_ENGINE_MIN_BYTES, PrepareConfig
from sftdata.errors import SftError
from sftdata.output import StoreUrl
from sftdata.sources.inputs import expand_inputs
from sftdata.sources.remote import is_url, state_of

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

ASKED = 32  # objects, for their size
_AHEAD = 10_000  # tasks handed in to an executor, which does not say how many workers it has


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Processes that take whole tasks; none are started for one worker or one task.

    Args:
        number: how many.
        warm: a module; the leader starts now and imports it, so that it is ready when the plan is.

    Attributes:
        elsewhere: tasks may run on machines that lack this one's cache.
    """

    elsewhere = False

    def __init__(self, number: int, warm: str | None = None) -> None:
        self._number = number
        self._leader: BaseProcess | None = None
        self._channel: Connection | None = None
        if warm is not None and number > 1:
            self._start(warm)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None:
            self._channel.close()  # closing the pipe stops the leader; tasks that have begun are finished
        if self._leader is not None:
            self._leader.join()

    def map(
        self,
        function: Callable[[Shared, Task], Result],
        job: Shared,
        tasks: Sequence[Task],
        load: Callable[[Shared], object],
    ) -> Iterator[Result]:
        """Begin at once; return an iterator over `function(job, task)` of all tasks, as they finish.

        Args:
            function: pure, importable by name.
            job: what all tasks share; small, as it goes with each of them.
            load: loads what all tasks share, before workers are forked.

        Raises:
            SftError: a worker died. Whatever a task raises is passed on; tasks already begun finish first.
        """
        if min(self._number, len(tasks)) <= 1:
            return (function(job, task) for task in tasks)
        channel = self._channel or self._start(None)
        channel.send((load, job, (function, tasks)))
        return self._results(channel, len(tasks))

    def begin(self, load: Callable[[Shared], object], job: Shared) -> None:
        """Let the leader, where one was started, load something that workers will need; return at once."""
        if self._channel is not None:
            self._channel.send((load, job, None))

    def _results(self, channel: Connection, number: int) -> Iterator[Any]:
        for _ in range(number):
            try:
                result, error = channel.recv()
            except (EOFError, ConnectionError):
                error = BrokenProcessPool()
            if isinstance(error, BrokenProcessPool):
                raise SftError(
                    "A worker process was killed, most likely out of memory; finished slices are kept.",
                    "run the same command again with fewer workers (--workers 1)"
                    " or a smaller --set slice_bytes.",
                ) from None
            if error is not None:
                raise error
            yield result

    def _start(self, warm: str | None) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._leader = context.Process(target=_lead, args=(theirs, self._number, warm))
        with _no_main_module(), _interrupts_held():
            self._leader.start()
        theirs.close()
        return self._channel


class Hired(Workers):
    """Workers of an executor that the caller runs, on this machine or on others that share its folders.

    Args:
        executor: what takes functions that can be pickled; it is not shut down.
    """

    elsewhere = True

    def __init__(self, executor: Executor) -> None:
        super().__init__(1)
        self._executor = executor

    def map(
        self,
        function: Callable[[Shared, Task], Result],
        job: Shared,
        tasks: Sequence[Task],
        load: Callable[[Shared], object],
    ) -> Iterator[Result]:
        """As that of `Workers`; what tasks share is loaded by the first one in each process.

        A result is let go of once it is here: a node that is lost takes along what it was doing, and no more.
        """
        call, queue = partial(_in_turn, job, function), iter(tasks)
        waiting, done = set[Future[Result]](), SimpleQueue[Future[Result]]()

        def hand_in(count: int) -> None:
            for task in islice(queue, count):
                future = self._executor.submit(call, task)
                waiting.add(future)
                future.add_done_callback(done.put)

        def results() -> Iterator[Result]:
            try:
                while waiting:
                    waiting.remove(future := done.get())
                    result = future.result()
                    del future  # for Dask keeps what is referred to, and makes it again where it is lost
                    hand_in(1)
                    yield result
            finally:
                for future in waiting:
                    future.cancel()

        hand_in(_AHEAD)
        return results()


_TURN = threading.Lock()


def _in_turn(job: Shared, function: Callable[[Shared, Task], Result], task: Task) -> Result:
    """Do a task once no other thread of this process does one: they share what is loaded and open."""
    with _TURN:
        return function(job, task)


def _lead(channel: Connection, number: int, warm: str | None) -> None:
    """Get ready, fork the workers, and hand them the tasks until all are done or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the first process decides
    # Libraries must not start threads before the fork; after it, workers are the threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if warm is not None:
        import_module(warm)
    with suppress(EOFError, ConnectionError):
        while True:
            load, job, work = channel.recv()
            try:
                load(job)
            except Exception as error:  # for the first process to show; what only began to load fails again
                if work is not None:
                    channel.send((None, error))
                continue
            if work is not None:
                function, tasks = work
                context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
                with ProcessPoolExecutor(number, context, initializer=_start_worker) as pool:
                    _hand_out(channel, pool, number, partial(function, job), tasks)
    os._exit(0)  # nothing is left to do, and taking the engine apart takes time


def _hand_out(
    channel: Connection,
    pool: ProcessPoolExecutor,
    number: int,
    function: Callable[[Task], object],
    tasks: Sequence[Task],
) -> None:
    queue = iter(tasks)
    # One more than there are workers: none is idle, and a failure leaves little to wait for.
    waiting = {pool.submit(function, task) for task in islice(queue, number + 1)}
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                channel.send((None, error) if error else (future.result(), None))
                if error:
                    return
            waiting |= {pool.submit(function, task) for task in islice(queue, len(done))}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when the one that started it is killed: its results would be lost."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_handles([parent.sentinel])
        os._exit(1)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Keep the leader from importing the caller's script, which need not be written for that."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C from a process that is started, which would end in a traceback before it can ignore it."""
    resource_tracker.ensure_running()  # where it is started later, it lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_PIPELINE = "sftdata.pipeline"


def start_workers(config: PrepareConfig, hired: Executor | int | None = None) -> Workers:
    """Return the workers of a run; starts their leader early when the input is large.

    Args:
        hired: an executor that does the work instead.

    Raises:
        UsageError: an input that is not there.
    """
    if isinstance(hired, Executor):
        return Hired(hired)
    worth_it = (config.overwrite or not _exists(config.output)) and _input_bytes(
        config
    ) >= FAST_ENGINE_MIN_BYTES
    return Workers(config.workers or usable_cores(), warm=_PIPELINE if worth_it else None)


def _exists(output: Path | StoreUrl) -> bool:
    """Say whether there may be a set; a store is asked later."""
    return isinstance(output, Path) and output.exists()


def _input_bytes(config: PrepareConfig) -> int:
    """Return the size of the input, before any of it is read; of objects as some of them tell it."""
    paths = expand_inputs(config.paths(config.inputs))[0]
    size = sum(Path(path).stat().st_size for path in paths if not is_url(path) and Path(path).is_file())
    urls = [path for path in paths if is_url(path)]
    for path in urls[:ASKED]:
        if size < FAST_ENGINE_MIN_BYTES:
            size += (state_of(path).size or 0) * max(1, len(urls) // ASKED)
    return size
