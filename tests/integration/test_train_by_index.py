"""The trainer takes a view by index as the set it stands for: the same losses, evaluation, resume and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdata.errors import IntegrityError
from sftdata.set.manifest import read_manifest
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.view_sets import chats, prepare, view, write_lines

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
STEPS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 3,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two views of it each way, and a model."""
    folder = tmp_path_factory.mktemp("by-index")
    prepare(folder / "base", [write_lines(folder / "rows.jsonl", chats(60, 3, 20))], max_length=96)
    for name, settings in {"train": {"without": "nothing*"}, "eval": {"cap": {"*": "12 rows"}}}.items():
        settings = {} if name == "train" else settings
        for write in (False, True):
            view(folder / f"{name}-{write}", folder / "base", max_length=64, write=write, **settings)
    vocabulary = read_manifest(folder / "base").tokenizer.vocab_size
    tiny_llama(folder / "model", vocabulary=vocabulary)
    return folder


def train(place: Path, write: bool, output: Path, **training: Any) -> Any:
    evaluation = {"eval_strategy": "steps", "eval_steps": 3}
    return train_in_process(
        place / f"train-{write}", place / "model", output, STEPS | evaluation | training,
        eval={"held": place / f"eval-{write}"},
    )  # fmt: skip


def losses(trainer: Any) -> list[tuple[str, float]]:
    return [
        (name, line[name])
        for line in trainer.state.log_history
        for name in sorted(line)
        if name in ("loss", "eval_held_loss")
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_a_view_by_index_is_the_run_on_the_written_view(
    place: Path, tmp_path: Path, workers: int
) -> None:
    one, other = (
        train(place, write, tmp_path / str(write), dataloader_num_workers=workers) for write in (False, True)
    )
    assert len(losses(one)) > 6
    assert losses(one) == losses(other)
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_on_a_view_by_index_is_resumed(place: Path, tmp_path: Path) -> None:
    whole = train(place, False, tmp_path / "whole")
    train(place, False, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "run.json").unlink()
    resumed = train(place, False, tmp_path / "run")
    assert losses(resumed)[-1] == losses(whole)[-1]
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_on_a_view_whose_base_is_gone_or_damaged_is_refused(place: Path, tmp_path: Path) -> None:
    for name in ("base", "train-False"):
        shutil.copytree(place / name, tmp_path / name)
    shard = tmp_path / "base" / "shard-00000.arrow"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"base/shard-00000\.arrow: xxh3-128 is "):
        train_in_process(tmp_path / "train-False", place / "model", tmp_path / "run", STEPS)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(IntegrityError, match="a view by index of .*base"):
        train_in_process(tmp_path / "train-False", place / "model", tmp_path / "run", STEPS)


def test_each_epoch_walks_its_own_packs(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = view(tmp_path / "epochs", place / "base", max_length=64, epochs=2, write=False)
    training = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "logging_steps": 1}
    trainer = train_in_process(tmp_path / "epochs", place / "model", tmp_path / "run", training)
    assert "order: the set's own, other packs for each of 2 epochs" in capsys.readouterr().err
    rows = made.ledger.rows_packed // 2
    assert trainer.state.global_step == 3 * -(-rows // 2)
    tokens = [line["tokens"] for line in trainer.state.log_history if "loss" in line]
    assert tokens[-1] == 3 * rows * 64
