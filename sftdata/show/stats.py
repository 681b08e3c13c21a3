"""The numbers of a set, and their charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

import msgspec

from sftdata.output import counted
from sftdata.pages import macro
from sftdata.set.ledger import Ledger
from sftdata.set.local import named
from sftdata.set.manifest import Manifest
from sftdata.set.opened import ShardSet
from sftdata.set.steps import Balance, measure_balance
from sftdata.show.choice import ShareOf, choices_of, counters_of, shares_of, tell_shares

MOST_SOURCES = 40  # in the table of the page
_MOST_TICKS = 8

Stretch = tuple[float, float]
"""Begin and end of a part of a bar, as shares of its width."""


@dataclass(frozen=True, slots=True)
class Part:
    """A named share of a whole.

    Attributes:
        name: `trained`, `cut: truncate`, ...
        kind: its colour: kept, trained, context, padding, lost, bad or out.
        count: rows or tokens.
    """

    name: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Examples of `start` to `stop - 1` tokens, before any cut."""

    start: int
    stop: int
    examples: int


@dataclass(frozen=True, slots=True)
class SourceShare:
    """The contribution of one source.

    Attributes:
        name: of the source.
        rows: kept rows.
        tokens, tokens_trained: of these in the set.
    """

    name: str
    rows: int
    tokens: int
    tokens_trained: int


@dataclass(frozen=True, slots=True)
class Reach:
    """Examples of at least `tokens` tokens, which a smaller max_length would cut."""

    tokens: int
    examples: int


@dataclass(frozen=True, slots=True)
class Stats:
    """The numbers of one set; every count is from the manifest.

    Attributes:
        digest: of the set.
        max_length: tokens per packed row; None where rows keep their own length.
        rows, tokens, slots: the parts of rows in, of tokens in, and of the slots of packed rows.
        rows_packed, documents, shards: counts.
        fill: tokens over slots.
        trained_share: trained tokens over tokens of the set.
        lengths: histogram, in order, without gaps.
        reach: examples at or above each power of two.
        sources: in the order of the manifest.
        shares: of a mixture, else of each source.
        choices: how the set was chosen from others: name and sentence of each step.
        balance: of a set in steps of equal work, if it was measured.
        repeated: documents that are there more than once, counted from the second time on.
        counters: everything else that was counted.
        notes: decisions of `prepare`.
    """

    digest: str
    max_length: int | None
    rows: tuple[Part, ...]
    tokens: tuple[Part, ...]
    slots: tuple[Part, ...]
    rows_packed: int
    documents: int
    shards: int
    fill: float
    trained_share: float
    lengths: tuple[LengthBin, ...]
    reach: tuple[Reach, ...]
    sources: tuple[SourceShare, ...]
    shares: tuple[ShareOf, ...]
    choices: tuple[tuple[str, str], ...]
    balance: Balance | None
    repeated: int
    counters: dict[str, int]
    notes: tuple[str, ...]

    @property
    def stages(self) -> tuple[tuple[str, tuple[Part, ...]], ...]:
        """The three wholes by name, each with its parts."""
        return ("rows in", self.rows), ("tokens in", self.tokens), ("token slots", self.slots)


def measure(manifest: Manifest, balance: Balance | None = None) -> Stats:
    """Return the numbers of a set; no shard is opened.

    Args:
        balance: of a set in steps of equal work, as its rows say.
    """
    ledger = manifest.ledger
    slots = _parts(
        ("trained", "trained", ledger.tokens_trained),
        ("context", "context", ledger.tokens_context),
        ("padding", "padding", ledger.tokens_padding),
    )
    bins = length_histogram(ledger.lengths)
    return Stats(
        digest=manifest.digest,
        max_length=manifest.max_length,
        rows=_rows(ledger),
        tokens=_tokens(ledger),
        slots=slots,
        rows_packed=ledger.rows_packed,
        documents=ledger.documents,
        shards=len(manifest.shards),
        fill=ledger.tokens / max(sum(part.count for part in slots), 1),
        trained_share=ledger.tokens_trained / max(ledger.tokens, 1),
        lengths=bins,
        reach=_reach(bins),
        sources=tuple(
            SourceShare(name, own.rows, own.tokens, own.tokens_trained)
            for name, own in ledger.sources.items()
        ),
        shares=shares_of(manifest),
        choices=choices_of(manifest, balance),
        balance=balance,
        repeated=ledger.documents_repeated,
        counters=counters_of(manifest),
        notes=manifest.notes,
    )


