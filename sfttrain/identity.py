"""What makes a run the same run: its data, and every setting that decides what is trained.

A checkpoint and `run.json` carry it. A run that goes on, or is asked for again, is compared with it, and refused by name
where they differ. Some settings may change on the way: how long it trains, what is saved, logged and evaluated, and how a
step is computed as far as that does not change the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from sftdata.errors import UsageError
from sftdata.shardset.opened import ShardSet
from sfttrain.acting import Run, acts
from sfttrain.config import LoraSettings
from sfttrain.fields import other_than_default

LENGTH = ("max_steps", "num_train_epochs")
_PREFIXES = (
    "logging_", "log_", "save_", "eval_", "trackio_", "dataloader_", "ddp_", "activation_checkpointing", "torch_compile",
)  # fmt: skip
MAY_CHANGE = frozenset({
    *LENGTH,
    "report_to", "run_name", "project", "skip_memory_metrics", "debug", "restore_callback_states_from_checkpoint",
    "eval", "per_device_eval_batch_size", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "include_for_metrics",
    "batch_eval_metrics", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "compute_metrics",
    "attention", "packing", "torch_empty_cache_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps",  # their product is compared, as global_batch
})  # fmt: skip
# Not compared: places, the machine, and what `identity_of` names in another way.
_APART = frozenset({
    "sets", "weights", "model", "init_from_config", "lora", "adapter", "eval", "training", "output", "overwrite", "push_to_hub",
    "trust_remote_code", "use_cpu", "dataloader_pin_memory", "disable_tqdm", "output_dir", "local_rank", "bf16", "fp16",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # older names; the new ones are compared,
})  # fmt: skip
_CALLED = {
    "global_batch": "global_batch (per_device_train_batch_size x gradient_accumulation_steps x processes)",
    "compute": "the dtype of computing (bf16, fp16)",
}
_OBJECTS = (
    "compute_loss_func",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "compute_metrics",
    "preprocess_logits_for_metrics",
)


def identity_of(run: Run, sets: Sequence[ShardSet], evaluation: Mapping[str, ShardSet]) -> dict[str, Any]:
    """Return what is known of a run's identity before its model is loaded, as plain JSON data."""
    config, args, objects = run.config, run.args, run.objects
    own = config.model_dump(mode="json", exclude=set(_APART), exclude_defaults=True)
    training = {
        name: value
        for name, value in other_than_default(args).items()
        if name not in _APART and acts(name, run)
    }
    held = {name: opened.manifest.digest for name, opened in evaluation.items()}
    found = {name: _name(objects[name]) for name in _OBJECTS if objects.get(name) is not None}
    settings = {
        **own,
        **training,
        **({"eval": held} if held else {}),
        **found,
        "learning_rate": args.learning_rate,
    }
    return {
        "sets": [opened.manifest.digest for opened in sets],
        "weights": list(config.set_weights),
        "tokenizer": [opened.manifest.tokenizer.sha256 for opened in sets],
        "chat_template": [opened.manifest.chat_template_sha256 for opened in sets],
        "model": str(config.model or config.init_from_config),
        "lora": config.lora.model_dump() if config.lora else None,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "compute": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "settings": msgspec.json.decode(msgspec.json.encode(settings, enc_hook=str)),
        "adapter": str(config.adapter) if config.adapter else None,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two identities, by name, in words; what `now` does not know yet is left out.

    An earlier version recorded no settings: then they are not compared.
    """
    old, new = _flat(before, now), _flat(now, now)
    names = [
        name
        for name in {**old, **new}
        if "settings" in before or name in old or name.startswith(("adapter", "lora."))
    ]
    changed = [name for name in names if old.get(name) != new.get(name)]
    return {
        name: f"{_CALLED.get(name, name)} was {_shown(old, name)}, is {_shown(new, name)}" for name in changed
    }


def may_change(name: str) -> bool:
    """Say whether a run may go on with another value of a setting."""
    return name in MAY_CHANGE or name.startswith(_PREFIXES)


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], place: Any) -> None:
    """Refuse to go on with what was begun with other data or other settings.

    Raises:
        UsageError: naming every difference.
    """
    changes = [text for name, text in differences(before, now).items() if not may_change(name)]
    if changes:
        raise UsageError(
            f"{place}: cannot resume, since the run changed: {'; '.join(changes)}.",
            "use what it was started with, another output folder, or --overwrite to start anew.",
        )


def _flat(run: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity as single settings: those that `known` has, too."""
    flat = {name: run[name] for name in known if name in run and name not in ("settings", "lora")}
    if run.get("lora"):
        lora = LoraSettings(**run["lora"])
        flat |= {
            f"lora.{name}": value
            for name, value in {"r": lora.r, **lora.model_dump(exclude_defaults=True)}.items()
        }
    return flat | dict(run.get("settings", {}))


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return f"{settings[name]!r:.200}" if settings.get(name) is not None else "not set"


def _name(given: Any) -> str:
    """Name an object so that another one of another make is noticed."""
    if isinstance(given, tuple | list):
        return ", ".join(_name(part) for part in given)
    kind = given if hasattr(given, "__qualname__") else type(given)
    return f"{kind.__module__}.{kind.__qualname__}"
