"""Settings that cannot act are refused by name, each with what it needs, and never recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from sftdata.errors import UsageError
from sfttrain.arguments import (
    NEEDS,
    NEVER,
    Run,
    checked_training,
    effective_settings,
    refuse_inert,
    training_arguments,
    training_defaults,
    try_optimizer,
)
from sfttrain.config import read_settings

FIELDS = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments) if field.init}
# What stands in the way of each group of NEEDS, where nothing does by default.
AGAINST: dict[str, dict[str, Any]] = {
    "num_train_epochs": {"max_steps": 3},
    "warmup_steps": {"lr_scheduler_type": "constant"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "constant"},
    "data_seed": {"train_sampling_strategy": "sequential"},
    "logging_steps": {"logging_strategy": "epoch"},
    "logging_nan_inf_filter": {"logging_strategy": "no"},
    "logging_first_step": {"logging_strategy": "no"},
    "save_steps": {"save_strategy": "epoch"},
    "save_total_limit": {"save_strategy": "no"},
    "save_only_model": {"save_strategy": "no"},
}
# What only an object given in Python takes the effect from.
BY_OBJECTS = {"optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate",
              "lr_scheduler_type", "weight_decay", "label_smoothing_factor"}  # fmt: skip
VALUES = {"eval_strategy": "steps", "trackio_static_space_id": "x", "include_for_metrics": ["loss"],
          "liger_kernel_config": {"rope": True},
          "lr_scheduler_kwargs": {"min_lr": 1e-5}, "fsdp_config": {"min_num_params": 1}, "torch_empty_cache_steps": 2,
          "activation_checkpointing_kwargs": {"use_reentrant": True}, "dataloader_multiprocessing_context": "spawn",
          "hub_strategy": "end", "accelerator_config": {"split_batches": True}, "metric_for_best_model": "loss"}  # fmt: skip


def _other(name: str) -> Any:
    """Return a value that is not the default."""
    if name in VALUES:
        return VALUES[name]
    default, kind = training_defaults().get(name), FIELDS[name]
    if isinstance(default, bool) or (default is None and "bool" in kind):
        return not default
    if isinstance(default, int | float) or "int" in kind or "float" in kind:
        return (default or 0) + 1
    return ["x"] if "list" in kind else "x"


def _run(output: Path, training: dict[str, Any], objects: dict[str, Any] | None = None) -> Run:
    config = read_settings(None, [], {"model": "m", "output": output, "training": training})
    return Run(config, training_arguments(config), objects or {}, evaluated=False)


NAMES = [name for names, *_ in NEEDS for name in names if name not in BY_OBJECTS]


def test_every_name_in_the_tables_is_a_setting() -> None:
    ours = {name for names, *_ in NEEDS for name in names} | set(NEVER)
    assert ours <= set(FIELDS), ours - set(FIELDS)


@pytest.mark.parametrize("name", sorted({*NAMES, *NEVER} - {"output_dir"}))
def test_a_setting_that_cannot_act_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as refused:
        refuse_inert(_run(tmp_path, {name: _other(name), **AGAINST.get(name, {})}))
    assert name in str(refused.value) or name.split("_")[-1] in str(refused.value)
    assert refused.value.fix


@pytest.mark.parametrize(
    "name", sorted(BY_OBJECTS - {"optim_args", "optim_target_modules", "optim", "lr_scheduler_type"})
)
def test_an_object_that_decides_leaves_nothing_to_a_setting(tmp_path: Path, name: str) -> None:
    objects = {"optimizers": (object(), object()), "compute_loss_func": print}
    with pytest.raises(UsageError, match=f"{name}=.* needs .* left out"):
        refuse_inert(_run(tmp_path, {name: 0.5}, objects))


def test_settings_at_their_defaults_are_not_refused_and_what_cannot_act_is_not_recorded(
    tmp_path: Path,
) -> None:
    defaults = {
        name: value
        for name, value in training_defaults().items()
        if name not in ("output_dir", "learning_rate")
    }
    run = _run(
        tmp_path,
        {**defaults, "max_steps": 3, "optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no"},
    )
    refuse_inert(run)
    recorded = effective_settings(run)["training"]
    assert not {"save_steps", "save_total_limit", "warmup_steps", "num_train_epochs", "eval_steps", "adam_beta1", "hub_token",
                "ddp_backend", "output_dir"} & set(recorded)  # fmt: skip
    assert {"learning_rate", "optim", "max_steps", "weight_decay", "seed"} <= set(recorded)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (
            {"optim": "sgd", "adam_beta1": 0.5},
            'adam_beta1=0.5: optim="sgd" does not read it. Fix: leave it out',
        ),
        (
            {"optim": "adafactor", "adam_epsilon": 1e-3},
            'adam_epsilon=0.001: optim="adafactor" does not read it',
        ),
        (
            {"optim": "adamw_torch", "optim_args": "nonsense=1"},
            'optim_args="nonsense=1": optim="adamw_torch" does not read it',
        ),
        ({"optim": "adamw_torch", "optim_target_modules": ["q_proj"]}, "optim_target_modules="),
        (
            {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
            'optim="galore_adamw": cannot be used: ',
        ),
        ({"optim": "schedule_free_adamw"}, 'optim="schedule_free_adamw": cannot be used: '),
        ({"optim": "lomo"}, 'optim="lomo": cannot be used: '),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            'lr_scheduler_type="cosine_with_min_lr": cannot be used: ',
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            'lr_scheduler_type="warmup_stable_decay": cannot be used: ',
        ),
        ({"lr_scheduler_kwargs": {"speed": 1}}, "lr_scheduler_kwargs={'speed': 1}: cannot be used"),
    ],
)
def test_an_optimizer_or_schedule_that_lacks_something_is_refused_before_the_first_step(
    tmp_path: Path, training: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as refused:
        try_optimizer(_run(tmp_path, training), None, 10)
    assert words in str(refused.value)
    assert "Fix: " in str(refused.value)


@pytest.mark.parametrize(
    "scheduler", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"]
)
@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"]
)
def test_what_can_be_used_is_not_refused(tmp_path: Path, optim: str, scheduler: str) -> None:
    try_optimizer(_run(tmp_path, {"optim": optim, "lr_scheduler_type": scheduler}), None, 10)


def test_a_length_on_the_command_line_replaces_the_other_length_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sets: [set]\nmodel: model\noutput: out\nnum_train_epochs: 3\n")
    training = read_settings(tmp_path / "run.yaml", [], {"training": {"max_steps": 2}}).training
    assert training["max_steps"] == 2
    assert "num_train_epochs" not in training
    assert "max_steps" not in read_settings(tmp_path / "run.yaml", ["num_train_epochs=1"], {}).training


@pytest.mark.parametrize("training", [1, "max_steps", [2], None])
def test_training_that_holds_no_settings_is_one_line(training: Any) -> None:
    if training is None:
        assert read_settings(
            None, [], {"sets": ("set",), "model": "m", "output": "o", "training": None}
        ).training
        return
    with pytest.raises(UsageError, match="expected fields of TrainingArguments"):
        read_settings(None, [], {"sets": ("set",), "model": "m", "output": "o", "training": training})


@pytest.mark.parametrize(
    "text", ["sets.0=x", "model.name=x", "seed.x=2", "optim.name=adam", "training.seed.x=2"]
)
def test_a_dot_reaches_into_nothing_that_holds_no_settings(text: str) -> None:
    with pytest.raises(UsageError, match=r"set (sets|model|seed|optim) whole"):
        training_arguments(read_settings(None, [text], {"sets": ("set",), "model": "m", "output": "o"}))


def test_fields_of_models_that_hold_settings_take_them(tmp_path: Path) -> None:
    flags = {"sets": ("s",), "model": "m", "output": tmp_path}
    config = read_settings(None, ["lr_scheduler_kwargs.num_cycles=2", "lora.r=4"], flags)
    assert training_arguments(config).lr_scheduler_kwargs == {"num_cycles": 2}
    assert config.lora is not None


def test_gpus_that_stay_idle_add_no_rows_to_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers counts a batch for each GPU that one process sees: the run would be recorded with them."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: args._n_gpu or 4))
    args = _run(tmp_path, {"per_device_train_batch_size": 2}).args
    assert (args.train_batch_size, args.eval_batch_size) == (2, args.per_device_eval_batch_size)


@pytest.mark.parametrize("name", ["bf16", "load_best_model_at_end", "dataloader_pin_memory"])
def test_what_is_no_switch_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"Setting '{name}': expected true or false; found 'maybe'"):
        checked_training({name: "maybe"})
    assert checked_training({name: False}) == {name: False}
