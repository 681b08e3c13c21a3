"""Optimizer and schedule, tried on a stand-in before the first step: a package or an argument may be missing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from sftdata.errors import UsageError
from sfttrain.acting import Run
from sfttrain.fields import given_training, training_defaults

# Fields that some optimizers read and others do not.
_READ_BY_SOME = ("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
_WHOLE = ("model", "optimizer_dict")  # arguments of optimizers that take more than parameters


def try_optimizer(run: Run, model: Any, steps: int) -> None:
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
    stand_in = torch.nn.Parameter(torch.ones(8, 8, device=args.device))
    stand_in.grad = torch.ones_like(stand_in)
    try:
        optimizer = kind([stand_in], **{name: value for name, value in arguments.items() if name != "params"})
        optimizer.step()
    except Exception as error:  # whatever a foreign optimizer raises: it would raise it at the first step
        raise _refusal(f"optim={_plain(args.optim)}", error, "set optim=adamw_torch") from None
    _try_schedule(args, optimizer, steps)


def reads(name: str, args: Any, model: Any) -> bool:
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


def _try_schedule(args: Any, optimizer: Any, steps: int) -> None:
    from transformers import get_scheduler

    kind = args.lr_scheduler_type
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has no more steps to take
            schedule = get_scheduler(
                kind, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
            )
            schedule.step(*([0.0] if kind in ("reduce_lr_on_plateau", "greedy") else []))
    except Exception as error:  # as above
        given = f", lr_scheduler_kwargs={args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        found = f"lr_scheduler_type={_plain(kind)}{given}"
        raise _refusal(
            found, error, "set lr_scheduler_kwargs.NAME=VALUE, or lr_scheduler_type=cosine"
        ) from None


def _kind(args: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import Trainer

    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return kind, arguments


def _refusal(found: str, error: Exception, fix: str) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"{found}: cannot be used: {reason:.300}", f"{fix}.")


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
