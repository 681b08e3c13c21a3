"""The facts about each example that the audit checks, as columns: computed from ids and labels, by batch."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import xxhash

from sftdata.batches import IGNORE_INDEX, Bool, Columns, Int32, Int64, PackedRows, offsets_of
from sftdata.set.hashes import UInt64
from sftdata.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class Documents(Columns):
    """Stretches of examples; index i in each column is the same one. An answer is a run of trained tokens.

    Attributes:
        example_id: int64[N].
        length: int64[N], tokens.
        trained: int64[N], trained tokens.
        first, second: int32[N], first two token ids; -1 where there is none.
        wrong_end: int32[N], a control token that ends an answer and is no stop token, the largest id; -1
            where there is none.
        unended: bool[N], some answer ends in no control token at all, whitespace after it aside.
        ends: bool[N], the last answer ends in a stop token, whitespace after it aside.
        cut: bool[N], the very last token is trained, and `ends` is False.
        empty: bool[N], some answer holds nothing but stop tokens and whitespace.
        control: bool[N], some answer holds a stop token or BOS before its end.
        prompt: uint64[N], hash of the ids before the first answer.
        prompt_length: int64[N], number of these ids.
    """

    example_id: Int64
    length: Int64
    trained: Int64
    first: Int32
    second: Int32
    wrong_end: Int32
    unended: Bool
    ends: Bool
    cut: Bool
    empty: Bool
    control: Bool
    prompt: UInt64
    prompt_length: Int64

    def __len__(self) -> int:
        return len(self.example_id)

    def by_example(self) -> tuple[Documents, Int64]:
        """Merge the stretches of each example; return examples by ascending id, and int64[E], their number.

        A flag of an example holds if it holds for one stretch: packing may put them in any order.
        """
        order = np.argsort(self.example_id, kind="stable")
        ids, at, count = np.unique(self.example_id[order], return_index=True, return_counts=True)
        merged = {field.name: getattr(self, field.name)[order][at] for field in fields(self)}
        if len(ids):
            for name in ("length", "trained"):
                merged[name] = np.add.reduceat(getattr(self, name)[order], at)
            merged["wrong_end"] = np.maximum.reduceat(self.wrong_end[order], at)
            for name in ("unended", "ends", "cut", "empty", "control"):
                merged[name] = np.logical_or.reduceat(getattr(self, name)[order], at)
        return Documents(**merged), count


class DocumentReader:
    """Turn packed rows into `Documents`: only trained tokens are examined one by one; prompts are hashed.

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
        self._blank = np.zeros(0, np.int8)  # by id: 0 unknown, 1 whitespace, 2 not whitespace

    def read(self, rows: PackedRows) -> Documents:
        """Return the documents of packed rows, padding left out."""
        ids, edges, segments = rows.input_ids, offsets_of(rows.seq_lengths), len(rows.seq_lengths)
        real = np.flatnonzero(rows.example_ids >= 0)
        start, stop = edges[:-1][real], edges[1:][real]
        # From here on a "place" is a position in `ids`, and an index into `trained` counts trained tokens.
        place = np.flatnonzero(rows.labels != IGNORE_INDEX)
        trained = ids[place]
        runs = _Runs.find(place, edges)
        stops, blank = np.isin(trained, self._stops), self._is_blank(trained)
        # The last token of each run that is not whitespace; -1 for a run of whitespace only.
        significant = np.maximum.accumulate(np.where(blank, -1, np.arange(len(trained))))[runs.stop - 1]
        last = np.where(significant >= runs.start, significant, -1)
        run_stops = (last >= 0) & stops[last]
        last_id = np.append(trained, np.int32(-1))[last]  # index -1: the id -1
        run_ends = np.isin(last_id, self._enders)
        wrong_end = np.full(segments, -1, np.int32)
        np.maximum.at(wrong_end, runs.document, np.where(run_ends & ~run_stops, last_id, np.int32(-1)))
        # Prefix sums count tokens of a kind in each run.
        substance, control = _sums(~blank & ~stops), _sums(np.isin(trained, self._control))
        # The first token of a document may be its BOS, and the last one of a run its stop: both are meant.
        first_trained = place[runs.start] == edges[runs.document]
        inside = control[runs.stop] - control[runs.start + first_trained] - run_stops
        # The first and the last run of each document; `last_run < first_run` where nothing is trained.
        first_run = np.searchsorted(runs.document, real)
        last_run = np.searchsorted(runs.document, real, side="right") - 1
        any_trained = last_run >= first_run
        ends, prompt_length = np.zeros(len(real), np.bool_), stop - start
        ends[any_trained] = run_stops[last_run[any_trained]]
        prompt_length[any_trained] = place[runs.start[first_run[any_trained]]] - start[any_trained]
        return Documents(
            example_id=rows.example_ids[real],
            length=stop - start,
            trained=np.searchsorted(place, stop) - np.searchsorted(place, start),
            first=ids[start],
            second=np.where(stop - start > 1, ids[np.minimum(start + 1, len(ids) - 1)], -1).astype(np.int32),
            wrong_end=wrong_end[real],
            unended=_any_run(runs, ~run_stops & ~run_ends, segments)[real],
            ends=ends,
            cut=(rows.labels[stop - 1] != IGNORE_INDEX) & ~ends,
            empty=_any_run(runs, substance[runs.stop] == substance[runs.start], segments)[real],
            control=_any_run(runs, inside > 0, segments)[real],
            prompt=_hashes(ids, start, prompt_length),
            prompt_length=prompt_length,
        )

    def _is_blank(self, trained: Int32) -> Bool:
        """bool[K]: tokens that are whitespace."""
        missing = int(trained.max(initial=-1)) + 1 - len(self._blank)
        self._blank = np.append(self._blank, np.zeros(max(missing, 0), np.int8))
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
        """Cut the positions of trained tokens, int64[K], at gaps and where segments begin."""
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
    """bool[S]: segments with a run for which `holds`, bool[R], is True."""
    some = np.zeros(documents, np.bool_)
    some[runs.document[holds]] = True
    return some


def _sums(flags: Bool) -> Int64:
    """int64[K + 1]: prefix sums, so that `sums[j] - sums[i]` counts the flags in `i:j`."""
    return np.append(0, np.cumsum(flags, dtype=np.int64))


def _hashes(ids: Int32, start: Int64, length: Int64) -> UInt64:
    """uint64[N]: hashes of stretches of ids."""
    raw, width = np.ascontiguousarray(ids).data.cast("B"), ids.itemsize
    spans = zip((start * width).tolist(), ((start + length) * width).tolist(), strict=True)
    return np.array([xxhash.xxh3_64_intdigest(raw[first:last]) for first, last in spans], np.uint64)