def stats_json(manifest: Manifest, balance: Balance | None = None) -> dict[str, object]:
    """Return the numbers and the manifest they come from, as plain JSON data; `balance` as for `measure`."""
    return {"stats": msgspec.to_builtins(asdict(measure(manifest, balance))), "manifest": manifest.to_json()}


def length_histogram(lengths: dict[int, int]) -> tuple[LengthBin, ...]:
    """Return the bins from the shortest to the longest example, empty ones included.

    >>> [(span.start, span.stop, span.examples) for span in length_histogram({15: 2, 18: 1})]
    [(15, 16, 2), (16, 18, 0), (18, 20, 1)]
    """
    if not lengths:
        return ()
    bins, start = [], min(lengths)
    while start <= max(lengths):
        stop = start + (1 << max(start.bit_length() - 4, 0))
        bins.append(LengthBin(start, stop, lengths.get(start, 0)))
        start = stop
    return tuple(bins)


def _rows(ledger: Ledger) -> tuple[Part, ...]:
    return _parts(
        ("kept", "kept", ledger.rows_kept),
        *((f"dropped: {reason}", "lost", count) for reason, count in sorted(ledger.rows_dropped.items())),
        *((f"filtered: {rule}", "padding", count) for rule, count in sorted(ledger.rows_filtered.items())),
        *((f"rejected: {code}", "bad", count) for code, count in sorted(ledger.rows_rejected.items())),
        *((f"left out: {step}", "out", count) for step, count in sorted(ledger.documents_left_out.items())),
    )


def _tokens(ledger: Ledger) -> tuple[Part, ...]:
    return _parts(
        ("trained", "trained", ledger.tokens_trained),
        ("context", "context", ledger.tokens_context),
        *((f"cut: {policy}", "lost", count) for policy, count in sorted(ledger.tokens_cut.items())),
        ("in dropped rows", "bad", ledger.tokens_in_dropped_rows),
        ("left out", "out", ledger.tokens_left_out),
    )


def _parts(*parts: tuple[str, str, int]) -> tuple[Part, ...]:
    """Leave out empty parts, other than the first."""
    return tuple(Part(*part) for index, part in enumerate(parts) if part[2] or not index)


def _reach(bins: tuple[LengthBin, ...]) -> tuple[Reach, ...]:
    """Count by powers of two: they are edges of bins, so the counts are exact."""
    if not bins:
        return ()
    longest = bins[-1].start
    powers = [1 << power for power in range(5, longest.bit_length())]
    counted = (Reach(power, sum(span.examples for span in bins if span.start >= power)) for power in powers)
    whole = sum(span.examples for span in bins)
    return tuple(span for span in counted if span.examples < whole)


