"""Workers are forked from a clean leader that loaded what they share; deaths and failures end in one error."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sftdata.encode.tokenizer import resolve_tokenizer
from sftdata.errors import DataError, SftError
from sftdata.on_ray import RayExecutor
from sftdata.pipeline import load_engine
from sftdata.workers import Hired, Workers
from tests.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
LOADED: list[int] = []


def load(job: Path) -> None:
    LOADED.append(os.getpid())
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 1
    (job / f"threads-{os.getpid()}").write_text(str(threads))


def judge(job: Path) -> None:
    load_engine((resolve_tokenizer(str(EXAMPLES / "tokenizer")), "auto"))
    load(job)


def where(job: Path, task: int) -> tuple[int, int, list[int]]:
    """Tell which process this is, once both of them have a task."""
    (job / f"worker-{os.getpid()}").touch()
    wait_until(lambda: len(list(job.glob("worker-*"))) == 2)
    return task, os.getpid(), LOADED


def linger(job: Path, task: int) -> tuple[int, int, list[int]]:
    """Return from the first eight tasks only."""
    wait_until(lambda: task < 8)
    return where(job, task)


def fail_on_three(job: Path, task: int) -> int:
    if task == 3:
        raise DataError("row three is bad.", "mend it.")
    return task


def die_on_three(job: Path, task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def die_on_none(job: Path, task: int) -> int:
    return task


def refuse(job: Path) -> None:
    raise DataError("nothing to load.", "bring it.")


@pytest.mark.parametrize(("warm", "loading"), [(None, load), ("sftdata.pipeline", load), (None, judge)])
def test_what_is_shared_is_loaded_once_by_one_thread_and_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: str | None, loading: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path))  # both engines are yet to be held against each other
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with Workers(2, warm=warm) as workers:
        found = sorted(workers.map(where, tmp_path, list(range(8)), loading))
    assert [task for task, _, _ in found] == list(range(8))
    assert len({pid for _, pid, _ in found}) == 2
    [loaded] = {tuple(loaded) for _, _, loaded in found}
    assert len(loaded) == 1
    assert loaded[0] not in {os.getpid(), *(pid for _, pid, _ in found)}
    [threads] = tmp_path.glob("threads-*")
    assert threads.read_text() == "1"


def test_a_second_map_gets_workers_of_its_own(tmp_path: Path) -> None:
    with Workers(2) as workers:
        assert sorted(workers.map(fail_on_three, tmp_path, [0, 1, 2], load)) == [0, 1, 2]
        assert sorted(workers.map(fail_on_three, tmp_path, [4, 5], load)) == [4, 5]


def test_what_a_task_raises_is_passed_on(tmp_path: Path) -> None:
    with Workers(2) as workers, pytest.raises(DataError, match="row three is bad"):
        list(workers.map(fail_on_three, tmp_path, list(range(9)), load))


def test_what_loading_raises_is_passed_on(tmp_path: Path) -> None:
    with Workers(2) as workers, pytest.raises(DataError, match="nothing to load"):
        list(workers.map(fail_on_three, tmp_path, list(range(9)), refuse))


def test_a_killed_worker_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    with Workers(2) as workers, pytest.raises(SftError, match="A worker process was killed"):
        list(workers.map(die_on_three, tmp_path, list(range(9)), load))


def test_a_killed_leader_is_the_same_error_and_leaves_no_worker(tmp_path: Path) -> None:
    with Workers(2) as workers:
        coming = workers.map(linger, tmp_path, list(range(40)), load)
        pids = {next(coming)[1] for _ in range(8)}
        assert workers._leader is not None
        os.kill(workers._leader.pid or 0, signal.SIGKILL)
        with pytest.raises(SftError, match="A worker process was killed"):
            list(coming)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_an_executor_begins_at_once_and_what_it_has_not_begun_is_cancelled(tmp_path: Path) -> None:
    futures: list[Future[Any]] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:  # type: ignore[override]
            futures.append(super().submit(function, *given, **named) if len(futures) < 4 else Future())
            return futures[-1]

    with Pool(1) as pool:
        coming = Hired(pool).map(fail_on_three, tmp_path, list(range(9)), load)
        assert len(futures) == 9
        with pytest.raises(DataError, match="row three is bad"):
            list(coming)
    assert [future.cancelled() for future in futures] == [False] * 4 + [True] * 5


def test_tasks_that_end_on_ray_after_a_failure_are_not_complained_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Lost(Exception):
        cause = DataError("row three is bad.", "mend it.")

    on_cluster: list[Future[Any]] = []

    def remote(*_: object) -> SimpleNamespace:
        on_cluster.append(Future())
        return SimpleNamespace(future=lambda: on_cluster[-1])

    call, kinds = SimpleNamespace(remote=remote), SimpleNamespace(RayTaskError=Lost, RayError=Lost)
    ray = SimpleNamespace(
        init=lambda *_, **__: None, remote=lambda **_: lambda _: call, put=lambda it: it, exceptions=kinds
    )
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    coming = Hired(RayExecutor("auto")).map(fail_on_three, tmp_path, list(range(9)), load)
    on_cluster[3].set_exception(Lost())
    with pytest.raises(DataError, match="row three is bad"):
        list(coming)
    on_cluster[0].set_result(0)
    on_cluster[1].set_exception(Lost())
    assert not caplog.records


def test_ctrl_c_is_no_traceback_of_a_leader_that_has_only_begun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Workers(2, warm="sftdata.pipeline") as workers:
        assert workers._leader is not None
        os.kill(workers._leader.pid or 0, signal.SIGINT)
        assert sorted(workers.map(die_on_none, tmp_path, list(range(4)), load)) == [0, 1, 2, 3]
    assert not capfd.readouterr().err
