"""What the GPU of this machine can do and hold: its driver, its kernels, bfloat16 and memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftdata.errors import UsageError
from sfttrain.process import Say, reason_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

DRIVER = Path("/proc/driver/nvidia/version")
_INSTEAD = "use_cpu=true trains on the CPU."
# Tensors as large as the weights that training holds: weights, gradients, and what the optimizer keeps.
_HELD = {"adamw_torch": 4, "adamw_torch_fused": 4, "sgd": 2}
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
            what = f"PyTorch {torch.__version__} cannot use the GPU: {reason}."
            raise UsageError(what, f"{fix}; {_INSTEAD}")


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
        what = f"{name}: this PyTorch has kernels for {oldest[0]}.{oldest[1]} and newer."
        raise UsageError(what, f"install an older PyTorch, which has them; {_INSTEAD}")


def _check_bf16(settings: Mapping[str, object], dtype: str, say: Say) -> None:
    if computes_in_bf16():
        return
    name = torch.cuda.get_device_name()
    if settings.get("bf16"):
        what = f"bf16=true: {name} does not compute in bfloat16."
        raise UsageError(what, "set fp16=true, or leave bf16 out for float32.")
    if dtype == "bfloat16":
        what = f"dtype=bfloat16: {name} does not compute in bfloat16."
        raise UsageError(what, "set dtype=float32, or dtype=float16 with --lora.")
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
    needed = weight_bytes(model, trained=False) + held * weight_bytes(model, trained=True)
    whole = torch.cuda.mem_get_info()[1]
    if needed > whole:
        found = f"weights, gradients and optimizer state take {needed / 1e9:.1f} GB"
        fix = "--lora r=16, with --quantize nf4 if need be; optim=adamw_bnb_8bit; or several GPUs with FSDP."
        raise UsageError(f"The model does not fit: {found}, and the GPU has {whole / 1e9:.1f} GB.", fix)


def weight_bytes(module: torch.nn.Module, trained: bool | None = None) -> int:
    """Return the bytes of a module's weights: of those that are trained, of those that are not, or of all."""
    weights = [weight for weight in module.parameters() if trained in (None, weight.requires_grad)]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def sharded(args: TrainingArguments) -> bool:
    """Say whether ranks have parts of the weights, by a setting or by what launched them."""
    return bool(args.fsdp or args.deepspeed) or any(os.environ.get(name) == "true" for name in _LAUNCHED)


def out_of_memory(error: RuntimeError, step: int) -> UsageError | None:
    """Return the error of a device out of memory at a step, or at the model (step 0); None for others."""
    reason = reason_of(error)
    host = "DefaultCPUAllocator: can't allocate memory"
    if not isinstance(error, torch.OutOfMemoryError) and host not in reason:
        return None
    reason = host if host in reason else reason.split(". ")[0]
    if not step:
        what = f"The model does not fit: {reason}."
        return UsageError(what, "--lora r=16, --quantize nf4, or a smaller model.")
    fix = (
        "set activation_checkpointing=true, a smaller batch, --lora, or prepare with a smaller --max-length."
    )
    return UsageError(f"Step {step:,} does not fit: {reason}.", fix)


def measurable() -> bool:
    """Say whether the memory of the device can be measured."""
    return bool(torch.cuda.is_available())


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