@dataclass(frozen=True, slots=True)
class Flow:
    """Bars one above the other, and the ribbons between them.

    Attributes:
        stages: name and parts of each bar.
        between: kind and SVG path of each ribbon, for each pair of neighbours.
    """

    stages: tuple[tuple[str, Sequence[Part]], ...]
    between: tuple[list[tuple[str, str]], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram: its height is a share of the highest.

    Attributes:
        link: where a click leads; "" for nowhere.
        off: drawn faint, as what is filtered away.
    """

    kind: str
    height: float
    title: str
    link: str = ""
    off: bool = False


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars of equal width, eight for each doubling of the length.

    Attributes:
        ticks: place of a number below the bars, as a share of the width, and the number.
        limit: place of the line where rows are cut, as a share of the width; None without one.
        unit: of these numbers.
    """

    bars: list[Bar]
    label: str
    ticks: list[tuple[float, int]]
    limit: float | None
    max_length: int | None
    unit: str = ""


def spread(parts: Sequence[Part]) -> list[Stretch]:
    """Return the stretch of each part in its bar.

    >>> spread([Part("a", "kept", 3), Part("b", "lost", 1)])
    [(0.0, 0.75), (0.75, 1.0)]
    """
    whole = max(sum(part.count for part in parts), 1)
    ends = [count / whole for count in accumulate((part.count for part in parts), initial=0)]
    return list(pairwise(ends))


def flow_of(stats: Stats) -> Flow:
    """Return the flow from rows to trained tokens."""
    rows, tokens, slots = (spread(parts) for parts in (stats.rows, stats.tokens, stats.slots))
    # Rows kept, dropped or left out have tokens; rejected and filtered rows were never tokenized.
    read = sum(part.kind in ("kept", "lost") for part in stats.rows)
    left = sum(part.kind == "out" for part in stats.rows)
    of_read = tokens[-1][0] if left else 1.0
    from_rows = [("kept", ribbon((0.0, rows[read - 1][1] if read else 0.0), (0.0, of_read if read else 0.0)))]
    if left:
        from_rows.append(("out", ribbon((rows[-left][0], 1.0), (of_read, 1.0))))
    context = [
        ("context", ribbon(tokens[i], slots[j]))
        for i, above in enumerate(stats.tokens)
        for j, below in enumerate(stats.slots)
        if above.kind == below.kind == "context"
    ]
    return Flow(stats.stages, (from_rows, [("trained", ribbon(tokens[0], slots[0])), *context]))


def ribbon(upper: Stretch, lower: Stretch) -> str:
    """Return the SVG path from a stretch of one bar to a stretch of the next."""
    (a, b), (c, d) = ((100 * low, 100 * high) for low, high in (upper, lower))
    return f"M{a:.3f} 0C{a:.3f} 11 {c:.3f} 9 {c:.3f} 20L{d:.3f} 20C{d:.3f} 9 {b:.3f} 11 {b:.3f} 0Z"


def histogram_of(bins: Sequence[LengthBin], max_length: int | None) -> Histogram:
    """Return the lengths as bars, with the line at which rows are cut."""
    if not bins:
        return Histogram([], "", [], None, max_length)
    whole = sum(span.examples for span in bins)
    bins = _up_to(bins, max_length or 0)
    most = max(span.examples for span in bins) or 1
    bars = [
        Bar(
            "lost" if max_length and span.start >= max_length else "trained",
            span.examples / most,
            f"{_range(span)} tokens: {counted(span.examples, 'example')}",
        )
        for span in bins
    ]
    label = f"{counted(whole, 'example')} of {bins[0].start:,} to {bins[-1].stop - 1:,} tokens"
    return Histogram(bars, label, _ticks(bins), _limit(bins, max_length) if max_length else None, max_length)


def notebook_summary(shards: ShardSet) -> str:
    """Return the figures of a set and their flow, as HTML for the output cell of a notebook."""
    folder, manifest = named(shards.folder), shards.manifest
    stats = measure(manifest, measure_balance(shards))
    length = f"of {counted(stats.max_length, 'token')}" if stats.max_length else "of their own length"
    shape = f"{counted(stats.rows_packed, 'packed row')} {length}, {stats.fill:.1%} full"
    trained = f"{stats.trained_share:.1%} of tokens trained"
    shares = [("shares", sentence) for sentence in tell_shares(manifest)]
    summary = macro("charts.html.jinja", "summary")
    return str(summary(folder, f"{shape}, {trained}", flow_of(stats), (*stats.choices, *shares)))


def _up_to(bins: Sequence[LengthBin], length: int) -> list[LengthBin]:
    """Append empty bins up to `length`, so that its line is inside the chart."""
    longer = list(bins)
    while longer[-1].stop <= length:
        start = longer[-1].stop
        longer.append(LengthBin(start, start + (1 << max(start.bit_length() - 4, 0)), 0))
    return longer


def _limit(bins: Sequence[LengthBin], max_length: int) -> float:
    if max_length < bins[0].start:
        return 0.0
    index, cut = next((index, span) for index, span in enumerate(bins) if span.stop > max_length)
    return (index + (max_length - cut.start) / (cut.stop - cut.start)) / len(bins)


def _ticks(bins: Sequence[LengthBin]) -> list[tuple[float, int]]:
    """Return powers of two, at most eight."""
    starts = [(index / len(bins), span.start) for index, span in enumerate(bins)]
    powers = [(place, start) for place, start in starts if start and start & (start - 1) == 0]
    return powers[:: max(1, -(-len(powers) // _MOST_TICKS))]


def _range(span: LengthBin) -> str:
    return f"{span.start:,}" if span.stop == span.start + 1 else f"{span.start:,}–{span.stop - 1:,}"
