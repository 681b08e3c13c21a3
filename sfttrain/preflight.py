"""What is tried with the model itself before step 1: its checkpoints find room, and a step works."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sftdata.errors import DataError, UsageError
from sfttrain import checkpoint
from sfttrain.data import Batch
from sfttrain.talk import Say

if TYPE_CHECKING:
    from sfttrain.trainer import SftTrainer


def check_fit(trainer: SftTrainer, compute: torch.dtype, steps: int, say: Say) -> None:
    """Check room on the disk, try one step as training will take it, and say what the run will need.

    Raises:
        SftError: the disk or the device has too little room, or the loss is no number.
    """
    args = trainer.args
    if args.save_strategy != "no" and args.process_index == 0:
        kept = args.save_total_limit or 2
        checkpoint.require_space(
            Path(str(args.output_dir)), (min(kept, 2) + 1) * checkpoint_bytes(trainer.model)
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        say("trial step: left out, since the model is not sharded yet")
        return
    trainer.checkpoint_activations()
    rows, batch = 1, _trial_batch(trainer)
    if (
        args.device.type == "cpu"
    ):  # where memory is not what a step can lack, one row tells as much as the batch
        rows = args.train_batch_size
    cast = torch.autocast(args.device.type, dtype=compute, enabled=compute != torch.float32)
    seconds = try_step(trainer.model, batch, trainer.fused, cast) * rows * args.gradient_accumulation_steps
    say(f"memory: {describe_memory(trainer.model)}")
    about = f"about {seconds * steps / 60:.1f} minutes at {seconds:.2f} s a step, from a cold one"
    say(f"plan: {steps:,} steps of {trainer.run['global_batch']} rows; {about}")


def _trial_batch(trainer: SftTrainer) -> Batch:
    """Return the first batch, on a CPU its first row."""
    if trainer.args.device.type == "cpu" and trainer.order is not None:
        rows: Any = trainer.train_dataset
        return dict(trainer._prepare_inputs(trainer.data_collator([rows[next(iter(trainer.order))[0]]])))
    return dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))


def checkpoint_bytes(model: Any) -> int:
    """Bytes of one checkpoint: the weights that are saved, and two Adam moments per trained weight."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return 3 * int(trained) + (0 if hasattr(model, "peft_config") else int(frozen))


def try_step(model: Any, batch: Batch, fused: bool, cast: AbstractContextManager[Any]) -> float:
    """Run one forward and backward; return its seconds. Weights, gradients and random state stay as they were.

    Raises:
        UsageError: the device has too little memory.
        DataError: the loss is no finite number.
    """
    started = time.perf_counter()
    extra = {"skip_logits": True} if fused else {}
    model.train()
    try:
        with torch.random.fork_rng(), cast:
            loss = model(**batch, **extra).loss
        loss.backward()
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"One forward and backward does not fit: {reason}.",
            "set activation_checkpointing=true, a smaller batch, --lora, or prepare with a smaller --max-length.",
        ) from None
    finally:
        model.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"The loss of the first batch is {value}.", "check the model's weights and dtype.")
    return time.perf_counter() - started


def describe_memory(model: Any) -> str:
    """Say what the weights, their gradients and Adam's moments take."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    text = f"{total:,} parameters, {trained:,} trained; "
    text += f"weights {weights / 1e9:.2f} GB, gradients and optimizer {state / 1e9:.2f} GB"
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        text += f"; trial step peaked at {peak:.2f} of {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB"
    return text
