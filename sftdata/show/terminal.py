"""The terminal face of views, stats and audit.

In a view a gutter holds roles and token positions, and trained tokens are green and underlined. Where nothing can be
styled (a pipe, a dumb terminal), trained stretches stand between ⟦ and ⟧. With NO_COLOR the underline stays. Bars
tell their parts by glyph as well as by colour.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sftdata.output import unguarded, visible
from sftdata.show.stats import LengthBin, Part, SourceShare, Stats
from sftdata.show.view import DocumentView, Piece, View

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

    from sftdata.show.audit import Finding

TRAINED, CONTEXT, CONTROL, QUIET = "green underline", "", "cyan", "bright_black"
TRAINED_CONTROL = "bold green underline"
NEWLINE, SEPARATOR = "↵", "─"
_OPEN, _CLOSE = "⟦", "⟧"
_MARKS = str.maketrans({_OPEN: "\\u27e6", _CLOSE: "\\u27e7"})
_GUTTER = 20


class SafeConsole(Console):
    """A console that styles what it prints, and escapes it: rich itself lets most control characters of the data through."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of anything that is printed, their text made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def make_console(file: TextIO | None = None, width: int | None = None) -> Console:
    """Return a console for data: no markup, no emoji names, no highlighting of what looks like numbers."""
    file = unguarded(sys.stdout if file is None else file)
    return SafeConsole(file=file, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def print_view(view: View, console: Console | None = None, *, ids: bool = False) -> None:
    """Print a view to stdout.

    Args:
        console: of `make_console`.
        ids: show the token ids behind each piece.
    """
    console = console or make_console()
    styled = console.color_system is not None
    trained = Text("trained", TRAINED) if styled else Text(f"{_OPEN}trained{_CLOSE}")
    console.print(Text.assemble((visible(view.title), "bold"), ("   " if view.title else ""), trained, ("  context  ", ""),
                                ("<control token>", CONTROL), (f"  {NEWLINE} newline", QUIET)))  # fmt: skip
    for document in view.documents:
        _print_document(document, console, styled, ids)
    if view.padding:
        console.print(_border(f"padding · {view.padding:,} tokens, never trained", console))


def print_examples(documents: Sequence[DocumentView], console: Console | None = None) -> None:
    """Print examples that are in no set yet, one under the other."""
    print_view(View("", tuple(documents)), console)


def _print_document(document: DocumentView, console: Console, styled: bool, ids: bool) -> None:
    number = f"example {document.example_id}" if document.example_id >= 0 else ""
    counts = f"{document.tokens:,} tokens, {document.tokens_trained:,} trained"
    console.print(_border(" · ".join(filter(None, [visible(document.origin), number, counts])), console))
    room = console.width - _GUTTER if console.is_terminal else None
    for role, position, any_trained, line in _lines(document, styled, ids):
        parts = line.wrap(console, max(room, 20), overflow="fold") if room else [line]
        for index, part in enumerate(parts or [line]):
            speaker, place = (role, position) if index == 0 else ("", "")
            gutter = ((f" {speaker:<9}", "bold"), (f"{place:>7} ", QUIET))
            console.print(
                Text.assemble(*gutter, ("┃ ", "green") if any_trained else ("│ ", QUIET), part),
                soft_wrap=True,
            )


def _border(title: str, console: Console) -> Text:
    width = min(console.width, 100)
    line = Text(f"{SEPARATOR * 2} {title} ", style="bold")
    return line.append(SEPARATOR * max(width - line.cell_len, 2), QUIET)


def _lines(document: DocumentView, styled: bool, ids: bool) -> Iterator[tuple[str, int, bool, Text]]:
    """Yield (role where a turn begins, position of its first token, whether it trains anything, text) for each line."""
    position = document.start
    for role, pieces in document.turns():
        for number, (begins, trains, line) in enumerate(_turn_lines(pieces, position, styled, ids)):
            yield "" if number else visible(role), begins, trains, line
        position += sum(len(piece.ids) for piece in pieces)


def _turn_lines(
    pieces: Sequence[Piece], begins: int, styled: bool, ids: bool
) -> Iterator[tuple[int, bool, Text]]:
    position, line, trains = begins, Text(), False
    for piece in pieces:
        position += len(piece.ids)
        parts = visible(piece.text).splitlines(keepends=True)
        for index, part in enumerate(parts):
            text = part.removesuffix("\n")
            line.append_text(_styled(text, piece, styled)).append_text(
                _styled(NEWLINE * (text != part), piece, styled)
            )
            trains |= piece.trained
            if ids and index == len(parts) - 1:
                line.append(f"‹{' '.join(map(str, piece.ids))}›", QUIET)
            if text != part:
                yield begins, trains, _joined(line)
                line, trains, begins = Text(), False, position
    if line:
        yield begins, trains, _joined(line)


def _joined(line: Text) -> Text:
    """Let brackets hold whole stretches instead of single tokens."""
    return Text(line.plain.replace(_CLOSE + _OPEN, "")) if _CLOSE + _OPEN in line.plain else line


def _styled(text: str, piece: Piece, styled: bool) -> Text:
    if styled:
        return Text(text, QUIET if text == NEWLINE and not piece.trained else style_of(piece))
    text = text.translate(_MARKS)
    return Text(f"{_OPEN}{text}{_CLOSE}" if piece.trained and text else text)


def style_of(piece: Piece) -> str:
    """Return the style of a piece: trained or not is told by colour and by underline."""
    if piece.trained:
        return TRAINED_CONTROL if piece.special else TRAINED
    return CONTROL if piece.special else CONTEXT


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
