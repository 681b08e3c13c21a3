"""When a run logs, saves and stops, and what it shows: `train_log.jsonl`, and a bar or plain lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftdata.output import Meter
from sftdata.set.store import write_atomic
from sfttrain.process import StopRequest

LOG_NAME = "train_log.jsonl"
Line = dict[str, object]
"""Of the log: its `step`, and figures, or answers to samples."""
_LABEL = "step {done}/{total}"


class TrainLog(TrainerCallback):
    """Append one line per logged step: step, loss, grad_norm, learning_rate, tokens, seconds and more."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Drop what an interrupted run logged after the checkpoint that this one resumes from."""
        if state.is_world_process_zero:
            forget_after(self._path, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Write what was logged, where this is the main process."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step, **{key: _plain(value) for key, value in logs.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Progress(TrainerCallback):
    """Show step, loss, tokens per second and the time that is left, where this is the main process."""

    def __init__(self) -> None:
        self._meter = Meter(_LABEL)
        self._figures = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Start the clock."""
        self._meter = Meter(_LABEL, before=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Keep the newest figures; print those of the first and the last step, and of each evaluation."""
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._figures = f"loss {logs['loss']:.4f}, {logs.get('tokens_per_second', 0):,.0f} tokens/s"
            if state.global_step in (1, state.max_steps):
                self._meter.show(state.global_step, state.max_steps, self._figures, line=True)
            if state.global_step == 1 and self._meter.drawn:
                self._meter.write(self._told(state))
        elif any(key.startswith("eval_") for key in logs):
            losses = [f"{_evaluation(key)}: loss {logs[key]:.4f}" for key in logs if key.endswith("_loss")]
            self._meter.write(", ".join(losses))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Advance the bar, or print a line when one is due; after step 1, what is found of it comes first."""
        if state.is_world_process_zero and state.global_step > 1:
            self._meter.show(state.global_step, state.max_steps, self._figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Take the bar away, and leave the figures of the last step where it was."""
        if self._meter.drawn:
            self._meter.close()
            self._meter.write(self._told(state))

    def _told(self, state: TrainerState) -> str:
        return ", ".join(filter(None, [f"step {state.global_step}/{state.max_steps}", self._figures]))


def _evaluation(key: str) -> str:
    """Name the evaluation that a loss is of: `eval_held_loss` is `evaluation held`."""
    name = key.removesuffix("_loss").removeprefix("eval").removeprefix("_")
    return f"evaluation {name}" if name else "evaluation"


def forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that are about to be taken again, and a line cut short by a kill."""
    if path.is_file():
        kept = "".join(f"{text}\n" for text, line in read_lines(path) if cast(int, line["step"]) <= step)
        write_atomic(path, lambda sink: sink.write(kept.encode()))


def read_lines(path: Path) -> Iterator[tuple[str, Line]]:
    """Yield each line of a training log, if there is one, with what it says; one cut short is left out."""
    for text in path.read_text("utf-8", errors="replace").split("\n") if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield text, line


def _plain(value: object) -> object:
    return value.item() if hasattr(value, "item") else value


class FollowSettings(TrainerCallback):
    """Let a resumed run follow its present settings.

    transformers takes from the checkpoint how often it logs, saves and evaluates, and the learning rate of
    the step behind it. The schedule is that of a run which had the present length from its first step on.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: object = None,
        **_: object,
    ) -> None:
        """Set intervals and learning rates anew."""
        state.compute_steps(args, state.max_steps)
        if state.global_step and isinstance(lr_scheduler, LambdaLR):
            functions = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            rates = [base * function(lr_scheduler.last_epoch) for base, function in functions]
            for group, rate in zip(lr_scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            lr_scheduler._last_lr = rates


class LogEnds(TrainerCallback):
    """Log the first and the last step, and every one that is evaluated, whatever `logging_steps` is."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Ask for a line where one is due; `logging_strategy=no` is respected."""
        due = (
            control.should_evaluate
            or state.global_step in (1, state.max_steps)
            or control.should_training_stop
        )
        if due and args.logging_strategy != "no":
            control.should_log = True


class StopAtStepEnd(TrainerCallback):
    """Save and stop at the end of a step once a signal asked for it, on all ranks at the same step.

    Args:
        request: where signals are noted.
        ranks: processes; with several, a signal to one of them stops all, one step later.
    """

    def __init__(self, request: StopRequest, ranks: int) -> None:
        self.number = 0
        self._request, self._ranks = request, ranks
        # The flag of all ranks, reduced asynchronously since the last step, so that no step waits for it.
        self._asked: tuple[torch.Tensor, torch.distributed.Work] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Note that there is something to save from now on."""
        self._request.stepping = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Stop once all ranks know of a signal; after the last step there is nothing to stop."""
        number = self._request.number if self._ranks == 1 else self._of_all_ranks(args.device)
        if state.global_step >= state.max_steps:
            self._request.done = True
        elif number:
            self.number = number
            control.should_training_stop = True
            control.should_save = not args.save_only_model

    def _of_all_ranks(self, device: torch.device) -> int:
        number = 0
        if self._asked is not None:
            flag, work = self._asked
            work.wait()
            number = int(flag)
        flag = torch.tensor(self._request.number, device=device)
        self._asked = flag, torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        return number
