"""The report of a run, `report.html`: one self-contained page, made from `train_log.jsonl` and the settings beside it.

It is written when a run ends; `sfttrain report` writes it at any time, of a run that is still going as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sftdata.errors import UsageError
from sftdata.outlet import visible
from sftdata.show.curves import Curve, key, line_chart, short
from sftdata.show.page import make_page, write_page
from sfttrain.output import RUN_NAME, SETTINGS_NAME
from sfttrain.progress import LOG_NAME

REPORT_NAME = "report.html"
SMALL = (("grad_norm", "gradient norm"), ("learning_rate", "learning rate"), ("tokens_per_second", "tokens per second"),
         ("mean_token_accuracy", "accuracy of trained tokens"))  # fmt: skip
TOLD = ("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "max_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "seed")  # fmt: skip
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
    name = _safe(folder.resolve().name)
    sections = (
        _section(
            "Loss", "Per trained token, of each logged step and of each evaluation.", _losses(steps, log)
        ),
        _section(
            "Along the way",
            "Every logged step; a long curve is faint, with its running mean over it.",
            _small(steps),
        ),
        _section("Evaluation", "Of held-out sets, by source where a set has several.", _evaluation(log)),
        _section("Settings", "What the run was asked to do; all of it below.", _settings(folder)),
    )
    header = f"<header><h1>{name}</h1>{_state(run)}{_figures(steps, log)}</header>"
    return make_page(
        f"{name}: training", f"{header}<main>{''.join(sections)}</main>", "charts", "report", "curves"
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


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{lead}</p>{body}</section>" if body else ""


def _curve(lines: Sequence[Line], name: str, called: str, kind: str) -> Curve:
    points = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]
    return Curve(called, kind, points, noisy=name != "learning_rate")


def _evaluated(log: Sequence[Line]) -> list[str]:
    """Return the figures of evaluations, in the order in which they were first logged."""
    names = dict.fromkeys(name for line in log for name in line if name.startswith("eval_"))
    return [name for name in names if not name.endswith(_SPEED)]


def _losses(steps: Sequence[Line], log: Sequence[Line]) -> str:
    held_out = [name for name in _evaluated(log) if name.endswith("_loss")][: len(_KINDS)]
    curves = [_curve(steps, "loss", "training", "trained")]
    curves += [_curve(log, name, _called(name), kind) for name, kind in zip(held_out, _KINDS, strict=False)]
    broken = sum(not math.isfinite(value) for curve in curves for _, value in curve.points)
    told = f"<p><b>{broken:,} logged values are no finite number</b>; they leave gaps.</p>" if broken else ""
    return told + key(curves) + line_chart(curves)


def _small(steps: Sequence[Line]) -> str:
    charts = []
    for name, called in SMALL:
        curve = _curve(steps, name, called, "trained")
        if curve.points:
            last = f"<span>last {short(curve.points[-1][1])}</span>"
            charts.append(f"<div><h3>{called}{last}</h3>{line_chart([curve], zero=True)}</div>")
    return f'<div class="small">{"".join(charts)}</div>' if charts else ""


def _evaluation(log: Sequence[Line]) -> str:
    rows = []
    for name in _evaluated(log):
        points = [point for point in _curve(log, name, name, "").points if math.isfinite(point[1])]
        if points:
            best = (
                min(points, key=lambda point: point[1])
                if "loss" in name
                else max(points, key=lambda point: point[1])
            )
            cells = (
                short(points[0][1]),
                f"{short(best[1])} <small>at step {best[0]:,.0f}</small>",
                short(points[-1][1]),
            )
            rows.append(
                f"<tr><td>{_safe(_called(name))}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
            )
    head = '<tr><th>figure</th><th class="n">first</th><th class="n">best</th><th class="n">last</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _called(name: str) -> str:
    """Name an evaluation figure: `eval_held_out_loss` is `held_out loss`."""
    return " ".join(part for part in name.removeprefix("eval_").partition("_loss") if part).replace("_loss", "loss").replace(
        "loss _", "loss of ")  # fmt: skip


def _figures(steps: Sequence[Line], log: Sequence[Line]) -> str:
    figures = [(f"{log[-1]['step'] if log else 0:,}", "steps" if log else "steps were logged")]
    if steps:
        last = steps[-1]
        figures.append((short(last["loss"]), f"loss, from {short(steps[0]['loss'])}"))
        figures += [(f"{last['tokens']:,}", "tokens")] if "tokens" in last else []
        speeds = [line["tokens_per_second"] for line in steps if "tokens_per_second" in line]
        figures += [(f"{median(speeds):,.0f}", "tokens a second")] if speeds else []
        figures.append((_duration(sum(line.get("seconds", 0) for line in steps)), "of training"))
    return f'<div class="figures">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in figures)}</div>'


def _state(run: Line) -> str:
    if not run.get("finished"):
        return '<p class="soft">Not finished: this is what was logged so far.</p>'
    digests = " · ".join(f"<code>{_safe(str(digest)[:16])}</code>" for digest in run.get("sets", ()))
    sets = f" · trained on {digests}" if digests else ""
    return f'<p class="soft"><code>{_safe(str(run.get("model")))}</code>{sets}</p>'


def _settings(folder: Path) -> str:
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return '<p class="soft">Written when the run ends.</p>'
    text = path.read_text("utf-8")
    rows = "".join(
        f'<tr><td class="k">{name}</td><td>{_safe(value)}</td></tr>'
        for name, value in _told(yaml.safe_load(text))
    )
    return f"<table>{rows}</table><details><summary>All settings</summary><pre>{_safe(text)}</pre></details>"


def _told(settings: Line) -> Iterator[tuple[str, str]]:
    for name in ("model", "init_from_config", "sets", "eval", "lora", "quantize", "loss", "attention"):
        if settings.get(name):
            yield name, _plain(settings[name])
    training = settings.get("training") or {}
    for name in TOLD:
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


def _safe(text: str) -> str:
    return escape(visible(text))
