"""What stands around a list of documents: histograms, sources, filters, each a link to another selection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sftdata.browse.catalog import SHARES, bin_starts
from sftdata.browse.query import STATES, Query
from sftdata.browse.selection import Selection
from sftdata.choosing import read_share
from sftdata.output import counted
from sftdata.set.manifest import SourceInfo
from sftdata.show.stats import MOST_SOURCES, Bar, Histogram, histogram_of, length_histogram


@dataclass(frozen=True, slots=True)
class Facet:
    """A source, or a filter that is set.

    Attributes:
        name: shown.
        link: query of a page with the filter, or without it where it is set.
        count: documents; 0 for a filter.
        chosen: the filter is set.
    """

    name: str
    link: str
    count: int = 0
    chosen: bool = True


def lengths_of(chosen: Selection, query: Query, max_length: int | None) -> Histogram:
    """Return the lengths that the other filters leave; each bar selects its own."""
    counts: dict[int, int] = {}
    for start, count in zip(bin_starts().tolist(), chosen.lengths.tolist(), strict=True):
        if count:
            counts[start] = counts.get(start, 0) + count
    bins = length_histogram(counts)
    drawn = histogram_of(bins, max_length)
    low, high = query.recipe.min_tokens or 0, query.recipe.max_tokens
    bars = []
    for bar, span in zip(drawn.bars, bins, strict=False):
        off = span.stop <= low or (high is not None and span.start > high)
        linked = span.examples and span.start
        link = query.link(min_tokens=span.start, max_tokens=span.stop - 1) if linked else ""
        bars.append(replace(bar, link=link, off=off))
    return replace(drawn, bars=bars + drawn.bars[len(bins) :])


def shares_of(chosen: Selection, query: Query) -> Histogram:
    """Return the trained shares that the other filters leave; each bar selects its own."""
    most = int(chosen.shares.max(initial=0)) or 1
    low, high = query.recipe.min_trained, query.recipe.max_trained
    above = read_share(low) if low else 0.0
    below = read_share(high) if high else 1.0
    bars = []
    for number, count in enumerate(chosen.shares.tolist()):
        start, stop = number / SHARES, (number + 1) / SHARES
        title = f"{start:.4g}–{stop:.4g} of the tokens trained: {counted(count, 'example')}"
        off = stop <= above or start > below
        bars.append(Bar("trained", count / most, title, query.within(number, SHARES) if count else "", off))
    ticks = [(quarter / 4, 25 * quarter) for quarter in range(5)]
    label = f"{counted(int(chosen.shares.sum()), 'example')} by the share of their tokens that is trained"
    return Histogram(bars, label, ticks, None, None, "%")


def sources_of(chosen: Selection, query: Query, sources: Sequence[SourceInfo]) -> tuple[list[Facet], int]:
    """Return the largest sources that have something, and those that are picked; and how many have something.

    A click on one adds it, or takes it away.
    """
    names = query.recipe.sources
    counts: dict[str, int] = {}
    for source, count in zip(sources, chosen.sources.tolist(), strict=True):
        if count or source.name in names:
            counts[source.name] = counts.get(source.name, 0) + count
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    facets = []
    for place, (name, count) in enumerate(ordered):
        picked = name in names
        if place < MOST_SOURCES or picked:
            others = [one for one in names if one != name]
            link = query.link(sources=others if picked else [*others, name])
            facets.append(Facet(name, link, count, picked))
    return facets, len(ordered)


def filters_of(query: Query) -> Iterator[Facet]:
    """Yield the filters that are set, each with the query without it."""
    recipe = query.recipe
    for field in ("sources", "without"):
        names = getattr(recipe, field)
        for name in names:
            rest = [one for one in names if one != name]
            yield Facet(f"{'not ' * (field == 'without')}{name}", query.link(**{field: rest}))
    bounds = {
        "tokens": (recipe.min_tokens, recipe.max_tokens),
        "trained": tuple(
            share and f"{100 * read_share(share):.4g}%" for share in (recipe.min_trained, recipe.max_trained)
        ),
    }
    for what, (low, high) in bounds.items():
        if low is not None or high is not None:
            span = f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"
            yield Facet(f"{span} {what}", query.link(**{f"min_{what}": None, f"max_{what}": None}))
    if query.state:
        yield Facet(STATES[query.state], query.link(state=None))
    for field in ("finding", "text"):
        if value := query.text(field):
            yield Facet(f"“{value}”" if field == "text" else value, query.link(**{field: None}))
