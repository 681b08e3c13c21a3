"""A run that is killed at random moments and started again ends with the weights of a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train_runs import Fleet, tiny_llama
from tests.train_sets import make_set

pytestmark = pytest.mark.slow

STEPS = 24
ADAPTERS = ["--lora", "r=4,alpha=8,dropout=0.2"]


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet()


@pytest.mark.parametrize(("kind", "ranks"), [("full", 1), ("lora", 2)])
def test_killed_runs_end_with_the_weights_of_an_unbroken_one(
    tmp_path: Path, fleet: Fleet, kind: str, ranks: int
) -> None:
    kills, _ = _torture(tmp_path, fleet, kind, ranks, kills=2)
    assert kills == 2


@pytest.mark.torture
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_twenty_kills_change_no_bit(tmp_path: Path, fleet: Fleet, kind: str, ranks: int) -> None:
    kills, saves_cut = _torture(tmp_path, fleet, kind, ranks, kills=20)
    print(f"{kind}, {ranks} ranks: {kills} kills, {saves_cut} of them inside a save")
    assert kills >= 20
    assert saves_cut >= 1


def _torture(folder: Path, fleet: Fleet, kind: str, ranks: int, kills: int) -> tuple[int, int]:
    """Kill so often, comparing every run that got to its end; return kills and those inside a save."""
    shards = make_set(folder / "set", rows=21)  # 21 rows fill no whole number of batches
    model = tiny_llama(folder / "model", dropout=0.1)
    unbroken, log = folder / "unbroken", folder / "log"
    assert fleet.finish(_arguments(shards, model, unbroken, kind), ranks, log) == [0] * ranks, log.read_text()
    chance = random.Random(f"{kind}{ranks}")
    killed = saves_cut = attempt = 0
    while killed < kills:
        attempt += 1
        output = folder / f"broken-{attempt}"
        while killed < kills and not (output / "run.json").exists():
            processes = fleet.start(_arguments(shards, model, output, kind), ranks, log)
            if _start_and_kill(processes, output, chance, in_save=killed % 4 == 3):
                killed += 1
                saves_cut += _saving(output)
        assert fleet.finish(_arguments(shards, model, output, kind), ranks, log) == [0] * ranks, (
            log.read_text()
        )
        _assert_same(unbroken, output, kind)
    return killed, saves_cut


def _start_and_kill(processes: list[Any], output: Path, chance: random.Random, in_save: bool) -> bool:
    """Kill some steps on, at a random moment or while a checkpoint is written; False if the run was done before."""
    target, wait = _lines(output) + chance.randint(0, 7), chance.uniform(0, 0.06)
    while any(process.is_alive() for process in processes) and _lines(output) < target:
        time.sleep(0.002)
    while in_save and any(process.is_alive() for process in processes) and not _saving(output):
        pass
    time.sleep(0 if in_save else wait)
    alive = [process for process in processes if process.is_alive()]
    for process in chance.sample(alive, len(alive)):
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return bool(alive)


def _saving(output: Path) -> bool:
    """Say whether there is a checkpoint that has no seal yet."""
    return any(not (part / "complete.json").exists() for part in output.glob("checkpoint-*"))


def _lines(output: Path) -> int:
    path = output / "train_log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _arguments(shards: Path, model: Path, output: Path, kind: str) -> list[str]:
    settings = {
        "max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1, "seed": 3,
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [
        "run",
        str(shards),
        "--model",
        str(model),
        "-o",
        str(output),
        *overrides,
        *(ADAPTERS if kind == "lora" else []),
    ]


def _assert_same(unbroken: Path, broken: Path, kind: str) -> None:
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (unbroken / name).read_bytes() == (broken / name).read_bytes()
    assert _losses(unbroken) == _losses(broken)


def _losses(output: Path) -> list[tuple[int, float, float, int]]:
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]
