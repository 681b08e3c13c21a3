"""The law of training on pictures: every step has the loss that transformers alone has, row by row, whatever is packed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path

import pytest

import sftdata
from sftdata.set.opened import open_set
from sftdata.set.rows import PackedRow
from tests.oracles.picture_steps import OwnSteps
from tests.picture_sets import write_rows
from tests.train_runs import OUR_WARNINGS, train_in_process
from tests.vision_models import LENGTH, SMALL, pictured_rows, write_small_model

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK = (("llava", "none", "none"), ("qwen2.5-vl", "bfd", "none"))
WAYS = (("none", "none"), ("bfd", "none"), ("none", "vision+projector"), ("bfd", "vision"))
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in ((name, *way) for name, way in product(SMALL, WAYS))
]
RATE = 1e-3


def _documents(row: PackedRow) -> Iterator[list[int]]:
    """Yield the ids of each document of a row; what fills it up trains nothing."""
    for last, length in zip(row.seq_lengths.cumsum(), row.seq_lengths, strict=True):
        own = slice(last - length, last)
        if (row.labels[own] != -100).any():
            yield row.input_ids[own].tolist()


@pytest.mark.feature("pictures")
@pytest.mark.parametrize(("name", "packing", "freeze"), CASES)
def test_steps_are_those_of_transformers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packing: str, freeze: str
) -> None:
    """Equal inputs, positions, masks and gradients all the way: Adam's steps part as soon as one of them differs."""
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    model, rows = write_small_model(tmp_path / "model", name), pictured_rows(tmp_path)
    length = LENGTH.get(name, 96)
    source = str(write_rows(tmp_path, rows))
    sftdata.prepare(
        source, output=tmp_path / "set", tokenizer=str(model), max_length=length, workers=1, packing=packing
    )
    batch = 2 if packing == "none" else 1
    settings = {
        "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0, "max_grad_norm": 1.0,
        "max_steps": 10, "per_device_train_batch_size": batch, "train_sampling_strategy": "sequential", "logging_steps": 1,
        "save_strategy": "no", "dataloader_num_workers": 0,
    }  # fmt: skip
    train_in_process(tmp_path / "set", model, tmp_path / "run", settings, freeze=freeze)
    lines = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text("utf-8").splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    opened = open_set(tmp_path / "set")
    packed = [list(_documents(row)) for row in opened]
    steps = [
        list(chain(*(packed[(batch * step + more) % len(packed)] for more in range(batch))))
        for step in range(10)
    ]
    theirs = OwnSteps(name, model, rows, tmp_path, freeze).take(steps, RATE, 1.0)
    assert ours == pytest.approx(theirs, abs=1e-4)
