"""However a global batch is split over micro-batches and ranks, loss and gradient are the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sftdata.blame.log import read_log
from tests.train_runs import Fleet, count_sums, count_sums_of_parts, tiny_llama
from tests.train_sets import make_set

pytestmark = pytest.mark.slow

# Rows of a micro-batch, micro-batches, ranks, and what is done to the processes.
SPLITS: dict[str, tuple[int, int, int, Any]] = {
    "8x1": (8, 1, 1, None),
    "1x8": (1, 8, 1, None),
    "2x4": (2, 4, 1, None),
    "2 ranks x4": (1, 4, 2, count_sums),
    "2 ranks x1": (4, 1, 2, count_sums),
    "2 ranks x4, weights in parts": (1, 4, 2, count_sums_of_parts),
    "2 ranks x1, weights in parts": (4, 1, 2, count_sums_of_parts),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same steps in every split; the last global batch of 21 rows holds fillers: one rank has more rows."""
    folder = tmp_path_factory.mktemp("ranks")
    shards = make_set(folder / "set", rows=21, trained=0.4)
    model, fleet = tiny_llama(folder / "model"), Fleet()
    for name, (batch, accumulation, ranks, before) in SPLITS.items():
        settings = {
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 6, "optim": "sgd",
            "learning_rate": 0.1, "max_grad_norm": 0, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant",
        }  # fmt: skip
        overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        arguments = [
            "run",
            str(shards),
            "--model",
            str(model),
            "-o",
            str(folder / name),
            "--log-documents",
            *overrides,
        ]
        log = folder / f"log {name}"
        assert fleet.finish(arguments, ranks, log, before) == [0] * ranks, log.read_text()
    return {name: folder / name for name in SPLITS}


@pytest.mark.feature("several GPUs")
@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_losses_and_gradient_norms_agree(runs: dict[str, Path], split: str) -> None:
    for mine, first in zip(_log(runs[split]), _log(runs["8x1"]), strict=True):
        assert mine["loss"] == pytest.approx(first["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-6)
        assert mine["mean_token_accuracy"] == first["mean_token_accuracy"]


@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_six_plain_gradient_steps_lead_to_the_same_weights(runs: dict[str, Path], split: str) -> None:
    first, mine = (load_file(runs[name] / "model.safetensors") for name in ("8x1", split))
    assert first.keys() == mine.keys()
    for name in first:
        torch.testing.assert_close(mine[name], first[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("split", list(SPLITS)[1:])
def test_each_document_is_logged_once_with_its_loss(runs: dict[str, Path], split: str) -> None:
    mine, expected = (read_log(runs[name])[1] for name in (split, "8x1"))
    one, other = (np.lexsort((log.example_id, log.step)) for log in (mine, expected))
    for column in ("step", "row", "example_id", "tokens", "trained", "weight"):
        assert getattr(mine, column)[one].tolist() == getattr(expected, column)[other].tolist(), column
    np.testing.assert_allclose(mine.loss[one], expected.loss[other], atol=2e-5)


@pytest.mark.parametrize("way", ["", ", weights in parts"])
def test_gradients_are_summed_over_ranks_once_a_step(runs: dict[str, Path], way: str) -> None:
    """However many micro-batches a step has."""
    folder = runs["8x1"].parent
    four, one = (
        [(folder / f"log 2 ranks x{count}{way}.sums{rank}").stat().st_size for rank in range(2)]
        for count in (4, 1)
    )
    assert four == one
    assert all(count and count % 6 == 0 for count in one)


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_global_batch(runs: dict[str, Path]) -> None:
    """Step 1 counted the slow way: every document alone, full logits, one sum, one division."""
    from transformers import AutoModelForCausalLM

    from sftdata.set.opened import open_set
    from sfttrain.schedule import Passes

    folder = runs["8x1"].parent
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    opened = open_set(folder / "set")
    total = count = 0.0
    for row in Passes([21], [1.0], seed=42).rows(0, 1, 8).tolist():
        for document in opened[row].documents():
            ids, labels = (
                torch.from_numpy(part.astype("int64")) for part in (document.input_ids, document.labels)
            )
            with torch.no_grad():
                chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for position in range(1, len(ids)):
                if labels[position] != -100:
                    total -= chances[position - 1, labels[position]].item()
                    count += 1
    for split in SPLITS:
        assert math.isclose(_log(runs[split])[0]["loss"], total / count, abs_tol=1e-5)


def _log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
