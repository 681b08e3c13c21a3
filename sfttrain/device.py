"""What the GPU of this machine can do and hold: its driver, its kernels, bfloat16 and memory.

Activation checkpoints cost a quarter of a step, so there are none where a step fits without them:
needed = peak of the trial step + optimizer state + gradients kept while later micro-batches run
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from sftdata.errors import UsageError
from sfttrain.process import Say

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sfttrain.trainer import SftTrainer

DRIVER = Path("/proc/driver/nvidia/version")
_INSTEAD = "use_cpu=true trains on the CPU."
# Tensors as large as the weights that training holds: weights, gradients, and what the optimizer keeps.
_HELD = {"adamw_torch": 4, "adamw_torch_fused": 4, "sgd": 2}
_SHARE = 0.9  # of what is free: other batches differ, and the allocator leaves gaps
_MOMENTS = 2  # of Adam, in the dtype of the weights
_LAUNCHED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def check_device(settings: Mapping[str, object], dtype: str, say: Say) -> None:
    """Refuse a GPU that cannot be used as asked, and say what a GPU that is there is not used for.

    Args:
        settings: of TrainingArguments, as given.
        dtype: of the weights, as given.
        say: told what is not refused.

    Raises:
        UsageError: the driver or the GPU is too old for this PyTorch, or the GPU does not know the dtype.
    """
    if settings.get("use_cpu") or not (DRIVER.exists() or torch.cuda.is_available()):
        return
    if torch.version.cuda is None and torch.version.hip is None:
        say("devices: the CPU; there is an NVIDIA driver, but this PyTorch was built without CUDA")
    elif torch.cuda.is_available():
        _refuse_old_gpu()
        _check_bf16(settings, dtype, say)
    else:
        reason = _why_unavailable()
        if "too old" in reason:
            fix = (
                "update it, or install a PyTorch for an older CUDA "
                "(https://pytorch.org/get-started/previous-versions)"
            )
            raise UsageError(
                f"PyTorch {torch.__version__} cannot use the GPU: {reason}.", f"{fix}; {_INSTEAD}"
            )


def leave_gpus_idle(args: TrainingArguments, say: Say) -> None:
    """Keep transformers from DataParallel, which would split packed rows; log which GPUs stay idle."""
    count = args.n_gpu
    if count > 1:
        args._n_gpu = 1
        say(
            f"devices: 1 of {count} GPUs; torchrun --nproc-per-node {count} -m sfttrain run ... uses them all"
        )


def _refuse_old_gpu() -> None:
    known = [
        name.removeprefix("sm_").rstrip("af") for name in torch.cuda.get_arch_list() if name.startswith("sm_")
    ]
    oldest = min(((int(name[:-1]), int(name[-1])) for name in known), default=(0, 0))
    found = torch.cuda.get_device_capability()
    if found < oldest:
        name = f"{torch.cuda.get_device_name()} (compute capability {found[0]}.{found[1]})"
        raise UsageError(
            f"{name}: this PyTorch has kernels for {oldest[0]}.{oldest[1]} and newer.",
            f"install an older PyTorch, which has them; {_INSTEAD}",
        )


def _check_bf16(settings: Mapping[str, object], dtype: str, say: Say) -> None:
    if computes_in_bf16():
        return
    name = torch.cuda.get_device_name()
    if settings.get("bf16"):
        raise UsageError(
            f"bf16=true: {name} does not compute in bfloat16.",
            "set fp16=true, or leave bf16 out for float32.",
        )
    if dtype == "bfloat16":
        raise UsageError(
            f"dtype=bfloat16: {name} does not compute in bfloat16.",
            "set dtype=float32, or dtype=float16 with --lora.",
        )
    if not settings.get("fp16"):
        say(f"compute: float32, since {name} does not compute in bfloat16; fp16=true is faster")


def _why_unavailable() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split(". ")[0]
    return ""


def computes_in_bf16() -> bool:
    """Say whether this machine's GPU computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def refuse_too_large(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Refuse a model whose weights, gradients and optimizer state alone are more than the GPU has.

    Args:
        model: as loaded, wherever it is.
        args: of the run; what is sharded over several GPUs is not judged.

    Raises:
        UsageError: naming both sizes, and ways to train with less.
    """
    if args.device.type != "cuda" or sharded(args) or getattr(model, "hf_device_map", None):
        return
    held = _HELD.get(str(getattr(args.optim, "value", args.optim)), 1)
    weights = [
        (weight.numel() * weight.element_size(), weight.requires_grad) for weight in model.parameters()
    ]
    needed = sum(size * (held if trained else 1) for size, trained in weights)
    whole = torch.cuda.mem_get_info()[1]
    if needed > whole:
        found = f"weights, gradients and optimizer state take {needed / 1e9:.1f} GB"
        fix = "--lora r=16, with --quantize nf4 if need be; optim=adamw_bnb_8bit; or several GPUs with FSDP."
        raise UsageError(f"The model does not fit: {found}, and the GPU has {whole / 1e9:.1f} GB.", fix)


def sharded(args: TrainingArguments) -> bool:
    """Say whether ranks have parts of the weights, by a setting or by what launched them."""
    return bool(args.fsdp or args.deepspeed) or any(os.environ.get(name) == "true" for name in _LAUNCHED)


def out_of_memory(error: RuntimeError, step: int) -> UsageError | None:
    """Return the error of a device out of memory at a step, or at the model (step 0); None for others."""
    reason = str(error).strip().split("\n")[0]
    host = "DefaultCPUAllocator: can't allocate memory"
    if not isinstance(error, torch.OutOfMemoryError) and host not in reason:
        return None
    reason = host if host in reason else reason.split(". ")[0]
    if not step:
        return UsageError(
            f"The model does not fit: {reason}.", "--lora r=16, --quantize nf4, or a smaller model."
        )
    fix = (
        "set activation_checkpointing=true, a smaller batch, --lora, or prepare with a smaller --max-length."
    )
    return UsageError(f"Step {step:,} does not fit: {reason}.", fix)


def by_memory(trainer: SftTrainer) -> bool:
    """Say whether memory decides on activation checkpoints; turn them off for models that have none."""
    args = trainer.args
    asked = bool(getattr(args, "checkpoints_by_memory", False))
    if asked and not getattr(trainer.model, "supports_gradient_checkpointing", False):
        args.activation_checkpointing = args.gradient_checkpointing = False
        return False
    return asked


def measurable() -> bool:
    """Say whether the memory of the device can be measured."""
    return bool(torch.cuda.is_available())


def switch(trainer: SftTrainer, on: bool) -> None:
    """Turn activation checkpoints on or off, for the trial and for training."""
    args, model = trainer.args, trainer.model
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
            "activation checkpoints: on, since rows differ in length "
            "and the first batch says little of others"
        )
        return False
    switch(trainer, False)
    fits, found = try_room(trainer, step)
    say(f"activation checkpoints: {'off' if fits else 'on'}, a step without them {found}")
    if not fits:
        reset_peak()
        switch(trainer, True)
    return fits


def try_room(trainer: SftTrainer, step: Callable[[], object]) -> tuple[bool, str]:
    """Take a trial step; return whether training fits with it, on all ranks, and what it needs, in words."""
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
    return fits, "does not fit" if needed is None else f"needs {needed / 1e9:.1f} of {free / 1e9:.0f} GB"


def _state(trainer: SftTrainer) -> int:
    """Return the bytes that training holds besides a trial step: moments, and gradients that accumulate."""
    trained = [weight for weight in cast(torch.nn.Module, trainer.model).parameters() if weight.requires_grad]
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
