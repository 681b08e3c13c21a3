"""What cannot work, refused before the model is loaded: one line each, with what to do instead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from sftdata.errors import UsageError, did_you_mean
from sftdata.set.opened import ShardSet
from sfttrain.config import TrainConfig
from sfttrain.process import Say

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

# What from_pretrained took once, and where it is set here.
_MOVED = {
    "load_in_8bit": "--quantize int8 --lora r=16",
    "load_in_4bit": "--quantize nf4 --lora r=16",
    "use_flash_attention_2": "--attention flash_attention_2",
}
_LOADING = ("init_from_config", "revision", "dtype", "model_init_kwargs", "quantize", "trust_remote_code")
_TRAINER = ("torch", "transformers", "accelerate", "peft", "safetensors")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml")  # packages of the same name


def refuse_useless(
    config: TrainConfig,
    args: TrainingArguments,
    model: object,
    data: object,
    extras: Mapping[str, object],
    say: Say,
) -> None:
    """Refuse settings that cannot work together, before anything is read.

    Args:
        args: transformers' TrainingArguments.
        model, data: objects given instead of names, or None.
        extras: what transformers' Trainer takes as objects.

    Raises:
        UsageError: naming what to set instead.
    """
    _refuse_data(config, args, data)
    _refuse_loading(config, args)
    if model is not None:
        _refuse_object(config, model)
    _refuse_loss(config, args, extras)
    _refuse_evaluation(config, args, extras)
    if config.eval and args.eval_strategy == "no":
        say(
            f"evaluation: {' and '.join(config.eval)} is not evaluated while training; "
            "set eval_strategy=epoch or steps for that"
        )
    offload = isinstance(
        args.activation_checkpointing_kwargs, dict
    ) and args.activation_checkpointing_kwargs.get("offload")
    if offload and args.device.type == "cpu":
        raise UsageError(
            "activation_checkpointing_kwargs.offload: activations lie in host memory already.",
            "leave it out.",
        )
    if "bnb" in str(args.optim) or "8bit" in str(args.optim):
        require_package("bitsandbytes", f"optim={args.optim}", "quantize")
    for name in args.report_to or ():
        require_tracker(name)
    if config.push_to_hub:
        _refuse_push(config.push_to_hub)


def _refuse_data(config: TrainConfig, args: TrainingArguments, data: object) -> None:
    if not config.sets and data is None:
        raise UsageError("There is nothing to train on.", "name a folder that `sftdata prepare` wrote.")
    if data is not None and not hasattr(data, "__len__") and args.max_steps <= 0:
        raise UsageError("A stream has no end that is known.", "set max_steps.")
    if data is not None and config.log_documents:
        raise UsageError(
            "log_documents: rows of a dataset have no file and line.", "train on sets, or leave it out."
        )
    if data is not None and config.passes is not None:
        raise UsageError(
            "passes: bounds how often a set is gone through; this is a dataset of rows.",
            "train on sets, or leave it out.",
        )


def refuse_missing_launch(settings: Mapping[str, object]) -> None:
    """Refuse ways to spread a model over GPUs that lack their package or their launcher.

    Raises:
        UsageError: naming the command.
    """
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if settings.get("deepspeed") or by_accelerate:
        require_package("deepspeed", "DeepSpeed" if by_accelerate else "deepspeed")
    if settings.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        fix = "accelerate launch --config_file examples/accelerate/fsdp2.yaml -m sfttrain run ..."
        raise UsageError("fsdp: one process has nothing to shard over.", fix)


def refuse_architecture(config: TrainConfig, model_config: PreTrainedConfig, model: object = None) -> None:
    """Refuse a model that a run cannot train, by its config.

    Args:
        model: the object, where one was given.

    Raises:
        UsageError: it answers from an encoder, or its weights are quantized and would all be trained.
    """
    name = config.model or config.init_from_config
    if getattr(model_config, "is_encoder_decoder", False):
        found = f"{name}: {model_config.model_type} is a sequence-to-sequence model; "
        found += "a run trains causal language models."
        raise UsageError(
            found, "sfttrain.IterativeTrainer(model).step(texts=..., texts_labels=...) trains it."
        )
    quantized = getattr(model_config, "quantization_config", None) is not None
    if quantized and config.quantize:
        raise UsageError(
            f"{name}: is quantized already; quantize={config.quantize} would do so twice.",
            "leave quantize out.",
        )
    if quantized and not config.adapted and not hasattr(model, "peft_config"):
        raise UsageError(
            f"{name}: its weights are quantized and cannot be trained.",
            "train adapters on them, as --lora r=16.",
        )


def refuse_too_long(sets: Sequence[ShardSet], model_config: PreTrainedConfig, say: Say) -> None:
    """Refuse documents longer than a model's table of positions; with rotary positions, only note them.

    Raises:
        UsageError: a document is longer than the table of positions.
    """
    text = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    for opened in sets:
        length = opened.manifest.max_length
        if length is not None and length <= limit:
            continue
        longest = max((int(np.max(rows.seq_lengths)) for rows in opened.batches()), default=0)
        found = (
            f"{opened.folder}: a document has {longest:,} tokens; {text.model_type} was made for {limit:,}"
        )
        if longest > limit and getattr(text, "rope_parameters", None) is None:
            raise UsageError(f"{found} and has no positions beyond.", f"prepare with --max-length {limit}.")
        if longest > limit:
            say(found)


def _refuse_loading(config: TrainConfig, args: TrainingArguments) -> None:
    for name, instead in _MOVED.items():
        if config.model_init_kwargs.get(name):
            raise UsageError(f"model_init_kwargs.{name}: from_pretrained no longer takes it.", instead)
    if "device_map" in config.model_init_kwargs and args.world_size > 1:
        raise UsageError(
            "model_init_kwargs.device_map: each process has a device of its own.", "leave it out."
        )


def _refuse_object(config: TrainConfig, model: object) -> None:
    """A model that is at hand is not loaded, so what says how to load it would be ignored."""
    fields = TrainConfig.model_fields
    given = [
        name
        for name in _LOADING
        if getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]
    if given:
        found = f"{', '.join(given)}: the model is an object, which is loaded already"
        raise UsageError(f"{found}.", "load it so, or name the model.")
    if config.adapted and hasattr(model, "peft_config"):
        raise UsageError(
            "The model carries adapters already.",
            "leave lora and adapter out, or give the model without them.",
        )


def _refuse_loss(config: TrainConfig, args: TrainingArguments, extras: Mapping[str, object]) -> None:
    if config.kernels == "liger" and args.device.type == "cpu":
        raise UsageError(
            "kernels=liger: its kernels need a GPU, and the device is the CPU.", "set kernels=auto."
        )
    if config.kernels == "liger":
        require_package("liger_kernel", "kernels=liger", "gpu")
    if args.use_liger_kernel:
        found = "use_liger_kernel: would change transformers' classes, and bring a loss over all positions"
        raise UsageError(f"{found}.", "set kernels=liger.")
    if args.torch_compile:
        found = "torch_compile: the whole model is compiled anew for each number of documents"
        raise UsageError(f"{found}.", "set compile=layers.")
    if config.objective == "nll":
        return
    if config.loss == "plain":
        raise UsageError(
            f"objective={config.objective} is computed by our loss, not by loss={config.loss}.",
            "set loss=auto.",
        )
    if extras.get("compute_loss_func") is not None:
        raise UsageError(
            f"objective={config.objective}: compute_loss_func decides on the loss.", "leave one of them out."
        )


def _refuse_evaluation(config: TrainConfig, args: TrainingArguments, extras: Mapping[str, object]) -> None:
    data = extras.get("eval_dataset")
    names = [*config.eval, *(data if isinstance(data, dict) else ["data"] if data is not None else [])]
    for rows in data.values() if isinstance(data, dict) else [data]:
        if rows is not None and not hasattr(rows, "__len__"):
            raise UsageError(
                "eval_dataset: a stream has no end that is known.",
                "give rows with a length, or --eval NAME=FOLDER.",
            )
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if strategy != "no" and not names:
        raise UsageError(
            f"eval_strategy={strategy}: there is nothing to evaluate on.",
            "name a set, as --eval held=FOLDER.",
        )
    metric = str(args.metric_for_best_model or "").removeprefix("eval_")
    if not metric or extras.get("compute_metrics") is not None or strategy == "no":
        return
    if not any(metric.startswith(f"{name}_loss") for name in names):
        found = f"metric_for_best_model={args.metric_for_best_model}: evaluation gives no such figure"
        raise UsageError(f"{found}.", f"set metric_for_best_model=eval_{names[0]}_loss.")


def _refuse_push(repository: str) -> None:
    """Refuse now what would otherwise fail only once the run is done."""
    from huggingface_hub import get_token

    if repository.count("/") != 1:
        raise UsageError(f"push_to_hub={repository}: is no repository of the Hub.", "name it as user/model.")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UsageError(
            f"push_to_hub={repository}: HF_HUB_OFFLINE is set.", "unset it, or leave push_to_hub out."
        )
    if get_token() is None:
        raise UsageError(
            f"push_to_hub={repository}: no one is logged in to the Hub.", "hf auth login, or set HF_TOKEN."
        )


def require_trainer() -> None:
    """Refuse to train without the packages of the extra `train`.

    Raises:
        UsageError: naming the extra.
    """
    for package in _TRAINER:
        require_package(package, "sfttrain", "train")


def require_package(package: str, setting: str, extra: str = "") -> None:
    """Refuse a setting whose package is missing.

    Args:
        package: its name, as imported.
        setting: what needs it, as the user wrote it.
        extra: of this project, that brings it along.

    Raises:
        UsageError: the package is not installed.
    """
    if find_spec(package) is None:
        source = f"'sftdata[{extra}]'" if extra else package
        raise UsageError(f"{setting} needs the package {package}.", f"pip install {source}")


def require_tracker(name: str) -> None:
    """Refuse a tracker that transformers does not know, or whose package is not installed.

    Raises:
        UsageError: the tracker cannot be used.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        choices = f"choose among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
        fix = did_you_mean(name, INTEGRATION_TO_CALLBACK, choices)
        raise UsageError(f"report_to={name}: there is no such tracker.", fix)
    if name in _TRACKERS:  # of the others, transformers knows what they need
        require_package(name, f"report_to={name}")
