"""Where tokens lie, and where to cut a text so that the ids before a trained span are those of inference.

    locate ──> places of tokens, from cumulative lengths ──> cut_rows: cut at edges, encode again

Positions are bytes of the batch's concatenated texts (`base[i]` is where text i starts), so that one
sorted array serves all rows. A row whose lengths do not add up to its text is encoded by the reference.

At inference the model is fed the ids of the text up to the span, and nothing else. Joint encoding can differ
from that in four ways: a token reaches over the edge; an added token absorbs whitespace that the span starts
with, or whitespace before the span; or the words before the edge are found differently because of what
follows: of two tabs before a letter the second can belong to the letter's word, so that the tabs are two
tokens in the whole text and one token at inference. Each cuts the text there.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, cast

import numpy as np

from sftdata.batches import Bool, Int32, Int64, Ragged, Ranges, offsets_of
from sftdata.encode.engine import WHITESPACE, Encoder, Located, join

_SPACES = re.compile(b"(?:" + b"|".join(re.escape(char.encode()) for char in WHITESPACE) + b")*")


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The tokens of a batch and where they lie.

    Attributes:
        tokens: ids with starts and ends, positions in the batch.
        offsets: int64[N + 1], tokens of each row.
        base: int64[N + 1], position of each text in the batch.
    """

    tokens: Located
    offsets: Int64
    base: Int64

    def with_rows(self, rows: dict[int, Located]) -> Places:
        """Replace the tokens of some rows; their positions are given relative to the row."""
        if not rows:
            return self
        lengths = np.diff(self.offsets)
        parts, done = [], 0
        for row in sorted(rows):
            parts += [self._rows(done, row), rows[row].shifted(int(self.base[row]))]
            lengths[row] = len(rows[row].ids)
            done = row + 1
        parts.append(self._rows(done, len(lengths)))
        return Places(join(parts), offsets_of(lengths), self.base)

    def row(self, row: int) -> Located:
        """Return one row's tokens, positions relative to its text."""
        return self._rows(row, row + 1).shifted(-int(self.base[row]))

    def _rows(self, start: int, stop: int) -> Located:
        part = slice(self.offsets[start], self.offsets[stop])
        return Located(self.tokens.ids[part], self.tokens.starts[part], self.tokens.ends[part])


def ranges_of(ragged: Ragged, row: int) -> Ranges:
    """Return one row's ranges as pairs."""
    return [(start, stop) for start, stop in ragged[row].tolist()]


def locate(
    encoder: Encoder,
    texts: list[str],
    raws: list[bytes],
    literal: Ragged,
    inside: Bool,
    *,
    reach: bool = False,
) -> tuple[Places, int]:
    """Encode texts and find where every token lies.

    Args:
        encoder: the tokenizer.
        texts: str[N].
        raws: the same texts in utf-8.
        literal: byte ranges whose text is data although it spells a control token.
        inside: bool[N], texts that continue one that was cut, so that they get no dummy prefix.
        reach: let added tokens range over the whitespace they absorb.

    Returns:
        the places, and how many texts the reference's own offsets had to place.
    """
    places, doubted = _place(encoder, texts, raws, reach)
    if encoder.resolved.layout.prefix != "none":
        doubted |= inside
    careful = np.flatnonzero(doubted | (np.diff(literal.offsets) > 0)).tolist()
    exact = {}
    for row in careful:
        exact[row] = encoder.exact.encode(
            raws[row], ranges_of(literal, row), at_start=not inside[row], reach=reach
        )
    return places.with_rows(exact), int(doubted.sum())


