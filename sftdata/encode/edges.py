"""Cut texts where a token would straddle the edge of a trained span, so that the ids before it are those of inference.

At inference the model is fed the ids of the text up to the span, and nothing else. Joint encoding can differ from that in three
ways: a token reaches over the edge; an added token swallows whitespace that the span starts with; or the words before the
edge are found differently because of what follows. Each cuts the text there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftdata.batches import Bool, Int64, Ragged
from sftdata.encode.engine import Encoder
from sftdata.encode.exact import Located, join
from sftdata.encode.places import Places

FAR = 2048  # bytes; of a longer prefix only the end is encoded again, which keeps the cost linear in the number of spans
# Every pattern that finds words cuts between a letter and a space before a letter.
_WORD_START = re.compile(rb"(?<=[A-Za-z]) (?=[A-Za-z])")

Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """The edges of trained spans, in order; spans that hold nothing have none.

    Attributes:
        position: int64[E], positions in the batch.
        row: int64[E].
        opens: bool[E], whether a span starts there (else one stops).
    """

    position: Int64
    row: Int64
    opens: Bool

    def of_row(self, row: int, base: int) -> Edges:
        """Select one row's edges, positions relative to its text."""
        own = slice(*np.searchsorted(self.row, [row, row + 1]))
        return Edges(self.position[own] - base, np.zeros_like(self.row[own]), self.opens[own])


def edges_of(spans: Ragged, base: Int64) -> Edges:
    """List the edges of all spans of a batch."""
    filled = spans.values[:, 1] > spans.values[:, 0]
    row = np.repeat(np.arange(len(base) - 1), np.diff(spans.offsets))[filled]
    position = (spans.values[filled] + base[row, None]).reshape(-1)
    return Edges(position, np.repeat(row, 2), np.tile(np.array([True, False]), len(row)))


def straddled(places: Places, edges: Edges, strips_right: Bool) -> Bool:
    """bool[E]: edges inside a token, and openings inside whitespace that the added token before them swallows."""
    tokens = places.tokens
    if not len(tokens.ids):
        return np.zeros(len(edges.row), np.bool_)
    token = np.searchsorted(tokens.ends, edges.position, "right")
    start = np.append(tokens.starts, places.base[-1])[token]
    before = token - 1
    swallows = (before >= places.offsets[edges.row]) & strips_right[tokens.ids[before]]
    gap_end = np.minimum(start, places.base[edges.row + 1])
    bad: Bool = (start < edges.position) | (edges.opens & swallows & (edges.position < gap_end))
    return bad


def cut_rows(places: Places, encoder: Encoder, edges: Edges, raws: list[bytes], literal: Ragged) -> tuple[Places, int, int]:
    """Cut every row that needs it.

    Returns:
        the new places, the number of cuts, and the number of rows that were cut.
    """
    bad = _bad(places, encoder, edges, raws, literal, np.zeros(0, np.int64))
    rows: dict[int, Located] = {}
    cuts = 0
    for row in np.unique(edges.row[bad]).tolist():
        base = int(places.base[row])
        own = edges.of_row(row, base)
        wanted = own.position[bad[slice(*np.searchsorted(edges.row, [row, row + 1]))]]
        rows[row], made = _cut(encoder, raws[row], own, set(wanted.tolist()), ranges_of(literal, row))
        cuts += made
    return places.with_rows(rows), cuts, len(rows)


def _bad(places: Places, encoder: Encoder, edges: Edges, raws: list[bytes], literal: Ragged, cuts: Int64) -> Bool:
    bad = straddled(places, edges, encoder.strips_right)
    if encoder.resolved.layout.looks_ahead:
        asked = np.flatnonzero(edges.opens & ~bad)
        bad[asked] = _prefix_differs(places, encoder, edges, asked, raws, literal, cuts)
    return bad


def ranges_of(ragged: Ragged, row: int) -> Ranges:
    """Return one row's ranges as pairs."""
    return [(start, stop) for start, stop in ragged[row].tolist()]


