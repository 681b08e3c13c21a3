"""Activation checkpoints stay on only where a step without them does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfttrain import device
from sfttrain.config import read_settings
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK = {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3}
WEIGHTS = 23_712 * 4  # bytes of `tiny_llama`


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a card of so many bytes, on which each step peaks at so many."""
    memory: dict[str, Any] = {"room": 10**9, "peak": 1000}
    monkeypatch.setattr(device, "measurable", lambda: True)
    monkeypatch.setattr(device, "reset_peak", lambda: None)
    monkeypatch.setattr(device, "peak", lambda: memory["peak"])
    monkeypatch.setattr(device, "room", lambda: memory["room"])
    return memory


def _train(tmp_path: Path, **training: Any) -> Any:
    shards, model = make_set(tmp_path / "set", rows=8), tiny_llama(tmp_path / "model")
    return train_in_process(shards, model, tmp_path / "out", {**QUICK, "use_cpu": False, **training})


@pytest.mark.feature("memory")
@pytest.mark.parametrize(
    ("room", "on"),
    [
        ((1000 + 2 * WEIGHTS) / 0.9 + 10, False),
        ((1000 + 2 * WEIGHTS) / 0.9 - 10, True),
    ],
)
def test_checkpoints_follow_the_memory_that_there_is(
    tmp_path: Path, card: dict[str, Any], room: float, on: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    card["room"] = int(room)
    trainer = _train(tmp_path)
    assert trainer.args.activation_checkpointing is on
    assert trainer.model.is_gradient_checkpointing is on
    word = "on" if on else "off"
    assert f"activation checkpoints: {word}, a step without them needs 0.0 of 0 GB" in capsys.readouterr().err


def test_what_is_asked_for_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: dict[str, Any]
) -> None:
    for asked in (True, False):
        trainer = _train(tmp_path / str(asked), activation_checkpointing=asked)
        assert trainer.args.activation_checkpointing is asked


def test_auto_is_the_default_and_takes_back_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\noutput: o\nactivation_checkpointing: true\n", encoding="utf-8")
    assert read_settings(file, [], {}).training["activation_checkpointing"] is True
    assert (
        "activation_checkpointing" not in read_settings(file, ["activation_checkpointing=auto"], {}).training
    )
