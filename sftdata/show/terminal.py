"""Views, stats and findings on a terminal.

A view has a gutter with roles and token positions; trained tokens are green and underlined. Without styles
(a pipe, a dumb terminal) they are between ⟦ and ⟧; NO_COLOR keeps the underline. The parts of a bar differ by
glyph as well as by colour.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sftdata.output import counted, unguarded, visible
from sftdata.set.shares import MEASURES
from sftdata.show.choice import ShareOf, spell
from sftdata.show.stats import MOST_SOURCES, LengthBin, Part, SourceShare, Stats
from sftdata.show.view import DocumentView, Piece, View

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

    from sftdata.show.diff import Both, Change, Diff, SourceChange, Version
    from sftdata.show.findings import Finding

TRAINED, CONTEXT, CONTROL, QUIET = "green underline", "", "cyan", "bright_black"
TRAINED_CONTROL = "bold green underline"
NEWLINE, SEPARATOR = "↵", "─"
_OPEN, _CLOSE = "⟦", "⟧"
_MARKS = str.maketrans({_OPEN: "\\u27e6", _CLOSE: "\\u27e7"})
_GUTTER, _BAR = 20, 40  # columns
_GLYPHS = {
    "kept": ("█", "green"), "trained": ("█", "green"), "context": ("▒", "blue"),
    "padding": ("░", QUIET), "out": ("░", QUIET), "lost": ("╱", "yellow"), "bad": ("╳", "red"),
    "same": ("█", QUIET), "came": ("+", "green"), "went": ("-", "red"), "changed": ("~", "yellow"),
}  # fmt: skip


class SafeConsole(Console):
    """A console that escapes what it styles: rich itself lets most control characters of the data pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable, their text escaped."""
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
    title = (visible(view.title) + "   " if view.title else "", "bold")
    trained = Text("trained", TRAINED) if styled else Text(f"{_OPEN}trained{_CLOSE}")
    control, newline = ("<control token>", CONTROL), (f"  {NEWLINE} newline", QUIET)
    console.print(Text.assemble(title, trained, "  context  ", control, newline))
    for document in view.documents:
        _print_document(document, console, styled, ids)
    if view.padding:
        console.print(_border(f"padding · {counted(view.padding, 'token')}, never trained", console))


def _print_document(document: DocumentView, console: Console, styled: bool, ids: bool) -> None:
    number = f"example {document.example_id}" if document.example_id >= 0 else ""
    counts = f"{counted(document.tokens, 'token')}, {document.tokens_trained:,} trained"
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
    """Yield each line: role if a turn begins, position of its first token, whether it trains any, text."""
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
    """Merge adjacent brackets, so that they enclose stretches instead of tokens."""
    return Text(line.plain.replace(_CLOSE + _OPEN, "")) if _CLOSE + _OPEN in line.plain else line


def _styled(text: str, piece: Piece, styled: bool) -> Text:
    if styled:
        return Text(text, QUIET if text == NEWLINE and not piece.trained else style_of(piece))
    text = text.translate(_MARKS)
    return Text(f"{_OPEN}{text}{_CLOSE}" if piece.trained and text else text)


def style_of(piece: Piece) -> str:
    """Return the style of a piece; trained ones differ by colour and by underline."""
    if piece.trained:
        return TRAINED_CONTROL if piece.special else TRAINED
    return CONTROL if piece.special else CONTEXT


def print_stats(stats: Stats, title: str, console: Console) -> None:
    """Print the numbers of a set to a console of `make_console`."""
    length = f"of {counted(stats.max_length, 'token')}" if stats.max_length else "of their own length"
    shards = counted(stats.shards, "shard")
    digest = f"   digest {stats.digest[:12]}" if stats.digest else ""
    console.print(Text.assemble((visible(title), "bold"), (digest, "bright_black")))
    console.print(
        f"{counted(stats.rows_packed, 'packed row')} {length}, {counted(stats.documents, 'document')},"
        f" {shards}; {stats.fill:.1%} full, {stats.trained_share:.1%} of tokens trained",
        soft_wrap=True,
    )
    for name, parts in stats.stages:
        console.print()
        for line in _flow(name, parts):
            console.print(line, soft_wrap=True)
    asked = [share for share in stats.shares if share.asked is not None]
    width = max((len(name) for name, _ in stats.choices), default=0)
    choices = (f"  {visible(name):<{width}}  {visible(text)}" for name, text in stats.choices)
    counters = (f"  {name.replace('_', ' '):<32}{count:>12,}" for name, count in stats.counters.items())
    for heading, lines in (
        ("lengths, in tokens before any cut", [*_histogram(stats.lengths, stats.max_length)]),
        ("choices", [*map(Text, choices)]),
        ("shares", [*_shares(asked)]),
        ("sources", [*_sources(stats.sources)]),
        ("counted", [*map(Text, counters)]),
        ("decided", [Text(f"  {visible(note)}") for note in stats.notes]),
    ):
        if lines:
            console.print(Text.assemble("\n", (heading, "bold")))
            for line in lines:
                console.print(line, soft_wrap=True)


def print_findings(findings: Sequence[Finding], console: Console, indent: str = "") -> None:
    """Print the findings of an audit, defects first."""
    for finding in findings:
        head = (finding.severity, "red bold" if finding.severity == "defect" else "blue bold")
        sentence = f"  {finding.amount}: {finding.message}"
        lines = [Text.assemble(indent, head, " ", (finding.code, "bold"), sentence)]
        if finding.examples:
            lines.append(Text(f"{indent}       at    {', '.join(map(visible, finding.examples))}"))
        lines.append(Text(f"{indent}       fix   {finding.fix}"))
        for line in lines:
            console.print(line, soft_wrap=True)


def _flow(name: str, parts: Sequence[Part]) -> Iterator[Text]:
    total = sum(part.count for part in parts)
    yield Text.assemble((f"{name:<20}{total:>14,}  ", "bold"), _bar(parts, total))
    for part in parts:
        figures = f" {visible(part.name):<30}{part.count:>14,}  {part.count / max(total, 1):>6.1%}"
        yield Text.assemble("  ", _GLYPHS[part.kind], figures)


def _bar(parts: Sequence[Part], total: int, length: int = _BAR) -> Text:
    """Draw the parts; one that is not empty has at least one cell."""
    bar, filled, done = Text(), 0, 0
    for part in parts:
        done += part.count
        cells = max(round(done / max(total, 1) * length) - filled, 1 if part.count else 0)
        filled += cells
        bar.append(_GLYPHS[part.kind][0] * cells, _GLYPHS[part.kind][1])
    return bar


def _histogram(bins: Sequence[LengthBin], max_length: int | None) -> Iterator[Text]:
    """Draw one bar for each doubling of the length, and the line at which rows are cut."""
    octaves: dict[int, int] = {}
    for part in bins:
        low = 1 << (part.start.bit_length() - 1) if part.start else 0
        octaves[low] = octaves.get(low, 0) + part.examples
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


def _shares(shares: Sequence[ShareOf]) -> Iterator[Text]:
    """Draw what was asked of each part of a mixture, and what it has of rows, tokens and trained tokens."""
    if not shares:
        return
    width = min(max(len(share.name) for share in shares), 44)
    head = "".join(f"{word:>10}" for word in ("asked", "rows", "tokens", "trained", "passes"))
    yield Text(f"  {'':<{width}}{head}", QUIET)
    for share in shares:
        line = Text(f"  {visible(share.name):<{width}}{share.asked or 0:>10.3%}")
        for by in MEASURES:
            line.append(f"{getattr(share, by):>10.3%}", "bold" if by == share.by else "")
        yield line.append(f"{share.passes or 0:>10.2f}")


def _sources(sources: Sequence[SourceShare]) -> Iterator[Text]:
    if not sources:
        return
    tokens = max(sum(source.tokens for source in sources), 1)
    trained = max(sum(source.tokens_trained for source in sources), 1)
    width = min(max(len(source.name) for source in sources), 44)
    head = f"{'rows':>11}{'tokens':>14}{'':>8}{'trained':>14}"
    yield Text(f"  {'':<{width}}{head}", QUIET)
    for source in sources:
        own, context = source.tokens_trained, source.tokens - source.tokens_trained
        bar = _bar((Part("", "trained", own), Part("", "context", context)), source.tokens, _BAR // 4)
        shares = f"{source.tokens:>14,}{source.tokens / tokens:>8.1%}{own:>14,}{own / trained:>8.1%}  "
        yield Text.assemble(f"  {visible(source.name):<{width}}{source.rows:>11,}{shares}", bar)


def print_diff(found: Diff, console: Console) -> None:
    """Print how two sets differ to a console of `make_console`."""
    for name, folder, digest in zip("ab", found.folders, found.digests, strict=True):
        line = Text.assemble((f"{name}  {visible(folder)}", "bold"), (f"   digest {digest[:12]}", QUIET))
        console.print(line, soft_wrap=True)
    for note in found.notes:
        console.print(Text(visible(note)), soft_wrap=True)
    console.print(Text(f"\n{'':<10}{'a':>14}{'b':>15}", "bold"))
    for name in ("documents", "tokens", "trained"):
        both: Both = getattr(found, name)
        console.print(f"{name:<10}{both.a:>14,} {both.b:>14,}  {_signed(both.gain):>13}")
    examples = [line for change in found.changes for line in _examples(change, console)]
    for heading, lines in (
        ("documents", [*_changes(found)]),
        ("settings, a → b", [*_settings(found.settings)]),
        ("sources that differ", [*_changed_sources(found.sources)]),
        ("examples", examples),
    ):
        if lines:
            console.print(Text.assemble("\n", (heading, "bold")))
            for line in lines:
                console.print(line, soft_wrap=True)


def _signed(number: int) -> str:
    return f"{number:+,}" if number else "="


def _changes(found: Diff) -> Iterator[Text]:
    """Draw what is the same and what is not, then a line for each kind."""
    parts = found.parts()
    yield Text.assemble("  ", _bar(parts, sum(part.count for part in parts)))
    about = {change.meaning: change for change in found.changes}
    for part in parts:
        figures = f" {part.name:<38}{part.count:>12,}"
        change = about.get(part.name)
        more = "" if change is None else f"   {', '.join(_amounts(change))}"
        yield Text.assemble("  ", _GLYPHS[part.kind], figures, (more, QUIET))


def _amounts(change: Change) -> Iterator[str]:
    """Yield what a change makes of tokens and labels, and where the other side has the documents."""
    for name, both in (("tokens", change.tokens), ("trained", change.trained)):
        if both.gain:
            yield f"{both.gain:+,} {name}"
    other = "a" if change.kind == "came" else "b"
    if change.copies:
        yield f"{change.copies:,} equal to one in {other}"
    if change.beside:
        yield f"{change.beside:,} dropped by {other}"


def _settings(settings: Mapping[str, tuple[object, object]]) -> Iterator[Text]:
    width = max((len(name) for name in settings), default=0)
    for name, (a, b) in settings.items():
        yield Text(f"  {visible(name):<{width}}  {visible(spell(a))} → {visible(spell(b))}")


def _changed_sources(sources: Sequence[SourceChange]) -> Iterator[Text]:
    changed = [source for source in sources if source.changes or source.other_bytes]
    width = min(max((len(source.name) for source in changed), default=0), 44)
    for source in changed[:MOST_SOURCES]:
        counts = [f"{count:,} {kind}" for kind, count in source.changes.items()]
        documents = source.documents
        counts += ["other bytes"] * (source.other_bytes and documents.a > 0 and documents.b > 0)
        shares = f"{documents.a:>11,} → {documents.b:<11,} trained {_signed(source.trained.gain):<12}"
        yield Text.assemble(f"  {visible(source.name):<{width}}", shares, (f"   {', '.join(counts)}", QUIET))
    if len(changed) > MOST_SOURCES:
        yield Text(f"  and {len(changed) - MOST_SOURCES:,} more")
    if changed and len(changed) < len(sources):
        others = len(sources) - len(changed)
        yield Text(f"  {others:,} more {'is' if others == 1 else 'are'} the same", QUIET)


def _examples(change: Change, console: Console) -> Iterator[Text]:
    if change.examples:
        count = f"{len(change.examples):,} of {change.documents:,}"
        yield Text.assemble(
            "  ", _GLYPHS[change.sign], (f" {change.meaning}", "bold"), (f"   {count}", QUIET)
        )
    styled = console.color_system is not None
    for example in change.examples:
        versions = [own for own in (example.a, example.b) if own is not None]
        places = dict.fromkeys(visible(own.place) for own in versions)
        why = f"   {'b' if example.b is None else 'a'} {visible(example.why)}" if example.why else ""
        yield Text.assemble(f"    {' → '.join(places)}   {_sizes(versions)}", (why, "yellow"))
        if change.kind == "cut":
            continue
        for own in versions:
            sign = "-" if own is example.a else "+"
            yield Text.assemble((f"      {sign} ", "red" if sign == "-" else "green"), _excerpt(own, styled))


def _sizes(versions: Sequence[Version]) -> str:
    sizes = [f"{own.tokens:,}" + f" of {own.length:,}" * (own.tokens < own.length) for own in versions]
    trained = [f"{own.trained:,}" for own in versions]
    return f"{' → '.join(dict.fromkeys(sizes))} tokens, {' → '.join(dict.fromkeys(trained))} trained"


def _excerpt(version: Version, styled: bool) -> Text:
    """Return what is shown of a document, on one line."""
    text = Text("… " if version.skipped else "")
    for piece in version.pieces:
        text.append_text(_styled(visible(piece.text).replace("\n", NEWLINE), piece, styled))
    return _joined(text).append(" …" if version.cut else "")
