"""The report of a run, `report.html`: one self-contained page, made from `train_log.jsonl` and the settings beside it.

It is written when a run ends; `sfttrain report` writes it at any time, of a run that is still going as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sftdata.errors import UsageError
from sftdata.pages import render, write_page
from sfttrain.curves import Curve, line_chart, short
from sfttrain.output import RUN_NAME, SETTINGS_NAME
from sfttrain.progress import LOG_NAME

REPORT_NAME = "report.html"
SMALL = (
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens per second"),
    ("mean_token_accuracy", "accuracy of trained tokens"),
)
SHOWN_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm", "optim",
    "bf16", "seed",
)  # fmt: skip
_SPEED = ("_runtime", "_per_second")
_KINDS = ("lost", "context", "bad")

Line = dict[str, Any]


def write_report(folder: Path, page: Path | None = None) -> Path:
    """Write the report of a run into its folder, or as `page`; return where it is.

    Raises:
        UsageError: the folder holds no run, or the page cannot be written.
    """
    page = page or folder / REPORT_NAME
    write_page(page, make_report(folder))
    return page


def make_report(folder: Path) -> str:
    """Return the report of a run as one page: no network, no script.

    Raises:
        UsageError: the folder holds no run.
    """
    log, run = read_log(folder / LOG_NAME), _read_run(folder / RUN_NAME)
    if not log and not run:
        raise UsageError(
            f"{folder}: no {LOG_NAME} and no {RUN_NAME}.",
            "name the folder of a run: sfttrain run ... -o DIR.",
        )
    steps = [line for line in log if "loss" in line]
    losses = _losses(steps, log)
    path = folder / SETTINGS_NAME
    settings = path.read_text("utf-8") if path.is_file() else None
    curves = [_curve(steps, name, called, "trained") for name, called in SMALL]
    return render(
        Path(__file__).with_name("report.html.jinja"),
        name=folder.resolve().name,
        run={"finished": False, "model": None, "sets": (), **run},
        figures=_figures(steps, log),
        losses=losses,
        loss_chart=line_chart(losses),
        broken=sum(not math.isfinite(value) for curve in losses for _, value in curve.points),
        small=[(curve, line_chart([curve], zero=True)) for curve in curves if curve.points],
        evaluation=list(_evaluation(log)),
        settings=settings,
        shown_settings=[] if settings is None else list(_shown_settings(yaml.safe_load(settings))),
    )


def read_log(path: Path) -> list[Line]:
    """Return the lines of a training log, none where there is no log; a line that a kill cut short is left out."""
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _read_run(path: Path) -> Line:
    found: Line = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _curve(lines: Sequence[Line], name: str, called: str, kind: str) -> Curve:
    points = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]
    return Curve(called, kind, points, noisy=name != "learning_rate")


def _evaluated(log: Sequence[Line]) -> list[str]:
    """Return the figures of evaluations, in the order in which they were first logged."""
    names = dict.fromkeys(name for line in log for name in line if name.startswith("eval_"))
    return [name for name in names if not name.endswith(_SPEED)]


def _losses(steps: Sequence[Line], log: Sequence[Line]) -> list[Curve]:
    """Return the loss of training, and of the first few evaluations."""
    held_out = [name for name in _evaluated(log) if name.endswith("_loss")][: len(_KINDS)]
    evaluated = [_curve(log, name, _called(name), kind) for name, kind in zip(held_out, _KINDS, strict=False)]
    return [_curve(steps, "loss", "training", "trained"), *evaluated]


def _evaluation(log: Sequence[Line]) -> Iterator[dict[str, str | float]]:
    """Yield a row of the table of evaluations for each figure."""
    for name in _evaluated(log):
        points = [point for point in _curve(log, name, name, "").points if math.isfinite(point[1])]
        if points:
            choose = min if "loss" in name else max
            step, best = choose(points, key=lambda point: point[1])
            first, last = short(points[0][1]), short(points[-1][1])
            yield {
                "name": _called(name),
                "first": first,
                "best": short(best),
                "best_step": step,
                "last": last,
            }


def _called(name: str) -> str:
    """Name an evaluation figure: `eval_held_out_loss` is `held_out loss`."""
    return " ".join(part for part in name.removeprefix("eval_").partition("_loss") if part).replace("_loss", "loss").replace(
        "loss _", "loss of ")  # fmt: skip


def _figures(steps: Sequence[Line], log: Sequence[Line]) -> list[tuple[str, str]]:
    figures = [(f"{log[-1]['step'] if log else 0:,}", "steps" if log else "steps were logged")]
    if steps:
        last = steps[-1]
        figures.append((short(last["loss"]), f"loss, from {short(steps[0]['loss'])}"))
        figures += [(f"{last['tokens']:,}", "tokens")] if "tokens" in last else []
        speeds = [line["tokens_per_second"] for line in steps if "tokens_per_second" in line]
        figures += [(f"{median(speeds):,.0f}", "tokens a second")] if speeds else []
        figures.append((_duration(sum(line.get("seconds", 0) for line in steps)), "of training"))
    return figures


def _shown_settings(settings: Line) -> Iterator[tuple[str, str]]:
    for name in ("model", "init_from_config", "sets", "eval", "lora", "quantize", "loss", "attention"):
        if settings.get(name):
            yield name, _plain(settings[name])
    training = settings.get("training") or {}
    for name in SHOWN_SETTINGS:
        if training.get(name) is not None:
            yield name, str(training[name])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items() if part is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"