def _place(encoder: Encoder, texts: list[str], raws: list[bytes], reach: bool) -> tuple[Places, Bool]:
    """Place tokens by their lengths; return the places and bool[N], the rows where lengths do not tell."""
    base = offsets_of(np.array([len(raw) for raw in raws], np.int64))
    layout = encoder.resolved.layout
    if layout.kind == "none":
        return Places(join([]), np.zeros(len(raws) + 1, np.int64), base), np.ones(len(raws), np.bool_)
    ids, offsets = encoder.encode(texts)
    before = offsets_of(encoder.byte_lengths[ids])
    if layout.prefix != "none" or encoder.strips_right.any() or encoder.strips_left.any():
        tokens, doubted = _Walk(encoder, before, reach).rows(raws, ids, offsets, base)
    else:
        # Lengths that add up to the text put every token where it is. Where they do not, later rows are moved
        # back to the starts of their texts, and the row itself goes to the reference.
        start = before[offsets]
        doubted = np.diff(start) != np.diff(base)
        tokens = Located(ids, before[:-1], before[1:])
        if doubted.any():
            shift = np.repeat(base[:-1] - start[:-1], np.diff(offsets))
            tokens = Located(ids, before[:-1] + shift, before[1:] + shift)
    return Places(tokens, offsets, base), doubted | _denormal(layout.normal_form, texts)


def _denormal(form: str, texts: list[str]) -> Bool:
    """bool[N]: texts that the tokenizer's Unicode normalization may change, and with them their length."""
    if not form:
        return np.zeros(len(texts), np.bool_)
    known = cast('Literal["NFC", "NFD", "NFKC", "NFKD"]', form)
    return np.array(
        [not (text.isascii() or unicodedata.is_normalized(known, text)) for text in texts], np.bool_
    )


@dataclass(slots=True)
class _Walk:
    """Walk each text from added token to added token, where a dummy prefix, lstrip or rstrip moves tokens.

    Every added token must be found in the text where the lengths put it, which proves the stretch before it.

    Attributes:
        encoder, reach: as in `locate`.
        before: int64[T + 1], cumulative byte lengths of all tokens.
        index: the first token of each section.
        shift: position minus cumulative length, the same for all tokens of a section.
        prefixed: tokens that begin with the dummy prefix.
        absorbing: tokens that absorb whitespace, with the (start, stop) they absorb.
    """

    encoder: Encoder
    before: Int64
    reach: bool
    index: list[int] = field(default_factory=list)
    shift: list[int] = field(default_factory=list)
    prefixed: list[int] = field(default_factory=list)
    absorbing: list[tuple[int, int, int]] = field(default_factory=list)

    def rows(self, raws: list[bytes], ids: Int32, offsets: Int64, base: Int64) -> tuple[Located, Bool]:
        added = np.flatnonzero(self.encoder.is_added[ids])
        cuts = np.searchsorted(added, offsets)
        doubted = np.zeros(len(raws), np.bool_)
        for row, raw in enumerate(raws):
            tokens = added[cuts[row] : cuts[row + 1]].tolist()
            doubted[row] = not self._row(
                raw, ids, int(offsets[row]), tokens, int(offsets[row + 1]), int(base[row])
            )
        # Each section is shifted as a whole; the tokens before the first one are not.
        sections: Int64 = np.diff(np.array([0, *self.index, len(ids)], np.int64)).astype(np.int64)
        shift = np.repeat(np.array([0, *self.shift], np.int64), sections)
        starts, ends = self.before[:-1] + shift, self.before[1:] + shift
        starts[self.prefixed] += 1
        if self.reach:
            for token, start, stop in self.absorbing:
                starts[token], ends[token] = start, stop
        return Located(ids, starts, ends), doubted

    def _row(self, raw: bytes, ids: Int32, first: int, added: list[int], stop: int, base: int) -> bool:
        """Place tokens [first, stop) of one text; False where an added token is not where lengths put it."""
        position, token = 0, first
        for end in [*added, stop]:
            if end > token:
                position += self._section(raw, position, token, end, token == first, base)
            if end < stop:
                found = self._added_token(raw, position, end, int(ids[end]), base)
                if found < 0:
                    return False
                position, token = found, end + 1
        return position == len(raw)

    def _section(self, raw: bytes, position: int, token: int, end: int, at_start: bool, base: int) -> int:
        """Place tokens [token, end), which begin at a position; return how many bytes of text they cover."""
        layout = self.encoder.resolved.layout
        prefixed = layout.prefix == "always" or (layout.prefix == "first" and at_start)
        prefixed = prefixed and (layout.prefix_doubles or raw[position : position + 1] != b" ")
        before = int(self.before[token])
        self.index.append(token)
        self.shift.append(base + position - prefixed - before)
        if prefixed:
            self.prefixed.append(token)
        return int(self.before[end]) - before - prefixed

    def _added_token(self, raw: bytes, position: int, token: int, token_id: int, base: int) -> int:
        """Find an added token at a position; return where it ends with what it absorbs, or -1."""
        content, lstrip, rstrip = self.encoder.added[token_id]
        start = _skip_spaces(raw, position) if lstrip else position
        stop = start + len(content)
        if raw[start:stop] != content:
            return -1
        end = _skip_spaces(raw, stop) if rstrip else stop
        self.index.append(token)
        self.shift.append(base + start - int(self.before[token]))
        if lstrip or rstrip:
            self.absorbing.append((token, base + position, base + end))
        return end


