"""Cut texts where a token would straddle the edge of a trained span, so that the ids before it are those of inference.

At inference the model is fed the ids of the text up to the span, and nothing else. Joint encoding can differ from that in four
ways: a token reaches over the edge; an added token swallows whitespace that the span starts with, or whitespace before the span;
or the words before the edge are found differently because of what follows (`prefixes.py`). Each cuts the text there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sftdata.batches import Bool, Int64, Ragged
from sftdata.encode.engine import Encoder
from sftdata.encode.places import Places, Ranges, locate, ranges_of
from sftdata.encode.prefixes import Prefixes
from sftdata.ragged import offsets_of


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


def edges_of(spans: Ragged, base: Int64) -> Edges:
    """List the edges of all spans of a batch."""
    filled = spans.values[:, 1] > spans.values[:, 0]
    row = np.repeat(np.arange(len(base) - 1), np.diff(spans.offsets))[filled]
    position = (spans.values[filled] + base[row, None]).reshape(-1)
    return Edges(position, np.repeat(row, 2), np.tile(np.array([True, False]), len(row)))


def straddled(places: Places, edges: Edges) -> Bool:
    """bool[E]: edges inside a token."""
    start = np.append(places.tokens.starts, places.base[-1])[_token_at(places, edges)]
    bad: Bool = start < edges.position
    return bad


def _swallowed(places: Places, edges: Edges, encoder: Encoder) -> Bool:
    """bool[E]: openings inside or behind whitespace that an added token swallows, as no token would at inference."""
    tokens, token = places.tokens, _token_at(places, edges)
    ids, first, stop = np.append(tokens.ids, 0), places.offsets[edges.row], places.offsets[edges.row + 1]
    before = token - 1
    by_last = (before >= first) & encoder.strips_right[ids[before]]
    by_next = (token < stop) & encoder.strips_left[ids[token]]
    gap_start = np.where(before >= first, np.append(tokens.ends, 0)[before], places.base[edges.row])
    gap_stop = np.where(token < stop, np.append(tokens.starts, 0)[token], places.base[edges.row + 1])
    swallowed: Bool = edges.opens & np.where(
        by_last, edges.position < gap_stop, by_next & (gap_start < edges.position)
    )
    return swallowed


def _token_at(places: Places, edges: Edges) -> Int64:
    """int64[E], the token that an edge lies in or before."""
    return np.searchsorted(places.tokens.ends, edges.position, "right")


def cut_rows(
    places: Places, encoder: Encoder, edges: Edges, raws: list[bytes], literal: Ragged
) -> tuple[Places, int, int]:
    """Cut every row that needs it.

    Returns:
        the new places, the number of cuts, and the number of rows that were cut.
    """
    bad = _bad(places, encoder, edges, raws, literal, np.zeros(len(edges.row), np.bool_))
    if not bad.any():
        return places, 0, 0
    rows = np.unique(edges.row[bad])
    part = _Rows.of(rows, edges, raws, literal, places.base)
    cut = bad[np.isin(edges.row, rows)]
    while True:
        pieces = part.encode(encoder, cut)
        # Pieces have other tokens than the whole had, so all edges of these rows are looked at again.
        more = ~cut & _bad(pieces, encoder, part.edges, part.raws, part.literal, cut)
        if not more.any():
            break
        cut |= more
    return (
        places.with_rows({row: pieces.row(index) for index, row in enumerate(rows.tolist())}),
        int(cut.sum()),
        len(rows),
    )


def _bad(
    places: Places, encoder: Encoder, edges: Edges, raws: list[bytes], literal: Ragged, cut: Bool
) -> Bool:
    """bool[E]: edges to cut at; at those marked by `cut` the text has been cut already."""
    bad = straddled(places, edges) | _swallowed(places, edges, encoder)
    if encoder.resolved.layout.looks_ahead:
        asked = np.flatnonzero(edges.opens & ~bad & ~cut)
        bad[asked] = Prefixes(places, encoder, raws, literal, edges.position[cut]).differ(
            edges.position[asked], edges.row[asked]
        )
    return bad


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows to cut, as a batch of their own: positions are those of this smaller batch."""

    raws: list[bytes]
    literal: Ragged
    edges: Edges
    base: Int64

    @classmethod
    def of(cls, rows: Int64, edges: Edges, raws: list[bytes], literal: Ragged, base: Int64) -> _Rows:
        chosen = [raws[row] for row in rows.tolist()]
        own = np.isin(edges.row, rows)
        row = np.searchsorted(rows, edges.row[own])
        new = offsets_of(np.array([len(raw) for raw in chosen], np.int64))
        position = edges.position[own] - base[edges.row[own]] + new[row]
        ranges = Ragged.from_lists([ranges_of(literal, row) for row in rows.tolist()])
        return cls(chosen, ranges, Edges(position, row, edges.opens[own]), new)

    def encode(self, encoder: Encoder, cut: Bool) -> Places:
        """Encode the pieces between cuts; laid end to end they are the rows."""
        bounds = np.sort(np.concatenate([self.base, self.edges.position[cut]]))
        text = b"".join(self.raws)
        raws = [text[start:stop] for start, stop in pairwise(bounds.tolist())]
        inside = ~np.isin(bounds[:-1], self.base)
        pieces, _ = locate(encoder, [raw.decode() for raw in raws], raws, self._literal(bounds), inside)
        return Places(pieces.tokens, pieces.offsets[np.searchsorted(bounds, self.base)], self.base)

    def _literal(self, bounds: Int64) -> Ragged:
        """Clip the literal ranges to the pieces."""
        pieces: list[Ranges] = [[] for _ in bounds[1:]]
        shifted = self.literal.values + np.repeat(self.base[:-1], np.diff(self.literal.offsets))[:, None]
        for start, stop in shifted.tolist():
            first, last = np.searchsorted(bounds, [start, stop - 1], "right").tolist()
            for piece in range(first - 1, last):
                begin, end = int(bounds[piece]), int(bounds[piece + 1])
                pieces[piece].append((max(start, begin) - begin, min(stop, end) - begin))
        return Ragged.from_lists(pieces)