def _cut(encoder: Encoder, raw: bytes, edges: Edges, cuts: set[int], literal: Ranges) -> tuple[Located, int]:
    """Encode one text in pieces; a piece's tokens differ from the joint ones, so its own edges are looked at again."""
    while True:
        bounds = [0, *sorted(cuts), len(raw)]
        located = join([_piece(encoder, raw, start, stop, literal) for start, stop in pairwise(bounds)])
        places = Places(located, np.array([0, len(located.ids)]), np.array([0, len(raw)]))
        bad = _bad(places, encoder, edges, [raw], Ragged.from_lists([literal]), np.array(bounds[1:-1], np.int64))
        more = set(edges.position[bad].tolist()) - cuts
        if not more:
            return located, len(cuts)
        cuts = cuts | more


def _piece(encoder: Encoder, raw: bytes, start: int, stop: int, literal: Ranges) -> Located:
    inside = [(max(a, start) - start, min(b, stop) - start) for a, b in literal if a < stop and b > start]
    return encoder.exact.encode(raw[start:stop], inside, at_start=start == 0).shifted(start)


def _prefix_differs(
    places: Places, encoder: Encoder, edges: Edges, asked: Int64, raws: list[bytes], literal: Ragged, cuts: Int64
) -> Bool:
    """bool[A]: openings before which the ids are not those of the text before them alone.

    Encoding starts afresh after an added token and after a cut, so only the stretch from there to the opening is encoded again.
    """
    tokens = places.tokens
    fresh = np.concatenate([[0], np.flatnonzero(encoder.is_added[tokens.ids]) + 1, np.searchsorted(tokens.starts, cuts)])
    fresh.sort()
    stop = np.searchsorted(tokens.ends, edges.position[asked], "right")
    row = edges.row[asked]
    start = np.maximum(fresh[np.searchsorted(fresh, stop, "right") - 1], places.offsets[row])
    whole = [_Stretch(*item) for item in zip(row.tolist(), start.tolist(), stop.tolist(), strict=True)]
    near = [_shortened(places, raws, stretch) for stretch in whole]
    differs = _differ(places, encoder, raws, literal, near)
    for index in np.flatnonzero(differs).tolist():
        if near[index] is not whole[index]:
            differs[index] = _differ(places, encoder, raws, literal, [whole[index]])[0]
    return differs


class _Stretch(NamedTuple):
    row: int
    start: int  # tokens of the batch
    stop: int

    def text_bounds(self, places: Places) -> tuple[int, int]:
        base = int(places.base[self.row])
        if self.start == self.stop:
            return 0, 0
        return int(places.tokens.starts[self.start]) - base, int(places.tokens.ends[self.stop - 1]) - base


def _shortened(places: Places, raws: list[bytes], stretch: _Stretch) -> _Stretch:
    """Keep the last part of a long stretch, from a word on that no pattern joins to the one before it."""
    begin, end = stretch.text_bounds(places)
    if end - begin <= FAR:
        return stretch
    for word in _WORD_START.finditer(raws[stretch.row], end - FAR, end - FAR // 2):
        position = int(places.base[stretch.row]) + word.start()
        token = int(np.searchsorted(places.tokens.starts, position))
        if places.tokens.starts[token] == position:
            return _Stretch(stretch.row, token, stretch.stop)
    return stretch


def _differ(places: Places, encoder: Encoder, raws: list[bytes], literal: Ragged, stretches: list[_Stretch]) -> Bool:
    """bool[A]: stretches whose text alone does not give their ids; each distinct one is encoded once."""
    numbers: dict[tuple[bytes, bytes], int] = {}
    verdicts: list[int] = []
    careful: dict[int, bool] = {}
    for index, stretch in enumerate(stretches):
        begin, end = stretch.text_bounds(places)
        ids = places.tokens.ids[stretch.start : stretch.stop].tobytes()
        if len(literal[stretch.row]):
            piece = _piece(encoder, raws[stretch.row], begin, end, ranges_of(literal, stretch.row))
            careful[index] = piece.ids.tobytes() != ids
        verdicts.append(numbers.setdefault((raws[stretch.row][begin:end], ids), len(numbers)))
    alone, offsets = encoder.encode([text.decode() for text, _ in numbers])
    bounds = zip(offsets[:-1], offsets[1:], strict=True)
    different = np.array([alone[a:b].tobytes() != ids for (a, b), (_, ids) in zip(bounds, numbers, strict=True)], np.bool_)
    differs = different[verdicts] if verdicts else np.zeros(0, np.bool_)
    for index, verdict in careful.items():
        differs[index] = verdict
    return differs