def _skip_spaces(raw: bytes, position: int) -> int:
    match = _SPACES.match(raw, position)
    return match.end() if match else position


# --------------------------------------------------------------------------------- edges of trained spans


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
    """List the edges of all spans of a batch: start, stop, start, stop, ..."""
    filled = spans.values[:, 1] > spans.values[:, 0]
    row = np.repeat(np.arange(len(base) - 1), np.diff(spans.offsets))[filled]
    position = (spans.values[filled] + base[row, None]).reshape(-1)
    return Edges(position, np.repeat(row, 2), np.tile(np.array([True, False]), len(row)))


def straddled(places: Places, edges: Edges) -> Bool:
    """bool[E]: edges inside a token."""
    start = np.append(places.tokens.starts, places.base[-1])[_token_at(places, edges)]
    bad: Bool = start < edges.position
    return bad


def _absorbed(places: Places, edges: Edges, encoder: Encoder) -> Bool:
    """bool[E]: openings inside or after whitespace that an added token absorbs, unlike at inference."""
    tokens, token = places.tokens, _token_at(places, edges)
    # Padded by one, so that `token` may be the end of the batch; what is read there is masked out below.
    ids, first, stop = np.append(tokens.ids, 0), places.offsets[edges.row], places.offsets[edges.row + 1]
    before = token - 1
    by_last = (before >= first) & encoder.strips_right[ids[before]]
    by_next = (token < stop) & encoder.strips_left[ids[token]]
    # The gap between the two tokens is what one of them absorbed: the first one if it strips right.
    gap_start = np.where(before >= first, np.append(tokens.ends, 0)[before], places.base[edges.row])
    gap_stop = np.where(token < stop, np.append(tokens.starts, 0)[token], places.base[edges.row + 1])
    absorbed: Bool = edges.opens & np.where(
        by_last, edges.position < gap_stop, by_next & (gap_start < edges.position)
    )
    return absorbed


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
    bad = straddled(places, edges) | _absorbed(places, edges, encoder)
    if encoder.resolved.layout.looks_ahead:
        # Encoding a prefix again is dear: only for openings that nothing cheaper has found.
        left = np.flatnonzero(edges.opens & ~bad & ~cut)
        prefixes = Prefixes(places, encoder, raws, literal, edges.position[cut])
        bad[left] = prefixes.differ(edges.position[left], edges.row[left])
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
        kept = np.isin(edges.row, rows)
        row = np.searchsorted(rows, edges.row[kept])  # `rows` is sorted: the number of each in the new batch
        new_base = offsets_of(np.array([len(raw) for raw in chosen], np.int64))
        position = edges.position[kept] - base[edges.row[kept]] + new_base[row]
        ranges = Ragged.from_lists([ranges_of(literal, row) for row in rows.tolist()])
        return cls(chosen, ranges, Edges(position, row, edges.opens[kept]), new_base)

    def encode(self, encoder: Encoder, cut: Bool) -> Places:
        """Encode the pieces between cuts; concatenated, they are the rows."""
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


# ------------------------------------------------------------------------------- prefixes encoded alone

# Bytes; of a longer prefix only the end is encoded again, which keeps the cost linear in the number of spans.
FAR = 2048
# Every pattern that finds words cuts between a letter and a space before a letter.
_WORD_START = re.compile(rb"(?<=[A-Za-z]) (?=[A-Za-z])")


