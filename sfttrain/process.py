"""A process of a run: its rank, the notes it prints, and stopping on a signal.

A scheduler sends a signal before it takes the machine away. While steps are taken, SIGTERM and SIGHUP let the
step end, save a checkpoint and stop; before that, and when sent twice, they stop at once. The same command
goes on. The exit code is 128 + the signal's number.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from sftdata.errors import SftError
from sftdata.output import StoppedError, one_line
from sftdata.wording import worded

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store
    from transformers import TrainingArguments

Say = Callable[[str], object]
SIGNALS = (signal.SIGTERM, signal.SIGHUP)

_FAILED = "sfttrain/failed"  # what the first rank that fails says, in the store that all share
_EVERY, _GRACE = 0.5, 10.0  # seconds between looks at it; in which a rank may end by itself

_listener: Say | None = None


def rank() -> int:
    """Return this process's number among those of a launcher, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def share_of_rows(args: TrainingArguments) -> tuple[int, int]:
    """Return which share of the rows this process takes, of how many; ranks that hold rows share one."""
    width = getattr(args, "sequence_parallel", 1)
    return args.process_index // width, args.world_size // width


def say(text: str) -> None:
    """Pass a note to the listener, or print it, where this is the main process."""
    if rank() == 0:
        if _listener is None:
            print(worded(text), file=sys.stderr, flush=True)
        else:
            _listener(worded(text))


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its kind."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


@contextmanager
def notes_to(listener: Say | None) -> Iterator[None]:
    """Pass notes to `listener` while the block runs; None leaves them on standard error."""
    global _listener
    _listener, before = listener, _listener
    try:
        yield
    finally:
        _listener = before


class StopRequest:
    """Whether a signal asked the run to stop.

    Attributes:
        number: the signal that came, 0 while none has.
        stepping: whether steps are taken, so that there is something to save.
        done: whether the last step is taken, so that a signal changes nothing more.
    """

    def __init__(self) -> None:
        self.number, self.stepping, self.done = 0, False, False

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note a signal, or stop at once where there is nothing to save."""
        if self.done:
            return
        if not self.stepping or self.number:
            raise StoppedError(number)
        self.number = number
        say(f"{signal.Signals(number).name}: stopping at the end of this step")


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Handle signals while a run lasts; those that are ignored, as under nohup, stay ignored."""
    request, before = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():  # Python gives signals to it alone
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, request.handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def failing_together(ranks: int) -> Iterator[None]:
    """End all ranks when one fails: those that wait for its part of an exchange would wait for good.

    Args:
        ranks: processes; their process group is initialized where there are several.

    Raises:
        SftError: another rank failed, and the exchange with it broke.
    """
    if ranks == 1:
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store: Store = _get_default_store()
    over = threading.Event()
    threading.Thread(target=_follow, args=(store, over), daemon=True).start()
    try:
        yield
    except StoppedError:  # a signal, of which all ranks learn by themselves
        raise
    except BaseException as error:
        if isinstance(error, RuntimeError) and (told := _told(store)):
            other = SftError(told[1])
            other.exit_code = told[0]
            raise other from error
        with suppress(RuntimeError):
            code = getattr(error, "exit_code", 1)
            store.compare_set(_FAILED, "", f"{code} rank {rank()} failed: {one_line(str(error))}")
            time.sleep(2 * _EVERY)  # this process may be the one that holds the store
        raise
    finally:
        over.set()


def _told(store: Store) -> tuple[int, str] | None:
    """Return the exit code and the words of a rank that failed, if one did."""
    with suppress(RuntimeError):  # whoever held the store has ended
        if store.check([_FAILED]):
            code, _, words = store.get(_FAILED).decode().partition(" ")
            return int(code), words
    return None


def _follow(store: Store, over: threading.Event) -> None:
    while not (told := _told(store)):
        if over.wait(_EVERY):
            return
    if not over.wait(_GRACE):
        print(told[1], file=sys.stderr, flush=True)
        os._exit(told[0])  # the main thread waits where nothing can wake it


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it takes longer; other threads than the main one have no limit."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    # And again, since what it interrupts may take it for an error of its own, and go on.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)
