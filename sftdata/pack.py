"""Pack examples into rows of constant length: lengths -> plan -> columns.

Best-fit decreasing is run over *distinct* lengths: examples of one length are interchangeable, and so are
rows with the same space left, so both are handled as ranges. The plan is the one that best-fit decreasing
finds example by example; only its cost differs, since it follows the number of distinct lengths and not the
number of examples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise
from typing import Literal

import numpy as np

from sftdata.batches import (
    IGNORE_INDEX,
    Bool,
    Float32,
    Int32,
    Int64,
    PackedRows,
    PackPlan,
    TokenBatch,
    offsets_of,
    positions_of,
)

Strategy = Literal["bfd", "wrapped", "none"]

PADDING_ID = -1
"""Stands in `example_ids` for the padding at the end of a row."""

_BLOCK_TOKENS = 1 << 18  # gather in blocks whose index arrays stay in the cache
_GOLDEN = np.uint64(
    0x9E3779B97F4A7C15
)  # 2**64 / golden ratio, odd: multiplication by it permutes the 64-bit numbers


def plan_packs(lengths: Int64, max_length: int, strategy: Strategy = "bfd") -> PackPlan:
    """Decide which example goes into which packed row, and where.

    An example without tokens makes no document. With `bfd` an example is never split; inside a row, documents
    stand in input order, and rows are spread so that any stretch of them holds long and short examples alike,
    from all over the input. `wrapped` cuts the stream of all examples every `max_length` tokens; `none` gives
    each example its own row.

    Args:
        lengths: int64[N], tokens per example.
        max_length: tokens per packed row.
        strategy: how to pack.

    Raises:
        ValueError: an example is longer than `max_length` with `bfd` or `none`; the over-long policy comes
            before packing.

    Source: best-fit decreasing for training data, https://arxiv.org/abs/2404.10830; over a histogram of
    lengths, https://arxiv.org/abs/2107.02027.

    >>> plan = plan_packs(np.array([3, 6, 2, 5]), max_length=8)
    >>> [plan.example[a:b].tolist() for a, b in zip(plan.offsets, plan.offsets[1:])]
    [[1, 2], [0, 3]]
    """
    lengths = np.asarray(lengths, np.int64)
    if strategy == "wrapped":
        return _cut_stream(lengths, max_length)
    if lengths.max(initial=0) > max_length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit max_length {max_length}")
    example = np.flatnonzero(lengths)
    lengths = lengths if len(example) == len(lengths) else lengths[example]  # millions: no copy without need
    if strategy == "none":
        return PackPlan(np.arange(len(example) + 1), example, _zeros(len(example)), lengths)
    position, rows = _assign_rows(lengths, max_length)
    offsets, by_row = offsets_of(np.bincount(position, minlength=rows)), _stable_argsort(position)
    return PackPlan(offsets, example[by_row], _zeros(len(example)), lengths[by_row])


def gather(
    tokens: TokenBatch, example_ids: Int64, plan: PackPlan, row_length: int | None, pad_id: int,
    weighted: bool = False, multiple: int = 1,
) -> PackedRows:  # fmt: skip
    """Lay the planned documents out as the columns of a shard.

    No document's first token has a label: nothing of its own stands before it to predict it from.

    Args:
        tokens: the examples that the plan speaks of.
        example_ids: int64[N], global row number of each example.
        plan: from `plan_packs`.
        row_length: tokens of every row, padding included; None (with `none`) where rows keep their own
            length.
        pad_id: token id that fills the end of a row; its labels are -100 whatever the id.
        weighted: lay out what each trained token weighs, too.
        multiple: padding fills the row behind each document up to a multiple of this.
    """
    document, lengths, ids, segment_offsets = lay_out(plan, example_ids, row_length, multiple)
    source = np.append(tokens.offsets[plan.example] + plan.start, 0)[document]
    target = offsets_of(lengths)
    input_ids, labels = _copy_tokens(tokens.input_ids, tokens.trained, source, target)
    padding = positions_of(target[:-1][ids == PADDING_ID], lengths[ids == PADDING_ID])
    input_ids[padding], labels[padding] = pad_id, IGNORE_INDEX
    labels[target[:-1]] = IGNORE_INDEX
    weights = _copy_weights(tokens.weights(), source, target, labels) if weighted else None
    return PackedRows(
        input_ids, labels, target[segment_offsets], lengths.astype(np.int32), ids, segment_offsets, weights
    )


def lay_out(
    plan: PackPlan, example_ids: Int64, row_length: int | None, multiple: int = 1
) -> tuple[Int64, Int64, Int64, Int64]:
    """Return the segments of the planned rows, padding included; arguments as for `gather`.

    Returns:
        int64[S] each: index of the planned document, -1 for padding; tokens; example id, `PADDING_ID` for
        padding; and int64[P + 1], the rows' offsets into these.
    """
    document, lengths, ids = np.arange(len(plan.example)), plan.stop - plan.start, example_ids[plan.example]
    if row_length is None:
        return document, lengths, ids, plan.offsets
    after = -lengths % multiple
    filled = np.diff(offsets_of(lengths + after)[plan.offsets])
    after[plan.offsets[1:] - 1] += row_length - filled
    padded = np.flatnonzero(after)
    return (
        np.insert(document, padded + 1, -1),
        np.insert(lengths, padded + 1, after[padded]),
        np.insert(ids, padded + 1, PADDING_ID),
        plan.offsets + offsets_of(after > 0)[plan.offsets],
    )


# ------------------------------------------------------------------------------------------- planning


def _cut_stream(lengths: Int64, max_length: int) -> PackPlan:
    offsets = offsets_of(lengths)
    total = int(offsets[-1])
    row_starts = np.arange(0, total, max_length)
    starts = np.sort(np.concatenate([offsets[:-1][lengths > 0], row_starts]))
    starts = starts[np.diff(starts, prepend=-1) > 0]
    example = np.searchsorted(offsets, starts, side="right") - 1
    stops = np.append(starts[1:], total)[: len(starts)]
    rows = np.searchsorted(starts, np.append(row_starts, total))
    return PackPlan(rows.astype(np.int64), example, starts - offsets[example], stops - offsets[example])


def _zeros(count: int) -> Int64:
    """int64[count] of zeros that take no memory; not to be written to."""
    return np.broadcast_to(np.int64(0), count)


def _assign_rows(lengths: Int64, max_length: int) -> tuple[Int32, int]:
    """Return int32[N], the row of each example, and the number of rows."""
    histogram = np.bincount(lengths)
    distinct = np.flatnonzero(histogram)[::-1]
    placements, rows = _best_fit(distinct.tolist(), histogram[distinct].tolist(), max_length)
    spread, dealt, at = _spread(rows), np.empty(len(lengths), np.int32), 0
    for first, width, times in placements:
        hands = dealt[at : at + width * times].reshape(times, width)
        hands[:] = spread[first : first + width]
        at += hands.size
    position = np.empty_like(dealt)
    position[_stable_argsort(max_length - lengths)] = dealt
    return position, rows


def _best_fit(
    distinct: list[int], counts: list[int], max_length: int
) -> tuple[list[tuple[int, int, int]], int]:
    """Run best-fit decreasing over (length, count) pairs, longest first.

    Returns:
        placements, in the order in which examples are taken: (first row, rows, times), one example being
            dealt to each of
        these consecutive rows, so many times; and the number of rows.
    """
    placements: list[tuple[int, int, int]] = []
    ranges: dict[int, list[tuple[int, int]]] = {}  # space left -> (first row, rows)
    spaces: list[int] = []  # the keys of `ranges`, ascending
    rows = 0

    def keep(space: int, first: int, count: int) -> None:
        if not count or space < distinct[-1]:
            return
        if space not in ranges:
            ranges[space] = []
            insort(spaces, space)
        ranges[space].append((first, count))

    for length, count in zip(distinct, counts, strict=True):
        while count:
            best = bisect_left(spaces, length)
            if best < len(spaces):
                space = spaces[best]
                first, available = ranges[space].pop()
                if not ranges[space]:
                    del ranges[space], spaces[best]
            else:
                space, first, available = max_length, rows, -(-count // (max_length // length))
                rows += available
            # A row that fits another example of this length is the tightest fit for it, so rows are filled
            # one by one. Which of these equal examples a row gets is free: dealing keeps neighbours in the
            # input apart.
            per_row = space // length
            placed = min(count, available * per_row)
            full, rest = divmod(placed, per_row)
            used = full + (rest > 0)
            placements += [(first, used, rest), (first, full, per_row - rest)]
            keep(space, first + used, available - used)
            keep(space - per_row * length, first, full)
            keep(space - rest * length, first + full, used - full)
            count -= placed
    return placements, rows


def _spread(count: int) -> Int64:
    """Return a permutation, int64[count]: where to put each of the rows that best fit opened, longest first.

    Sorting by multiples of the golden ratio modulo one spaces neighbours evenly, so a stretch of the result
    samples the whole.
    Arithmetic, not a random generator: the same in every version of every library.
    """
    with np.errstate(over="ignore"):
        keys = np.arange(count, dtype=np.uint64) * _GOLDEN
    position = np.empty(count, np.int64)
    position[np.argsort(keys)] = np.arange(count)
    return position


def _stable_argsort(values: Int32 | Int64) -> Int64:
    """Argsort int64[N], 0 <= values < 2**31 and N < 2**32, ties in order, far faster than `kind="stable"`."""
    keys = values.astype(np.int64)
    keys <<= 32
    keys |= np.arange(len(values), dtype=np.uint32)
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


# ------------------------------------------------------------------------------------------ gathering


def _copy_tokens(input_ids: Int32, trained: Bool, source: Int64, target: Int64) -> tuple[Int32, Int32]:
    """Copy segments from `source` to `target` positions; those without a source are to be overwritten."""
    total = int(target[-1])
    ids, labels = np.empty(total, np.int32), np.empty(total, np.int32)
    edges = np.unique(np.append(np.searchsorted(target, np.arange(0, total, _BLOCK_TOKENS)), len(source)))
    for first, last in pairwise(edges.tolist()):
        start, stop = target[first], target[last]
        index = positions_of(source[first:last], np.diff(target[first : last + 1]))
        np.take(input_ids, index, out=ids[start:stop], mode="clip")
        labels[start:stop] = np.where(trained.take(index, mode="clip"), ids[start:stop], IGNORE_INDEX)
    return ids, labels


def _copy_weights(weights: Float32, source: Int64, target: Int64, labels: Int32) -> Float32:
    """float32[T], what each token weighs, 0 where it is not trained."""
    index = positions_of(source, np.diff(target))
    copied: Float32 = np.where(
        labels != IGNORE_INDEX, np.append(weights, np.float32(0)).take(index, mode="clip"), np.float32(0)
    )
    return copied
