"""Checks before step 1: room for checkpoints and in memory, what is compiled, a finite loss.

Activation checkpoints cost a quarter of a step, so there are none where a step fits without them:
needed = peak of the trial step + optimizer state + gradients kept while later micro-batches run
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from sftdata.errors import DataError, UsageError
from sftdata.output import as_clock, counted
from sfttrain import checkpoint, device
from sfttrain.compiling import Compilation, start_compiled, stop_compiled
from sfttrain.data import Batch, Row
from sfttrain.device import out_of_memory, weight_bytes
from sfttrain.loss import items_of
from sfttrain.process import Say, reason_of, share_of_rows, time_limit

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sfttrain.trainer import SftTrainer

COMPILE_SECONDS = 180  # a cold compiler takes 20 s on a machine with 16 cores
_SHARE = 0.9  # of what is free: other batches differ, and the allocator leaves gaps
_MOMENTS = 2  # of Adam, in the dtype of the weights
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
    by_memory = memory_decides(trainer)
    if by_memory and _together(trainer):
        say(
            "activation checkpoints: on, since ranks hold rows together; "
            "activation_checkpointing=false trains without them"
        )
        by_memory = False
    if choice.what != "none" or by_memory:
        trainer.checkpoint_activations()
        _try_first_batch(trainer, compute, choice, by_memory, say)


def _together(trainer: SftTrainer) -> bool:
    """Say whether ranks hold rows together.

    One that runs out of memory in the middle of an exchange cannot go on with the others: what may not fit is
    not tried.
    """
    return bool(share_of_rows(trainer.args)[1] < trainer.args.world_size)


def _try_first_batch(
    trainer: SftTrainer, compute: torch.dtype, choice: Compilation, by_memory: bool, say: Say
) -> None:
    """Compile, and choose activation checkpoints by memory, as the first batch shows."""
    model = cast(nn.Module, trainer.model)
    whole, parts = _trial_batches(trainer)

    def trial(batches: list[Batch] = whole) -> Trial:
        # Under 16 bit without a cache, as in training; another state would compile everything once more.
        half, kind = compute != torch.float32, trainer.args.device.type
        autocast = torch.autocast(kind, dtype=compute, enabled=half, cache_enabled=not half)
        return try_step(model, batches, trainer.fused, autocast)

    # In parts, since it takes more memory than what is compiled, which is what trains.
    plain = trial(parts) if choice.what != "none" else None

    def compiled(keep: bool = choice.keep) -> bool:
        less = [choice._replace(what="loss")] if choice.what == "layers" else []
        choices = [choice._replace(keep=keep), *less] if plain else []
        return any(_try_compiled(model, one, cast(Trial, plain), trial, say) for one in choices)

    def smallest() -> None:
        if not compiled(keep=False):
            trial()

    if by_memory and _drop_where_they_fit(trainer, smallest, say):
        return
    if by_memory and choice.what == "layers" and not choice.keep and not trainer.run["unpack"]:
        fits, found = _try_room(trainer, lambda: compiled(keep=True))
        say(f"activation checkpoints: a step that keeps what attention gave {found}")
        if fits:
            return
        device.reset_peak()
        stop_compiled(model)
    try:
        compiled()
    except UsageError:
        if _together(trainer):
            raise
        say("compile: nothing (it takes more memory than there is)")


def memory_decides(trainer: SftTrainer) -> bool:
    """Say whether memory decides on activation checkpoints; turn them off for models that have none."""
    args = trainer.args
    asked = bool(getattr(args, "checkpoints_by_memory", False))
    if asked and not getattr(trainer.model, "supports_gradient_checkpointing", False):
        args.activation_checkpointing = args.gradient_checkpointing = False
        return False
    return asked


def _switch(trainer: SftTrainer, on: bool) -> None:
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


def _drop_where_they_fit(trainer: SftTrainer, step: Callable[[], object], say: Say) -> bool:
    """Try a step without activation checkpoints; leave them on where it needs too much.

    Args:
        trainer: with activation checkpoints on.
        step: takes the trial step, and raises UsageError where it does not fit.
        say: told what was decided.

    Returns:
        Whether they are off, with the step taken last.
    """
    if trainer.run["unpack"]:
        why = "since rows differ in length and the first batch says little of others"
        say(f"activation checkpoints: on, {why}")
        return False
    _switch(trainer, False)
    fits, found = _try_room(trainer, step)
    say(f"activation checkpoints: {'off' if fits else 'on'}, a step without them {found}")
    if not fits:
        device.reset_peak()
        _switch(trainer, True)
    return fits


def _try_room(trainer: SftTrainer, step: Callable[[], object]) -> tuple[bool, str]:
    """Take a trial step; return whether training fits with it, on all ranks, and what it needs, in words."""
    device.reset_peak()
    try:
        step()
    except UsageError:
        needed = None
    else:
        needed = device.peak() + _state(trainer)
    free = device.room()
    fits = needed is not None and needed <= _SHARE * free
    if trainer.args.world_size > 1:
        flag = torch.tensor(float(fits), device=trainer.args.device)
        fits = float(trainer.accelerator.reduce(flag, "sum")) == trainer.args.world_size
    return fits, "does not fit" if needed is None else f"needs {needed / 1e9:.1f} of {free / 1e9:.0f} GB"


def _state(trainer: SftTrainer) -> int:
    """Return the bytes that training holds besides a trial step: moments, and gradients that accumulate."""
    gradients = trainer.args.gradient_accumulation_steps > 1
    return (_MOMENTS + gradients) * weight_bytes(cast(nn.Module, trainer.model), trained=True)


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
        about = f"about {as_clock(seconds * state.max_steps)} at {seconds:.2f} s a step, judged by a cold one"
        self._say(f"plan: {counted(state.max_steps, 'step')} of {counted(self._rows, 'row')}; {about}{peak}")


def _try_compiled(
    model: nn.Module, choice: Compilation, plain: Trial, trial: Callable[[], Trial], say: Say
) -> bool:
    """Compile; keep it, and return True, if loss and gradient of the first batch are those of a plain step.

    Raises:
        UsageError: the step does not fit.
    """
    from torch._dynamo.utils import counters  # here, since it takes seconds that other runs need not wait

    say(f"compile: the {choice.what}, in at most {COMPILE_SECONDS} s")
    before = sum(counters["graph_break"].values())
    try:
        with time_limit(COMPILE_SECONDS):
            parts = start_compiled(model, choice)
            compiled = trial()
    except UsageError:
        stop_compiled(model)
        raise
    except Exception as error:  # whatever a compiler raises; the plain step works
        reason = f"it failed: {reason_of(error):.200}"
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


def _trial_batches(trainer: SftTrainer) -> tuple[list[Batch], list[Batch]]:
    """Return the first batch, on a CPU its first row: whole, and in parts whose losses add up to its loss."""
    if trainer.order is None:
        batches = [dict(trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))]
        return batches, batches
    dataset = cast(Dataset[Row], trainer.train_dataset)
    collate = cast(Callable[[list[Row]], Batch], trainer.data_collator)
    rows = [dataset[number] for number in next(iter(trainer.order))]
    if trainer.args.device.type == "cpu":
        rows = rows[:1]

    def ready(some: list[Row]) -> Batch:
        batch = dict(trainer._prepare_inputs(collate(some)))
        batch.pop("documents", None)  # for the log
        return batch

    whole = ready(rows)
    if not trainer.splits:
        return [whole], [whole]
    items = items_of(cast(Tensor, whole["labels"]), cast("Tensor | None", whole.get("loss_weights")))
    parts = [[row] for row in rows] if len(rows) > 1 else [[half] for half in _halves(rows[0])]
    return [whole], [ready(part) | {"num_items_in_batch": items} for part in parts]


def _halves(row: Row) -> list[Row]:
    """Cut a row where a document ends, as near to its middle as may be; one document stays whole."""
    ends = row.seq_lengths.cumsum()
    if len(ends) == 1:
        return [row]
    count = int(abs(ends[:-1] - ends[-1] / 2).argmin()) + 1
    return [row.part(0, count), row.part(count, len(ends))]


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of one checkpoint: the weights that are saved, and two Adam moments per trained weight."""
    frozen = 0 if hasattr(model, "peft_config") else weight_bytes(model, trained=False)
    return 3 * weight_bytes(model, trained=True) + frozen


