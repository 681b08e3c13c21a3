"""Whether a run begins, resumes, or is finished already: is it the same run?

A checkpoint and `run.json` carry a run's identity: its data, and every setting that decides what is trained.
A run that resumes, or is started again, is compared with it, and refused by name where they differ. Some
settings may change on the way: how long it trains, what is saved, logged and evaluated, and how a step is
computed as long as the step stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec

from sftdata.blame.log import cut_after
from sftdata.errors import IntegrityError, UsageError
from sftdata.output import counted
from sftdata.set.opened import ShardSet
from sfttrain import checkpoint
from sfttrain.arguments import Run, acts, other_than_default
from sfttrain.checkpoint import RUN_NAME, Identity
from sfttrain.config import LENGTH, LoraSettings, TrainConfig
from sfttrain.process import Say, share_of_rows
from sfttrain.progress import LOG_NAME
from sfttrain.seen import LINES_NAME, SEEN_NAME

if TYPE_CHECKING:
    from transformers import TrainingArguments

# What would be taken for the new run's, or read together with it: adapters beside a model, for one.
_OF_A_RUN = (
    RUN_NAME, LOG_NAME, SEEN_NAME, LINES_NAME, "*.safetensors", "*.safetensors.index.json",
    "adapter_config.json",
)  # fmt: skip


class Point(NamedTuple):
    """A checkpoint, the steps behind it, and the first step of the leg that goes on from there."""

    folder: Path
    step: int
    first_step: int


_PREFIXES = (
    "logging_", "log_", "save_", "eval_", "trackio_", "dataloader_", "ddp_", "activation_checkpointing",
    "torch_compile",
)  # fmt: skip
MAY_CHANGE = frozenset({
    *LENGTH,
    "report_to", "run_name", "project", "skip_memory_metrics", "debug",
    "restore_callback_states_from_checkpoint", "eval", "per_device_eval_batch_size", "prediction_loss_only",
    "bf16_full_eval", "fp16_full_eval", "include_for_metrics", "batch_eval_metrics", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "compute_metrics",
    "passes", "attention", "packing", "kernels", "compile", "liger_kernel_config", "torch_empty_cache_steps",
    "sequence_parallel",
    # Their product is compared, as global_batch.
    "per_device_train_batch_size", "gradient_accumulation_steps",
})  # fmt: skip
# What a new leg may have of its own.
LEG = frozenset({"sets", "weights", "mix", "mix_by", "rows", "window", "chat_template"})
_TOLD = ("sets", "weights", "mix", "mix_by")  # of these; the others follow from them
_OF_EACH_SET = ("tokenizer", "chat_template")  # compared whatever the number of sets is
_DIGEST = 12
# Not compared: places, the machine, and what `identity_of` names in another way.
_NOT_COMPARED = frozenset({
    "sets", "weights", "mix", "mix_by", "new_leg", "model", "init_from_config", "lora", "adapter", "eval",
    "training", "output", "sample", "overwrite", "prove_again", "push_to_hub", "trust_remote_code", "use_cpu",
    "window", "dataloader_pin_memory", "disable_tqdm", "output_dir", "local_rank", "bf16", "fp16",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # older names; the new ones are compared,
})  # fmt: skip
_LABELS = {
    "global_batch": "global_batch (per_device_train_batch_size x gradient_accumulation_steps x processes)",
    "compute": "the dtype of computing (bf16, fp16)",
}
_OBJECTS = (
    "compute_loss_func", "optimizers", "optimizer_cls_and_kwargs", "compute_metrics",
    "preprocess_logits_for_metrics",
)  # fmt: skip


def finished(config: TrainConfig, identity: Identity) -> Identity | None:
    """Return the `run.json` of a run that is finished with the same settings; None where there is work to do.

    Raises:
        UsageError: the output holds a run with other settings, which are named.
    """
    if config.overwrite:
        return None
    done = read_run(config.output)
    if not done.get("finished") or not any(config.output.glob("*.safetensors")):
        begun = checkpoint.newest_sealed(config.output)
        if begun is not None:
            check_unchanged(begun[1].run, identity, begun[0], new_leg=config.new_leg)
        return None
    fix = "choose another output folder, or --overwrite to start anew."
    if "settings" not in done:
        found = f"{config.output}: holds a finished run of an earlier version, "
        found += "which recorded no settings to compare with"
        raise UsageError(f"{found}.", fix)
    changes = differences(done, identity)
    if not changes:
        return done
    decides = _deciding(changes, new_leg=config.new_leg)
    if not decides and any(name in changes for name in LENGTH):
        return None  # it is to go on
    found = f"{config.output}: holds a finished run with other settings: {'; '.join(changes.values())}"
    longer = "a higher max_steps trains it on"
    if decides:
        longer = "with what it was started with, a higher max_steps trains it on"
    if decides and not _deciding(changes, new_leg=True):
        longer = "--new-leg and a higher max_steps train it on with these sets"
    raise UsageError(f"{found}.", f"{fix[:-1]}; {longer}.")


def read_run(output: Path) -> Identity:
    """Return what `run.json` holds, nothing where there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    path = output / RUN_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{path}: damaged: {error}.", "start anew with --overwrite.") from None


