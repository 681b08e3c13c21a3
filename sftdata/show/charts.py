"""What the charts of a set draw: where its parts, their flow, and the bars of its lengths lie. How: pages/charts.html.jinja."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from sftdata.pages import macro
from sftdata.shardset.manifest import Manifest
from sftdata.show.stats import LengthBin, Part, Stats, measure

Stretch = tuple[float, float]
"""Begin and end of a part of a bar, as shares of its width."""

_MOST_TICKS = 8


@dataclass(frozen=True, slots=True)
class Flow:
    """Bars one above the other, and what flows from each to the next.

    Attributes:
        stages: name and parts of each bar.
        between: kind and SVG path of each ribbon, for each pair of neighbours.
    """

    stages: tuple[tuple[str, Sequence[Part]], ...]
    between: tuple[list[tuple[str, str]], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram: its height is a share of the highest."""

    kind: str
    height: float
    title: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars of equal width, eight for each doubling of the length.

    Attributes:
        ticks: place of a number below the bars, as a share of the width, and the number.
        limit: place of the line where rows are cut, as a share of the width; None without one.
    """

    bars: list[Bar]
    label: str
    ticks: list[tuple[float, int]]
    limit: float | None
    max_length: int | None


def spread(parts: Sequence[Part]) -> list[Stretch]:
    """Return the stretch that each part takes in its bar.

    >>> spread([Part("a", "kept", 3), Part("b", "lost", 1)])
    [(0.0, 0.75), (0.75, 1.0)]
    """
    whole = max(sum(part.count for part in parts), 1)
    ends = [count / whole for count in accumulate((part.count for part in parts), initial=0)]
    return list(pairwise(ends))


def flow_of(stats: Stats) -> Flow:
    """Return the way from rows to trained tokens."""
    rows, tokens, slots = (spread(parts) for parts in (stats.rows, stats.tokens, stats.slots))
    # Rows kept or dropped have tokens; rejected and filtered rows were never tokenized.
    read = sum(part.kind in ("kept", "lost") for part in stats.rows)
    read_rows = ("kept", ribbon((0.0, rows[read - 1][1] if read else 0.0), (0.0, 1.0 if read else 0.0)))
    context = [
        ("context", ribbon(tokens[i], slots[j]))
        for i, above in enumerate(stats.tokens)
        for j, below in enumerate(stats.slots)
        if above.kind == below.kind == "context"
    ]
    return Flow(
        (("rows in", stats.rows), ("tokens in", stats.tokens), ("token slots", stats.slots)),
        ([read_rows], [("trained", ribbon(tokens[0], slots[0])), *context]),
    )


def ribbon(upper: Stretch, lower: Stretch) -> str:
    """Return the SVG path from a stretch of one bar to a stretch of the next."""
    (a, b), (c, d) = ((100 * low, 100 * high) for low, high in (upper, lower))
    return f"M{a:.3f} 0C{a:.3f} 11 {c:.3f} 9 {c:.3f} 20L{d:.3f} 20C{d:.3f} 9 {b:.3f} 11 {b:.3f} 0Z"


def histogram_of(bins: Sequence[LengthBin], max_length: int | None) -> Histogram:
    """Return the lengths as bars, with the line where rows are cut."""
    if not bins:
        return Histogram([], "", [], None, max_length)
    whole = sum(found.examples for found in bins)
    bins = _up_to(bins, max_length or 0)
    most = max(found.examples for found in bins) or 1
    bars = [
        Bar(
            "lost" if max_length and found.start >= max_length else "trained",
            found.examples / most,
            f"{_range(found)} tokens: {found.examples:,} examples",
        )
        for found in bins
    ]
    label = f"{whole:,} examples of {bins[0].start:,} to {bins[-1].stop - 1:,} tokens"
    return Histogram(bars, label, _ticks(bins), _limit(bins, max_length) if max_length else None, max_length)


def notebook_summary(folder: str, manifest: Manifest) -> str:
    """Return the figures of a set and their flow, as HTML for the output cell of a notebook."""
    stats = measure(manifest)
    length = f"of {stats.max_length:,} tokens" if stats.max_length else "of their own length"
    shape = f"{stats.rows_packed:,} packed rows {length}, {stats.fill:.1%} full"
    trained = f"{stats.trained_share:.1%} of tokens trained"
    return str(macro("charts.html.jinja", "summary")(folder, f"{shape}, {trained}", flow_of(stats)))


def _up_to(bins: Sequence[LengthBin], length: int) -> list[LengthBin]:
    """Go on with empty bins as far as `length`, so that its line stands inside the chart."""
    longer = list(bins)
    while longer[-1].stop <= length:
        start = longer[-1].stop
        longer.append(LengthBin(start, start + (1 << max(start.bit_length() - 4, 0)), 0))
    return longer


def _limit(bins: Sequence[LengthBin], max_length: int) -> float:
    if max_length < bins[0].start:
        return 0.0
    index, cut = next((index, found) for index, found in enumerate(bins) if found.stop > max_length)
    return (index + (max_length - cut.start) / (cut.stop - cut.start)) / len(bins)


def _ticks(bins: Sequence[LengthBin]) -> list[tuple[float, int]]:
    """Return powers of two, at most eight."""
    starts = [(index / len(bins), found.start) for index, found in enumerate(bins)]
    powers = [(place, start) for place, start in starts if start and start & (start - 1) == 0]
    return powers[:: max(1, -(-len(powers) // _MOST_TICKS))]


def _range(found: LengthBin) -> str:
    return f"{found.start:,}" if found.stop == found.start + 1 else f"{found.start:,}–{found.stop - 1:,}"
