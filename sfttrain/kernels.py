"""Liger's kernels for norms, rotary factors and activations: on one model, never on transformers' classes.

The loss stays ours: Liger's computes the untrained positions too. A tiny model of the same architecture shows
first that the kernels round no more than plain PyTorch does in the dtype of training.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sftdata.errors import UsageError
from sfttrain.config import TrainConfig
from sfttrain.process import Say, reason_of
from sfttrain.proofs import Surroundings, remembered
from sfttrain.tiny import VOCABULARY, fixed_seed, full_float32, smallest_that_runs, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DEVICES = {"cuda"}  # where they run
_ROUNDING = 3.0  # how much more than plain PyTorch the kernels may round: logits and gradients, in the mean
_NEVER = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_TOKENS = 48
Options = dict[str, Any]


def add_kernels(
    config: TrainConfig, model: nn.Module, options: Options | None, where: Surroundings, say: Say
) -> bool:
    """Put Liger's kernels on a model where they are proven; return whether they are there.

    Args:
        config: `kernels=auto` leaves them out, with a reason, where `kernels=liger` refuses.
        model: without adapters.
        options: what Liger's own function for this family takes, as `{"rope": False}`.
        where: device and dtype of training.
        say: told what was decided.

    Raises:
        UsageError: they were asked for and cannot be used.
    """
    model_config: PreTrainedConfig = cast(Any, model).config
    reason = _unsupported_reason(model_config, where)
    if not reason:
        try:
            rounding, before = remembered(
                model_config,
                {"kernels": "liger", "options": options, **asdict(where)},
                float,
                lambda: prove_kernels(model_config, where, config.trust_remote_code, options or {}),
                config.prove_again,
            )
            reason = f"they round {rounding:.1f} times as much as plain PyTorch does" * (rounding > _ROUNDING)
        except Exception as error:  # whatever a kernel raises on a card that it does not know
            reason = f"they could not be tried on this architecture ({reason_of(error):.200})"
    if reason and config.kernels == "liger":
        raise UsageError(f"kernels=liger cannot be used: {reason}.", "set kernels=auto.")
    if reason:
        say(f"kernels: PyTorch's ({reason})")
        return False
    replaced = apply_liger(model, options or {})
    when = "before " * before
    say(f"kernels: Liger's for {', '.join(replaced)}, proven {when}on a tiny {model_config.model_type}")
    return True


def _unsupported_reason(model_config: PreTrainedConfig, where: Surroundings) -> str:
    if where.device not in DEVICES:
        return f"Liger's need a GPU and the device is {where.device}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed: pip install 'sftdata[gpu]'"
    try:
        known = _appliers()
    except Exception as error:  # a build for another triton or torch fails in many ways
        return f"liger_kernel does not import: {str(error).strip() or type(error).__name__:.200}"
    return "" if model_config.model_type in known else f"Liger does not know {model_config.model_type}"


def _appliers() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known: dict[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return known


def apply_liger(model: nn.Module, options: Options) -> list[str]:
    """Replace the kernels of one model; return the names of the functions and classes that were replaced.

    Liger's own function patches the modules of the model, which stays, and the names of the modelling code,
    which is undone; the model's functions that use those names get copies that see Liger's.
    """
    apply = _appliers()[cast(Any, model).config.model_type]
    known = inspect.signature(apply).parameters
    with _modelling_restored() as changed:
        apply(model=model, **{name: value for name, value in (options | _NEVER).items() if name in known})
    functions = {name: value for name, value in changed.items() if isinstance(value, types.FunctionType)}
    for module in model.modules():
        forward = getattr(module.forward, "__func__", None)
        if isinstance(forward, types.FunctionType) and not functions.keys().isdisjoint(
            forward.__code__.co_names
        ):
            cast(Any, module).forward = types.MethodType(_seeing(forward, functions), module)
    return sorted(changed)


def _seeing(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """Copy a function, with other values for some of the names of its module."""
    copied = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


@contextmanager
def _modelling_restored() -> Iterator[dict[str, Any]]:
    """Undo the changes of the block to transformers' modelling code; give them, by name, at the end."""
    spaces: list[Any] = [
        module for name, module in list(sys.modules.items()) if name.startswith("transformers.models.")
    ]
    spaces += [
        value
        for space in spaces
        for value in list(vars(space).values())
        if isinstance(value, type) and value.__module__ == space.__name__
    ]
    before = [dict(vars(space)) for space in spaces]
    changed: dict[str, Any] = {}
    try:
        yield changed
    finally:
        for space, old in zip(spaces, before, strict=True):
            for name, value in list(vars(space).items()):
                if name in old and value is not old[name]:
                    changed[name] = value
                    setattr(space, name, old[name])


def prove_kernels(config: PreTrainedConfig, where: Surroundings, trusted: bool, options: Options) -> float:
    """Return the error of the kernels in errors of plain PyTorch, both in the dtype of training.

    It is the larger one of logits and of gradients, measured from float32.

    Raises:
        Exception: whatever a kernel raises.
    """
    with fixed_seed(), full_float32():
        small = smallest_that_runs(config, trusted, where.reach)
        ids = torch.randint(3, VOCABULARY, (1, _TOKENS)).to(where.device)

        def outcome(fast: bool, dtype: torch.dtype) -> list[Tensor]:
            model: Any = tiny_model(copy.deepcopy(small), "eager", trusted).to(cast(Any, where.device))
            if fast:
                apply_liger(model, options)
            with torch.autocast(where.device, dtype=dtype, enabled=dtype != torch.float32):
                output = model(input_ids=ids, labels=ids)
            output.loss.backward()
            weights = [weight.grad for weight in model.parameters() if weight.grad is not None]
            return [output.logits.detach().float(), *(weight.float() for weight in weights)]

        exact = outcome(False, torch.float32)
        usual, fast = outcome(False, where.compute), outcome(True, where.compute)
    limit = 1e-5  # where the dtype is float32, plain PyTorch has no error
    return max(
        _error(fast[:1], exact[:1]) / max(_error(usual[:1], exact[:1]), limit),
        _error(fast[1:], exact[1:]) / max(_error(usual[1:], exact[1:]), limit),
    )


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the mean over tensors of the relative error."""
    if len(found) != len(exact):
        raise ValueError("not the same weights get a gradient")
    errors = [
        float((one - other).norm() / other.norm().clamp_min(1e-12))
        for one, other in zip(found, exact, strict=True)
    ]
    return sum(errors) / len(errors)
