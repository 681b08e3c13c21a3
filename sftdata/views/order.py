"""Pack the documents of a view into rows, put the rows in order, and cut them into shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sftdata.batches import Bool, Int64, PackPlan, offsets_of, positions_of
from sftdata.pack import Strategy, plan_packs
from sftdata.views.choose import draw
from sftdata.views.recipe import ViewConfig
from sftdata.views.select import Choice

Names = npt.NDArray[np.object_]
SHARD_TOKENS = 1 << 22  # of a shard where packing goes over the whole view


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Stretches of documents, each with the id that it has in the view.

    Attributes:
        document: int64[K], index of the document.
        id: int64[K], example id in the view.
        start, stop: int64[K], tokens of that document, half-open.
        reason: object[K], why it is in no row: of `REASONS`, or the policy that cut it; empty where it is
            in one.
    """

    document: Int64
    id: Int64
    start: Int64
    stop: Int64
    reason: Names

    def __len__(self) -> int:
        return len(self.id)

    def take(self, which: Int64 | Bool) -> Stretches:
        """Return some of them."""
        return Stretches(*(getattr(self, name)[which] for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class ViewSlice:
    """What becomes one shard, and what lies beside it.

    Attributes:
        index: number of the shard.
        packs: rows; `example` indexes the view's kept stretches.
        rest: int64[R], indices of the view's stretches that are in no row.
    """

    index: int
    packs: PackPlan
    rest: Int64


Packed = tuple[Stretches, Stretches, tuple[ViewSlice, ...]]


def pack_slices(config: ViewConfig, choice: Choice, kept: Stretches, rest: Stretches) -> Packed:
    """Pack each slice of the bases apart, as `prepare` did: in the order of the ids."""
    shard = choice.documents.shard
    kept, rest = (part.take(np.argsort(shard[part.document], kind="stable")) for part in (kept, rest))
    numbers = np.union1d(shard[kept.document], shard[rest.document])
    edges = np.append(np.searchsorted(shard[kept.document], numbers), len(kept))
    others = np.append(np.searchsorted(shard[rest.document], numbers), len(rest))
    slices = []
    for place, number in enumerate(numbers.tolist()):
        first, last = int(edges[place]), int(edges[place + 1])
        packs = _packs(config, kept.stop[first:last] - kept.start[first:last])
        moved = PackPlan(packs.offsets, packs.example + first, packs.start, packs.stop)
        slices.append(ViewSlice(number, moved, np.arange(others[place], others[place + 1])))
    return kept, rest, tuple(slices)


def pack_whole(config: ViewConfig, choice: Choice, kept: Stretches, rest: Stretches) -> Packed:
    """Pack all documents together, and cut the rows into shards of about `SHARD_TOKENS`."""
    packs = _packs(config, kept.stop - kept.start)
    if config.order == "shuffled":
        rows = np.arange(len(packs), dtype=np.uint64)
        packs = _reordered(packs, np.argsort(draw(rows, config.seed, "order"), kind="stable"))
    ends = offsets_of(packs.stop - packs.start)[packs.offsets]
    if config.packing != "none":
        ends = np.arange(len(packs) + 1) * (config.max_length or 1)
    first_rows = np.unique(np.searchsorted(ends[:-1], np.arange(0, ends[-1], SHARD_TOKENS)))
    first_rows = first_rows[first_rows < len(packs)]
    last_rows = np.append(first_rows[1:], len(packs))
    # What is left over of a document lies beside its first row; documents in no row are spread over all.
    beside = _first_rows(packs, kept.id, rest.id)
    nowhere = np.flatnonzero(beside == len(packs))
    beside[nowhere] = np.arange(len(nowhere)) * len(packs) // max(len(nowhere), 1)
    shard = np.searchsorted(first_rows, beside, side="right") - 1
    slices = []
    for index, (first, last) in enumerate(zip(first_rows.tolist(), last_rows.tolist(), strict=True)):
        here = slice(packs.offsets[first], packs.offsets[last])
        part = PackPlan(
            packs.offsets[first : last + 1] - packs.offsets[first],
            packs.example[here],
            packs.start[here],
            packs.stop[here],
        )
        slices.append(ViewSlice(index, part, np.flatnonzero(shard == index)))
    return kept, rest, tuple(slices)


def _packs(config: ViewConfig, lengths: Int64) -> PackPlan:
    strategy: Strategy = config.packing or "bfd"
    longest = int(lengths.max(initial=1))
    return plan_packs(lengths, longest if strategy == "none" else config.max_length or longest, strategy)


def _reordered(packs: PackPlan, order: Int64) -> PackPlan:
    """Return the same rows in another order."""
    count = np.diff(packs.offsets)[order]
    which = positions_of(packs.offsets[:-1][order], count)
    return PackPlan(offsets_of(count), packs.example[which], packs.start[which], packs.stop[which])


def _first_rows(packs: PackPlan, ids: Int64, asked: Int64) -> Int64:
    """Return the first row of each example id asked for, int64[R]; the number of rows where there is none.

    Args:
        ids: int64[K], ascending, of the stretches that are packed.
    """
    if not len(asked):
        return asked
    row = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    first_row = np.full(len(ids), len(packs))
    first_row[packs.example[::-1]] = row[::-1]  # of several the last one written stays: the first row
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    lowest, distinct = np.minimum.reduceat(first_row, first), ids[first]
    place = np.minimum(np.searchsorted(distinct, asked), len(distinct) - 1)
    return np.where(distinct[place] == asked, lowest[place], len(packs))
