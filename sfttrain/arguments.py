"""From a configuration to transformers' TrainingArguments, and back to what a run records of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import torch

from sftdata.errors import UsageError
from sfttrain import activations, refusals
from sfttrain.acting import Run, acts, checked_training, named_as_installed
from sfttrain.config import TrainConfig
from sfttrain.model import computes_in_bf16
from sfttrain.preflight import reads

if TYPE_CHECKING:
    from transformers import TrainingArguments


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Return transformers' TrainingArguments for a configuration.

    Raises:
        UsageError: transformers refuses a value.
    """
    from transformers import TrainingArguments

    settings = {"output_dir": str(config.output), "disable_tqdm": True, **checked_training(config.training)}
    refusals.refuse_missing_launch(settings)
    settings.setdefault("learning_rate", config.learning_rate)
    # Otherwise ranks without a GPU find no backend.
    settings.setdefault("use_cpu", not torch.accelerator.is_available())
    settings.setdefault("dataloader_pin_memory", torch.accelerator.is_available())
    settings.setdefault("bf16", computes_in_bf16() and not settings.get("fp16"))
    spread = any(settings.get(name) for name in ("fsdp", "deepspeed", "use_cpu"))
    by_memory = "activation_checkpointing" not in settings and activations.measurable() and not spread
    if by_memory:  # until the trial step shows that there is room without
        settings["activation_checkpointing"] = True
    if settings.get("activation_checkpointing"):
        # Reentrant checkpoints run a parameter's hooks twice, which DDP refuses.
        settings["activation_checkpointing_kwargs"] = {
            "use_reentrant": False,
            **_given(settings, "activation_checkpointing_kwargs"),
        }
    if settings.get("save_total_limit") == 1:
        raise UsageError(
            "save_total_limit=1 leaves no complete checkpoint while the next is written.", "set 2 or more."
        )
    try:
        args = TrainingArguments(**named_as_installed(settings))
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"Training settings: {reason}", "see `sfttrain config`.") from None
    if not hasattr(args, "activation_checkpointing"):  # older transformers have another name for it
        old: Any = args
        old.activation_checkpointing, old.activation_checkpointing_kwargs = (
            old.gradient_checkpointing,
            old.gradient_checkpointing_kwargs,
        )
    cast(Any, args).checkpoints_by_memory = by_memory
    return args


def effective_settings(run: Run, model: Any = None) -> dict[str, Any]:
    """Return every setting that acts, with defaults resolved, as plain data.

    Args:
        model: the model that is trained, where there is one; low-rank optimizers look into it.
    """
    own = run.config.model_dump(mode="json", exclude={"training"})
    fields = run.args.to_dict().items()
    return own | {
        "training": {key: value for key, value in fields if acts(key, run) and reads(key, run.args, model)}
    }


def _given(settings: dict[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name) or {}
    return dict(json.loads(value) if isinstance(value, str) else value)
