"""Curves over steps: what a chart of them draws. How: `lines` of sftdata/pages/charts.html.jinja."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

_MOST_POINTS = 500
_SMOOTHED = 60  # points from which on a noisy curve is shown faint, with its mean drawn over it

Point = tuple[float, float]


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


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers, evenly spaced, from at most `low` to at least `high`.

    >>> nice_ticks(0.3, 2.1), nice_ticks(1, 420, 5)
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [0.0, 100.0, 200.0, 300.0, 400.0, 500.0])
    """
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest or largest < 1e-30:  # a flat line, or nothing that floats can divide
        room = (largest if largest >= 1e-30 else 1.0) / 2
        low, high = low - room, high + room
    rough = (high - low) / wanted
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
            found = list(stretch)
            yield found if len(found) > 1 else found * 2


def _value(point: Point) -> float:
    return point[1]
