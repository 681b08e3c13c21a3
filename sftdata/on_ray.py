"""An executor on a Ray cluster: tasks of Ray Core, repeated where a node is lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from sftdata.errors import SftError, need

Result = TypeVar("Result")

_RETRIES = 5  # of a task whose process or node is lost


class RayExecutor(Executor):
    """Calls functions on a cluster.

    Args:
        address: of the cluster, as `ray.init` takes it: `auto`, `host:port`, `ray://host:port`, or `local`.

    Raises:
        SftError: Ray is not installed, or nothing answers there.
    """

    def __init__(self, address: str) -> None:
        self._ray = need("ray", "ray", f"--ray {address}")
        try:
            self._ray.init(address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            what = f"--ray {address}: no cluster ({' '.join(str(error).split())[:200]})."
            raise SftError(what, "start Ray there, or check the address.") from None
        self._run = self._ray.remote(max_retries=_RETRIES)(_call)
        self._last: tuple[object, Any] = (None, None)

    def submit(self, fn: Callable[..., Result], /, *args: Any, **keywords: Any) -> Future[Result]:
        """Return the future result of a call; what the function raises is raised by it."""
        if fn is not self._last[0]:
            self._last = fn, self._ray.put(fn)  # once for each node
        future = Future[Result]()
        on_cluster = self._run.remote(self._last[1], *args, **keywords).future()
        on_cluster.add_done_callback(partial(self._settle, future))
        return future

    def _settle(self, future: Future[Result], on_cluster: Future[Result]) -> None:
        if not future.set_running_or_notify_cancel():
            return  # cancelled, as another task has failed
        error, kinds = on_cluster.exception(), self._ray.exceptions
        if error is None:
            future.set_result(on_cluster.result())
            return
        if isinstance(error, kinds.RayTaskError):
            error = error.cause
        elif isinstance(error, kinds.RayError):
            what = f"Ray lost a task {_RETRIES + 1} times ({type(error).__name__})."
            fix = "look at the nodes, and run the same command again; what is finished is kept."
            error = SftError(what, fix)
        future.set_exception(error)


def _call(function: Callable[..., Result], *args: Any, **keywords: Any) -> Result:
    return function(*args, **keywords)
