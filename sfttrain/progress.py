"""What a run says while it runs: `train_log.jsonl`, a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sftdata.outlet import unguarded, visible
from sftdata.shardset.atomic import write_atomic

LOG_NAME = "train_log.jsonl"
_PLAIN_SECONDS = 10.0


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
    """Show step, loss, tokens per second and the time that is left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._began = self._spoke = 0.0
        self._first = 0
        self._figures = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, where there is a terminal."""
        self._began = self._spoke = time.perf_counter()
        self._first = state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm.auto import tqdm

            shape = {
                "total": state.max_steps,
                "initial": state.global_step,
                "unit": "step",
                "dynamic_ncols": True,
            }
            self._bar = tqdm(file=unguarded(sys.stderr), **shape)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Remember the newest figures."""
        if logs and "loss" in logs:
            self._figures = f"loss {logs['loss']:.4f}, {logs.get('tokens_per_second', 0):,.0f} tokens/s"
            if (
                state.is_world_process_zero
                and self._bar is None
                and state.global_step in (1, state.max_steps)
            ):
                self._tell(state)
        elif logs and state.is_world_process_zero and any(key.startswith("eval_") for key in logs):
            self._write(
                ", ".join(f"{key} {value:.4f}" for key, value in logs.items() if key.endswith("loss"))
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move on, and speak when it is time."""
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(self._figures)
        elif state.is_world_process_zero and time.perf_counter() - self._spoke >= _PLAIN_SECONDS:
            self._tell(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar, with the figures of the last step."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures)
            self._bar.close()

    def _tell(self, state: Any) -> None:
        """Write a line on the step that is done."""
        self._spoke = time.perf_counter()
        left = (
            (self._spoke - self._began)
            / (state.global_step - self._first)
            * (state.max_steps - state.global_step)
        )
        figures = f", {self._figures}" if self._figures else ""
        self._write(f"step {state.global_step}/{state.max_steps}{figures}, {_duration(left)} left")

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(visible(text), file=unguarded(sys.stderr))
        else:
            print(text, file=sys.stderr, flush=True)


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


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
