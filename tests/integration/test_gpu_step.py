"""The benchmark for a GPU, in miniature on the CPU: every contender runs, and what is missing is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train_runs import ROOT
from tests.waiting import HANGS

pytestmark = pytest.mark.slow
# One of each kind; the compiled loop needs a C++ compiler and most of a minute.
CONTENDERS = (
    "4K sfttrain, checkpoints",
    "4K TRL, sdpa",
    "4K TRL, varlen",
    "16K sfttrain, checkpoints",
    "4K bare loop",
    "4K start",
)


def _run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py"), *options]
    environment = {**os.environ, "OUT": str(out), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=2 * HANGS, check=False, env=environment, cwd=out
    )


def test_every_contender_takes_its_steps_in_miniature(tmp_path: Path) -> None:
    variant = "tiny/4K@without packing:packing=unpack"
    done = _run(
        tmp_path, "--device", "cpu", "--shape", "tiny", "--minutes", "9", "--variant", variant, "--only", *CONTENDERS
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu_step.jsonl").read_text().splitlines()]
    found = {f"{row['data']} {row['contender']}": row for row in rows}
    start = found.pop("4K start")["start"]
    assert set(start) == {"TRL", "sfttrain", "sfttrain, proven before"}
    assert {name.split(",")[0] for name in CONTENDERS if "start" not in name} <= {
        name.split(",")[0] for name in found
    }
    assert "4K sfttrain, without packing" in found
    packed = [row["losses"] for name, row in found.items() if name.startswith("4K") and "without" not in name]
    for losses in packed:  # the same weights, rows and steps, whoever takes them
        assert losses == pytest.approx(packed[0], abs=2e-3)
    table = (tmp_path / "gpu_step.md").read_text()
    assert "times the tokens a second of the fastest TRL" in table


def test_without_a_gpu_everything_is_tried_up_to_it(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = _run(tmp_path)
    assert done.returncode == 3, done.stderr
    assert "no GPU here" in done.stdout
    assert "not run" in done.stdout
