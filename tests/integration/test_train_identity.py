"""A run is its settings: asked for again with others, it is refused by name or does what they say, and records nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sftdata.errors import UsageError
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
BASE = {
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 2,
    "learning_rate": 0.01,
    "gradient_accumulation_steps": 2,
}
# What decides what is trained: (fields of TrainingArguments, settings of our own, the name that must be said).
DECIDING: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"learning_rate": 0.5}, {}, "learning_rate"),
    ({"weight_decay": 0.1}, {}, "weight_decay"),
    ({"lr_scheduler_type": "cosine"}, {}, "lr_scheduler_type"),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
        {},
        "lr_scheduler_kwargs",
    ),
    ({"warmup_steps": 2}, {}, "warmup_steps"),
    ({"optim": "sgd"}, {}, "optim"),
    ({"adam_beta1": 0.5}, {}, "adam_beta1"),
    ({"adam_beta2": 0.5}, {}, "adam_beta2"),
    ({"adam_epsilon": 1e-3}, {}, "adam_epsilon"),
    ({"max_grad_norm": 0.1}, {}, "max_grad_norm"),
    ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
    ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha"),
    ({"seed": 7}, {}, "seed"),
    ({"data_seed": 7}, {}, "data_seed"),
    (
        {"gradient_accumulation_steps": 1},
        {},
        "global_batch (per_device_train_batch_size x gradient_accumulation_steps",
    ),
    ({"per_device_train_batch_size": 2}, {}, "global_batch (per_device_train_batch_size"),
    ({"train_sampling_strategy": "sequential"}, {}, "train_sampling_strategy"),
    ({"bf16": True}, {}, "bf16"),
    ({}, {"objective": "dft"}, "objective"),
    ({}, {"loss": "plain"}, "loss"),
    ({}, {"dtype": "bfloat16"}, "dtype"),
    ({}, {"weights": (2.0,)}, "weights"),
    ({}, {"resize_to_multiple_of": 8}, "resize_to_multiple_of"),
    ({}, {"model_init_kwargs": {"attention_dropout": 0.5}}, "model_init_kwargs"),
    ({}, {"lora": {"r": 2}}, "lora.r"),
]
# What may change while a run goes on; with nothing left to do it cannot act.
FREE: list[tuple[dict[str, Any], str]] = [
    ({"logging_steps": 1}, "logging_steps"),
    ({"save_steps": 1}, "save_steps"),
    ({"save_total_limit": 5}, "save_total_limit"),
    ({"dataloader_num_workers": 1}, "dataloader_num_workers"),
    ({"activation_checkpointing": True}, "activation_checkpointing"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=12)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A finished run of four steps, beside its model."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_llama(folder / "model")
    train_in_process(shards, folder / "model", folder / "done", BASE)
    return folder / "done"


def _again(
    done: Path, folder: Path, shards: Path, training: dict[str, Any], own: dict[str, Any], *, broken: bool
) -> Any:
    """Run in a copy of a finished run; `broken` takes it back to how a kill in step 3 leaves it."""
    shutil.copytree(done, folder)
    if broken:
        for path in folder.iterdir():
            if path.name not in ("checkpoint-2", "train_log.jsonl"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return train_in_process(shards, done.parent / "model", folder, {**BASE, **training}, **own)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_the_table_has_thirty_settings() -> None:
    assert len(DECIDING) + len(FREE) >= 30


@pytest.mark.parametrize("broken", [False, True], ids=["finished", "resumed"])
@pytest.mark.parametrize(
    ("training", "own", "name"), DECIDING, ids=[name.split(" ")[0] for *_, name in DECIDING]
)
def test_what_decides_on_the_weights_is_refused_by_name_and_nothing_is_touched(
    done: Path,
    shards: Path,
    tmp_path: Path,
    training: dict[str, Any],
    own: dict[str, Any],
    name: str,
    broken: bool,
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UsageError) as refused:
        _again(done, folder, shards, training, own, broken=broken)
    assert name in refused.value.message
    assert " was " in refused.value.message
    assert "--overwrite" in refused.value.fix
    before = _content(done)
    assert _content(folder) == {path: content for path, content in before.items() if (folder / path).exists()}


@pytest.mark.parametrize(("training", "name"), FREE, ids=[name for _, name in FREE])
def test_what_cannot_act_any_more_is_refused_of_a_finished_run(
    done: Path, shards: Path, tmp_path: Path, training: dict[str, Any], name: str
) -> None:
    with pytest.raises(UsageError, match=f"holds a finished run with other settings.*{name} was"):
        _again(done, tmp_path / "out", shards, training, {}, broken=False)
    assert _content(tmp_path / "out") == _content(done)


@pytest.mark.parametrize(("training", "name"), FREE, ids=[name for _, name in FREE])
def test_what_may_change_acts_on_a_resumed_run_and_changes_no_weight(
    done: Path, shards: Path, tmp_path: Path, training: dict[str, Any], name: str
) -> None:
    folder = tmp_path / "out"
    trainer = _again(done, folder, shards, training, {}, broken=True)
    assert (folder / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
    assert yaml.safe_load((folder / "settings.yaml").read_text())["training"][name] == training[name]
    steps = {line["step"] for line in _log(folder) if "loss" in line}
    assert (3 in steps) == (name == "logging_steps")
    assert (folder / "checkpoint-3").exists() == (name == "save_steps")
    assert (trainer.args.save_total_limit == 5) == (name == "save_total_limit")


def test_evaluation_may_begin_in_the_middle(done: Path, shards: Path, tmp_path: Path) -> None:
    training = {"eval_strategy": "steps", "eval_steps": 1}
    _again(done, tmp_path / "out", shards, training, {"eval": {"held": shards}}, broken=True)
    assert [line["step"] for line in _log(tmp_path / "out") if "eval_held_loss" in line] == [3, 4]


def test_the_same_command_says_so_and_touches_nothing(
    done: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _again(done, tmp_path / "out", shards, {}, {}, broken=False) is None
    assert (
        "is up to date: finished after 4 steps with the same data and the same settings"
        in capsys.readouterr().err
    )
    assert _content(tmp_path / "out") == _content(done)


def test_settings_given_at_their_defaults_are_the_same_settings(
    done: Path, shards: Path, tmp_path: Path
) -> None:
    defaults = {
        "weight_decay": 0.0,
        "lr_scheduler_type": "linear",
        "adam_beta1": "0.9",
        "save_total_limit": 2,
        "seed": 42,
    }
    assert (
        _again(
            done, tmp_path / "out", shards, defaults, {"objective": "nll", "weights": (1.0,)}, broken=False
        )
        is None
    )


@pytest.mark.parametrize(
    "training",
    [
        {},
        {
            "activation_checkpointing": True,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-5},
        },
        {"eval_strategy": "steps", "load_best_model_at_end": True, "logging_steps": 2, "save_steps": 2},
        {
            "optim": "sgd",
            "warmup_steps": 0.5,
            "report_to": "none",
            "bf16": False,
            "dataloader_num_workers": 0,
        },
    ],
)
def test_the_settings_that_a_run_recorded_are_the_same_settings(
    tmp_path: Path, shards: Path, training: dict[str, Any]
) -> None:
    from sfttrain.arguments import Run, effective_settings, refuse_inert, training_arguments
    from sfttrain.config import read_settings
    from sfttrain.resume import identity_of

    def run(file: Path | None, given: dict[str, Any]) -> Run:
        config = read_settings(file, [], given)
        return Run(config, training_arguments(config), {}, evaluated=True)

    given = {
        "model": "m",
        "output": tmp_path / "out",
        "sets": shards,
        "eval": {"held": shards},
        "training": training,
    }
    first = run(None, given)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(effective_settings(first)))
    again = run(tmp_path / "settings.yaml", {})
    refuse_inert(again)
    assert identity_of(again, [], {}) == identity_of(first, [], {})


def test_other_data_is_refused_of_a_finished_run(done: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a finished run with other settings: sets was"):
        _again(done, tmp_path / "out", make_set(tmp_path / "other", seed=9), {}, {}, broken=False)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "polynomial", "inverse_sqrt"])
def test_a_run_made_longer_follows_the_schedule_of_the_new_length(
    shards: Path, tmp_path: Path, scheduler: str
) -> None:
    model = tiny_llama(tmp_path / "model")
    settings = {
        "save_steps": 1,
        "save_total_limit": 9,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": scheduler,
    }
    train_in_process(shards, model, tmp_path / "long", {**settings, "max_steps": 8})
    for steps in (4, 8):
        train_in_process(shards, model, tmp_path / "out", {**settings, "max_steps": steps})
    rates, long = (
        {line["step"]: line["learning_rate"] for line in _log(tmp_path / name)} for name in ("out", "long")
    )
    assert {step: rates[step] for step in range(5, 9)} == {step: long[step] for step in range(5, 9)}
    assert rates[5] > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 8
    assert yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())["training"]["max_steps"] == 8


def test_a_run_cannot_be_made_shorter_than_it_is(done: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"has taken 4 steps; max_steps and num_train_epochs ask for 3.*higher max_steps"
    ):
        _again(done, tmp_path / "out", shards, {"max_steps": 3}, {}, broken=False)
    assert _content(tmp_path / "out") == _content(done)


def test_a_run_stopped_before_its_export_writes_the_best_model(shards: Path, tmp_path: Path) -> None:
    best = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_held_loss",
        "greater_is_better": True, "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 6, "save_steps": 2,
    }  # fmt: skip
    model = tiny_llama(tmp_path / "model")
    train_in_process(shards, model, tmp_path / "out", best, eval={"held": shards})
    wanted = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert wanted == (tmp_path / "out" / "checkpoint-2" / "model.safetensors").read_bytes()
    for name in ("run.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    train_in_process(shards, model, tmp_path / "out", best, eval={"held": shards})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted


def test_runs_of_an_earlier_version_are_resumed_aloud_and_finished_ones_are_not_guessed_at(
    done: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sfttrain import checkpoint

    def forget(folder: Path) -> Path:
        sealed = checkpoint.read_seal(folder / "checkpoint-2")
        assert sealed is not None
        run = {
            name: value
            for name, value in sealed.run.items()
            if name not in ("settings", "compute", "adapter")
        }
        checkpoint.seal(folder / "checkpoint-2", 2, run)
        finished = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(
            json.dumps({name: finished[name] for name in (*run, "finished", "steps")})
        )
        return folder

    old = forget(shutil.copytree(done, tmp_path / "old"))
    shutil.copytree(done.parent / "model", tmp_path / "model")
    with pytest.raises(
        UsageError, match="finished run of an earlier version, which recorded no settings to compare with"
    ):
        train_in_process(shards, done.parent / "model", old, BASE)
    (old / "run.json").unlink()
    shutil.rmtree(old / "checkpoint-4")
    with pytest.raises(UsageError, match="global_batch .* was 2, is 1"):
        train_in_process(shards, done.parent / "model", old, {**BASE, "gradient_accumulation_steps": 1})
    train_in_process(shards, done.parent / "model", old, BASE)
    assert (
        "an earlier version wrote it without settings; they are taken to be the same as now"
        in capsys.readouterr().err
    )
    assert (old / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()
