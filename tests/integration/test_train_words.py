"""What a run says: one line for each decision, details where they are asked for, and at its end what came of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sfttrain.cli import main
from sfttrain.preflight import describe_time
from tests.train_runs import OUR_WARNINGS, Fleet, tiny_llama
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


def _command(shards: Path, model: Path, output: Path, *more: str) -> list[str]:
    return [str(shards), "--model", str(model), "-o", str(output), "--max-steps", "6", *more]


@pytest.fixture(scope="module")
def said(shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What a run with evaluations said, and its folder."""
    import contextlib
    import io

    output, heard = tmp_path_factory.mktemp("runs") / "out", io.StringIO()
    more = ["--eval", f"held={shards}", "--set", "eval_strategy=steps", "--set", "eval_steps=2"]
    with contextlib.redirect_stderr(heard):
        assert main(["run", *_command(shards, model, output, *more, "--set", "logging_steps=100")]) == 0
    return output, heard.getvalue().splitlines()


def test_attention_is_one_line(said: tuple[Path, list[str]]) -> None:
    _, lines = said
    assert sum(line.startswith("attention") for line in lines) == 1
    assert not [line for line in lines if line.startswith(" ")]


def test_first_and_last_step_are_told_and_the_end_sums_up_what_was_logged(
    said: tuple[Path, list[str]],
) -> None:
    output, lines = said
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text("utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in log if "loss" in line}
    held = {line["step"]: line["eval_held_loss"] for line in log if "eval_held_loss" in line}
    assert {1, 6} <= losses.keys()
    assert any(line.startswith(f"step 1/6, loss {losses[1]:.4f}") for line in lines)
    assert any(line.startswith(f"step 6/6, loss {losses[6]:.4f}") for line in lines)
    assert f"loss        {losses[1]:.4f} to {losses[6]:.4f} in 6 steps" in lines
    best = min(held, key=lambda step: held[step])
    wanted = f"evaluation  held loss {held[2]:.4g} to {held[6]:.4g}, best {held[best]:.4g} at step {best}"
    assert wanted in lines
    assert lines[-3:] == [
        f"report      {output / 'report.html'}",
        f"model       {output}",
        f"next        sfttrain chat {output}",
    ]
    (tokens,) = [line["tokens"] for line in log if line.get("step") == 6 and "tokens" in line]
    assert any(line.startswith("speed") and f"{tokens:,} tokens in 0:" in line for line in lines)


@pytest.mark.parametrize("more", [(), ("--lora", "r=4"), ("--lora", "r=4,target=q_proj+v_proj")])
def test_a_plan_knows_the_memory_of_the_run_without_its_weights(
    more: tuple[str, ...], shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
        assert main(["plan", *_command(shards, model, tmp_path / "out", *more)]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    assert main(["run", *_command(shards, model, tmp_path / "out", *more)]) == 0
    (memory,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
    assert memory in plan
    assert any(re.match(r"time: at least 0:00:\d\d, ", line) for line in plan)
    assert any(re.match(r"  sdpa +chosen", line) for line in plan)


def test_a_dry_run_is_the_plan(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *_command(shards, model, tmp_path / "out", "--dry-run")]) == 2
    assert "`sfttrain plan` says what a run would take, and trains nothing" in capsys.readouterr().err


def test_a_set_that_is_trained_and_evaluated_on_is_named(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = _command(shards, model, tmp_path / "out", "--eval", str(shards))
    assert main(["plan", *flags]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation: "))
    assert f"{shards.name} is one of the sets that are trained on" in said


@pytest.mark.parametrize(
    "flags",
    ["--sample none.jsonl", "--eval held=none", "--set eval_strategy=steps", "--set objective=dft --set loss=plain",
     "--liger", "--set eval_steps=2", "--push-to-hub me/model"],
)  # fmt: skip
def test_a_plan_is_refused_for_what_its_run_is_refused_for(
    flags: str, shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = []
    for command in ("run", "plan"):
        assert main([command, *_command(shards, model, tmp_path / "out", *flags.split())]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]


def _estimate(trained: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sfttrain.preflight._matrix_speed", lambda *_: 1e9)
    layer = torch.nn.Linear(1000, 500, bias=True)
    layer.requires_grad_(trained)
    return describe_time(layer, 2_000_000, torch.device("cpu"), torch.float32)


def test_the_least_time_counts_what_each_weight_takes_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """500,000 weights, 2 million tokens, 1e9 operations a second: six operations each, four where frozen."""
    assert _estimate(True, monkeypatch).startswith("time: at least 1:40:00, 6.0e+12 operations")
    assert _estimate(False, monkeypatch).startswith("time: at least 1:06:40, 4.0e+12 operations")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_do_not_count(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are looked up, this one sees trained tokens alone: with them the least time was more than was taken."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("sfttrain.preflight._matrix_speed", lambda *_: 1e9)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", tied=tied))
    products = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if name.startswith("model.layers") and weight.ndim > 1
    )
    said = describe_time(model, 1_000_000, torch.device("cpu"), torch.float32)
    assert f", {6e6 * products:.1e} operations" in said


def test_each_of_two_processes_has_half_of_the_work_and_one_says_so(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    found = []
    for ranks in (1, 2):
        batch = ["--set", f"gradient_accumulation_steps={3 - ranks}"]
        log = tmp_path / f"log {ranks}"
        codes = Fleet().finish(["plan", *_command(shards, model, tmp_path / "out", *batch)], ranks, log)
        assert codes == [0] * ranks, log.read_text()
        found += re.findall(r"time: at least .*, (\S+) operations", log.read_text())
    one, half = map(float, found)
    assert half == pytest.approx(one / 2, rel=0.05)


def test_of_experts_no_time_is_guessed() -> None:
    model: Any = torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2)})
    assert "the router's choice" in describe_time(model, 10, torch.device("cpu"), torch.float32)


def test_on_a_terminal_no_bar_is_drawn_before_the_first_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of the first step would else stand behind the bar, on its line."""
    import io
    import sys

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sfttrain.progress import Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    args, state, control, told = (
        TrainingArguments("out", use_cpu=True),
        TrainerState(max_steps=3),
        TrainerControl(),
        Progress(),
    )
    told.on_train_begin(args, state, control)
    state.global_step = 1
    told.on_step_end(args, state, control)
    assert not terminal.getvalue()
    told.on_log(args, state, control, {"loss": 2.0, "tokens_per_second": 10.0})
    written = terminal.getvalue()
    told.on_train_end(args, state, control)  # takes the bar away
    assert re.search(r"\x1b\[2Kstep 1/3, loss 2\.0000, 10 tokens/s\n", written)
