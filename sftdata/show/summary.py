"""The terminal face of stats and audit: bars that tell their parts by glyph as well as by colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from sftdata.outlet import visible
from sftdata.show.stats import LengthBin, Part, SourceShare, Stats

if TYPE_CHECKING:
    from rich.console import Console

    from sftdata.show.findings import Finding

_GLYPHS = {
    "kept": ("█", "green"), "trained": ("█", "green"), "context": ("▒", "blue"), "padding": ("░", "bright_black"),
    "lost": ("╱", "yellow"), "bad": ("╳", "red"),
}  # fmt: skip
_BAR = 40


def print_stats(stats: Stats, title: str, console: Console) -> None:
    """Print the numbers of a set.

    Args:
        console: of `sftdata.show.terminal.make_console`.
    """
    length = f"of {stats.max_length:,} tokens" if stats.max_length else "of their own length"
    shards = "1 shard" if stats.shards == 1 else f"{stats.shards:,} shards"
    console.print(Text.assemble((visible(title), "bold"), (f"   digest {stats.digest[:12]}", "bright_black")))
    console.print(
        f"{stats.rows_packed:,} packed rows {length}, {stats.documents:,} documents, {shards};"
        f" {stats.fill:.1%} full, {stats.trained_share:.1%} of tokens trained",
        soft_wrap=True,
    )
    for name, parts in (("rows in", stats.rows), ("tokens in", stats.tokens), ("token slots", stats.slots)):
        console.print()
        for line in _flow(name, parts):
            console.print(line, soft_wrap=True)
    for heading, lines in (
        ("lengths, in tokens before any cut", _histogram(stats.lengths, stats.max_length)),
        ("sources", _sources(stats.sources)),
        (
            "counted",
            (Text(f"  {name.replace('_', ' '):<32}{count:>12,}") for name, count in stats.counters.items()),
        ),
        ("decided", (Text(f"  {visible(note)}") for note in stats.notes)),
    ):
        found = list(lines)
        if found:
            console.print(Text.assemble("\n", (heading, "bold")))
            for line in found:
                console.print(line, soft_wrap=True)


def print_findings(findings: Sequence[Finding], console: Console, indent: str = "") -> None:
    """Print what an audit found, defects first."""
    for finding in findings:
        head = (finding.severity, "red bold" if finding.severity == "defect" else "blue bold")
        line = Text.assemble(
            indent, head, " ", (finding.code, "bold"), f"  {finding.amount}: {finding.message}"
        )
        console.print(line, soft_wrap=True)
        if finding.examples:
            console.print(
                Text(f"{indent}       at    {', '.join(map(visible, finding.examples))}"), soft_wrap=True
            )
        console.print(Text(f"{indent}       fix   {finding.fix}"), soft_wrap=True)


def _flow(name: str, parts: Sequence[Part]) -> Iterator[Text]:
    whole = sum(part.count for part in parts)
    yield Text.assemble((f"{name:<20}{whole:>14,}  ", "bold"), _bar(parts, whole))
    for part in parts:
        share = part.count / max(whole, 1)
        yield Text.assemble(
            "  ", _GLYPHS[part.kind], f" {visible(part.name):<30}{part.count:>14,}  {share:>6.1%}"
        )


def _bar(parts: Sequence[Part], whole: int, length: int = _BAR) -> Text:
    """Draw the parts; one that is there has at least one cell."""
    bar, filled, done = Text(), 0, 0
    for part in parts:
        done += part.count
        cells = max(round(done / max(whole, 1) * length) - filled, 1 if part.count else 0)
        filled += cells
        bar.append(_GLYPHS[part.kind][0] * cells, _GLYPHS[part.kind][1])
    return bar


def _histogram(bins: Sequence[LengthBin], max_length: int | None) -> Iterator[Text]:
    """Draw one bar for each doubling, and the line where rows are cut."""
    octaves: dict[int, int] = {}
    for found in bins:
        low = 1 << (found.start.bit_length() - 1) if found.start else 0
        octaves[low] = octaves.get(low, 0) + found.examples
    most = max(octaves.values(), default=1)
    limit = Text(f"  ── max_length {max_length:,} {'─' * 30}", "yellow") if max_length and octaves else None
    for low, count in octaves.items():
        over = max_length is not None and low >= max_length
        if over and limit:
            yield limit
            limit = None
        cells = max(round(count / most * _BAR), 1 if count else 0)
        yield Text.assemble(
            f"  {low:>9,} – {max(2 * low - 1, low):<9,}  ",
            ("█" * cells, "yellow" if over else "green"),
            f" {count:,}",
        )
    if limit:
        yield limit


def _sources(sources: Sequence[SourceShare]) -> Iterator[Text]:
    whole = max(sum(source.tokens for source in sources), 1)
    width = min(max((len(source.name) for source in sources), default=0), 44)
    for source in sources:
        parts = (
            Part("", "trained", source.tokens_trained),
            Part("", "context", source.tokens - source.tokens_trained),
        )
        share, trained = source.tokens / whole, source.tokens_trained / max(source.tokens, 1)
        counts = (
            f"{source.rows:>11,} rows {source.tokens:>13,} tokens {share:>6.1%}, trained {trained:>6.1%} "
        )
        yield Text.assemble(
            f"  {visible(source.name):<{width}}", counts, _bar(parts, source.tokens, _BAR // 2)
        )
