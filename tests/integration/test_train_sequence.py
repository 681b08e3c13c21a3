"""Rows that two ranks hold together train as on one: losses, gradients, weights, documents, over a stop and with FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sftdata.blame.log import read_log
from tests.train_runs import Fleet, as_fsdp2, tiny_llama
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.feature("several GPUs")]
STEPS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "optim": "sgd",
    "learning_rate": 0.1, "max_grad_norm": 0, "logging_steps": 1, "save_steps": 3, "lr_scheduler_type": "constant",
    "eval_strategy": "steps", "eval_steps": 3,
}  # fmt: skip
LORA = ("--lora", "r=4,alpha=8", "--set", "learning_rate=1.0")
HALVES = ("--set", "sequence_parallel=2")
# Ranks, flags, and what is done to the processes; the last batch of an epoch holds fillers.
RUNS: dict[str, tuple[int, tuple[str, ...], Any]] = {
    "one": (1, (), None),
    "halves": (2, HALVES, None),
    "halves, weights in parts": (2, HALVES, as_fsdp2),
    "one, adapters": (1, LORA, None),
    "halves, adapters": (2, (*LORA, *HALVES), None),
    "halves, adapters, weights in parts": (2, (*LORA, *HALVES), as_fsdp2),
    "halves of two rows": (4, (*HALVES, "--set", "per_device_train_batch_size=1"), None),
}
OTHERS = [name for name in RUNS if not name.startswith("one")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose rows fill no whole number of steps, one to evaluate on, and a model with one head of keys."""
    folder = tmp_path_factory.mktemp("sequence")
    make_set(folder / "set", rows=21, trained=0.4)
    make_set(folder / "held", rows=5, seed=9, sources=2)
    tiny_llama(folder / "model", num_key_value_heads=1)
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, Path]:
    for name, (ranks, flags, before) in RUNS.items():
        _train(place, name, ranks, flags, before)
    return {name: place / name for name in RUNS}


def _train(place: Path, name: str, ranks: int, flags: tuple[str, ...], before: Any = None) -> None:
    settings = [part for key, value in STEPS.items() for part in ("--set", f"{key}={value}")]
    arguments = [
        "run",
        str(place / "set"),
        "--model",
        str(place / "model"),
        "-o",
        str(place / name),
        "--log-documents",
    ]
    held, log = ["--eval", f"held={place / 'held'}"], place / f"log {name}"
    codes = Fleet().finish([*arguments, *held, *settings, *flags], ranks, log, before)
    assert codes == [0] * ranks, log.read_text()


def _like(name: str) -> str:
    return "one, adapters" if "adapters" in name else "one"


def _log(output: Path, key: str = "loss") -> list[dict[str, Any]]:
    lines = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def _assert_same_weights(mine: Path, other: Path) -> None:
    (path,), (like,) = (sorted(folder.glob("*.safetensors")) for folder in (mine, other))
    weights, expected = load_file(path), load_file(like)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("name", OTHERS)
def test_steps_and_weights_are_those_of_one_rank(runs: dict[str, Path], name: str) -> None:
    lines, expected = _log(runs[name]), _log(runs[_like(name)])
    assert len(lines) == len(expected) == 6
    for mine, first in zip(lines, expected, strict=True):
        assert mine["loss"] == pytest.approx(first["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
        assert mine["mean_token_accuracy"] == first["mean_token_accuracy"]
    _assert_same_weights(runs[name], runs[_like(name)])


@pytest.mark.parametrize("name", OTHERS)
def test_evaluation_is_that_of_one_rank(runs: dict[str, Path], name: str) -> None:
    lines, expected = (_log(runs[one], "eval_held_loss") for one in (name, _like(name)))
    assert [line["step"] for line in lines] == [3, 6]
    for mine, first in zip(lines, expected, strict=True):
        names = [key for key in first if key.startswith("eval_held_loss")]
        assert len(names) == 3
        assert [mine[key] for key in names] == pytest.approx([first[key] for key in names], abs=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_each_document_is_logged_once_with_its_loss(runs: dict[str, Path], name: str) -> None:
    """Also those that lie in both halves of a row."""
    mine, expected = (read_log(runs[one])[1] for one in (name, _like(name)))
    orders = [np.lexsort((log.example_id, log.step)) for log in (mine, expected)]
    for column in ("step", "row", "example_id", "tokens", "trained", "bytes", "weight"):
        one, other = (
            getattr(log, column)[order] for log, order in zip((mine, expected), orders, strict=True)
        )
        assert one.tolist() == other.tolist(), column
    np.testing.assert_allclose(mine.loss[orders[0]], expected.loss[orders[1]], atol=2e-5)


@pytest.mark.parametrize(
    ("ranks", "flags", "before"), [(1, (), None), (2, HALVES, as_fsdp2)], ids=["on one rank", "as it was"]
)
def test_a_run_goes_on_from_its_checkpoint(
    runs: dict[str, Path], place: Path, ranks: int, flags: tuple[str, ...], before: Any
) -> None:
    name, first = f"resumed on {ranks}", "halves" if ranks == 1 else "halves, weights in parts"
    one_rank, together, way = RUNS[first]
    _train(place, name, one_rank, (*together, "--set", "max_steps=3"), way)
    assert _log(place / name)[-1]["step"] == 3
    _train(place, name, ranks, flags, before)
    assert "resuming from" in (place / f"log {name}").read_text()
    _assert_same_weights(place / name, runs["one"])


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (
            ("--set", "sequence_parallel=4"),
            "sequence_parallel=4: the number of processes is 2, no multiple of 4",
        ),
        ((*HALVES, "--set", "loss=plain"), "sequence_parallel=2: it needs our loss"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(place: Path, flags: tuple[str, ...], found: str) -> None:
    arguments = [
        "run",
        str(place / "set"),
        "--model",
        str(place / "model"),
        "-o",
        str(place / "refused"),
        *flags,
    ]
    log = place / f"log refused {found[18:30]}"
    assert Fleet().finish(arguments, 2, log) == [2, 2]
    assert found in log.read_text()


def _out_of_memory(rank: int, log: str) -> None:
    """Let the second rank run out of memory in the middle of a forward."""
    from sfttrain import sequence

    def attend(*inputs: Any, **options: Any) -> Any:
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return own(*inputs, **options)

    own, sequence.attend = sequence.attend, attend


def test_a_rank_that_runs_out_of_memory_ends_the_others_too(place: Path) -> None:
    arguments = ["run", str(place / "set"), "--model", str(place / "model"), "-o", str(place / "full")]
    assert Fleet().finish([*arguments, *HALVES], 2, place / "log full", _out_of_memory) == [2, 2]
    said = (place / "log full").read_text()
    assert "rank 1: Step 1 does not fit: CUDA out of memory. Fix: set activation_checkpointing=true" in said
    assert "\nrank 1 failed: Step 1 does not fit" in said


def test_a_rank_that_waits_in_an_exchange_is_ended(tmp_path: Path) -> None:
    """As NCCL waits: no error wakes it."""
    script = (
        "import threading, time; from torch.distributed import HashStore; from sfttrain import process\n"
        "process._GRACE, store = 0.1, HashStore()\n"
        "threading.Thread(target=process._follow, args=(store, threading.Event())).start()\n"
        "store.compare_set(process._FAILED, '', '2 rank 1 failed: no room'); time.sleep(600)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "rank 1 failed: no room\n")
