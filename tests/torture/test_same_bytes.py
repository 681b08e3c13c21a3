"""One digest, however a run is made: workers, engines, hash seeds, locale, time zone, clock, order of a folder's listing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.runs import ROOT, TOKENIZER, content, write_chats

pytestmark = pytest.mark.slow

# A clock years away and a folder listed backwards, whatever the disk says.
WARP = """
import os, random, sys, time
shift = float(os.environ.get("WARP", "0"))
if shift:
    real, real_ns, listing, scan = time.time, time.time_ns, os.listdir, os.scandir
    time.time = lambda: real() + shift
    time.time_ns = lambda: real_ns() + int(shift * 1e9)
    os.listdir = lambda *args: sorted(listing(*args), reverse=True)
from sftdata.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
WORLDS = [
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "UTC"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "TZ": "Asia/Kathmandu", "WARP": "3e8"},
    {
        "PYTHONHASHSEED": "random",
        "LC_ALL": "tr_TR.UTF-8",
        "TZ": "America/Lima",
        "WARP": "-5e8",
        "PYTHONUTF8": "0",
    },
]
RUNS = list(itertools.product((1, 2, 4, 8), ("gigatoken", "tokenizers"), range(3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, one of them compressed, of which none sorts as it was made."""
    folder = tmp_path_factory.mktemp("same")
    (folder / "data").mkdir()
    for number, name in enumerate(("b.jsonl", "Z.jsonl", "a.jsonl")):
        write_chats(folder / "data" / name, 300, seed=number)
    return folder


def made(folder: Path, workers: int, engine: str, world: int) -> dict[str, bytes]:
    output = folder / f"{workers}-{engine}-{world}" / "set"
    output.parent.mkdir()
    flags = ["--max-length", "128", "--max-rejects", "50%", "--set", "slice_bytes=20000"]
    command = [
        "prepare",
        str(folder / "data"),
        "-t",
        TOKENIZER,
        "-o",
        str(output),
        "--workers",
        str(workers),
        "--engine",
        engine,
    ]
    environment = os.environ | WORLDS[world] | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WARP, *command, *flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return content(output)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, bytes]:
    found = made(folder, *RUNS[0])
    assert sum(name.endswith(".arrow") for name in found) > 4
    assert json.loads(found["manifest.json"])["ledger"]["rows_in"] == 900
    return found


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, marks=() if number in (10, 17) else pytest.mark.torture)
        for number, run in enumerate(RUNS)
    ],
)
def test_every_run_gives_the_same_bytes(
    folder: Path, reference: dict[str, bytes], run: tuple[int, str, int]
) -> None:
    if run != RUNS[0]:
        assert made(folder, *run) == reference
