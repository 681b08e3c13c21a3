"""Rows of the trainer's table that need a GPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sfttrain
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.gpu
@pytest.mark.feature("Unsloth")
def test_an_unsloth_model_trains_on_shards(shards: Path, model: Path, tmp_path: Path) -> None:
    unsloth = pytest.importorskip("unsloth")
    given, _ = unsloth.FastLanguageModel.from_pretrained(str(model), max_seq_length=64, load_in_4bit=False)
    given = unsloth.FastLanguageModel.get_peft_model(given, r=4)
    losses = _losses(
        sfttrain.train(shards, model=given, output=tmp_path / "out", **{**QUICK, "max_steps": 20})
    )
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.feature("memory")
def test_offloaded_activations_change_no_weight(shards: Path, model: Path, tmp_path: Path) -> None:
    kept = train_in_process(shards, model, tmp_path / "kept", {**QUICK, "activation_checkpointing": True})
    offload = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    moved = train_in_process(shards, model, tmp_path / "moved", {**QUICK, **offload})
    for one, other in zip(kept.model.parameters(), moved.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.feature("attention")
@pytest.mark.parametrize("attention", ["varlen", "flex_attention", "sdpa", "sdpa:flash", "sdpa:efficient"])
def test_each_attention_of_the_gpu_trains_with_the_same_loss(
    shards: Path, model: Path, tmp_path: Path, attention: str
) -> None:
    eager = train_in_process(shards, model, tmp_path / "eager", QUICK, attention="eager")
    found = train_in_process(shards, model, tmp_path / attention, QUICK, attention=attention)
    assert _losses(found) == pytest.approx(_losses(eager), rel=2e-2)


@pytest.mark.gpu
@pytest.mark.feature("export: GPTQ")
def test_a_gptq_model_answers_nearly_as_the_original(shards: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM

    from sfttrain.merge import quantize

    quantize(model, shards, tmp_path / "gptq", 8, 32, print)
    ids = torch.arange(3, 40)[None].cuda()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(model).cuda()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", device_map="cuda")(
            input_ids=ids
        ).logits
    assert (wanted - found).abs().max() < 0.1 * wanted.abs().max()


# Last: Liger changes the modelling code of the whole process.
@pytest.mark.gpu
@pytest.mark.feature("Liger")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_liger_gives_the_loss_that_is_given_without_it(
    shards: Path, model: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("liger_kernel")
    more = {"lora": {"r": 4}} if kind == "lora" else {}
    ours = train_in_process(shards, model, tmp_path / "ours", QUICK, **more)
    liger = train_in_process(shards, model, tmp_path / "liger", QUICK, loss="liger", **more)
    assert _losses(liger) == pytest.approx(_losses(ours), rel=2e-2)
