"""The report of a run, `report.html`: one self-contained page, from `train_log.jsonl` and the settings.

It is written when a run ends; `sfttrain report` writes it at any time, of a run that is still going as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import cast

import msgspec
import numpy as np
import yaml

from sftdata.blame.log import log_files
from sftdata.blame.named import LoggedRun
from sftdata.errors import SftError, UsageError
from sftdata.output import as_clock, counted
from sftdata.pages import render, write_page
from sfttrain.checkpoint import RUN_NAME, SETTINGS_NAME
from sfttrain.progress import LOG_NAME, Line, read_lines
from sfttrain.seen import SEEN_NAME, Seen

REPORT_NAME = "report.html"
SMALL_CHARTS = (
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

_MOST_POINTS = 500
_WORST = 20  # documents
_SMOOTHED = 60  # points from which on a noisy curve is shown faint, with its mean drawn over it
Point = tuple[float, float]


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
        what = f"{folder}: no {LOG_NAME} and no {RUN_NAME}."
        raise UsageError(what, "name the folder of a run: sfttrain run ... -o DIR.")
    steps = [line for line in log if "loss" in line]
    losses = _losses(steps, log)
    path = folder / SETTINGS_NAME
    settings = path.read_text("utf-8") if path.is_file() else None
    curves = [_curve(steps, name, label, "trained") for name, label in SMALL_CHARTS]
    return render(
        Path(__file__).with_name("report.html.jinja"),
        name=folder.resolve().name,
        run={"finished": False, "model": None, "sets": (), **run},
        figures=_figures(steps, log),
        losses=losses,
        loss_chart=line_chart(losses),
        broken=sum(not math.isfinite(value) for curve in losses for _, value in curve.points),
        small=[(curve, line_chart([curve], zero=True)) for curve in curves if curve.points],
        seen=_read_seen(folder / SEEN_NAME),
        evaluation=list(_evaluation(log)),
        samples=_samples(log),
        **_documents(folder),
        settings=settings,
        shown_settings=[] if settings is None else list(_shown_settings(yaml.safe_load(settings))),
    )


def _documents(folder: Path) -> dict[str, object]:
    """Return the worst documents of a run and its spikes, or why they have no names; None without a log."""
    found: dict[str, object] = {"documents": None, "spikes": (), "unnamed": ""}
    if not log_files(folder):
        return found
    try:
        logged = LoggedRun(folder)
        found |= {"documents": logged.worst(_WORST), "spikes": list(logged.spikes())}
        return found | {"unnamed": " ".join(logged.unnamed())}
    except SftError as error:  # nothing logged yet, or its sets are gone
        return found | {"documents": (), "unnamed": str(error)}


def read_log(path: Path) -> list[Line]:
    """Return the lines of a training log, if there is one; a line cut short by a kill is left out."""
    return [line for _, line in read_lines(path)]


def _read_run(path: Path) -> Line:
    run: Line = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return run


def _read_seen(path: Path) -> Seen | None:
    return msgspec.json.decode(path.read_bytes(), type=Seen) if path.is_file() else None


def _curve(lines: Sequence[Line], name: str, label: str, kind: str) -> Curve:
    return Curve(label, kind, _points(lines, name), noisy=name != "learning_rate")


def _points(lines: Sequence[Line], name: str) -> list[Point]:
    """Return step and value of a figure, from the lines that hold it."""
    found = ((cast(int, line["step"]), line.get(name)) for line in lines)
    return [(step, float(value)) for step, value in found if isinstance(value, (int, float))]


def _evaluated(log: Sequence[Line]) -> list[str]:
    """Return the figures of evaluations, in the order in which they were first logged."""
    names = dict.fromkeys(name for line in log for name in line if name.startswith("eval_"))
    return [name for name in names if not name.endswith(_SPEED)]


def _losses(steps: Sequence[Line], log: Sequence[Line]) -> list[Curve]:
    """Return the loss of training, and of the first few evaluations."""
    held_out = [name for name in _evaluated(log) if name.endswith("_loss")][: len(_KINDS)]
    evaluated = [_curve(log, name, _label(name), kind) for name, kind in zip(held_out, _KINDS, strict=False)]
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
                "name": _label(name),
                "first": first,
                "best": short(best),
                "best_step": step,
                "last": last,
            }


def _samples(log: Sequence[Line]) -> list[Line]:
    """Return each held row with its first and its last answer, and the steps that they are of."""
    found = ((line["step"], line.get("samples")) for line in log)
    lines = [(step, cast(list[Line], samples)) for step, samples in found if isinstance(samples, list)]
    if not lines:
        return []
    last_step, last = lines[-1]
    asked = [sample["prompt"] for sample in last]
    # A run may go on with other rows.
    first_step, first = next(line for line in lines if [sample["prompt"] for sample in line[1]] == asked)
    steps = {"first_step": first_step, "last_step": last_step}
    return [now | steps | {"before": then["answer"]} for then, now in zip(first, last, strict=True)]


def _label(name: str) -> str:
    """Name an evaluation figure: `eval_held_out_loss` is `held_out loss`."""
    evaluated, loss, source = name.removeprefix("eval_").partition("_loss")
    if not loss:
        return evaluated
    return f"{evaluated} loss of {source.removeprefix('_')}" if source else f"{evaluated} loss"


def _figures(steps: Sequence[Line], log: Sequence[Line]) -> list[tuple[str, str]]:
    figures = [(f"{log[-1]['step'] if log else 0:,}", "steps" if log else "steps were logged")]
    if steps:
        last = steps[-1]
        losses, speeds, seconds = (
            [value for _, value in _points(steps, name)] for name in ("loss", "tokens_per_second", "seconds")
        )
        figures.append((short(losses[-1]), f"loss, from {short(losses[0])}"))
        figures += [(f"{last['tokens']:,}", "tokens")] if "tokens" in last else []
        figures += [(f"{median(speeds):,.0f}", "tokens a second")] if speeds else []
        figures.append((as_clock(sum(seconds)), "of training"))
    return figures


def closing(folder: Path) -> Iterator[str]:
    """Yield what came of a run, a line for each figure, for the terminal."""
    log = read_log(folder / LOG_NAME)
    steps = [line for line in log if "loss" in line]
    if not steps:
        return
    figures = {what: value for value, what in _figures(steps, log)}
    losses = [value for _, value in _points(steps, "loss")]
    taken = counted(cast(int, log[-1]["step"]), "step")
    yield f"loss        {losses[0]:.4f} to {losses[-1]:.4f} in {taken}"
    for figure in _evaluation(log):
        if str(figure["name"]).endswith(" loss"):
            best = f"{figure['best']} at step {figure['best_step']:,.0f}"
            yield f"evaluation  {figure['name']} {figure['first']} to {figure['last']}, best {best}"
    speed = f"{figures['tokens a second']} tokens/s" if "tokens a second" in figures else ""
    took = f"{figures['tokens']} tokens in {figures['of training']}" if "tokens" in figures else ""
    yield f"speed       {', '.join(filter(None, [speed, took]))}"


def _shown_settings(settings: Line) -> Iterator[tuple[str, str]]:
    for name in (
        "model",
        "init_from_config",
        "sets",
        "weights",
        "mix",
        "eval",
        "lora",
        "quantize",
        "loss",
        "attention",
    ):
        if settings.get(name):
            yield name, _plain(settings[name])
    training = cast(Line, settings.get("training") or {})
    for name in SHOWN_SETTINGS:
        if training.get(name) is not None:
            yield name, str(training[name])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items() if part is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure that changes from step to step.

    Attributes:
        name: for the key.
        kind: colour, one of the classes of charts.css.
        points: (step, value), by step; values that are no numbers leave a gap.
        noisy: draw a long one faint, with its running mean over it.
    """

    name: str
    kind: str
    points: Sequence[Point]
    noisy: bool = True

    @property
    def last(self) -> str:
        """The last value, in few characters."""
        return short(self.points[-1][1])


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves that share their axes, in percent of width and height, from the upper left.

    Attributes:
        strokes: classes and `points` of each polyline.
        rules: place and value of each horizontal line.
        marks: place and step of each number below.
        label: the chart in words.
    """

    strokes: list[tuple[str, str]]
    rules: list[tuple[float, str]]
    marks: list[tuple[float, float]]
    label: str


def line_chart(curves: Sequence[Curve], *, zero: bool = False) -> Chart | None:
    """Lay out curves; None where there is no number to draw.

    Args:
        zero: let the value axis begin at 0.
    """
    points = [point for curve in curves for point in curve.points if math.isfinite(point[1])]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    left, right = float(min(steps)), float(max(*steps, min(steps) + 1))
    ticks = nice_ticks(0.0 if zero else min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def across(step: float) -> float:
        return 100 * (step - left) / (right - left)

    def down(value: float) -> float:
        return 100 * (high - value) / (high - low)

    strokes = [
        (style, " ".join(f"{across(step):.2f},{down(value):.2f}" for step, value in stretch))
        for curve in curves
        for style, drawn in _strokes(curve)
        for stretch in _unbroken(drawn)
    ]
    numbers = [tick for tick in nice_ticks(left, right, 5) if left <= tick <= right and tick == round(tick)]
    named = [curve for curve in curves if curve.points]
    label = "; ".join(f"{curve.name} from {short(curve.points[0][1])} to {curve.last}" for curve in named)
    rules = [(down(tick), short(tick)) for tick in ticks]
    return Chart(strokes, rules, [(across(tick), tick) for tick in numbers], label)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers, evenly spaced, from at most `low` to at least `high`.

    >>> nice_ticks(0.3, 2.1), nice_ticks(1, 420, 5)
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [0.0, 100.0, 200.0, 300.0, 400.0, 500.0])
    """
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest or largest < 1e-30:  # a flat line, or nothing that floats can divide
        room = (largest if largest >= 1e-30 else 1.0) / 2
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number in few characters.

    >>> short(0.00003), short(0.5), short(12345.0), short(2_500_000)
    ('3e-05', '0.5', '12,345', '2,500,000')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _strokes(curve: Curve) -> Iterator[tuple[str, Sequence[Point]]]:
    """Yield (classes, points)."""
    if not curve.noisy or len(curve.points) < _SMOOTHED:
        yield curve.kind, _thinned(curve.points)
        return
    yield f"{curve.kind} faint", _thinned(curve.points)
    finite = [point for point in curve.points if math.isfinite(point[1])]
    yield curve.kind, _thinned(_running_mean(finite, max(3, len(finite) // 25)))


def _running_mean(points: Sequence[Point], span: int) -> list[Point]:
    """Return the mean of up to `span` points around each."""
    sums = np.append(0, np.cumsum([value for _, value in points]))
    index = np.arange(len(points))
    first, last = np.maximum(index - span // 2, 0), np.minimum(index + span // 2 + 1, len(points))
    means = (sums[last] - sums[first]) / (last - first)
    return [(step, mean) for (step, _), mean in zip(points, means.tolist(), strict=True)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Keep the lowest and the highest of each stretch, so that no spike is lost."""
    size = -(-2 * len(points) // _MOST_POINTS)
    if size <= 2:
        return list(points)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        broken = [point for point in stretch if not math.isfinite(point[1])]
        kept += sorted(
            {*broken[:1], *([] if broken else [min(stretch, key=_value), max(stretch, key=_value)])}
        )
    return kept


def _unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    for finite, stretch in groupby(points, lambda point: math.isfinite(point[1])):
        if finite:
            part = list(stretch)
            yield part if len(part) > 1 else part * 2


def _value(point: Point) -> float:
    return point[1]
