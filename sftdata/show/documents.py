"""What the audit asks of each example of a set, as columns: counted on ids and labels, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import xxhash

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64, PackedRows, offsets_of
from sftdata.vocabulary import Vocabulary

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Stretches of examples; index i in each column is the same one. An answer is a run of trained tokens.

    Attributes:
        example_id: int64[N].
        length: int64[N], tokens.
        trained: int64[N], trained tokens.
        first, second: int32[N], first two token ids; -1 where there is none.
        odd: int32[N], a control token that ends an answer and is no stop token, the largest id; -1 where there is none.
        unended: bool[N], some answer ends in no control token at all, whitespace after it aside.
        ends: bool[N], the last answer ends in a stop token, whitespace after it aside.
        cut: bool[N], the very last token is trained, and `ends` is False.
        empty: bool[N], some answer holds nothing but stop tokens and whitespace.
        control: bool[N], some answer holds a stop token or BOS before its end.
        prompt: uint64[N], hash of the ids before the first answer.
        prompt_length: int64[N], how many these are.
    """

    example_id: Int64
    length: Int64
    trained: Int64
    first: Int32
    second: Int32
    odd: Int32
    unended: Bool
    ends: Bool
    cut: Bool
    empty: Bool
    control: Bool
    prompt: UInt64
    prompt_length: Int64

    def __len__(self) -> int:
        return len(self.example_id)

    @classmethod
    def join(cls, parts: Iterable[Documents]) -> Documents:
        """Put documents one after the other."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def by_example(self) -> tuple[Documents, Int64]:
        """Merge the stretches of each example; return them by ascending id, with int64[E], how many stretches each has.

        What is asked of an ending holds if it holds for one stretch, since packing may deal them out in any order.
        """
        order = np.argsort(self.example_id, kind="stable")
        ids, at, count = np.unique(self.example_id[order], return_index=True, return_counts=True)
        merged = {field.name: getattr(self, field.name)[order][at] for field in fields(self)}
        if len(ids):
            for name in ("length", "trained"):
                merged[name] = np.add.reduceat(getattr(self, name)[order], at)
            merged["odd"] = np.maximum.reduceat(self.odd[order], at)
            for name in ("unended", "ends", "cut", "empty", "control"):
                merged[name] = np.logical_or.reduceat(getattr(self, name)[order], at)
        return Documents(**merged), count


class DocumentReader:
    """Turn packed rows into `Documents`. Only trained tokens are looked at one by one; prompts are hashed whole.

    Args:
        vocabulary: of the set; its stop tokens end answers.
        bos_id: of the tokenizer, if any.
    """

    def __init__(self, vocabulary: Vocabulary, bos_id: int | None) -> None:
        self._vocabulary = vocabulary
        self._control = np.array(
            sorted({*vocabulary.stop_ids, *([] if bos_id is None else [bos_id])}), np.int32
        )
        self._stops = np.array(sorted(vocabulary.stop_ids), np.int32)
        self._enders = np.array(sorted(vocabulary.enders), np.int32)
        self._blank = np.zeros(0, np.int8)  # by id: 0 not asked yet, 1 whitespace, 2 more than that

    def read(self, rows: PackedRows) -> Documents:
        """Return the documents of packed rows, padding left out."""
        ids, edges = rows.input_ids, offsets_of(rows.seq_lengths)
        real = np.flatnonzero(rows.example_ids >= 0)
        start, stop = edges[:-1][real], edges[1:][real]
        place = np.flatnonzero(rows.labels != IGNORE_INDEX)
        trained = ids[place]
        runs = _Runs.find(place, edges)
        stops, blank = np.isin(trained, self._stops), self._is_blank(trained)
        significant = np.maximum.accumulate(np.where(blank, -1, np.arange(len(trained))))
        last = np.where(significant[runs.stop - 1] >= runs.start, significant[runs.stop - 1], -1)
        run_ends = (last >= 0) & stops[last]
        substance, control = _sums(~blank & ~stops), _sums(np.isin(trained, self._control))
        # The first token of a text may be its BOS: it stands where it should.
        inside = (
            control[runs.stop] - control[runs.start + (place[runs.start] == edges[runs.document])] - run_ends
        )
        first, final = (
            np.searchsorted(runs.document, real),
            np.searchsorted(runs.document, real, side="right") - 1,
        )
        has = final >= first
        ends, before = np.zeros((2, len(real)), np.int64)
        ends[has] = run_ends[final[has]]
        before[has], before[~has] = place[runs.start[first[has]]] - start[has], (stop - start)[~has]
        begins, finishes = np.searchsorted(place, start), np.searchsorted(place, stop)
        at_end = rows.labels[stop - 1] != IGNORE_INDEX
        last_id = np.append(trained, np.int32(-1))[last]  # index -1: none
        in_control = np.isin(last_id, self._enders)
        odd = np.full(len(rows.seq_lengths), -1, np.int32)
        np.maximum.at(odd, runs.document, np.where(in_control & ~run_ends, last_id, np.int32(-1)))
        return Documents(
            example_id=rows.example_ids[real],
            length=stop - start,
            trained=finishes - begins,
            first=ids[start],
            second=np.where(stop - start > 1, ids[np.minimum(start + 1, len(ids) - 1)], -1).astype(np.int32),
            odd=odd[real],
            unended=_any_run(runs, ~run_ends & ~in_control, len(rows.seq_lengths))[real],
            ends=ends.astype(np.bool_),
            cut=at_end & (ends == 0),
            empty=_any_run(runs, substance[runs.stop] == substance[runs.start], len(rows.seq_lengths))[real],
            control=_any_run(runs, inside > 0, len(rows.seq_lengths))[real],
            prompt=_hashes(ids, start, before),
            prompt_length=before,
        )

    def _is_blank(self, trained: Int32) -> Bool:
        """bool[K]: tokens that are whitespace."""
        new = int(trained.max(initial=-1)) + 1 - len(self._blank)
        self._blank = np.append(self._blank, np.zeros(max(new, 0), np.int8))
        for token_id in np.unique(trained[self._blank[trained] == 0]).tolist():
            self._blank[token_id] = 1 if self._vocabulary.is_blank(token_id) else 2
        blank: Bool = self._blank[trained] == 1
        return blank


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Runs of trained tokens that do not cross documents.

    Attributes:
        start, stop: int64[R], half-open, counted in trained tokens.
        document: int64[R], the segment that a run lies in.
    """

    start: Int64
    stop: Int64
    document: Int64

    @classmethod
    def find(cls, place: Int64, edges: Int64) -> _Runs:
        """Cut `place`, int64[K], positions of the trained tokens, where one is left out or a segment begins."""
        begins = np.ones(len(place), np.bool_)
        begins[1:] = np.diff(place) > 1
        begins[np.searchsorted(place, edges[:-1][edges[:-1] <= place[-1]]) if len(place) else []] = True
        start = np.flatnonzero(begins)
        return cls(
            start,
            np.append(start[1:], len(place))[: len(start)],
            np.searchsorted(edges, place[start], side="right") - 1,
        )


def _any_run(runs: _Runs, holds: Bool, documents: int) -> Bool:
    found = np.zeros(documents, np.bool_)
    found[runs.document[holds]] = True
    return found


def _sums(flags: Bool) -> Int64:
    return np.append(0, np.cumsum(flags, dtype=np.int64))


def _hashes(ids: Int32, start: Int64, length: Int64) -> UInt64:
    """Hash stretches of ids."""
    raw, width = np.ascontiguousarray(ids).data.cast("B"), ids.itemsize
    spans = zip((start * width).tolist(), ((start + length) * width).tolist(), strict=True)
    return np.array([xxhash.xxh3_64_intdigest(raw[first:last]) for first, last in spans], np.uint64)
