"""Adapters: what is trained, what stays as it was, and what a later run or a merge makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sfttrain
from sftdata.errors import UsageError
from sfttrain import cli
from sfttrain.adapters import merge
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no", "per_device_train_batch_size": 12}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=12)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose tokenizer gained three tokens."""
    return make_set(tmp_path_factory.mktemp("data") / "grown", rows=12, vocabulary=131, tokens_added=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="module")
def adapter(shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    train_in_process(shards, model, folder, QUICK, lora={"r": 4, "alpha": 8})
    return folder


def _trained(trainer: Any) -> set[str]:
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


@pytest.mark.feature("LoRA")
@pytest.mark.parametrize(
    ("lora", "wanted"),
    [
        ("r=4,rslora=true", "lora_A"),
        ("r=4,dora=true", "lora_magnitude_vector"),
        ("r=4,target=q_proj,modules_to_save=lm_head", "lm_head.modules_to_save"),
        ("r=4,target=q_proj+v_proj,dropout=0.1", "v_proj.lora_B"),
    ],
)
def test_each_kind_of_adapter_trains_what_it_says_and_nothing_of_the_base(
    shards: Path, model: Path, tmp_path: Path, lora: str, wanted: str
) -> None:
    trainer = train_in_process(shards, model, tmp_path / "out", QUICK, lora=lora)
    names = _trained(trainer)
    assert any(wanted in name for name in names)
    assert not [name for name in names if "lora" not in name and "modules_to_save" not in name]
    settings = trainer.model.peft_config["default"]
    assert (settings.use_rslora, settings.use_dora) == ("rslora" in lora, "dora" in lora)


@pytest.mark.feature("LoRA")
def test_biases_are_trained_when_asked_for(shards: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", attention_bias=True)
    for bias in ("all", "none"):
        trainer = train_in_process(shards, model, tmp_path / bias, QUICK, lora={"r": 2, "bias": bias})
        assert any(name.endswith("bias") for name in _trained(trainer)) == (bias == "all")


@pytest.mark.feature("LoRA")
@pytest.mark.parametrize("kind", ["model", "tied"])
def test_few_added_tokens_get_trained_rows_of_the_embeddings(
    grown: Path, kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = request.getfixturevalue(kind)
    trainer = train_in_process(grown, base, tmp_path / "out", QUICK, lora={"r": 4})
    assert "3 rows of embed_tokens" in capsys.readouterr().err
    inner = trainer.model.get_base_model()
    indices = inner.get_input_embeddings().token_adapter.token_indices["default"]
    assert list(indices) == [128, 129, 130]
    before = inner.get_input_embeddings().original_module.weight
    after = inner.get_input_embeddings().weight
    moved = (before != after).any(1).nonzero()[:, 0].tolist()
    assert moved == [128, 129, 130]
    head = inner.get_output_embeddings().weight
    assert torch.equal(head, after) == (kind == "tied")
    assert not torch.equal(head[128:], before[128:])  # the head learns the new tokens too


@pytest.mark.feature("LoRA")
def test_many_added_tokens_train_the_tables_and_tied_ones_stay_tied(
    grown: Path,
    tied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sfttrain.adapters.FEW_TOKENS", 2)
    trainer = train_in_process(grown, tied, tmp_path / "out", QUICK, lora={"r": 4})
    assert "embed_tokens are trained in full" in capsys.readouterr().err
    inner = trainer.model.get_base_model()
    assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight


@pytest.mark.feature("LoRA")
def test_the_chunked_loss_sees_trained_rows_of_the_head(grown: Path, model: Path, tmp_path: Path) -> None:
    losses = {}
    for loss in ("chunked", "plain"):
        trainer = train_in_process(
            grown, model, tmp_path / loss, {**QUICK, "logging_steps": 1}, lora={"r": 4}, loss=loss
        )
        losses[loss] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["chunked"] == pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.feature("LoRA")
def test_adapters_on_the_head_are_trained_with_the_models_own_loss(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = train_in_process(
        shards, model, tmp_path / "out", QUICK, lora={"r": 4, "target": "q_proj+lm_head"}
    )
    assert "adapters on the head" in capsys.readouterr().err
    assert not trainer.fused
    assert trainer.model.get_base_model().lm_head.lora_B["default"].weight.abs().max() > 0


@pytest.mark.feature("LoRA")
def test_control_tokens_that_the_base_never_learnt_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaForCausalLM

    folder = make_set(tmp_path / "set", rows=6, vocabulary=512)
    shutil.copytree(EXAMPLES / "tokenizer", folder / "tokenizer")
    base = tiny_llama(tmp_path / "model", vocabulary=512)
    weights = LlamaForCausalLM.from_pretrained(base)
    weights.get_input_embeddings().weight.data[2] = 0  # the end token of the set
    weights.save_pretrained(base)
    trainer = train_in_process(folder, base, tmp_path / "out", QUICK, lora={"r": 4})
    assert "training 1 row of embed_tokens" in capsys.readouterr().err
    inner = trainer.model.get_base_model()
    before = inner.get_output_embeddings().original_module.weight[
        2
    ]  # nothing follows an end token, but it is predicted
    assert not torch.equal(inner.get_output_embeddings().weight[2], before)


@pytest.mark.feature("continue an adapter")
def test_an_adapter_is_trained_on_and_its_base_is_found(shards: Path, adapter: Path, tmp_path: Path) -> None:
    before = _lora_weights(adapter)
    trainer = train_in_process(shards, None, tmp_path / "out", QUICK, adapter=adapter)
    after = _lora_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all("lora" in name for name in _trained(trainer))


@pytest.mark.feature("continue an adapter")
def test_a_peft_model_object_is_trained_as_it_is(
    shards: Path, adapter: Path, model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), adapter, is_trainable=True
    )
    trainer = sfttrain.train(shards, model=adapted, output=tmp_path / "out", **QUICK)
    assert trainer.model is adapted
    before, after = _lora_weights(adapter), _lora_weights(tmp_path / "out")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.feature("continue an adapter")
def test_an_adapter_of_another_base_is_refused_in_one_line(
    shards: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tiny_llama(tmp_path / "other")
    with pytest.raises(UsageError, match=r"adapters of .*llama; the model is .*other\. Fix: set model"):
        train_in_process(shards, other, tmp_path / "out", QUICK, adapter=adapter)


@pytest.mark.feature("export: merge")
@pytest.mark.parametrize("kind", ["model", "tied"])
def test_a_merged_model_answers_as_the_adapted_one(
    grown: Path, kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    base = request.getfixturevalue(kind)
    trainer = train_in_process(grown, base, tmp_path / "run", QUICK, lora={"r": 4})
    assert merge(tmp_path / "run", tmp_path / "merged") < 1e-5
    assert "merged" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == 131
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == (kind == "tied")
    ids = torch.arange(100, 131)[None]
    with torch.no_grad():
        wanted = trainer.model.eval()(input_ids=ids).logits
        assert torch.allclose(merged.eval()(input_ids=ids).logits, wanted, atol=1e-5)


@pytest.mark.feature("export: merge")
def test_a_merge_into_a_folder_with_something_in_it_is_refused(adapter: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        merge(adapter, adapter)


@pytest.mark.feature("export: merge")
def test_the_command_merges_and_says_how_near_the_logits_are(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    assert "its logits differ from the adapted model's by" in capsys.readouterr().err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def _lora_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
