"""The terminal face of a view: a gutter with roles and token positions, trained tokens in green and underlined.

Where nothing can be styled (a pipe, a dumb terminal), trained stretches stand between ⟦ and ⟧. With NO_COLOR the underline stays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from sftdata.outlet import unguarded, visible
from sftdata.show.view import DocumentView, Piece, View

if TYPE_CHECKING:
    from typing import TextIO

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
