"""Activation checkpoints stay on only where a step without them does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfttrain import device, preflight
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


def _train(tmp_path: Path, compile: str = "none", **training: Any) -> Any:
    shards, model = make_set(tmp_path / "set", rows=8), tiny_llama(tmp_path / "model")
    given = {**QUICK, "use_cpu": False, **training}
    return train_in_process(shards, model, tmp_path / "out", given, compile=compile)


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


@pytest.mark.feature("memory")
@pytest.mark.parametrize(
    ("peaks", "told"),
    [
        ([9, 2], "keeps what attention gave needs 0.0 of 0 GB"),
        ([9, 9, 0], "keeps what attention gave needs 0.0 of 0 GB"),
        ([2], "off, a step without them"),
    ],
)
def test_attention_is_kept_where_only_a_step_that_keeps_nothing_more_fits(
    tmp_path: Path, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    peaks: list[int], told: str,
) -> None:  # fmt: skip
    """On a card with room for ten times the weights; steps peak at so many times their size, beside two of moments."""
    left, chosen = iter(peaks), list[bool]()

    def compiled(model: Any, choice: Any, *_: Any) -> bool:
        chosen.append(choice.keep)
        return True

    card["room"] = 10 * WEIGHTS
    monkeypatch.setattr(device, "peak", lambda: next(left) * WEIGHTS)
    monkeypatch.setattr(preflight, "_try_compiled", compiled)
    monkeypatch.setattr("sfttrain.training.free_to_keep", lambda *_: False)
    trainer = _train(tmp_path, compile="layers")
    assert chosen == [False, True, False][: len(peaks)]
    assert trainer.args.activation_checkpointing is (len(peaks) > 1)
    assert told in capsys.readouterr().err


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
