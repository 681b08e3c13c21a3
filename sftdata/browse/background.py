"""Work that takes longer than a page may: a thread of its own does it, and pages go on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Generic, TypeVar

PATIENCE = 0.3  # seconds that a page waits: most sets are small

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Something that is worked out once, begun by who first asks for it.

    Args:
        work: returns it.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._future: Future[Result] | None = None

    @property
    def at_work(self) -> bool:
        """Whether it was begun and is not done."""
        return self._future is not None and not self._future.done()

    def ask(self) -> Result | None:
        """Begin the work, if nobody has; return its result, None while it is not there.

        Raises:
            Exception: what the work raised; who asks again begins it anew.
        """
        if self._future is None:
            self._future = Future()
            Thread(target=self._run, args=(self._future,), daemon=True).start()  # Ctrl-C does not wait for it
            wait([self._future], PATIENCE)
        return self.look()

    def look(self) -> Result | None:
        """Return the result if it is there; raises as `ask`, and begins nothing."""
        if self._future is None or not self._future.done():
            return None
        future = self._future
        if future.exception() is not None:
            self._future = None
        return future.result()

    def _run(self, future: Future[Result]) -> None:
        try:
            future.set_result(self._work())
        except BaseException as error:
            future.set_exception(error)
