"""Where tokens lie: the byte range of every token of a batch, from cumulative token lengths.

Positions are bytes of the batch's texts laid end to end (`base[i]` is where text i starts), so that one sorted array serves all
rows. A row whose lengths do not add up to its text is reported, and goes the exact way.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np

from sftdata.batches import Bool, Int32, Int64, Ragged
from sftdata.encode.engine import Encoder
from sftdata.encode.exact import WHITESPACE, Located, join
from sftdata.ragged import offsets_of

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


Ranges = list[tuple[int, int]]


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
        inside: bool[N], texts that go on where another was cut, so that no space is invented before them.
        reach: let added tokens range over the whitespace they swallow.

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
        start = before[offsets]
        doubted = np.diff(start) != np.diff(base)
        tokens = Located(ids, before[:-1], before[1:])
        if doubted.any():
            shift = np.repeat(base[:-1] - start[:-1], np.diff(offsets))
            tokens = Located(ids, before[:-1] + shift, before[1:] + shift)
    return Places(tokens, offsets, base), doubted | _denormal(layout.normal_form, texts)


def _denormal(form: str, texts: list[str]) -> Bool:
    """bool[N]: texts that the tokenizer's normalizer may change."""
    if not form:
        return np.zeros(len(texts), np.bool_)
    known = cast('Literal["NFC", "NFD", "NFKC", "NFKD"]', form)
    return np.array(
        [not (text.isascii() or unicodedata.is_normalized(known, text)) for text in texts], np.bool_
    )


@dataclass(slots=True)
class _Walk:
    """Walk each text from added token to added token, where spaces are invented or swallowed between them.

    Every added token must be found in the text where the lengths put it, which proves the stretch before it.
    """

    encoder: Encoder
    before: Int64
    reach: bool
    index: list[int] = field(default_factory=list)  # first token of each section
    shift: list[int] = field(
        default_factory=list
    )  # position minus cumulative length, for all tokens of the section
    invented: list[int] = field(default_factory=list)  # tokens that begin with an invented space
    reached: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # stripping tokens with the range they swallow

    def rows(self, raws: list[bytes], ids: Int32, offsets: Int64, base: Int64) -> tuple[Located, Bool]:
        added = np.flatnonzero(self.encoder.is_added[ids])
        cuts = np.searchsorted(added, offsets)
        doubted = np.zeros(len(raws), np.bool_)
        for row, raw in enumerate(raws):
            tokens = added[cuts[row] : cuts[row + 1]].tolist()
            doubted[row] = not self._row(
                raw, ids, int(offsets[row]), tokens, int(offsets[row + 1]), int(base[row])
            )
        sections: Int64 = np.diff(np.array([0, *self.index, len(ids)], np.int64)).astype(np.int64)
        shift = np.repeat(np.array([0, *self.shift], np.int64), sections)
        starts, ends = self.before[:-1] + shift, self.before[1:] + shift
        starts[self.invented] += 1
        if self.reach:
            for token, start, stop in self.reached:
                starts[token], ends[token] = start, stop
        return Located(ids, starts, ends), doubted

    def _row(self, raw: bytes, ids: Int32, first: int, added: list[int], stop: int, base: int) -> bool:
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
        layout = self.encoder.resolved.layout
        invents = layout.prefix == "always" or (layout.prefix == "first" and at_start)
        invents = invents and (layout.prefix_doubles or raw[position : position + 1] != b" ")
        before = int(self.before[token])
        self.index.append(token)
        self.shift.append(base + position - invents - before)
        if invents:
            self.invented.append(token)
        return int(self.before[end]) - before - invents

    def _added_token(self, raw: bytes, position: int, token: int, token_id: int, base: int) -> int:
        """Find an added token at a position; return where it ends with what it swallows, or -1."""
        content, lstrip, rstrip = self.encoder.added[token_id]
        start = _skip_spaces(raw, position) if lstrip else position
        stop = start + len(content)
        if raw[start:stop] != content:
            return -1
        end = _skip_spaces(raw, stop) if rstrip else stop
        self.index.append(token)
        self.shift.append(base + start - int(self.before[token]))
        if lstrip or rstrip:
            self.reached.append((token, base + position, base + end))
        return end


def _skip_spaces(raw: bytes, position: int) -> int:
    match = _SPACES.match(raw, position)
    return match.end() if match else position
