"""Settings of TrainingArguments: names and types checked, and those that cannot act refused."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sftdata.errors import UsageError, did_you_mean
from sfttrain.config import RENAMED, TRAINING_DEFAULTS, TrainConfig

if TYPE_CHECKING:
    from transformers import TrainingArguments


@cache
def training_fields() -> dict[str, str]:
    """Return the fields of TrainingArguments and their types, as text.

    They are read from its source: importing it takes seconds, and a misspelt setting should take none.
    """
    package = cast(ModuleSpec, find_spec("transformers")).origin
    source = Path(str(package)).with_name("training_args.py").read_text("utf-8")
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    body = next(node for node in classes if node.name == "TrainingArguments").body
    known = {
        ast.unparse(field.target): ast.unparse(field.annotation)
        for field in body
        if isinstance(field, ast.AnnAssign) and "init=False" not in ast.unparse(field.value or field.target)
    }
    return {name: known[old] for old, name in RENAMED.items() if old in known} | known


def named_as_installed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of TrainingArguments by the names that the installed transformers knows, old or new."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    older = {name: old for old, name in RENAMED.items()}
    return {name if name in known else older.get(name, name): value for name, value in settings.items()}


def checked_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of TrainingArguments as it takes them.

    Raises:
        UsageError: it has no such field, or the value is no number where one is wanted.
    """
    known = training_fields()
    for key in given:
        if key not in known:
            fix = did_you_mean(key, [*TrainConfig.model_fields, *known], "see `sfttrain config`.")
            raise UsageError(f"Unknown setting {key!r}.", fix)
    return {key: _coerced(key, value, known[key]) for key, value in given.items()}


def given_training(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of TrainingArguments that were given and are not what they would be anyway."""
    defaults = {**training_defaults(), "learning_rate": config.learning_rate}
    given = {
        name: getattr(value, "value", value) for name, value in checked_training(config.training).items()
    }
    return {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}


def other_than_default(args: TrainingArguments) -> dict[str, Any]:
    """Return the fields of TrainingArguments as it resolved them, without those at their defaults.

    The same comes out for settings as they were given and as a run recorded them: some are resolved from
    others, and what is not set has more than one form.
    """
    defaults = training_defaults()
    return {name: value for name, value in args.to_dict().items() if _set(value) != _set(defaults.get(name))}


def _set(value: Any) -> object:
    """Return a value, None where it is one of the forms of not being set."""
    value = getattr(value, "value", value)
    return None if value is False or value in ("", "none", [], ["none"], {}) else value


def training_defaults() -> dict[str, Any]:
    """Return the defaults of TrainingArguments' fields, except `bf16`, which depends on the machine."""
    from transformers import TrainingArguments

    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init and field.name != "bf16"]
    ours = {**TRAINING_DEFAULTS, "disable_tqdm": True}
    return {
        field.name: ours.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        for field in fields
    }


def _coerced(key: str, value: object, annotation: str) -> object:
    """Undo what YAML does to `1e-5`, which it takes for text, and to `no`, which it takes for false.

    Raises:
        UsageError: no number where one is wanted, or settings inside what holds none.
    """
    if isinstance(value, dict) and "dict" not in annotation:
        raise UsageError(
            f"Setting {key!r}: found {value!r:.200}; nothing inside it can be set.", f"set {key} whole."
        )
    if isinstance(value, bool) and "bool" not in annotation:
        return "yes" if value else "no"
    number = next((kind for kind in (float, int) if kind.__name__ in annotation), None)
    if isinstance(value, str) and number is not None:
        try:
            return number(value)
        except ValueError:
            if "str" not in annotation:
                raise UsageError(
                    f"Setting {key!r}: expected a number; found {value!r}.", "write it as 2e-5 or 3."
                ) from None
    return value


_ONCE = "the finished model is pushed once"
# What never acts here: why, and what does instead.
NEVER: dict[str, tuple[str, str]] = {
    "output_dir": ("the folder of the run is `output`", "name it with -o."),
    "do_train": ("a run always trains", "leave it out."),
    "do_eval": ("eval_strategy decides", "set eval_strategy=steps and --eval NAME=FOLDER."),
    "do_predict": ("a run predicts nothing", "leave it out."),
    "resume_from_checkpoint": ("the same command resumes by itself", "leave it out."),
    "push_to_hub": (_ONCE, "--push-to-hub user/model"),
    "hub_model_id": (_ONCE, "--push-to-hub user/model"),
    "hub_strategy": (_ONCE, "--push-to-hub user/model"),
    "hub_token": ("the login of the machine is used", "hf auth login, or set HF_TOKEN."),
    "hub_private_repo": ("a repository that --push-to-hub makes is private", "leave it out."),
    "hub_always_push": (_ONCE, "--push-to-hub user/model"),
    "hub_revision": (_ONCE, "--push-to-hub user/model"),
    "remove_unused_columns": ("rows hold nothing but what is trained", "leave it out."),
    "label_names": ("rows hold labels under that name", "leave it out."),
    "length_column_name": ("lengths are those of the set", "leave it out."),
    "dataloader_drop_last": (
        "no row is dropped; the last batch is filled with rows that train nothing",
        "leave it out.",
    ),
    "dataloader_in_order": ("the order of rows is that of the seed", "leave it out."),
    "ignore_data_skip": ("a resumed run goes on with the rows it has not seen", "leave it out."),
    "auto_find_batch_size": ("batches are planned before the first step", "set per_device_train_batch_size."),
    "enable_jit_checkpoint": ("a run always saves on SIGTERM", "leave it out."),
    "include_num_input_tokens_seen": ("tokens are always counted", "leave it out."),
    "accelerator_config": ("batches are dealt out by the seed, not by accelerate", "leave it out."),
    "disable_tqdm": ("progress is a bar on a terminal, and lines elsewhere", "leave it out."),
    "local_rank": ("the launcher sets it", "leave it out."),
}