def resume_point(
    config: TrainConfig, args: TrainingArguments, run: Identity, steps: int, say: Say
) -> Point | None:
    """Find the newest complete checkpoint; the main process alone looks and cleans, the others follow it.

    Args:
        run: the identity of this run.
        steps: how many it is to take.

    Raises:
        UsageError: the run changed, or has gone further already.
    """
    from accelerate.utils import broadcast_object_list

    shared: list[Point | None] = [None]
    if args.process_index == 0:
        shared = [_find(config, run, steps, say)]
    if args.world_size > 1:
        broadcast_object_list(shared)
    return shared[0]


def _find(config: TrainConfig, run: Identity, steps: int, say: Say) -> Point | None:
    output = config.output
    if config.overwrite:
        checkpoint.clear(output)
        for path in (path for pattern in _OF_A_RUN for path in output.glob(pattern)):
            path.unlink()
        cut_after(output, 0)
        return None
    newest = checkpoint.newest_complete(output)
    changes: list[str] = []
    if newest is not None:
        changes = check_unchanged(newest[1].run, run, newest[0], new_leg=config.new_leg)
    elif (output / RUN_NAME).exists():
        what = f"{output}: holds a finished run without a checkpoint."
        raise UsageError(what, "choose another output folder, or --overwrite.")
    step = newest[1].step if newest else 0
    if step > steps:
        found = (
            f"{output}: the run has taken {counted(step, 'step')}; {' and '.join(LENGTH)} ask for {steps:,}"
        )
        fix = "set a higher max_steps, choose another output folder, or --overwrite to start anew."
        raise UsageError(f"{found}.", fix)
    for name in checkpoint.remove_after(output, step):
        say(f"{output / name}: incomplete, removed")
    cut_after(output, step)
    if newest is None:
        return None
    say(f"resuming from {newest[0]} (step {step})")
    if "settings" not in newest[1].run:
        say(
            f"{newest[0]}: an earlier version wrote it without settings; they are taken to be the same as now"
        )
    if changes:
        say(f"new leg from step {step} on: {'; '.join(changes)}")
    return Point(newest[0], step, step if changes else cast(int, newest[1].run.get("first_step", 0)))


def identity_of(run: Run, sets: Sequence[ShardSet], evaluation: Mapping[str, ShardSet]) -> Identity:
    """Return what is known of a run's identity before its model is loaded, as plain JSON data."""
    config, args, objects = run.config, run.args, run.objects
    own = config.model_dump(mode="json", exclude=set(_NOT_COMPARED), exclude_defaults=True)
    training = {
        name: value
        for name, value in other_than_default(args).items()
        if name not in _NOT_COMPARED and acts(name, run)
    }
    held = {name: opened.manifest.digest for name, opened in evaluation.items()}
    classes = {name: _name(objects[name]) for name in _OBJECTS if objects.get(name) is not None}
    settings = {
        **own,
        **training,
        **({"eval": held} if held else {}),
        **classes,
        "learning_rate": args.learning_rate,
    }
    return {
        "sets": [opened.manifest.digest for opened in sets],
        "weights": list(config.set_weights),
        "mix": _shares(config),
        "mix_by": config.mix_by if config.mix else None,
        "tokenizer": [opened.manifest.tokenizer.sha256 for opened in sets],
        "chat_template": [opened.manifest.chat_template_sha256 for opened in sets],
        "model": str(config.model or config.init_from_config),
        "lora": config.lora.model_dump() if config.lora else None,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * share_of_rows(args)[1],
        "compute": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "settings": msgspec.json.decode(msgspec.json.encode(settings, enc_hook=str)),
        "adapter": str(config.adapter) if config.adapter else None,
    }


