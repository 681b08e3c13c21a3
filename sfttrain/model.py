"""The model to train: loaded or given, embeddings resized, loss fused, adapters added."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from sftdata.errors import UsageError
from sftdata.set.opened import ShardSet
from sfttrain.adapters import add_adapters, continue_adapters, has_adapted_head, prepare_quantized
from sfttrain.attention import attentions, auto_class, registered_name
from sfttrain.checkpoint import refuse_weights
from sfttrain.config import TrainConfig
from sfttrain.device import computes_in_bf16, sharded
from sfttrain.forward import disable_cache, share_terms
from sfttrain.loss import Objective, fuse_loss
from sfttrain.masks import keep_apart
from sfttrain.process import Say, reason_of
from sfttrain.refusals import require_package
from sfttrain.towers import frozen_parts, keep_in_step
from sfttrain.vocabulary import align_special_tokens, resize_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from sfttrain.path import Plan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Return the weights' dtype: float32 where they are trained, since small updates vanish in 16 bit."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.bfloat16 if config.adapted and computes_in_bf16() else torch.float32


def load_config(config: TrainConfig) -> PreTrainedConfig:
    """Return the model's transformers config.

    Raises:
        UsageError: there is none, or it cannot be used.
    """
    from transformers import AutoConfig

    source = str(config.init_from_config or config.model)
    try:
        model_config: PreTrainedConfig = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(source, error, config.trust_remote_code) from None
    for name, value in config.model_init_kwargs.items():
        owner = _owner(model_config, name)
        if owner is not None:
            setattr(owner, name, value)
        elif config.init_from_config is not None:
            what = f"model_init_kwargs.{name}: {model_config.model_type} has no such field in its config."
            raise UsageError(what, "leave it out.")
    return model_config


def _owner(model_config: PreTrainedConfig, name: str) -> PreTrainedConfig | None:
    """Return the config that has a field: the model's own, its text part's, or None."""
    text = model_config.get_text_config()
    return next((one for one in (model_config, text) if hasattr(one, name)), None)


def load_model(
    config: TrainConfig, model_config: PreTrainedConfig, attention: str, device: torch.device, pictured: bool
) -> PreTrainedModel:
    """Return the model with its weights, or with fresh ones under `init_from_config`.

    Args:
        device: where a quantized base goes, which cannot be moved later; one device per process.

    Raises:
        UsageError: no safetensors, or transformers cannot load it.
    """
    dtype, kind = weight_dtype(config), auto_class(model_config, pictured)
    implementation = attentions(attention, model_config, pictured)
    if config.init_from_config is not None:
        fresh: PreTrainedModel = kind.from_config(
            model_config,
            attn_implementation=implementation,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )
        return fresh
    source = str(config.model)
    refuse_weights(Path(source))
    arguments: dict[str, object] = {
        "config": model_config,
        "revision": config.revision,
        "dtype": dtype,
        "attn_implementation": implementation,
        "use_safetensors": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.quantize is not None:
        arguments |= {"quantization_config": _quantization(config.quantize), "device_map": {"": device}}
    try:
        more = {
            name: value
            for name, value in config.model_init_kwargs.items()
            if _owner(model_config, name) is None
        }
        return kind.from_pretrained(source, **(arguments | more))
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise _unusable(source, error, config.trust_remote_code) from None


def describe_model(model: nn.Module, config: TrainConfig) -> str:
    """Describe what was loaded, defaults included."""
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    revision = f", revision {config.revision}" if config.revision else ""
    more = "".join(f", {key}={value}" for key, value in config.model_init_kwargs.items())
    quantized = f", base quantized to {config.quantize}" if config.quantize else ""
    return f"model: {type(model).__name__} in {' and '.join(dtypes)}{quantized}{revision}{more}"


def _quantization(kind: str) -> QuantizationConfigMixin:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao-int8":
        require_package("torchao", f"quantize={kind}", "torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    require_package("bitsandbytes", f"quantize={kind}", "quantize")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if computes_in_bf16() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _unusable(source: str, error: Exception, trusted: bool) -> UsageError:
    text = reason_of(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        found = f"{source}: model_init_kwargs.{unknown[1]}: "
        found += "neither a field of its config nor an argument of from_pretrained"
        return UsageError(f"{found}.", "leave it out.")
    if "trust_remote_code" in str(error) and not trusted:
        what = f"{source}: brings its own code."
        return UsageError(what, "read that code; if you trust it, add --trust-remote-code.")
    what = f"{source}: transformers cannot load it: {text}"
    return UsageError(what, "name a folder or Hub id of a causal language model.")


def make_model(
    config: TrainConfig,
    model_config: PreTrainedConfig,
    model: PreTrainedModel | None,
    plan: Plan,
    sets: list[ShardSet],
    args: TrainingArguments,
    say: Say,
) -> tuple[PreTrainedModel, Plan]:
    """Return the model to train, and the plan, without the chunked loss where the model rules it out."""
    from transformers import set_seed

    set_seed(args.seed)
    if model is None:
        model = load_model(config, model_config, plan.attention, args.device, plan.pictures is not None)
        say(describe_model(model, config))
    elif model.config._attn_implementation != registered_name(plan.attention):
        model.set_attn_implementation(attentions(plan.attention, model.config, plan.pictures is not None))
    unwrap = getattr(model, "get_base_model", None)
    inner: PreTrainedModel = model if unwrap is None else unwrap()
    disable_cache(inner)
    _freeze(inner, plan.unreached, "nothing from text", say)
    towers = [] if plan.pictures is None else frozen_parts(inner, config.freeze, config.adapted)
    _freeze(inner, towers, "no gradient; --freeze says what does", say)
    keep_apart(inner, plan.restart, plan.pictures)
    untrained = resize_embeddings(inner, sets, config.resize_to_multiple_of, say)
    align_special_tokens(inner, sets)
    if plan.loss is not None and _zero_stage(args) == 3:
        plan = _own_loss(plan, config, "ZeRO-3 keeps the head whole only inside its own module", say)
    if plan.loss is not None:
        fuse_loss(
            inner, plan.loss, Objective(config.objective == "dft", args.label_smoothing_factor), plan.terms
        )
    model = _adapt(config, model, inner, untrained, (*plan.unreached, *towers), args, say)
    if plan.pictures is not None:
        keep_in_step(inner, plan.pictures, sharded(args), say)
    if plan.loss is not None and has_adapted_head(inner):
        plan = _own_loss(plan, config, "adapters on the head", say)
    if plan.loss is None and plan.terms:
        share_terms(inner)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        what = "No weight of the model is trained."
        raise UsageError(what, "load adapters with is_trainable=True, or set lora.")
    return model, plan


def outline(
    config: TrainConfig,
    model_config: PreTrainedConfig,
    plan: Plan,
    sets: list[ShardSet],
    args: TrainingArguments,
) -> PreTrainedModel:
    """Return the model to train without its weights, which only its shapes can be asked of."""
    pictured = plan.pictures is not None
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(model_config, pictured).from_config(
            model_config,
            attn_implementation=attentions(plan.attention, model_config, pictured),
            dtype=weight_dtype(config),
            trust_remote_code=config.trust_remote_code,
        )
        return make_model(config, model_config, model, plan, sets, args, lambda _: None)[0]


def _freeze(model: nn.Module, names: Sequence[str], why: str, say: Say) -> None:
    """Freeze modules that are not trained: ranks would wait for the gradient of what text never reaches."""
    modules = dict(model.named_modules())
    frozen = [name for name in names if name in modules]
    for name in frozen:
        modules[name].requires_grad_(False)
    if frozen:
        say(f"frozen: {', '.join(frozen)} ({'they get' if len(frozen) > 1 else 'it gets'} {why})")


def _adapt(
    config: TrainConfig,
    model: PreTrainedModel,
    inner: PreTrainedModel,
    untrained: list[int],
    excluded: Sequence[str],
    args: TrainingArguments,
    say: Say,
) -> PreTrainedModel:
    """Freeze the model and put adapters on it, where they are asked for."""
    if config.adapted and getattr(model, "is_quantized", False):
        model = prepare_quantized(model)
    if args.activation_checkpointing and (config.adapted or model is not inner):
        inner.enable_input_require_grads()  # checkpointed layers pass no gradient on to inputs that want none
    if config.lora is not None:
        adapted = add_adapters(model, config.lora, untrained, excluded, say)
        return cast("PreTrainedModel", adapted)  # peft's wrapper answers as the model inside it
    if config.adapter is not None:
        return cast("PreTrainedModel", continue_adapters(model, config.adapter, str(config.model)))
    return model


def _own_loss(plan: Plan, config: TrainConfig, reason: str, say: Say) -> Plan:
    for name, usual in (("objective", "nll"), ("sequence_parallel", 1)):
        if (value := getattr(config, name)) != usual:
            found = f"{name}={value} needs our loss, which cannot be used: {reason}"
            raise UsageError(f"{found}.", f"set {name}={usual}.")
    say(f"loss: the model's own, with full logits ({reason})")
    return dataclasses.replace(plan, loss=None)


def _zero_stage(args: TrainingArguments) -> int | None:
    """DeepSpeed's stage, from `deepspeed=...` or from accelerate's file."""
    return getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", None)


@contextmanager
def whole_weights(args: TrainingArguments) -> Iterator[None]:
    """Load models whole on every rank, to resize embeddings; ZeRO-3 shards them when training begins."""
    if _zero_stage(args) != 3:
        yield
        return
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known
