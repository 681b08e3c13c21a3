"""Clusters of two nodes on this machine, of which one is killed while it prepares: `python -m tests.clusters ray FOLDER`.

It runs in a network namespace that has loopback alone, where the machine allows that, with an S3 server of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from sftdata.set import stores
from sftdata.set.making import Making
from sftdata.sources.chunks import Source
from tests.remote_stores import KEYS, s3_server
from tests.torture.runs import TOKENIZER
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[1]
ROWS, FOUND = "chats.jsonl", "found.json"
SMALL = {"max_length": 64, "max_rejects": "50%", "slice_bytes": 4000}
NOTES = "TEST_NOTES"  # the variable that names the folder in which nodes say what they do
DIES_AT = 5  # slices that have been begun, by all
LEAVES = 60  # seconds after which a result has to have come to who asked for it
# However busy the machine: a node that is gone refuses connections at once, one that is slow is waited for.
PATIENT = {
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "120000",
}
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def run(kind: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Make the set of a folder's rows in the folder and in a store; return what came of each."""
    alone = ["unshare", "--map-root-user", "--net"]
    allowed = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    done = subprocess.run(
        [*(alone if allowed else ()), sys.executable, "-m", __name__, kind, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True, text=True, timeout=HANGS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads((folder / FOUND).read_text()))


def noted(function: Callable[[Any], Any], task: Any) -> Any:
    """Do a task on a node, and say so; one node is killed as it is about to record a slice."""
    notes = Path(os.environ[NOTES])
    with open(notes / "begun", "a") as lines:
        lines.write(f"{task.index}\n")
    Source.file = property(attrgetter("path"))  # type: ignore[method-assign]  # the planner's copy is on another machine
    if len((notes / "begun").read_text().splitlines()) >= DIES_AT:
        try:
            (notes / "killed").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            Making.commit = _die  # type: ignore[method-assign]
    return function(task)


def _die(*_: object) -> None:
    """Kill the node of this process, all at once; a worker of Dask once what it finished has left it."""
    if "distributed" in sys.modules:
        from distributed import get_worker

        until = time.monotonic() + LEAVES
        while get_worker().data and time.monotonic() < until:
            time.sleep(0.01)
    node = os.getppid()
    if "raylet" in Path(f"/proc/{node}/cmdline").read_text():
        others = Path(f"/proc/{node}/task/{node}/children").read_text().split()
        for pid in (node, *(int(pid) for pid in others if int(pid) != os.getpid())):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def ray_cluster() -> Iterator[Callable[[str, str], object]]:
    """Yield the command with `--ray` on a cluster that has two nodes whenever it is run."""
    os.environ |= PATIENT
    from ray.cluster_utils import Cluster

    from sftdata import on_ray
    from sftdata.cli import main

    on_ray._call = noted
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    def prepare(rows: str, output: str) -> None:
        while len(cluster.worker_nodes) < 2:
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        flags = ["--max-length", "64", "--max-rejects", "50%", "--set", "slice_bytes=4000"]
        code = main(["prepare", rows, "-t", TOKENIZER, "-o", output, "--ray", cluster.address, *flags])
        assert code == 0
        for node in [*cluster.worker_nodes]:
            if node.all_processes["raylet"][0].process.poll() is not None:
                cluster.remove_node(node, allow_graceful=False)

    yield prepare


@contextmanager
def dask_cluster() -> Iterator[Callable[[str, str], object]]:
    """Yield the recipe of docs/scale.md on a cluster of two processes."""
    from distributed import LocalCluster
    from distributed.cfexecutor import ClientExecutor

    from tests.integration.test_scale import block

    submit = ClientExecutor.submit
    ClientExecutor.submit = lambda pool, function, task: submit(pool, partial(noted, function), task)
    code = block("Dask, or any executor", "python")
    given = f'tokenizer="{TOKENIZER}", ' + ", ".join(f"{name}={value!r}" for name, value in SMALL.items())
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:

        def prepare(rows: str, output: str) -> None:
            text = code
            for said, meant in (
                ("tcp://scheduler:8786", cluster.scheduler_address),
                ('tokenizer="tokenizer"', given),
                ("/shared/chats.jsonl", rows),
                ("/shared/shards", output),
            ):
                assert said in text
                text = text.replace(said, meant)
            exec(text)

        yield prepare


def _loopback() -> None:
    """Let the interface of a new namespace work."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _main(kind: str, folder: Path) -> None:
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        _loopback()
    found = {}
    with s3_server(folder / "s3.log") as port:
        url = f"http://127.0.0.1:{port}"
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": url, NOTES: str(folder)}
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=HANGS).close()
        stores.put_bytes(stores.Objects("s3://bucket"), ROWS, (folder / ROWS).read_bytes())
        with {"ray": ray_cluster, "dask": dask_cluster}[kind]() as prepare:
            for place in (str(folder), "s3://bucket"):
                prepare(f"{place}/{ROWS}", f"{place}/made")
                found[place] = _seen(folder, f"{place}/made")
    (folder / FOUND).write_text(json.dumps(found))


def _seen(folder: Path, output: str) -> dict[str, Any]:
    """Say what came of a run, and forget it."""
    import sftdata

    begun = (folder / "begun").read_text().split()
    killed = (folder / "killed").exists()
    for name in ("begun", "killed"):
        (folder / name).unlink(missing_ok=True)
    return {
        "digest": sftdata.open(output).manifest.digest,
        "sound": sftdata.verify(output).ok,
        "killed": killed,
        "slices": len(set(begun)),
        "again": len(begun) - len(set(begun)),
    }


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