@dataclass(frozen=True)
class Run:
    """What decides whether a setting acts.

    Attributes:
        args: transformers' TrainingArguments.
        objects: what transformers' Trainer takes as objects.
        evaluated: whether there is anything to evaluate on.
    """

    config: TrainConfig
    args: TrainingArguments
    objects: Mapping[str, Any]
    evaluated: bool

    @property
    def picks_best(self) -> bool:
        """Whether a figure of evaluation decides on anything."""
        args = self.args
        plateau = args.lr_scheduler_type == "reduce_lr_on_plateau"
        return bool(
            args.load_best_model_at_end
            or args.save_strategy == "best"
            or plateau
            or self.objects.get("callbacks")
        )


Acts = Callable[[Run], bool]
_OPTIMIZER = (
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "learning_rate",
)  # fmt: skip
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay")
_WARMLESS = ("constant", "reduce_lr_on_plateau", "greedy")
_KWARGLESS = ("constant", "constant_with_warmup")
# What acts only beside something else: the settings, what they need, and whether it is there.
NEEDS: tuple[tuple[tuple[str, ...], str, Acts], ...] = (
    ((*_OPTIMIZER, *_SCHEDULE), "optimizers left out, which bring their own",
     lambda run: not run.objects.get("optimizers")),
    (_OPTIMIZER, "optimizer_cls_and_kwargs left out",
     lambda run: not run.objects.get("optimizer_cls_and_kwargs")),
    (("num_train_epochs",), "max_steps left out, which decides alone", lambda run: run.args.max_steps <= 0),
    (("warmup_steps",), "a schedule that warms up", lambda run: run.args.lr_scheduler_type not in _WARMLESS),
    (("lr_scheduler_kwargs",), "a schedule that takes arguments",
     lambda run: run.args.lr_scheduler_type not in _KWARGLESS),
    (("label_smoothing_factor",), "compute_loss_func left out",
     lambda run: run.objects.get("compute_loss_func") is None),
    (("activation_checkpointing_kwargs",), "activation_checkpointing=true",
     lambda run: bool(run.args.activation_checkpointing)),
    (("torch_empty_cache_steps",), "a GPU", lambda run: run.args.device.type != "cpu"),
    (("liger_kernel_config",), "a GPU, and kernels other than none",
     lambda run: run.config.kernels != "none" and run.args.device.type != "cpu"),
    (("data_seed",), "rows that are shuffled", lambda run: run.args.train_sampling_strategy == "random"),
    (("logging_steps",), "logging_strategy=steps", lambda run: run.args.logging_strategy == "steps"),
    (("logging_first_step", "logging_nan_inf_filter"), "logging_strategy=steps or epoch",
     lambda run: run.args.logging_strategy != "no"),
    (("run_name", "project"), "report_to", lambda run: bool(run.args.report_to)),
    (("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "report_to=trackio",
     lambda run: "trackio" in (run.args.report_to or ())),
    (("eval_strategy", "eval_on_start", "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval"),
     "an evaluation set, as --eval held=FOLDER", lambda run: run.evaluated),
    (("eval_steps",), "eval_strategy=steps", lambda run: run.args.eval_strategy == "steps"),
    (("eval_delay",), "eval_strategy=steps or epoch", lambda run: run.args.eval_strategy != "no"),
    (("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps",
      "eval_do_concat_batches", "eval_use_gather_object"), "compute_metrics",
     lambda run: run.objects.get("compute_metrics") is not None),
    (("metric_for_best_model", "greater_is_better"), "load_best_model_at_end=true",
     lambda run: run.picks_best),
    (("load_best_model_at_end",), "eval_strategy=steps or epoch", lambda run: run.args.eval_strategy != "no"),
    (("save_steps",), "save_strategy=steps", lambda run: run.args.save_strategy == "steps"),
    (("save_total_limit", "save_only_model"), "save_strategy other than no",
     lambda run: run.args.save_strategy != "no"),
    (("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
     "dataloader_num_workers above 0", lambda run: run.args.dataloader_num_workers > 0),
    (("fsdp_config",), "fsdp", lambda run: bool(run.args.fsdp)),
)  # fmt: skip
# What acts in a run of several processes, and may stay in the settings of one.
_SEVERAL = (
    "ddp_", "average_tokens_across_devices", "save_on_each_node", "log_on_each_node", "log_level_replica",
)  # fmt: skip


def refuse_inert(run: Run) -> None:
    """Refuse a setting that was given and cannot act.

    Raises:
        UsageError: naming what it needs, or what does the same here.
    """
    for name, value in given_training(run.config).items():
        if name in NEVER:
            why, instead = NEVER[name]
            raise UsageError(f"{name}={value}: cannot act: {why}.", instead)
        needs = _unmet(name, run)
        if needs:
            raise UsageError(f"{name}={value} needs {needs}.", f"leave {name} out, or see to that.")
    if run.args.train_sampling_strategy == "group_by_length":
        found = "train_sampling_strategy=group_by_length: packed rows are all of one length"
        raise UsageError(f"{found}.", "leave it out.")


def acts(name: str, run: Run) -> bool:
    """Say whether a setting of TrainingArguments has an effect on a run."""
    if name in NEVER or name.startswith("_") or (run.args.world_size == 1 and name.startswith(_SEVERAL)):
        return False
    return not _unmet(name, run)


def _unmet(name: str, run: Run) -> str:
    return next((needs for names, needs, acts_on in NEEDS if name in names and not acts_on(run)), "")
