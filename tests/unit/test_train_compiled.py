"""Compiled layers and the compiled loss: the figures of the plain model, whatever the documents are, compiled once."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sftdata.errors import UsageError
from sfttrain import compiling, preflight
from sfttrain.attention import register_attention
from sfttrain.compiling import Compilation, choose_compile, compile_layers, restore_layers, start_compiled
from sfttrain.config import read_settings
from sfttrain.data import Collator
from sfttrain.loss import Head, Objective, fuse_loss, supervised_loss
from sfttrain.preflight import _trial_batches, try_step
from sfttrain.proofs import Document, _row
from tests import varlen_op
from tests.train_runs import tiny_llama, train_in_process
from tests.train_sets import make_set

SETS = [(20, 12, 8), (30, 10), (10, 10, 10, 5, 5), (40,)]  # documents of rows of 40 tokens
pytestmark = pytest.mark.filterwarnings("default")  # of compilers, to their own developers
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for inductor")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _model(attention: str, checkpoints: bool = False, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    register_attention()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, **more,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False
    fuse_loss(model)
    if checkpoints:
        model.activation_checkpointing_enable()
    return model.train()


def _batch(lengths: tuple[int, ...], flatten: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(lengths))
    return Collator(flatten)(
        [_row([Document(torch.randint(3, 64, (n,), generator=generator)) for n in lengths])]
    )


def _step(model: Any, batch: dict[str, Any], half: bool = False) -> tuple[Tensor, Tensor]:
    """Loss of every token, and the gradient of all weights."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half, cache_enabled=not half):
        output = model(**batch, skip_logits=True)
    output.loss.backward()
    return output.token_losses, torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.feature("compiled layers")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_compiled_layers_give_loss_and_gradient_of_the_plain_ones(
    flatten: bool, checkpoints: bool, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen_op.install(monkeypatch)
    model = _model("varlen" if flatten else "sdpa", checkpoints)
    batches = [_batch(lengths, flatten) for lengths in SETS]
    plain = [_step(model, batch, half=flatten) for batch in batches]
    assert compile_layers(model, "aot_eager", in_place) == 3
    for batch, (losses, gradient) in zip(batches, plain, strict=True):
        found, moved = _step(model, batch, half=flatten)
        near = {"rtol": 2e-2, "atol": 2e-2} if flatten else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found, losses, **near)
        assert float((moved - gradient).norm() / gradient.norm()) < (2e-2 if flatten else 1e-5)
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.feature("memory")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]
)
def test_a_checkpoint_that_keeps_attention_computes_it_once_and_gives_the_same(backend: str) -> None:
    seen = varlen_op.on_cpu()
    model, batch = _model("varlen", checkpoints=True), _batch(SETS[0], flatten=True)
    outcomes, times = [], []
    for keep in (False, True, False):
        compile_layers(model, backend, keep=keep)
        _step(model, batch, half=True)
        model.activation_checkpointing_enable()  # as transformers does when training begins
        seen.clear()
        outcomes.append(_step(model, batch, half=True))
        times.append(len(seen))
        restore_layers(model)
    assert times == [6, 3, 6]
    for found, exact in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(found, exact)
    assert not counters["graph_break"]


