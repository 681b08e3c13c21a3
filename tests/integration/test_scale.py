"""The recipes of docs/scale.md, with bash in the place of the scheduler, and its real variables."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import yaml

import sftdata
from sftdata.cli import main
from sftdata.set.manifest import partial_folder
from sftdata.workers import Hired
from tests import clusters
from tests.remote_stores import need_packages
from tests.torture.runs import TOKENIZER, write_chats
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/scale.md").read_text("utf-8")
PARTS = 3


def block(title: str, language: str) -> str:
    """Return the first block of a language below a title of the page."""
    found = re.search(rf"^### {title}\n.*?^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    command = tmp_path / "bin" / "sftdata"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sftdata "$@"\n')
    command.chmod(0o755)
    return tmp_path


def schedule(folder: Path, command: list[str], jobs: list[dict[str, str]]) -> str:
    """Run the jobs of an array at once, in any order; return the digest of the set."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    crew = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)} | job,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job in random.Random(0).sample(jobs, len(jobs))
    ]
    for one in crew:
        _, said = one.communicate(timeout=HANGS)
        assert one.returncode == 0, said
    assert sftdata.verify(folder / "shards").ok
    assert not list(folder.glob("shards.partial*"))
    return sftdata.open(folder / "shards").manifest.digest


def alone(folder: Path) -> str:
    made = sftdata.prepare(
        folder / "examples/conversations.jsonl",
        tokenizer=folder / "examples/tokenizer",
        output=folder / "alone",
        max_length=256,
    )
    return made.digest


def test_slurm(folder: Path) -> None:
    script = block("Slurm", "bash")
    (last,) = re.findall(r"#SBATCH --array=0-(\d+)", script)
    assert int(last) > 0
    (folder / "job.sh").write_text(script)
    array = {"MIN": 0, "MAX": PARTS - 1, "STEP": 1, "COUNT": PARTS}
    common = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    common |= {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    jobs = [common | {"SLURM_ARRAY_TASK_ID": str(number)} for number in range(PARTS)]
    assert schedule(folder, ["bash", "job.sh"], jobs) == alone(folder)


def slices(folder: Path, output: str, **more: object) -> Any:
    rows = write_chats(folder / clusters.ROWS, 300)
    return sftdata.prepare(rows, tokenizer=TOKENIZER, output=folder / output, **clusters.SMALL, **more)


def test_an_executor_makes_the_same_set(folder: Path) -> None:
    alone = slices(folder, "alone", workers=1)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert slices(folder, "hired", workers=pool).digest == alone.digest
    assert sftdata.verify(folder / "hired").ok
    assert not (folder / "hired" / "slices").exists()


def test_threads_of_one_process_take_turns() -> None:
    """They share an open input and what is loaded."""
    inside: list[int] = []

    def most(job: None, task: int) -> int:
        inside.append(task)
        time.sleep(0.01)
        count = len(inside)
        inside.remove(task)
        return count

    with ThreadPoolExecutor(4) as pool:
        assert [*Hired(pool).map(most, None, range(8), load=lambda job: None)] == [1] * 8


def test_the_tokenizer_travels_with_the_build(folder: Path) -> None:
    """Another machine has no cache of tokenizers: what it is sent names files in the folder of the set alone."""
    sent = set[Path]()

    class Elsewhere(ThreadPoolExecutor):
        def submit(self, function: Any, /, *task: Any, **_: Any) -> Future[Any]:
            job = pickle.loads(pickle.dumps(function)).args[0]
            sent.add(job.tokenizer.folder)
            assert job.tokenizer.lengths_file.is_file()
            return super().submit(function, *task)

    with Elsewhere(1) as pool:
        digest = slices(folder, "hired", workers=pool).digest
    assert digest == slices(folder, "alone").digest
    (place,) = sent
    assert place == partial_folder(folder / "hired") / "slices" / "tokenizer" / place.name


def test_an_executor_that_breaks_leaves_what_is_finished(folder: Path) -> None:
    class Breaks(ThreadPoolExecutor):
        def submit(self, function: Any, /, *task: Any, **_: Any) -> Future[Any]:
            if len(made) == 3:
                raise RuntimeError("a worker died")
            made.append(super().submit(function, *task))
            wait(made)
            return made[-1]

    made: list[Future[Any]] = []
    with Breaks(1) as pool, pytest.raises(RuntimeError, match="a worker died"):
        slices(folder, "hired", workers=pool)
    notes: list[str] = []
    assert slices(folder, "hired", workers=2, on_note=notes.append).digest == slices(folder, "alone").digest
    assert any(note.startswith("Resuming: 3/") for note in notes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ray", "dask"])
def test_a_node_that_is_killed_takes_one_slice_with_it(folder: Path, kind: str) -> None:
    """`--ray` and the recipe for Dask, each on two nodes; folder and store; killed as a slice is about to be recorded."""
    need_packages({"dask": "distributed"}.get(kind, kind), "moto", "obstore", "s3fs")
    alone = slices(folder, "alone", workers=1)
    found = clusters.run(kind, folder)
    assert [*found] == [str(folder), "s3://bucket"]
    whole = {"digest": alone.digest, "sound": True, "slices": len(alone.shards), "killed": True, "again": 1}
    assert [*found.values()] == [whole] * 2


def test_ray_says_how_many_and_has_to_be_installed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    inputs = [str(folder / "examples/conversations.jsonl"), "-t", str(folder / "examples/tokenizer")]
    command = ["prepare", *inputs, "-o", str(folder / "set"), "--ray", "auto"]
    assert main([*command, "--workers", "2"]) == 2
    assert "--workers 2: Ray itself says how many. Fix: leave --workers out." in capsys.readouterr().err
    assert main(command) == 2
    assert "pip install 'sftdata[ray]'" in capsys.readouterr().err


def test_kubernetes(folder: Path) -> None:
    job = yaml.safe_load(block("Kubernetes", "yaml"))["spec"]
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    assert named == {"SFTDATA_PARTS": str(job["completions"])}
    jobs = [{"SFTDATA_PARTS": str(PARTS), "JOB_COMPLETION_INDEX": str(number)} for number in range(PARTS)]
    assert schedule(folder, ["bash", "-c", 'exec "$@"', "bash", *container["command"]], jobs) == alone(folder)
