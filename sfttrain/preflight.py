"""Checks before step 1: room for checkpoints and in memory, what is compiled, a finite loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers import TrainerCallback

from sftdata.errors import DataError, UsageError
from sfttrain import checkpoint, device
from sfttrain.compiling import Compilation, start_compiled, stop_compiled
from sfttrain.data import Batch, Row
from sfttrain.device import out_of_memory
from sfttrain.process import Say, counted

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sfttrain.trainer import SftTrainer

_SAME_STEP = 2e-2  # in bf16; dropout draws other numbers where layers are compiled


def check_fit(trainer: SftTrainer, compute: torch.dtype, choice: Compilation, say: Say) -> None:
    """Check room on the disk, log what the weights take, and compile what was chosen.

    Nothing else is tried: what a step lacks shows in the first one (`FirstStep`), before anything is lost.

    Args:
        trainer: with the model.
        compute: dtype of the matrix products.
        choice: what to compile; where the compiled step is not the plain one, it is undone.
        say: told what was found.

    Raises:
        SftError: the disk or the device has too little room, or the loss is no number.
    """
    args, model = trainer.args, cast(nn.Module, trainer.model)
    if args.save_strategy != "no" and args.process_index == 0:
        kept = args.save_total_limit or 2
        checkpoint.require_space(Path(str(args.output_dir)), (min(kept, 2) + 1) * checkpoint_bytes(model))
    trainer.add_callback(FirstStep(cast(int, trainer.run["global_batch"]), say))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # not sharded yet
    say(f"memory: {describe_memory(model)}")
    by_memory = device.by_memory(trainer)
    if choice.what == "none" and not by_memory:
        return
    trainer.checkpoint_activations()
    batch = _trial_batch(trainer)

    def trial() -> Trial:
        # Under 16 bit without a cache, as in training; another state would compile everything once more.
        half = compute != torch.float32
        autocast = torch.autocast(args.device.type, dtype=compute, enabled=half, cache_enabled=not half)
        return try_step(model, batch, trainer.fused, autocast)

    plain = trial()
    choices = {"layers": (choice, choice._replace(what="loss")), "loss": (choice,), "none": ()}[choice.what]

    def compiled() -> bool:
        return any(_try_compiled(model, one, plain, trial, say) for one in choices)

    def smallest() -> None:
        if not compiled():
            trial()

    if by_memory and device.drop_where_they_fit(trainer, smallest, say):
        return
    try:
        compiled()
    except UsageError:
        say("compile: nothing (it takes more memory than there is)")


class FirstStep(TrainerCallback):
    """Say after the first step how long the run will take, and what memory its steps need."""

    def __init__(self, rows: int, say: Say) -> None:
        self._rows, self._say, self._began = rows, say, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock."""
        self._began = self._began or time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Log the figures of the first step."""
        if state.global_step != 1 or not state.is_world_process_zero:
            return
        peak = ""
        if args.device.type == "cuda":
            torch.cuda.synchronize()
            peaked, whole = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.mem_get_info()[1] / 1e9
            peak = f"; memory peaked at {peaked:.2f} of {whole:.0f} GB"
        seconds = time.perf_counter() - self._began
        about = (
            f"about {seconds * state.max_steps / 60:.1f} minutes at {seconds:.2f} s a step, from a cold one"
        )
        self._say(f"plan: {counted(state.max_steps, 'step')} of {counted(self._rows, 'row')}; {about}{peak}")


def _try_compiled(
    model: nn.Module, choice: Compilation, plain: Trial, trial: Callable[[], Trial], say: Say
) -> bool:
    """Compile; keep it, and return True, if loss and gradient of the first batch are those of a plain step.

    Raises:
        UsageError: the step does not fit.
    """
    before = sum(counters["graph_break"].values())
    try:
        parts = start_compiled(model, choice)
        compiled = trial()
    except UsageError:
        stop_compiled(model)
        raise
    except Exception as error:  # whatever a compiler raises; the plain step works
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        reason = f"it failed: {first:.200}"
    else:
        breaks = sum(counters["graph_break"].values()) - before
        moved = compiled.difference(plain)
        reason = f"the layers fall into pieces, at {breaks} places" if breaks else ""
        if not moved <= _SAME_STEP:
            reason = f"loss or gradient move by {moved:.1%}"
        if not reason:
            found = f"loss and gradient as before within {moved:.1e}"
            say(f"compile: {parts} ({choice.reason}) in {compiled.seconds:.0f} s; {found}")
            return True
    stop_compiled(model)
    say(f"compile: not the {choice.what} ({reason})")
    return False


def _trial_batch(trainer: SftTrainer) -> Batch:
    """Return the first batch, on a CPU its first row."""
    if trainer.args.device.type == "cpu" and trainer.order is not None:
        rows = cast(Dataset[Row], trainer.train_dataset)
        collate = cast(Callable[[list[Row]], Batch], trainer.data_collator)
        batch = dict(trainer._prepare_inputs(collate([rows[next(iter(trainer.order))[0]]])))
    else:
        batch = dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    batch.pop("documents", None)  # for the log
    return batch


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of one checkpoint: the weights that are saved, and two Adam moments per trained weight."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return 3 * int(trained) + (0 if hasattr(model, "peft_config") else int(frozen))


class Trial(NamedTuple):
    """What one forward and backward took, and gave: its seconds, loss and the norm of the gradient."""

    seconds: float
    loss: float
    norm: float

    def difference(self, other: Trial) -> float:
        """Return by which part loss or gradient differ."""
        return max(abs(one - two) / max(abs(two), 1e-6) for one, two in zip(self[1:], other[1:], strict=True))


def try_step(model: nn.Module, batch: Batch, fused: bool, autocast: AbstractContextManager[object]) -> Trial:
    """Run one forward and backward. Weights and random state are unchanged.

    Raises:
        UsageError: the device has too little memory.
        DataError: the loss is no finite number.
    """
    started = time.perf_counter()
    extra = {"skip_logits": True} if fused else {}
    model.train()
    try:
        with torch.random.fork_rng(), autocast:
            loss = model(**batch, **extra).loss
        loss.backward()
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
    except torch.OutOfMemoryError as error:
        raise cast(UsageError, out_of_memory(error, 1)) from None
    finally:
        model.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"The loss of the first batch is {value}.", "check the model's weights and dtype.")
    return Trial(time.perf_counter() - started, value, norm)


def describe_memory(model: nn.Module) -> str:
    """Say what the weights, their gradients and Adam's moments take."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    text = f"{total:,} parameters, {trained:,} trained; "
    return f"{text}weights {weights / 1e9:.2f} GB, gradients and optimizer {state / 1e9:.2f} GB"
