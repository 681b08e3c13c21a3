"""Settings of TrainingArguments: checked, refused where they have no effect, tried, and recorded."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sftdata.errors import UsageError, did_you_mean
from sfttrain.config import RENAMED, TRAINING_DEFAULTS, TrainConfig
from sfttrain.process import reason_of, say
from sfttrain.refusals import refuse_missing_launch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

# Fields that some optimizers read and others do not.
_READ_BY_SOME = ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
_WHOLE = ("model", "optimizer_dict")  # arguments of optimizers that take more than parameters


def training_arguments(config: TrainConfig, *, evaluated: bool = False) -> TrainingArguments:
    """Return transformers' TrainingArguments for a configuration.

    Args:
        evaluated: whether there is anything to evaluate on; then each epoch does, unless told otherwise.

    Raises:
        UsageError: transformers refuses a value.
    """
    import torch
    from transformers import TrainingArguments

    from sfttrain.device import check_device, computes_in_bf16, leave_gpus_idle, measurable

    settings = {"output_dir": str(config.output), "disable_tqdm": True, **checked_training(config.training)}
    refuse_missing_launch(settings)
    settings.setdefault("learning_rate", config.learning_rate)
    if evaluated:
        settings.setdefault("eval_strategy", "epoch")
    check_device(settings, config.dtype, say)
    # Otherwise ranks without a GPU find no backend.
    settings.setdefault("use_cpu", not torch.accelerator.is_available())
    settings.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    settings.setdefault("bf16", computes_in_bf16() and not settings.get("fp16"))
    spread = config.sequence_parallel > 1 or any(
        settings.get(name) for name in ("fsdp", "deepspeed", "use_cpu")
    )
    by_memory = "activation_checkpointing" not in settings and measurable() and not spread
    if by_memory:  # until the trial step shows that there is room without
        settings["activation_checkpointing"] = True
    if settings.get("activation_checkpointing"):
        # Reentrant checkpoints run a parameter's hooks twice, which DDP refuses.
        settings["activation_checkpointing_kwargs"] = {
            "use_reentrant": False,
            **_given(settings, "activation_checkpointing_kwargs"),
        }
    if settings.get("save_total_limit") == 1:
        what = "save_total_limit=1 leaves no complete checkpoint while the next is written."
        raise UsageError(what, "set 2 or more.")
    try:
        args = TrainingArguments(**named_as_installed(settings))
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"Training settings: {reason_of(error)}", "see `sfttrain config`.") from None
    leave_gpus_idle(args, say)  # before anything counts the rows of a batch
    if not hasattr(args, "activation_checkpointing"):  # older transformers have another name for it
        for old, name in RENAMED.items():
            setattr(args, name, getattr(args, old))
    # Marks of ours.
    args.checkpoints_by_memory = by_memory  # type: ignore[attr-defined]
    args.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return args


def effective_settings(run: Run, model: PreTrainedModel | None = None) -> dict[str, object]:
    """Return every setting that acts, with defaults resolved, as plain data.

    Args:
        model: the model that is trained, where there is one; low-rank optimizers look into it.
    """
    own = run.config.model_dump(mode="json", exclude={"training"})
    fields = run.args.to_dict().items()
    return own | {
        "training": {key: value for key, value in fields if acts(key, run) and reads(key, run.args, model)}
    }


def _given(settings: Mapping[str, object], name: str) -> dict[str, object]:
    value = settings.get(name) or {}
    return dict(json.loads(value) if isinstance(value, str) else cast(Mapping[str, object], value))


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


def named_as_installed(settings: Mapping[str, object]) -> dict[str, Any]:
    """Return settings of TrainingArguments by the names that the installed transformers knows, old or new."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    older = {name: old for old, name in RENAMED.items()}
    return {name if name in known else older.get(name, name): value for name, value in settings.items()}


def checked_training(given: Mapping[str, object]) -> dict[str, object]:
    """Return settings of TrainingArguments as it takes them.

    Raises:
        UsageError: it has no such field, or the value is no number where one is wanted, or out of bounds.
    """
    known = training_fields()
    for key in given:
        if key not in known:
            fix = did_you_mean(key, [*TrainConfig.model_fields, *known], "see `sfttrain config`.")
            raise UsageError(f"Unknown setting {key!r}.", fix)
    coerced = {key: _coerced(key, value, known[key]) for key, value in given.items()}
    for key, value in coerced.items():
        _refuse_out_of_bounds(key, value)
    return coerced


_ABOVE_0 = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)  # fmt: skip
_FROM_0 = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")


def _refuse_out_of_bounds(key: str, value: object) -> None:
    unset = key == "max_steps" and value == -1  # as transformers writes it
    if unset or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if key in _ABOVE_0 and value <= 0:
        what = f"Setting {key!r}: found {value}; expected a number above 0."
        raise UsageError(what, "set 1 or more, or leave it out.")
    if key in _FROM_0 and value < 0:
        what = f"Setting {key!r}: found {value}; expected 0 or more."
        raise UsageError(what, "set 0 or more, or leave it out.")