class _Stretch(NamedTuple):
    """Tokens [start, stop) of the batch, and their text, bytes [begin, end) of the row."""

    row: int
    start: int
    stop: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Prefixes:
    """Compare the ids before openings with those of their text alone.

    Encoding starts afresh after an added token and after a cut: only the stretch from there is encoded again.

    Attributes:
        cuts: positions where the texts have been cut.
    """

    places: Places
    encoder: Encoder
    raws: list[bytes]
    literal: Ragged
    cuts: Int64

    def differ(self, position: Int64, row: Int64) -> Bool:
        """bool[A]: openings at these positions of these rows (int64[A]) that need a cut."""
        if not len(row):
            return np.zeros(0, np.bool_)
        whole = self._stretches(position, row)
        near = [
            self._shortened(stretch) if stretch.end - stretch.begin > FAR else stretch for stretch in whole
        ]
        differs = self._compare(near)
        for index in np.flatnonzero(differs).tolist():
            if near[index] is not whole[index]:
                differs[index] = self._compare([whole[index]])[0]
        return differs

    def _stretches(self, position: Int64, row: Int64) -> list[_Stretch]:
        """Return, for each opening, the tokens from the last fresh start of the encoding up to it."""
        tokens, base = self.places.tokens, self.places.base[row]
        added = np.flatnonzero(self.encoder.is_added[tokens.ids]) + 1
        fresh = np.sort(np.concatenate([[0], added, np.searchsorted(tokens.starts, self.cuts)]))
        stop = np.searchsorted(tokens.ends, position, "right")
        start = np.maximum(fresh[np.searchsorted(fresh, stop, "right") - 1], self.places.offsets[row])
        filled = start < stop
        begin = np.where(filled, np.append(tokens.starts, 0)[start] - base, 0)
        end = np.where(filled, tokens.ends[stop - 1] - base, 0)
        columns = (column.tolist() for column in (row, start, stop, begin, end))
        return [_Stretch(*values) for values in zip(*columns, strict=True)]

    def _shortened(self, stretch: _Stretch) -> _Stretch:
        """Keep the last part of a long stretch, from a word on that no pattern joins to the one before it."""
        starts = self.places.tokens.starts
        base = int(self.places.base[stretch.row])
        for word in _WORD_START.finditer(self.raws[stretch.row], stretch.end - FAR, stretch.end - FAR // 2):
            token = int(np.searchsorted(starts, base + word.start()))
            if starts[token] == base + word.start():
                return stretch._replace(start=token, begin=word.start())
        return stretch

    def _compare(self, stretches: list[_Stretch]) -> Bool:
        """bool[A]: stretches whose text alone does not give their ids; each distinct one is encoded once."""
        ids = memoryview(self.places.tokens.ids.tobytes())  # int32: four bytes an id
        numbers: dict[tuple[bytes, bytes], int] = {}
        verdicts = []
        for row, start, stop, begin, end in stretches:
            key = (self.raws[row][begin:end], bytes(ids[4 * start : 4 * stop]))
            verdicts.append(numbers.setdefault(key, len(numbers)))
        alone, offsets = self.encoder.encode([text.decode() for text, _ in numbers])
        found = [alone[start:stop].tobytes() for start, stop in pairwise(offsets.tolist())]
        differs = np.array(
            [one != expected for one, (_, expected) in zip(found, numbers, strict=True)], np.bool_
        )[verdicts]
        # An engine matches control tokens that data spells; those rows are compared again with the reference.
        has_literal = (np.diff(self.literal.offsets) > 0)[[stretch.row for stretch in stretches]]
        for index in np.flatnonzero(differs & has_literal).tolist():
            differs[index] = self._differs_with_literal(stretches[index])
        return differs

    def _differs_with_literal(self, stretch: _Stretch) -> bool:
        """Compare without matching the control tokens that data spells."""
        row, start, stop, begin, end = stretch
        literal = [
            (max(a, begin) - begin, min(b, end) - begin)
            for a, b in ranges_of(self.literal, row)
            if a < end and b > begin
        ]
        alone = self.encoder.exact.encode(self.raws[row][begin:end], literal, at_start=begin == 0)
        return not np.array_equal(alone.ids, self.places.tokens.ids[start:stop])
