"""An executor on a Ray cluster: tasks of Ray Core, repeated where a node is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice
from typing import TypeVar

from sftdata.errors import SftError, need

Task = TypeVar("Task")
Result = TypeVar("Result")

_RETRIES = 5  # of a task whose process or node is lost
_WAITING = 4  # tasks handed in for each core


class RayExecutor(Executor):
    """Maps a function over tasks on a cluster.

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

    def map(
        self,
        fn: Callable[[Task], Result],
        *iterables: Iterable[Task],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[Result]:
        """Yield the results as they finish; what a task raises is raised here."""
        ray = self._ray
        run = ray.remote(max_retries=_RETRIES)(_call)
        function = ray.put(fn)  # once for each node
        queue = iter(*iterables)
        room = max(1, int(ray.cluster_resources().get("CPU", 1))) * _WAITING
        waiting = [run.remote(function, task) for task in islice(queue, room)]
        while waiting:
            done, waiting = ray.wait(waiting)
            waiting += [run.remote(function, task) for task in islice(queue, len(done))]
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                what = f"Ray lost a task {_RETRIES + 1} times ({type(error).__name__})."
                fix = "look at the nodes, and run the same command again; what is finished is kept."
                raise SftError(what, fix) from None


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    return function(task)
