"""What is trained that the model is given, and what is left out, in rows whose masks nobody has proven.

Array work over ids and marks: the turns are those of the chat template (headers.py), and text without such
headers is judged by its control tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64, PackedRows, offsets_of
from sftdata.show.headers import Headers, Turns, find_headers
from sftdata.vocabulary import Vocabulary

_SAME = 12  # tokens in which a system prompt is told from another

Places = dict[str, Int64]
"""By code of a finding: positions in the ids, at most one a document."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Knows the tokens of one tokenizer.

    Attributes:
        headers: of its chat template.
        vocabulary: its tokens.
        bos_id, eos_id: None where it names none.
    """

    headers: Headers
    vocabulary: Vocabulary
    bos_id: int | None
    eos_id: int | None

    @cached_property
    def _blanks(self) -> Bool:
        """bool[V], tokens of whitespace."""
        known = self.vocabulary.pieces.keys() | self.vocabulary.added.keys()
        return np.array([self.vocabulary.is_blank(index) for index in range(max(known) + 1)], np.bool_)

    def joined(self, ids: Int32, edges: Int64) -> Int64:
        """Return where documents begin inside of stretches that are taken for one, ascending.

        A BOS in the middle begins one, and so does what follows an EOS that no turn ends in, and the same
        system prompt over again.

        Args:
            ids: int32[T].
            edges: int64[S + 1], of the stretches.
        """
        turns = self.headers.turns(ids, edges)
        inside = np.ones(len(ids) + 1, np.bool_)
        inside[edges] = False
        again = self._again(ids, edges, turns)
        found = [again - (ids[again - 1] == (-1 if self.bos_id is None else self.bos_id))]
        if self.bos_id is not None and self.bos_id not in {self.eos_id, *self.headers.written}:
            begins = np.flatnonzero((ids == self.bos_id) & inside[:-1])
            found.append(begins[inside[begins - 1] | (ids[begins - 1] != self.bos_id)])
        if self.eos_id is not None:
            behind = np.flatnonzero(ids == self.eos_id) + 1
            behind = behind[inside[behind]]
            if self.eos_id in self.headers.written:  # where there are turns, it ends them
                known = np.isin(_stretch(behind, edges), _stretch(turns.start, edges))
                behind = behind[~known & bool(self.headers.roles)]
            found.append(behind[(ids[behind] != self.eos_id) & ~self._blank(ids[behind])])
        return np.unique(np.concatenate(found))

    def _again(self, ids: Int32, edges: Int64, turns: Turns) -> Int64:
        """Return later turns that hold the system prompt with which the stretch begins."""
        at = np.flatnonzero(turns.system)
        of = _stretch(turns.start[at], edges)
        first = np.unique(of, return_index=True)[1]
        before = np.repeat(at[first], np.diff(np.append(first, len(at))))
        start, original = turns.start[at], turns.start[before]
        same = at > before
        for step in range(_SAME):
            here = np.minimum(start + step, len(ids) - 1)
            same &= (ids[here] == ids[np.minimum(original + step, len(ids) - 1)]) | (
                original + step >= turns.stop[before]
            )
        return start[same]

    def begins_inside(self, rows: PackedRows) -> Bool:
        """bool[P]: rows that begin in the middle of a turn, which another follows."""
        first = rows.row_offsets[:-1]
        turns = self.headers.turns(rows.input_ids, rows.row_offsets)
        at = np.searchsorted(turns.start, first)
        start = np.append(turns.start, len(rows.input_ids))[at]
        text = np.cumsum(np.append(0, ~self._control(rows.input_ids) & ~self._blank(rows.input_ids)))
        begins: Bool = (start < rows.row_offsets[1:]) & (text[start] > text[first])
        return begins

    def find(self, rows: PackedRows) -> Places:
        """Return what is trained by mistake in rows whose documents are known."""
        ids, edges = rows.input_ids, offsets_of(rows.seq_lengths)
        trained = rows.labels != IGNORE_INDEX
        turns = self.headers.turns(ids, edges)
        real = np.repeat(rows.example_ids >= 0, rows.seq_lengths)
        shifted = self._shifted(ids, trained, turns)
        off = np.zeros(len(edges), np.bool_)
        off[_stretch(shifted, edges)] = True
        # Only what is text counts: a newline behind a header does no harm, nor does the first token of
        # the next header where that is what ends a turn (GLM-4).
        ends = np.isin(ids, sorted(self.headers.ends)) & np.append(False, trained[:-1])
        wrong = trained & real & ~ends
        wrong[wrong] = ~self._blank(ids[wrong])
        header, prompt = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        for start, body, stop, answer in zip(
            turns.start.tolist(), turns.body.tolist(), turns.stop.tolist(), turns.answer.tolist(), strict=True
        ):
            header[start:body] = answer
            prompt[start:stop] = not answer
        places = {"mask-shifted": shifted}
        for code, where in (("prompt-trained", prompt), ("header-trained", header)):
            found = np.flatnonzero(wrong & where)
            places[code] = found[~off[_stretch(found, edges)]]
        places["padding-trained"] = np.flatnonzero(trained & ~real)
        return {code: _first_of_each(found, edges) for code, found in places.items() if len(found)}

    def _shifted(self, ids: Int32, trained: Bool, turns: Turns) -> Int64:
        """Return the answers whose marks lie one token early, or one late, by their first token."""
        body, stop = turns.body[turns.answer], turns.stop[turns.answer]
        marks = np.append(trained, [False] * 3)
        ends = np.flatnonzero(np.isin(ids, sorted(self.headers.ends)))
        ends = np.append(ends, len(ids))
        text = np.append(np.flatnonzero(~self._blank(ids)), len(ids))
        first = text[np.searchsorted(text, body)]  # of the answer, whitespace aside
        end = ends[np.searchsorted(ends, first)]
        whole = (end < stop) & (first < end)
        early = whole & marks[end - 1] & ~marks[end] & marks[body - (first == body)]
        behind = end + 1
        late = whole & ~marks[first] & marks[first + 1] & marks[end] & marks[behind] & ~marks[behind + 1]
        late &= (first + 1 < end) & ~marks[first - 1]
        found: Int64 = first[early | late]
        return found

    def ends_left_out(self, rows: PackedRows) -> Int64:
        """Return the end tokens that follow an answer and are not trained."""
        ids, trained = rows.input_ids, rows.labels != IGNORE_INDEX
        follows = np.append(False, trained[:-1]) & ~trained
        follows[offsets_of(rows.seq_lengths)[:-1]] = False
        found = np.flatnonzero(follows)
        return found[np.isin(ids[found], sorted(self.headers.ends))]

    def ends_in_stop(self, ids: Int32) -> bool:
        """Whether the last token that is not whitespace ends a turn."""
        text = np.flatnonzero(~self._blank(ids))
        return len(text) > 0 and int(ids[text[-1]]) in self.headers.ends

    def _control(self, ids: Int32) -> Bool:
        return np.isin(ids, sorted(self.vocabulary.added))

    def _blank(self, ids: Int32) -> Bool:
        return self._blanks[np.minimum(ids, len(self._blanks) - 1)]


def make_judge(vocabulary: Vocabulary, tokenizer: Tokenizer, bos_id: int | None, eos_id: int | None) -> Judge:
    """Return what judges rows of a tokenizer, by its own chat template."""
    return Judge(find_headers(vocabulary, tokenizer), vocabulary, bos_id, eos_id)


def _stretch(places: Int64, edges: Int64) -> Int64:
    """Return the stretch that each place lies in."""
    return np.searchsorted(edges, places, side="right") - 1


def _first_of_each(places: Int64, edges: Int64) -> Int64:
    """Return the first place of each stretch."""
    return places[np.unique(_stretch(places, edges), return_index=True)[1]]
