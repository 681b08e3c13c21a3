"""Pictures in a rendered conversation: each marker of the template becomes what stands for its picture."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from sftdata.batches import Ranges
from sftdata.errors import RowError
from sftdata.masks.turns import RenderedConversation
from sftdata.output import counted
from sftdata.pictures.families import PictureProcessor
from sftdata.pictures.layouts import Layout, Size


def write_layouts(
    rendered: RenderedConversation, sizes: Sequence[Size], processor: PictureProcessor | None
) -> RenderedConversation:
    """Write the layout of a picture in place of each marker; turns and literal ranges move with the text.

    Args:
        sizes: height and width of the pictures, in their order.
        processor: lays them out.

    Raises:
        RowError: there is no processor, it cannot take a picture of such a size, or the template wrote more
            markers than there are pictures, or fewer.
    """
    if processor is None:
        what = f"the row has {counted(len(sizes), 'picture')}, and no processor says what stands for one."
        raise RowError("no-processor", what, "leave out rows with pictures.")
    layouts = [_laid_out(processor, number, size) for number, size in enumerate(sizes, 1)]
    marker = processor.marker
    starts = _find_outside(rendered.literal, rendered.text, marker)
    if len(starts) != len(layouts):
        what = (
            f"the chat template writes {marker!r} {len(starts)} times for {counted(len(layouts), 'picture')}."
        )
        raise RowError("images-lost", what, "use the chat template of the model.")
    made = rendered
    if any(layout.text != marker for layout in layouts):
        made = _write(rendered, starts, [layout.text for layout in layouts], len(marker))
    runs = tuple(run for layout in layouts for run in layout.runs)
    tokens = len(_find_outside(made.literal, made.text, processor.image_token))
    if tokens != len(runs):
        what = (
            f"the text has {processor.image_token!r} {counted(tokens, 'time')};"
            f" its pictures have it {counted(len(runs), 'time')}."
        )
        raise RowError("images-lost", what, "take that token out of the data.")
    return replace(made, runs=runs)


def _laid_out(processor: PictureProcessor, number: int, size: Size) -> Layout:
    try:
        return processor.layout(*size)
    except RowError as error:
        error.fault = replace(error.fault, reason=f"picture {number} of the row has {error.fault.reason}")
        raise


def _write(
    rendered: RenderedConversation, starts: Sequence[int], texts: Sequence[str], length: int
) -> RenderedConversation:
    """Write a text in place of each stretch of this length."""
    pieces, last = [], 0
    for start, text in zip(starts, texts, strict=True):
        pieces += [rendered.text[last:start], text]
        last = start + length
    pieces.append(rendered.text[last:])
    grown = [0, *accumulate(len(text) - length for text in texts)]

    def moved(position: int) -> int:
        return position + grown[bisect_right(starts, position - length)]

    turns = [replace(turn, start=moved(turn.start), stop=moved(turn.stop)) for turn in rendered.turns]
    literal = [(moved(start), moved(stop)) for start, stop in rendered.literal]
    return replace(rendered, text="".join(pieces), turns=turns, literal=literal)


def _find_outside(literal: Ranges, text: str, token: str) -> list[int]:
    """Return where a token stands that the template, not data, wrote."""
    spelled = {start for start, _ in literal}
    starts, at = [], text.find(token)
    while at >= 0:
        if at not in spelled:
            starts.append(at)
        at = text.find(token, at + len(token))
    return starts
