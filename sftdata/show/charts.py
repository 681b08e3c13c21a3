"""The charts of the report, in HTML and inline SVG: they stretch to any width, since no text is drawn in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate, pairwise

from sftdata.outlet import visible
from sftdata.show.stats import LengthBin, Part

_MOST_TICKS = 8


def stacked_bar(parts: Sequence[Part], *, thin: bool = False) -> str:
    """Return parts of a whole as one bar; every part that is there can be seen."""
    whole = max(sum(part.count for part in parts), 1)
    cells = "".join(
        f'<i class="{part.kind}" style="flex:{part.count / whole:.6f} 1 0" title="{_safe(part.name)}: {part.count:,}"></i>'
        for part in parts
        if part.count
    )
    label = ", ".join(f"{_safe(part.name)} {part.count / whole:.1%}" for part in parts)
    size = "bar thin" if thin else "bar"
    return f'<div class="{size}" role="img" aria-label="{label}">{cells}</div>'


def legend(title: str, parts: Sequence[Part]) -> str:
    """Return the names, counts and shares of the parts of a bar."""
    whole = max(sum(part.count for part in parts), 1)
    items = (
        f'<li><i class="{part.kind}"></i>{_safe(part.name)} <b>{part.count:,}</b> <span>{part.count / whole:.1%}</span></li>'
        for part in parts
    )
    return f'<div><h3>{title}</h3><ul class="legend">{"".join(items)}</ul></div>'


def ribbons(pairs: Sequence[tuple[str, tuple[float, float], tuple[float, float]]]) -> str:
    """Return what flows from one bar to the next.

    Args:
        pairs: kind, and the half-open stretch it takes in the upper and in the lower bar, as shares of their widths.
    """
    paths = "".join(_ribbon(kind, upper, lower) for kind, upper, lower in pairs)
    return f'<svg class="ribbons" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">{paths}</svg>'


def spread(parts: Sequence[Part]) -> list[tuple[float, float]]:
    """Return the stretch that each part takes in its bar.

    >>> spread([Part("a", "kept", 3), Part("b", "lost", 1)])
    [(0.0, 0.75), (0.75, 1.0)]
    """
    whole = max(sum(part.count for part in parts), 1)
    ends = [count / whole for count in accumulate((part.count for part in parts), initial=0)]
    return list(pairwise(ends))


def histogram(bins: Sequence[LengthBin], max_length: int | None) -> str:
    """Return the lengths as bars of equal width, eight for each doubling, with the line where rows are cut."""
    if not bins:
        return '<p class="soft">No lengths were counted.</p>'
    bins = _up_to(bins, max_length or 0)
    most = max(found.examples for found in bins) or 1
    bars = "".join(
        f'<i class="{_side(found, max_length)}" style="height:{found.examples / most:.2%}"'
        f' title="{_range(found)} tokens: {found.examples:,} examples"></i>'
        for found in bins
    )
    whole = sum(found.examples for found in bins)
    label = f"{whole:,} examples of {bins[0].start:,} to {bins[-1].stop - 1:,} tokens"
    marks = "".join(_ticks(bins)) + (_limit(bins, max_length) if max_length else "")
    return (
        f'<div class="histogram" role="img" aria-label="{label}"><div class="bins">{bars}</div>{marks}</div>'
    )


def _ribbon(kind: str, upper: tuple[float, float], lower: tuple[float, float]) -> str:
    (a, b), (c, d) = ((100 * low, 100 * high) for low, high in (upper, lower))
    curve = f"M{a:.3f} 0C{a:.3f} 11 {c:.3f} 9 {c:.3f} 20L{d:.3f} 20C{d:.3f} 9 {b:.3f} 11 {b:.3f} 0Z"
    return f'<path class="{kind}" d="{curve}"/>'


def _up_to(bins: Sequence[LengthBin], length: int) -> list[LengthBin]:
    """Go on with empty bins as far as `length`, so that its line stands inside the chart."""
    longer = list(bins)
    while longer[-1].stop <= length:
        start = longer[-1].stop
        longer.append(LengthBin(start, start + (1 << max(start.bit_length() - 4, 0)), 0))
    return longer


def _limit(bins: Sequence[LengthBin], max_length: int) -> str:
    if max_length < bins[0].start:
        place = 0.0
    else:
        index = next(index for index, found in enumerate(bins) if found.stop > max_length)
        place = (index + (max_length - bins[index].start) / (bins[index].stop - bins[index].start)) / len(
            bins
        )
    side = " left" if place > 0.5 else ""
    return f'<div class="limit{side}" style="left:{place:.3%}"><b>max_length {max_length:,}</b></div>'


def _ticks(bins: Sequence[LengthBin]) -> Iterator[str]:
    powers = [
        index for index, found in enumerate(bins) if found.start and found.start & (found.start - 1) == 0
    ]
    for index in powers[:: max(1, -(-len(powers) // _MOST_TICKS))]:
        yield f'<span class="tick" style="left:{index / len(bins):.3%}">{bins[index].start:,}</span>'


def _side(found: LengthBin, max_length: int | None) -> str:
    return "lost" if max_length and found.start >= max_length else "trained"


def _range(found: LengthBin) -> str:
    return f"{found.start:,}" if found.stop == found.start + 1 else f"{found.start:,}–{found.stop - 1:,}"


def _safe(text: str) -> str:
    return escape(visible(text))