def given_training(config: TrainConfig) -> dict[str, object]:
    """Return the settings of TrainingArguments that were given and are not what they would be anyway."""
    defaults = {**training_defaults(), "learning_rate": config.learning_rate}
    given = {
        name: getattr(value, "value", value) for name, value in checked_training(config.training).items()
    }
    return {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}


def other_than_default(args: TrainingArguments) -> dict[str, object]:
    """Return the fields of TrainingArguments as it resolved them, without those at their defaults.

    The same comes out for settings as they were given and as a run recorded them: some are resolved from
    others, and what is not set has more than one form.
    """
    defaults = training_defaults()
    return {name: value for name, value in args.to_dict().items() if _set(value) != _set(defaults.get(name))}


def _set(value: object) -> object:
    """Return a value, None where it is one of the forms of not being set."""
    value = getattr(value, "value", value)
    return None if value is False or value in ("", "none", [], ["none"], {}) else value


def training_defaults() -> dict[str, object]:
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
        what = f"Setting {key!r}: found {value!r:.200}; nothing inside it can be set."
        raise UsageError(what, f"set {key} whole.")
    if isinstance(value, bool) and "bool" not in annotation:
        return "yes" if value else "no"
    if "bool" in annotation and "str" not in annotation and value not in (True, False, None):
        what = f"Setting {key!r}: expected true or false; found {value!r:.200}."
        raise UsageError(what, "write true or false.")
    number = next((kind for kind in (float, int) if kind.__name__ in annotation), None)
    if isinstance(value, str) and number is not None:
        try:
            return number(value)
        except ValueError:
            if "str" not in annotation:
                what = f"Setting {key!r}: expected a number; found {value!r}."
                raise UsageError(what, "write it as 2e-5 or 3.") from None
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
    "hub_private_repo": ("a repository made by --push-to-hub is private", "leave it out."),
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
        trains: whether weights are trained, and not evaluated alone.
    """

    config: TrainConfig
    args: TrainingArguments
    objects: Mapping[str, object]
    evaluated: bool
    trains: bool = True

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


def try_optimizer(run: Run, model: PreTrainedModel, steps: int) -> None:
    """Build what `optim` and `lr_scheduler_type` name, and take a step on a stand-in.

    Args:
        model: the model that is trained; low-rank optimizers look for their modules in it.
        steps: of the run.

    Raises:
        UsageError: naming the setting and what is wrong.
    """
    if run.objects.get("optimizers") or run.objects.get("optimizer_cls_and_kwargs"):
        return
    args = run.args
    try:
        kind, arguments = _kind(args, model)
    except (ImportError, ValueError, RuntimeError, TypeError) as error:
        raise _refusal(f"optim={_plain(args.optim)}", error, "set optim=adamw_torch") from None
    for name, value in given_training(run.config).items():
        if name in _READ_BY_SOME and not reads(name, args, model):
            raise UsageError(f"{name}={value}: optim={_plain(args.optim)} does not read it.", "leave it out.")
    if any(name in arguments for name in _WHOLE):
        return
    import torch

    stand_in = torch.nn.Parameter(torch.ones(8, 8, device=args.device))
    stand_in.grad = torch.ones_like(stand_in)
    try:
        optimizer = kind([stand_in], **{name: value for name, value in arguments.items() if name != "params"})
        optimizer.step()
    except Exception as error:  # whatever a foreign optimizer raises: it would raise it at the first step
        raise _refusal(f"optim={_plain(args.optim)}", error, "set optim=adamw_torch") from None
    _try_schedule(args, optimizer, steps)


def reads(name: str, args: TrainingArguments, model: PreTrainedModel | None) -> bool:
    """Say whether the optimizer of `args` depends on a field of it."""
    if name not in _READ_BY_SOME:
        return True
    other, default = copy.copy(args), training_defaults()[name]
    value = getattr(args, name)
    setattr(other, name, value / 2 if isinstance(value, float) else default)
    try:
        return str(_kind(args, model)) != str(_kind(other, model))
    except (ImportError, ValueError, RuntimeError, TypeError):
        return True  # without it there is no optimizer at all


def _try_schedule(args: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int) -> None:
    from transformers import get_scheduler

    kind, options = args.lr_scheduler_type, cast(dict[str, object] | None, args.lr_scheduler_kwargs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has no more steps to take
            schedule = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, options)
            schedule.step(*([0.0] if kind in ("reduce_lr_on_plateau", "greedy") else []))
    except Exception as error:  # as above
        given = f", lr_scheduler_kwargs={options}" if options else ""
        found = f"lr_scheduler_type={_plain(kind)}{given}"
        raise _refusal(
            found, error, "set lr_scheduler_kwargs.NAME=VALUE, or lr_scheduler_type=cosine"
        ) from None


def _kind(
    args: TrainingArguments, model: PreTrainedModel | None
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, object]]:
    from transformers import Trainer

    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return kind, arguments


def _refusal(found: str, error: Exception, fix: str) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"{found}: cannot be used: {reason:.300}", f"{fix}.")


def _plain(value: object) -> str:
    return str(getattr(value, "value", value))
