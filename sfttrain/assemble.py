"""The model as it is trained: loaded or given, its embeddings fitted to the sets, its loss fused, its adapters added."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sftdata.errors import UsageError
from sftdata.shardset.opened import ShardSet
from sfttrain.adapters import add_adapters, continue_adapters, has_adapted_head, prepare_quantized
from sfttrain.attention import registered_name
from sfttrain.config import TrainConfig
from sfttrain.loss import Objective, fuse_loss
from sfttrain.model import describe_model, disable_cache, load_model
from sfttrain.path import Plan
from sfttrain.rotary import keep_rotary_apart
from sfttrain.talk import Say
from sfttrain.terms import share_terms
from sfttrain.vocabulary import align_special_tokens, fit_vocabulary


def make_model(
    config: TrainConfig, model_config: Any, model: Any, plan: Plan, sets: list[ShardSet], args: Any, say: Say
) -> tuple[Any, Plan]:
    """Return the model as it is trained, and the plan without the chunked loss where the model rules that out."""
    from transformers import set_seed

    set_seed(args.seed)
    if model is None:
        model = load_model(config, model_config, plan.attention, args.device)
        say(describe_model(model, config))
    elif model.config._attn_implementation != registered_name(plan.attention):
        model.set_attn_implementation(registered_name(plan.attention))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    disable_cache(inner)
    _freeze(inner, plan.unreached, say)
    if plan.restart:
        keep_rotary_apart(inner)
    unlearnt = fit_vocabulary(inner, sets, config.resize_to_multiple_of, say)
    align_special_tokens(inner, sets)
    if plan.loss is not None and _zero_stage(args) == 3:
        plan = _own_loss(plan, config, "ZeRO-3 keeps the head whole only inside its own module", say)
    if plan.loss is not None:
        fuse_loss(
            inner, plan.loss, Objective(config.objective == "dft", args.label_smoothing_factor), plan.terms
        )
    model = _adapt(config, model, inner, unlearnt, plan, args, say)
    if plan.loss is not None and has_adapted_head(inner):
        plan = _own_loss(plan, config, "adapters on the head", say)
    if plan.loss is None and plan.terms:
        share_terms(inner)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "No weight of the model is trained.", "load adapters with is_trainable=True, or set lora."
        )
    return model, plan


def _freeze(model: Any, names: tuple[str, ...], say: Say) -> None:
    """Freeze what text never reaches, such as a vision tower: ranks would wait for its gradient."""
    modules = dict(model.named_modules())
    found = [name for name in names if name in modules]
    for name in found:
        modules[name].requires_grad_(False)
    if found:
        say(f"frozen: {', '.join(found)} ({'they get' if len(found) > 1 else 'it gets'} nothing from text)")


def _adapt(
    config: TrainConfig, model: Any, inner: Any, unlearnt: list[int], plan: Plan, args: Any, say: Say
) -> Any:
    """Freeze the model and put adapters on it, where they are asked for."""
    if config.adapted and getattr(model, "is_quantized", False):
        model = prepare_quantized(model)
    if args.activation_checkpointing and (config.adapted or model is not inner):
        inner.enable_input_require_grads()  # checkpointed layers pass no gradient on to inputs that want none
    if config.lora is not None:
        return add_adapters(model, config.lora, unlearnt, plan.unreached, say)
    if config.adapter is not None:
        return continue_adapters(model, config.adapter, str(config.model))
    return model


def _own_loss(plan: Plan, config: TrainConfig, reason: str, say: Say) -> Plan:
    if config.objective != "nll":
        raise UsageError(
            f"objective={config.objective} needs our loss, which cannot be used: {reason}.",
            "set objective=nll.",
        )
    say(f"loss: the model's own, with full logits ({reason})")
    return dataclasses.replace(plan, loss=None)


def _zero_stage(args: Any) -> int | None:
    """DeepSpeed's stage, from `deepspeed=...` or from accelerate's file."""
    return getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", None)


@contextmanager
def whole_weights(args: Any) -> Iterator[None]:
    """Make models whole on every rank, as the sets must be fitted to them; ZeRO-3 takes them apart when training begins."""
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


def leave_gpus_idle(args: Any, say: Say) -> None:
    """Keep transformers from DataParallel, which would cut packed rows in two; say which GPUs that leaves idle."""
    count = args.n_gpu
    if count > 1:
        args._n_gpu = 1
        say(
            f"devices: 1 of {count} GPUs; torchrun --nproc-per-node {count} -m sfttrain run ... uses them all"
        )
