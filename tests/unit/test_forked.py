"""Tests of the GPU run apart and within their time; what becomes of one is reported, and the others go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.train_runs import ROOT
from tests.waiting import HANGS

_CASES = """
import os, time, pytest

@pytest.mark.gpu
def test_right(): pass

@pytest.mark.gpu(seconds=0.5)
def test_endless(): time.sleep(1_000)

@pytest.mark.gpu
def test_wrong(): assert False, "said by the test"

@pytest.mark.gpu
def test_gone(): os._exit(3)

@pytest.mark.gpu
def test_left_out(): pytest.skip("not here")
"""


def test_a_test_of_the_gpu_can_neither_hang_nor_take_the_others_along(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(_CASES)
    options = [
        "-p",
        "tests.forked",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "-o",
        "markers=gpu: apart",
        "-rA",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        capture_output=True, text=True, timeout=HANGS, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    assert "1 skipped" in done.stdout, done.stdout + done.stderr
    assert "3 failed, 1 passed" in done.stdout
    for words in ("killed: not done after 0.5 s", "said by the test", "its process died"):
        assert words in done.stdout