class Trial(NamedTuple):
    """What one forward and backward took, and gave: its seconds, loss and the norm of the gradient."""

    seconds: float
    loss: float
    norm: float

    def difference(self, other: Trial) -> float:
        """Return by which part loss or gradient differ."""
        return max(abs(one - two) / max(abs(two), 1e-6) for one, two in zip(self[1:], other[1:], strict=True))


def try_step(
    model: nn.Module, batches: list[Batch], fused: bool, autocast: AbstractContextManager[object]
) -> Trial:
    """Run one forward and backward a batch, whose losses add up. Weights and random state are unchanged.

    Raises:
        UsageError: the device has too little memory.
        DataError: the loss is no finite number.
    """
    started = time.perf_counter()
    extra, value = {"skip_logits": True} if fused else {}, 0.0
    model.train()
    try:
        for batch in batches:
            with torch.random.fork_rng(), autocast:
                loss = model(**batch, **extra).loss
            loss.backward()
            value += float(loss.detach())
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
    except torch.OutOfMemoryError as error:
        raise cast(UsageError, out_of_memory(error, 1)) from None
    finally:
        model.zero_grad(set_to_none=True)
    if not math.isfinite(value):
        raise DataError(f"The loss of the first batch is {value}.", "check the model's weights and dtype.")
    return Trial(time.perf_counter() - started, value, norm)


