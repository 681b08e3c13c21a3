"""Run every test marked `gpu` in a process forked for it, within a time limit: none can hang the others, or change them.

A kernel that compiles for ever is killed; Liger's changes to modelling code end with their test. `@pytest.mark.gpu(seconds=N)`
sets another limit than `SECONDS`. The parent imports but never touches the GPU: CUDA cannot be used again after a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

SECONDS = 60.0
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that asking for a GPU does not touch it


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test of the GPU apart, and report what it reported."""
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, float(marker.kwargs.get("seconds", SECONDS))):
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(item: pytest.Item, seconds: float) -> list[pytest.TestReport]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(item, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            config = item.config
            return [
                config.hook.pytest_report_from_serializable(config=config, data=data) for data in ours.recv()
            ]
        reason = f"killed: not done after {seconds:g} s"
    except EOFError:
        reason = "its process died"
    finally:
        with contextlib.suppress(ProcessLookupError):  # and what it started, such as compilers
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()
    return [pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call", duration=seconds)]


def _run(item: pytest.Item, pipe: Any) -> None:
    os.setpgid(0, 0)
    hook = item.config.hook
    reports = runtestprotocol(item, log=False, nextitem=None)
    pipe.send([hook.pytest_report_to_serializable(config=item.config, report=report) for report in reports])
    pipe.close()
    os._exit(0)
