"""Weighted losses: the weighted sum over the trained tokens of a step, divided by the sum of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sftdata
import sfttrain
from sftdata.errors import DataError, UsageError
from sftdata.set.opened import open_set
from sfttrain.loss import Head, Objective, supervised_loss
from tests.train_runs import OUR_WARNINGS, Fleet, tiny_llama, train_in_process

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
TOKENIZER = str(Path(__file__).parents[2] / "examples" / "tokenizer")
STEP = {
    "max_steps": 1, "learning_rate": 0.0, "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "max_grad_norm": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packed rows, so that the last place of a step of four is a filler."""
    return _prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", vocabulary=1024)


def _prepare(folder: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {
                    "role": "assistant",
                    "content": f"Answer {number}, " * (number % 4 + 1),
                    "weight": [0.25, 1, 0, 3, 0.5][number % 5],
                },
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": "Nothing."},
            ]
        }
        for number in range(6)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"tokenizer": TOKENIZER, "output": folder / "set", "max_length": 128, "workers": 1}
    sftdata.prepare(folder / "rows.jsonl", loss_weights=True, **settings)
    return folder / "set"


def _plain(model: Path, shards: Path) -> tuple[float, float]:
    """Loss and gradient norm counted the slow way: every document alone, full logits, token by token."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model)
    total, weights = torch.zeros(()), 0.0
    for row in open_set(shards):
        start = 0
        for length, example in zip(row.seq_lengths.tolist(), row.examples.tolist(), strict=True):
            ids = torch.from_numpy(row.input_ids[start : start + length].astype(np.int64))
            if example >= 0:
                chances = network(input_ids=ids[None]).logits[0].log_softmax(-1)
                for place in range(1, length):
                    weight = float(row.loss_weights[start + place])
                    total = total - weight * chances[place - 1, ids[place]]
                    weights += weight
            start += length
    (total / weights).backward()
    norm = torch.stack(
        [parameter.grad.norm() for parameter in network.parameters() if parameter.grad is not None]
    ).norm()
    return float(total.detach()) / weights, float(norm)


@pytest.mark.feature("losses")
@pytest.mark.parametrize("objective", [Objective(), Objective(dft=True), Objective(smoothing=0.1)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_weighted_loss_and_its_gradient_follow_the_formula(
    objective: Objective, softcap: float | None
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels, weights = torch.randint(0, 40, (2, 9)), torch.rand(2, 9) * 3
    labels[0, :4] = -100
    head = Head(weight, softcap=softcap)
    loss, _, _, token_losses = supervised_loss(
        hidden, labels, head, objective=objective, loss_weights=weights
    )
    loss.backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    wanted = torch.zeros(())
    for row in range(2):
        for place in range(1, 9):
            if labels[row, place] == -100:
                continue
            logits = hidden[row, place - 1] @ weight.T
            chances = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
            nll = -chances[labels[row, place]]
            term = (1 - objective.smoothing) * nll - objective.smoothing * chances.mean()
            wanted = wanted + weights[row, place] * term * ((-nll).exp().detach() if objective.dft else 1)
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert torch.allclose(found[0], hidden.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[1], weight.grad, rtol=1e-5, atol=1e-6)
    plain = supervised_loss(hidden, labels, head, objective=objective)[3]
    assert torch.equal(token_losses, plain)  # what evaluation reports is unweighted


@pytest.mark.feature("losses")
@pytest.mark.parametrize("settings", [{}, {"packing": "unpack"}, {"loss": "torch"}, {"attention": "eager"}])
def test_a_step_divides_the_weighted_sum_by_the_sum_of_weights(
    shards: Path, model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    rows = len(open_set(shards))
    assert rows == 3
    training = {**STEP, "gradient_accumulation_steps": 8} if settings.get("packing") == "unpack" else STEP
    trainer = train_in_process(shards, model, tmp_path / "out", training, **settings)
    loss, norm = _plain(model, shards)
    found = trainer.state.log_history[0]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.feature("losses")
def test_weights_that_are_all_alike_change_nothing(shards: Path, model: Path, tmp_path: Path) -> None:
    logs = []
    for factor in (0, 1, 2.5):
        rows = [
            {"input_ids": row.input_ids, "labels": row.labels, "seq_lengths": row.seq_lengths}
            | ({"loss_weights": np.where(row.labels != -100, factor, 0)} if factor else {})
            for row in open_set(shards)
        ]
        trainer = sfttrain.train(rows, model=str(model), output=tmp_path / str(factor), **STEP)
        logs.append(trainer.state.log_history[0])
    for log in logs[1:]:
        assert log["loss"] == pytest.approx(logs[0]["loss"], rel=1e-6)
        assert log["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-5)


@pytest.mark.feature("losses")
def test_a_step_is_the_same_on_one_rank_and_on_two(shards: Path, model: Path, tmp_path: Path) -> None:
    logs = {}
    for name, (batch, ranks) in {"one": (4, 1), "two": (2, 2)}.items():
        settings = {**STEP, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1}
        overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        arguments = ["run", str(shards), "--model", str(model), "-o", str(tmp_path / name), *overrides]
        log = tmp_path / f"{name}.log"
        assert Fleet().finish(arguments, ranks, log) == [0] * ranks, log.read_text()
        logs[name] = json.loads((tmp_path / name / "train_log.jsonl").read_text().splitlines()[0])
    assert logs["two"]["loss"] == pytest.approx(logs["one"]["loss"], abs=1e-6)
    assert logs["two"]["grad_norm"] == pytest.approx(logs["one"]["grad_norm"], rel=1e-6)
    assert logs["one"]["loss"] == pytest.approx(_plain(model, shards)[0], rel=1e-6)


@pytest.mark.feature("losses")
def test_evaluation_of_a_weighted_set_is_the_plain_loss(shards: Path, model: Path, tmp_path: Path) -> None:
    trainer = train_in_process(shards, model, tmp_path / "out", STEP, eval={"held": shards})
    found = trainer.evaluate()["eval_held_loss"]
    labels = [
        {"input_ids": row.input_ids, "labels": row.labels, "seq_lengths": row.seq_lengths}
        for row in open_set(shards)
    ]
    unweighted = sfttrain.train(labels, model=str(model), output=tmp_path / "plain", **STEP)
    assert found == pytest.approx(unweighted.state.log_history[0]["loss"], abs=1e-5)
    assert found != pytest.approx(trainer.state.log_history[0]["loss"], abs=1e-3)


@pytest.mark.feature("custom data")
def test_weights_of_ones_own_rows_are_used_and_checked(model: Path, tmp_path: Path) -> None:
    def first(name: str, rows: list[dict[str, Any]]) -> dict[str, float]:
        training = {**STEP, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
        return dict(
            sfttrain.train(rows, model=str(model), output=tmp_path / name, **training).state.log_history[0]
        )

    ids = [5, 6, 7, 8]
    off = first("off", [{"input_ids": ids, "loss_weights": [1, 1, 0, 1]}])
    masked = first("masked", [{"input_ids": ids, "labels": [5, 6, -100, 8]}])
    assert off["loss"] == pytest.approx(masked["loss"], abs=1e-6)
    for number, wrong in enumerate([[1, 1, -1, 1], [1, 1], [1, float("nan"), 1, 1], ["a"] * 4]):
        with pytest.raises(DataError, match="row 0: loss_weights"):
            first(f"wrong{number}", [{"input_ids": ids, "loss_weights": wrong}])


@pytest.mark.feature("wrong combinations")
@pytest.mark.parametrize(
    "settings", [{"loss": "plain"}, {"compute_loss_func": lambda *_, **__: torch.zeros(())}]
)
def test_a_loss_that_knows_no_weights_is_refused(
    shards: Path, model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match='have loss_weights, which .* Fix: set loss="auto"'):
        sfttrain.train(shards, model=str(model), output=tmp_path / "out", **settings, **STEP)