def describe_memory(model: nn.Module) -> str:
    """Say what the weights, their gradients and Adam's moments take."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = 3 * weight_bytes(model, trained=True)
    text = f"{total:,} parameters, {trained:,} trained; weights {weight_bytes(model) / 1e9:.2f} GB"
    return f"{text}, gradients and optimizer {state / 1e9:.2f} GB"


_TRIED = {"cuda": 8192}  # rows and columns of the matrices whose products are timed; elsewhere 2048
_SECONDS = 0.2


def describe_time(model: nn.Module, tokens: int, device: torch.device, compute: torch.dtype) -> str:
    """Say how long steps on so many tokens take at least: the products of matrices alone, at their best.

    A forward takes two operations for each weight and token, the gradients of the activations and of what is
    trained as many each. Embeddings take none, and the head as many as there are trained tokens, so neither
    counts. Attention, norms, the optimizer and the reading of data come on top.
    """
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    apart = set() if head is None else set(head.modules())
    layers = [part for part in model.modules() if part not in apart and not isinstance(part, nn.Embedding)]
    weights = [weight for part in layers for weight in part.parameters(recurse=False) if weight.ndim > 1]
    sizes = [(weight.numel(), weight.requires_grad) for weight in weights]
    experts = any("expert" in name for name, _ in model.named_modules())
    if experts:
        return "time: the first step tells; how many experts a token takes is the router's choice"
    operations = tokens * sum(size * (6 if trained else 4) for size, trained in sizes)
    speed = _matrix_speed(device, compute)
    seconds = round(operations / speed)
    clock = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return (
        f"time: at least {clock}, {operations:.1e} operations at the {speed / 1e12:.2g} TFLOP/s that products"
        f" of matrices reach on {device.type}; the first step of a run measures it"
    )


def _matrix_speed(device: torch.device, compute: torch.dtype) -> float:
    """Return operations a second."""
    size = _TRIED.get(device.type, 2048)
    left = torch.ones((size, size), dtype=compute, device=device)
    began, count = 0.0, -1  # the first product warms up
    while count < 1 or time.perf_counter() - began < _SECONDS:
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began, count = began if count >= 0 else time.perf_counter(), count + 1
    return 2 * count * size**3 / (time.perf_counter() - began)
