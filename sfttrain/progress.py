"""What a run says while it runs: `train_log.jsonl`, a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sftdata.meter import Meter
from sftdata.shardset.atomic import write_atomic

LOG_NAME = "train_log.jsonl"
_LABEL = "step {done}/{total}"


class TrainLog(TrainerCallback):
    """Append one line per logged step: step, loss, grad_norm, learning_rate, tokens, seconds, and what else there is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what a broken run logged after the checkpoint that this one goes on from."""
        if state.is_world_process_zero:
            _forget_after(self._path, state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._meter = Meter(_LABEL, before=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Remember the newest figures; tell those of the first and the last step, and of each evaluation."""
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._figures = f"loss {logs['loss']:.4f}, {logs.get('tokens_per_second', 0):,.0f} tokens/s"
            if state.global_step in (1, state.max_steps):
                self._meter.show(state.global_step, state.max_steps, self._figures, line=True)
        elif any(key.startswith("eval_") for key in logs):
            losses = [f"{key} {value:.4f}" for key, value in logs.items() if key.endswith("loss")]
            self._meter.say(", ".join(losses))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on."""
        if state.is_world_process_zero:
            self._meter.show(state.global_step, state.max_steps, self._figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the bar away, and leave the figures of the last step where it was."""
        if self._meter.drawn:
            self._meter.close()
            self._meter.say(
                ", ".join(filter(None, [f"step {state.global_step}/{state.max_steps}", self._figures]))
            )


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that are about to be taken again, and a line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_atomic(path, lambda sink: sink.write("".join(kept).encode()))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
