"""What the audit asks of each example of a set, as columns: counted on ids and labels, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from sftdata.batches import Bool, Int32, Int64, PackedRows
from sftdata.show.view import NOT_TRAINED
from sftdata.show.vocabulary import Vocabulary

UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Stretches of examples; index i in each column is the same one. An answer is a run of trained tokens.

    Attributes:
        example_id: int64[N].
        length: int64[N], tokens.
        trained: int64[N], trained tokens.
        first, second: int32[N], first two token ids; -1 where there is none.
        last: int32[N], last trained id that is more than whitespace; -1 where there is none.
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
    last: Int32
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
            for name in ("ends", "cut", "empty", "control"):
                merged[name] = np.logical_or.reduceat(getattr(self, name)[order], at)
        return Documents(**merged), count


class DocumentReader:
    """Turn packed rows into `Documents`.

    Args:
        vocabulary: of the set; its stop tokens end answers.
        bos_id: of the tokenizer, if any.
    """

    def __init__(self, vocabulary: Vocabulary, bos_id: int | None) -> None:
        self._vocabulary = vocabulary
        self._control = np.array(sorted({*vocabulary.stop_ids, *([] if bos_id is None else [bos_id])}), np.int32)
        self._stops = np.array(sorted(vocabulary.stop_ids), np.int32)
        self._blank: dict[int, bool] = {}

    def read(self, rows: PackedRows) -> Documents:
        """Return the documents of packed rows, padding left out."""
        ids, edges = rows.input_ids, np.append(0, np.cumsum(rows.seq_lengths, dtype=np.int64))
        real = np.flatnonzero(rows.example_ids >= 0)
        start, stop = edges[:-1][real], edges[1:][real]
        trained = rows.labels != NOT_TRAINED
        runs = _Runs.find(trained, edges)
        stops = np.isin(ids, self._stops) & trained
        blank = self._is_blank(ids, trained)
        significant = np.maximum.accumulate(np.where(trained & ~blank, np.arange(len(ids)), -1))
        last = np.where(significant[runs.last] >= runs.first, significant[runs.last], -1)
        run_ends = (last >= 0) & stops[last]
        substance, control = _sums(trained & ~blank & ~stops), _sums(np.isin(ids, self._control) & trained)
        # The first token of a text may be its BOS: it stands where it should.
        inside = control[runs.last + 1] - control[np.clip(edges[runs.document] + 1, runs.first, runs.last + 1)] - run_ends
        total = _sums(trained)
        final, has = runs.last_of(real)
        ends = has & run_ends[final]
        before = runs.first[runs.first_of(real)] - start
        prompt_length = np.where(has, before, stop - start)
        return Documents(
            example_id=rows.example_ids[real],
            length=stop - start,
            trained=total[stop] - total[start],
            first=ids[start],
            second=np.where(stop - start > 1, ids[np.minimum(start + 1, len(ids) - 1)], -1).astype(np.int32),
            last=np.where(has & (last[final] >= 0), ids[last[final]], -1).astype(np.int32),
            ends=ends,
            cut=trained[stop - 1] & ~ends,
            empty=_any_run(runs, substance[runs.last + 1] == substance[runs.first], len(rows.seq_lengths))[real],
            control=_any_run(runs, inside > 0, len(rows.seq_lengths))[real],
            prompt=_hashes(ids, start, prompt_length),
            prompt_length=prompt_length,
        )

    def _is_blank(self, ids: Int32, trained: Bool) -> Bool:
        """bool[T]: trained tokens that are whitespace."""
        seen = np.unique(ids[trained])
        for token_id in seen.tolist():
            if token_id not in self._blank:
                self._blank[token_id] = not self._vocabulary.text_of([token_id]).strip()
        blank = np.array([token_id for token_id in seen.tolist() if self._blank[token_id]], np.int32)
        return np.isin(ids, blank) & trained


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Runs of trained tokens that do not cross documents: int64[R] first and last position, and the segment they lie in.

    One run of no tokens after all segments closes the list, so that there is always one to point at.
    """

    first: Int64
    last: Int64
    document: Int64

    @classmethod
    def find(cls, trained: Bool, edges: Int64) -> _Runs:
        begins, stops = trained.copy(), trained.copy()
        begins[1:] &= ~trained[:-1]
        stops[:-1] &= ~trained[1:]
        begins[edges[:-1]] |= trained[edges[:-1]]
        stops[edges[1:] - 1] |= trained[edges[1:] - 1]
        first, last = np.append(np.flatnonzero(begins), edges[-1]), np.append(np.flatnonzero(stops), edges[-1] - 1)
        return cls(first, last, np.searchsorted(edges, first, side="right") - 1)

    def first_of(self, documents: Int64) -> Int64:
        """Return the index of the first run of each document; meaningless where it has none."""
        return np.searchsorted(self.document, documents)

    def last_of(self, documents: Int64) -> tuple[Int64, Bool]:
        """Return the index of the last run of each document, and whether it has one."""
        index = np.maximum(np.searchsorted(self.document, documents, side="right") - 1, 0)
        has: Bool = self.document[index] == documents
        return index, has


def _any_run(runs: _Runs, holds: Bool, documents: int) -> Bool:
    found = np.zeros(documents + 1, np.bool_)
    found[runs.document[holds]] = True
    return found


def _sums(flags: Bool) -> Int64:
    return np.append(0, np.cumsum(flags, dtype=np.int64))


def _hashes(ids: Int32, start: Int64, length: Int64) -> UInt64:
    """Hash stretches of ids: a sum of mixed ids, each times a weight of its place. Sums wrap, which differences undo."""
    offsets = np.append(0, np.cumsum(length))
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length)
    taken = ids[place + np.repeat(start, length)]
    mixed = _mix(taken.astype(np.uint64)) * (_mix(place.astype(np.uint64)) | np.uint64(1))
    sums = np.append(np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64))
    hashes: UInt64 = sums[offsets[1:]] - sums[offsets[:-1]] + _mix(length.astype(np.uint64))
    return hashes


def _mix(values: UInt64) -> UInt64:
    """Spread 64-bit values. Source: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
