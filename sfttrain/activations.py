"""Activation checkpoints by the memory there is: none where a step fits without them, since they cost a quarter of it.

needed = peak of the trial step + optimizer state + gradients kept while later micro-batches run
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from sftdata.errors import UsageError
from sfttrain.process import Say

if TYPE_CHECKING:
    from sfttrain.trainer import SftTrainer

_SHARE = 0.9  # of what is free: other batches differ, and the allocator leaves gaps
_MOMENTS = 2  # of Adam, in the dtype of the weights


def by_memory(trainer: SftTrainer) -> bool:
    """Say whether activation checkpoints are left to the memory that there is; turn them off where none are known."""
    args, model = cast(Any, trainer.args), trainer.model
    asked = bool(getattr(args, "checkpoints_by_memory", False))
    if asked and not getattr(model, "supports_gradient_checkpointing", False):
        args.activation_checkpointing = args.gradient_checkpointing = False
        return False
    return asked


def measurable() -> bool:
    """Say whether the memory of the device can be measured."""
    return bool(torch.cuda.is_available())


def switch(trainer: SftTrainer, on: bool) -> None:
    """Turn activation checkpoints on or off, for the trial and for training."""
    args, model = cast(Any, trainer.args), cast(Any, trainer.model)
    args.activation_checkpointing = on
    if hasattr(args, "gradient_checkpointing"):  # what older transformers read
        args.gradient_checkpointing = on
    if on:
        trainer.checkpoint_activations()
        return
    word = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    getattr(model, f"{word}_checkpointing_disable")()


def drop_where_they_fit(trainer: SftTrainer, step: Callable[[], object], say: Say) -> bool:
    """Try a step without activation checkpoints; leave them on where it needs too much.

    Args:
        trainer: with activation checkpoints on.
        step: takes the trial step, and raises UsageError where it does not fit.
        say: told what was decided.

    Returns:
        Whether they are off, with the step taken last.
    """
    if trainer.run["unpack"]:
        say(
            "activation checkpoints: on, since rows differ in length and the first batch says little of others"
        )
        return False
    switch(trainer, False)
    reset_peak()
    try:
        step()
    except UsageError:
        needed = None
    else:
        needed = peak() + _state(trainer)
    free = room()
    fits = needed is not None and needed <= _SHARE * free
    if trainer.args.world_size > 1:
        flag = torch.tensor(float(fits), device=trainer.args.device)
        fits = float(trainer.accelerator.reduce(flag, "sum")) == trainer.args.world_size
    found = "does not fit" if needed is None else f"needs {needed / 1e9:.1f} of {free / 1e9:.0f} GB"
    say(f"activation checkpoints: {'off' if fits else 'on'}, a step without them {found}")
    if not fits:
        reset_peak()
        switch(trainer, True)
    return fits


def _state(trainer: SftTrainer) -> int:
    """Bytes that training holds beside the trial step: moments, and gradients that later micro-batches add to."""
    trained = [weight for weight in cast(Any, trainer.model).parameters() if weight.requires_grad]
    size: int = sum(weight.numel() * weight.element_size() for weight in trained)
    return (_MOMENTS + (trainer.args.gradient_accumulation_steps > 1)) * size


def reset_peak() -> None:
    """Forget the largest use of memory so far, and what a failed step still holds."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Return the most bytes that tensors have taken since `reset_peak`."""
    return int(torch.cuda.max_memory_allocated())


def room() -> int:
    """Return the bytes of the device that this process has or could have."""
    return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
