"""The recipes of docs/scale.md, with bash in the place of the scheduler, and its real variables."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sftdata
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


def test_kubernetes(folder: Path) -> None:
    job = yaml.safe_load(block("Kubernetes", "yaml"))["spec"]
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    assert named == {"SFTDATA_PARTS": str(job["completions"])}
    jobs = [{"SFTDATA_PARTS": str(PARTS), "JOB_COMPLETION_INDEX": str(number)} for number in range(PARTS)]
    assert schedule(folder, ["bash", "-c", 'exec "$@"', "bash", *container["command"]], jobs) == alone(folder)