def differences(before: Identity, now: Identity) -> dict[str, str]:
    """Return what differs between two identities, by name, in words; what `now` lacks is left out.

    An earlier version recorded no settings: then they are not compared.
    """
    old, new = _flat(before, now), _flat(now, now)
    names = [
        name
        for name in {**old, **new}
        if "settings" in before or name in old or name.startswith(("adapter", "lora."))
    ]
    changed = [name for name in names if _compared(old, name) != _compared(new, name)]
    return {
        name: f"{_LABELS.get(name, name)} was {_shown(old, name)}, is {_shown(new, name)}" for name in changed
    }


def may_change(name: str) -> bool:
    """Say whether a run may go on with another value of a setting."""
    return name in MAY_CHANGE or name.startswith(_PREFIXES)


def check_unchanged(before: Identity, now: Identity, place: Path, *, new_leg: bool = False) -> list[str]:
    """Refuse to go on with what was begun with other data or other settings.

    Args:
        new_leg: let the run go on with other sets, in other proportions.

    Returns:
        How the data changed, in words: what makes a new leg.

    Raises:
        UsageError: naming every difference.
    """
    changes = differences(before, now)
    refused = _deciding(changes, new_leg=new_leg)
    if refused:
        only_data = not _deciding(changes, new_leg=True)
        on = "--new-leg to go on with these sets from here, " if only_data else ""
        raise UsageError(
            f"{place}: cannot resume, since the run changed: {'; '.join(changes[name] for name in refused)}.",
            f"use what it was started with, {on}another output folder, or --overwrite to start anew.",
        )
    told = [text for name, text in changes.items() if name in _TOLD]
    return told or [text for name, text in changes.items() if name in LEG]


def _deciding(changes: Mapping[str, str], *, new_leg: bool) -> list[str]:
    """Return which changes a run cannot go on with, by name."""
    return [name for name in changes if not may_change(name) and not (new_leg and name in LEG)]


def _flat(run: Identity, known: Identity) -> Identity:
    """Return an identity as single settings: those that `known` has, too."""
    flat = {name: run[name] for name in known if name in run and name not in ("settings", "lora")}
    if run.get("lora"):
        lora = LoraSettings.model_validate(run["lora"])
        flat |= {
            f"lora.{name}": value
            for name, value in {"r": lora.r, **lora.model_dump(exclude_defaults=True)}.items()
        }
    return flat | cast(Identity, run.get("settings", {}))


def _shares(config: TrainConfig) -> list[float] | None:
    """Return shares that sum up to 1, in the order of the sets, so that one mixture is always the same."""
    shares = config.set_shares()
    return [share / sum(shares) for share in shares] or None


def _compared(settings: Identity, name: str) -> object:
    value = settings.get(name)
    return set(value) if name in _OF_EACH_SET and isinstance(value, list) else value


def _shown(settings: Identity, name: str) -> str:
    value = settings.get(name)
    if isinstance(value, list) and name in ("sets", *_OF_EACH_SET):
        value = [digest and str(digest)[:_DIGEST] for digest in value]
    return f"{value!r:.200}" if value is not None else "not set"


def _name(given: object) -> str:
    """Name an object so that another one of another make is noticed."""
    if isinstance(given, tuple | list):
        return ", ".join(_name(part) for part in given)
    kind = given if hasattr(given, "__qualname__") else type(given)
    return f"{kind.__module__}.{kind.__qualname__}"
