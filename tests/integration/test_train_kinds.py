"""Bases that once trained first and failed last, and adapters on layers that are no plain linear ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sftdata.errors import UsageError
from sfttrain.adapters import merge
from sfttrain.vocabulary import ready_generation
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
QUICK = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.01}


def _tiny(folder: Path, family: str, **shape: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings, **shape)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.6, "do_sample": False},
        {"top_p": 0.9},
        {"do_sample": False, "num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_a_generation_config_that_cannot_be_saved_is_fixed_aloud_and_no_other_is(
    given: dict[str, Any], changed: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    base = tiny_llama(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({**given, "eos_token_id": [2, 5]}))
    model, said = AutoModelForCausalLM.from_pretrained(base), list[str]()
    if changed:
        model.generation_config.pad_token_id = 0
    try:
        model.save_pretrained(tmp_path / "before")
        sound = True
    except ValueError:
        sound = False
    ready_generation(model, [], said.append)
    model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [2, 5]
    assert sound is not changed
    assert bool(said) is changed


def test_mamba_gets_adapters_where_it_can_take_them(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _tiny(tmp_path / "model", "mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, expand=2)
    train_in_process(shards, model, tmp_path / "out", QUICK, lora={"r": 2})
    assert "lora: adapters on 1 weight: in_proj; none on " in capsys.readouterr().err
    with pytest.raises(UsageError, match="'out_proj' is incompatible.*Fix: .*target=all-linear"):
        train_in_process(shards, model, tmp_path / "named", QUICK, lora={"r": 2, "target": "out_proj"})


def test_experts_are_named_as_left_out_and_get_adapters_where_they_are_asked_for(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8}
    model = _tiny(tmp_path / "model", "gpt_oss", num_attention_heads=4, num_key_value_heads=2, **shape)
    train_in_process(shards, model, tmp_path / "plain", QUICK, lora={"r": 2})
    left_out = capsys.readouterr().err.partition("none on ")[2].splitlines()[0]
    assert {"experts.gate_up_proj", "experts.down_proj", "router"} <= set(left_out.split(", "))
    parameters = "experts.gate_up_proj+experts.down_proj"
    train_in_process(shards, model, tmp_path / "experts", QUICK, lora={"r": 2, "parameters": parameters})
    left_out = capsys.readouterr().err.partition("none on ")[2].splitlines()[0]
    assert left_out == "router"
    assert merge(tmp_path / "experts", tmp_path / "merged", str(model), lambda _: None) < 1e-3
    with pytest.raises(UsageError, match="parameters='experts.nothing'"):
        train_in_process(
            shards, model, tmp_path / "none", QUICK, lora={"r": 2, "parameters": "experts.nothing"}
        )


def test_fields_of_the_config_reach_it(shards: Path, model: Path, tmp_path: Path) -> None:
    given = {"use_cache": False, "rms_norm_eps": 0.5}
    trainer = train_in_process(shards, model, tmp_path / "out", QUICK, model_init_kwargs=given)
    assert trainer.model.config.rms_norm_eps == 0.5
    assert trainer.model.model.norm.variance_epsilon == 0.5
    with pytest.raises(
        UsageError, match="model_init_kwargs.nonsense: neither a field of its config nor an argument"
    ):
        train_in_process(shards, model, tmp_path / "bad", QUICK, model_init_kwargs={"nonsense": 1})
    fresh = {"init_from_config": model / "config.json", "model_init_kwargs": {"low_cpu_mem_usage": True}}
    with pytest.raises(UsageError, match="model_init_kwargs.low_cpu_mem_usage: llama has no such field"):
        train_in_process(shards, None, tmp_path / "fresh", QUICK, **fresh)
