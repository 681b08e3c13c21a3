"""Find span openings before which the ids are not those of the text before them alone, although no token lies across.

A pattern that finds words may look ahead: of two tabs before a letter the second can belong to the letter's word, so that the
tabs are two tokens in the whole text and one token at inference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftdata.batches import Bool, Int64, Ragged
from sftdata.encode.engine import Encoder
from sftdata.encode.places import Places, ranges_of

FAR = 2048  # bytes; of a longer prefix only the end is encoded again, which keeps the cost linear in the number of spans
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

    Encoding starts afresh after an added token and after a cut, so only the stretch from there on is encoded again.

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
        ids = memoryview(self.places.tokens.ids.tobytes())
        numbers: dict[tuple[bytes, bytes], int] = {}
        verdicts = []
        for row, start, stop, begin, end in stretches:
            key = (self.raws[row][begin:end], bytes(ids[4 * start : 4 * stop]))
            verdicts.append(numbers.setdefault(key, len(numbers)))
        alone, offsets = self.encoder.encode([text.decode() for text, _ in numbers])
        found = [alone[start:stop].tobytes() for start, stop in pairwise(offsets.tolist())]
        differs = np.array(
            [own != expected for own, (_, expected) in zip(found, numbers, strict=True)], np.bool_
        )[verdicts]
        for index in np.flatnonzero(
            differs & (np.diff(self.literal.offsets) > 0)[[stretch.row for stretch in stretches]]
        ).tolist():
            differs[index] = self._differs_with_literal(stretches[index])
        return differs

    def _differs_with_literal(self, stretch: _Stretch) -> bool:
        """Compare without matching what data spells."""
        row, start, stop, begin, end = stretch
        literal = [
            (max(a, begin) - begin, min(b, end) - begin)
            for a, b in ranges_of(self.literal, row)
            if a < end and b > begin
        ]
        alone = self.encoder.exact.encode(self.raws[row][begin:end], literal, at_start=begin == 0)
        return not np.array_equal(alone.ids, self.places.tokens.ids[start:stop])
