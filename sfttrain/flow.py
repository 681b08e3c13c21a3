"""When a run logs, saves and stops, where that is not as transformers has it."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from sfttrain.stop import StopRequest


class GoOn(TrainerCallback):
    """Let a resumed run follow the settings it has now.

    transformers takes from the checkpoint how often it logs, saves and evaluates, and the learning rate of the step behind
    it. The schedule is that of a run which had the present length from its first step on.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
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

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for a line where one is due; `logging_strategy=no` is taken at its word."""
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
        self._asked: Any = (
            None  # the flag of all ranks, on its way since the last step, so that no step waits for it
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on there is something to save."""
        self._request.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where all ranks know of a signal; past the last step there is nothing to stop."""
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