@pytest.mark.feature("memory")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_parts_of_the_first_batch_add_up_to_it(
    flatten: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen_op.install(monkeypatch)
    model, lengths = _model("varlen" if flatten else "sdpa"), (7, 20, 4, 9)
    row = _row([Document(torch.randint(3, 64, (length,))) for length in lengths])
    if weighted:
        row = row._replace(loss_weights=torch.rand(40).numpy())
    trainer: Any = SimpleNamespace(
        order=[[0, 0]], train_dataset=[row], data_collator=Collator(flatten), splits=True, _prepare_inputs=dict,
        args=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    whole, parts = _trial_batches(trainer)
    assert [part["labels"].shape[1] for part in parts] == [27, 13]

    def half() -> Any:  # the kernel wants 16 bit
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=flatten, cache_enabled=False)

    once, twice = (try_step(model, batches, True, half()) for batches in (whole, parts))
    assert twice.difference(once) < (5e-3 if flatten else 1e-5)
    assert try_step(model, parts[:1], True, half()).difference(once) > 0.1


def test_layers_that_never_ran_plainly_are_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen_op.install(monkeypatch)
    model = _model("varlen", checkpoints=True)
    compile_layers(model, "aot_eager")
    _step(model, _batch(SETS[0], True), half=True)
    assert not counters["graph_break"]


@pytest.mark.feature("compiled layers")
def test_packed_is_alone_with_compiled_layers() -> None:
    model = _model("sdpa")
    compile_layers(model, "aot_eager")
    documents = [Document(torch.randint(3, 64, (length,))) for length in (9, 14, 17)]
    packed, _ = _step(model, Collator(False)([_row(documents)]))
    alone = torch.cat([_step(model, Collator(False)([_row([one])]))[0] for one in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_layers_are_compiled_in_training_only_and_restored_afterwards() -> None:
    model = _model("sdpa")
    kind = type(model.model.layers[0])
    compile_layers(model, "aot_eager")
    assert isinstance(model.model.layers[0], kind)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 20)[None])
    assert counters["stats"]["unique_graphs"] == 0
    compile_layers(model, "aot_eager", in_place=True)
    assert "forward" in vars(model.model.layers[0].mlp)
    restore_layers(model)
    assert type(model.model.layers[0]) is kind
    assert "forward" not in vars(model.model.layers[0].mlp)


@needs_compiler
@pytest.mark.parametrize("objective", [Objective(), Objective(dft=True, smoothing=0.1)])
def test_the_compiled_loss_is_the_plain_one_for_any_number_of_positions(objective: Objective) -> None:
    def outcome(positions: int, compiled: bool) -> list[Tensor]:
        torch.manual_seed(positions)
        hidden = torch.randn(1, positions, 16, requires_grad=True)
        weight = torch.randn(512, 16, requires_grad=True)
        labels = torch.randint(0, 512, (1, positions))
        labels[0, 5:9] = -100
        head = Head(weight, None, 0.5, 3.0)
        loss, correct, _, losses = supervised_loss(
            hidden, labels, head, "chunked", objective, torch.rand(1, positions), compiled
        )
        loss.backward()
        return [loss.detach(), correct, losses, hidden.grad, weight.grad]

    for positions in (40, 53, 71):
        for found, exact in zip(outcome(positions, True), outcome(positions, False), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("training", [{}, {"bf16": True}, {"activation_checkpointing": True}])
def test_a_compiled_run_has_the_losses_of_a_plain_one_and_compiles_before_step_1(
    tmp_path: Path, training: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shards, model = make_set(tmp_path / "set", rows=16), tiny_llama(tmp_path / "model")
    quick = {"max_steps": 3, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3, **training}

    def losses(name: str, what: str) -> list[float]:
        trainer = train_in_process(shards, model, tmp_path / name, quick, compile=what)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses("compiled", "layers") == pytest.approx(losses("plain", "none"), rel=1e-3)
    kept = " (attention kept)" * ("activation_checkpointing" in training)
    assert f"compile: 2 layers as one{kept} and the loss (as asked)" in capsys.readouterr().err
    assert counters["stats"]["unique_graphs"] == 2  # one of the layers, one of the loss


def test_a_compiler_that_takes_too_long_is_stopped_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def for_ever(*_: Any) -> str:
        with suppress(TimeoutError):  # taken for an error of its own
            time.sleep(60)
        time.sleep(60)
        return ""

    monkeypatch.setattr(preflight, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(preflight, "start_compiled", for_ever)
    choice, trial, notes = Compilation("layers", "as asked"), preflight.Trial(0, 1, 1), list[str]()
    before = signal.getsignal(signal.SIGALRM)
    assert not preflight._try_compiled(_model("sdpa"), choice, trial, lambda: trial, notes.append)
    assert notes == [
        "compile: the layers, in at most 0.2 s",
        "compile: not the layers (it failed: not done after 0.2 s)",
    ]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@needs_compiler
@pytest.mark.slow
def test_what_the_compiler_cannot_do_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, keep: bool = False) -> int:
        raise RuntimeError("no such instruction\nmore")

    shards, model = make_set(tmp_path / "set", rows=8), tiny_llama(tmp_path / "model")
    quick = {"max_steps": 1, "save_strategy": "no", "logging_steps": 1}
    monkeypatch.setattr(compiling, "compile_layers", broken)
    train_in_process(shards, model, tmp_path / "out", quick, compile="layers")
    told = capsys.readouterr().err
    assert "compile: not the layers (it failed: no such instruction)\n" in told
    assert "compile: the loss (as asked) in" in told


def _chosen(
    asked: str, device: str, steps: int, model: Any, kernels: bool = False, **more: Any
) -> Compilation:
    config = read_settings(None, [], {"model": "m", "output": "o", "compile": asked})
    args: Any = SimpleNamespace(
        device=torch.device(device), fsdp=more.get("fsdp"), deepspeed=None, activation_checkpointing_kwargs={},
        sequence_parallel=more.get("sequence_parallel", 1),
    )  # fmt: skip
    return choose_compile(config, args, model, steps, kernels)


def test_auto_compiles_layers_on_a_gpu_where_the_run_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("sdpa")
    assert _chosen("auto", "cpu", 1000, model).what == "none"
    assert _chosen("auto", "cuda", 1000, model)[:2] == ("none", "triton is not installed")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert _chosen("auto", "cuda", 1000, model).what == "layers"
    assert _chosen("auto", "cuda", 1000, model, kernels=True).what == "loss"
    assert _chosen("auto", "cuda", 49, model).what == "none"
    assert _chosen("auto", "cuda", 1000, model, fsdp="full_shard")[:2] == ("none", "the layers are sharded")
    with pytest.raises(
        UsageError, match=r'compile="layers" cannot be used: the layers are sharded.*compile="none"'
    ):
        _chosen("layers", "cuda", 1000, model, fsdp="full_shard")
    with pytest.raises(
        UsageError, match='compile="layers" cannot be used: ranks exchange heads inside the layers'
    ):
        _chosen("layers", "cuda", 1000, model, sequence_parallel=2)
    assert _chosen("loss", "cuda", 1000, model, sequence_parallel=2).what == "loss"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert _chosen("auto", "cuda", 1000, model)[:2] == ("none", "the layers are sharded")


def test_a_model_without_known_layers_is_left_as_it_is() -> None:
    with pytest.raises(UsageError, match="Linear has no repeated layer"):
        _chosen("layers", "cpu", 10, torch.nn.Linear(2, 2))
    assert start_compiled(torch.nn.Linear(2, 2), Compilation("loss", "")) == "nothing"
