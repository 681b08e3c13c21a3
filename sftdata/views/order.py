"""Pack the documents of a view into rows, put the rows in order, and cut them into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sftdata.batches import Columns, Int64, PackPlan, offsets_of, positions_of
from sftdata.choosing import OF_ORDERS
from sftdata.errors import UsageError
from sftdata.output import counted
from sftdata.pack import Strategy, lay_out, plan_packs
from sftdata.set.steps import Balance, Float64, Steps, balance_of, row_costs
from sftdata.views.balance import deal_rows
from sftdata.views.choose import draw
from sftdata.views.cost import read_cost
from sftdata.views.recipe import ViewConfig, read_ranks
from sftdata.views.select import Choice

Names = npt.NDArray[np.object_]
SHARD_TOKENS = 1 << 22  # of a shard where packing goes over the whole view


@dataclass(frozen=True, slots=True, eq=False)
class Stretches(Columns):
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
Dealt = tuple[Steps, list[str]]
"""Steps of equal work, and what is said of them."""


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


def pack_whole(
    config: ViewConfig, choice: Choice, kept: Stretches, rest: Stretches, dealt: Dealt | None = None
) -> Packed:
    """Pack documents together, put the rows in order, and cut them into shards of about `SHARD_TOKENS`.

    Args:
        config: the settings.
        choice: the documents.
        kept, rest: what rows are made of, and what is left over.
        dealt: steps to make; told how even they are.

    Raises:
        UsageError: there is not one whole step.
    """
    packs = _pack_epochs(config, kept) if config.epochs > 1 else _pack_ordered(config, choice, kept, dealt)
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


def _pack_ordered(config: ViewConfig, choice: Choice, kept: Stretches, dealt: Dealt | None) -> PackPlan:
    """Pack documents, and put the rows in order; arguments as for `pack_whole`."""
    packs, edges = _pack_bands(config, choice, kept)
    if dealt is not None:
        return _reordered(packs, _deal(config, packs, edges, dealt, _pictures(choice, kept, packs)))
    return packs if config.order == "as-is" else _reordered(packs, _shuffle(edges, config.seed))


def _pack_epochs(config: ViewConfig, kept: Stretches) -> PackPlan:
    """Pack the documents of each epoch by themselves, those after the first in an order drawn by seed.

    How many rows it takes follows from their lengths alone, so all epochs have as many.
    """
    parts, epoch_of = [], _epochs_of(config, kept)
    for epoch in range(config.epochs):
        here = np.flatnonzero(epoch_of == epoch)
        if epoch:
            keys = draw(np.arange(len(here), dtype=np.uint64), config.seed + epoch, "epochs")
            here = here[np.argsort(keys, kind="stable")]
        packs = _packs(config, (kept.stop - kept.start)[here])
        if config.order == "shuffled":
            packs = _reordered(packs, _shuffle(np.array([0, len(packs)]), config.seed + epoch))
        parts.append(replace(packs, example=here[packs.example]))
    return _joined(parts)


def _epochs_of(config: ViewConfig, kept: Stretches) -> Int64:
    """Return the epoch of each stretch, int64[K]; a mixture may have a document several times in each."""
    epochs = config.epochs
    if not config.mix:
        return np.repeat(np.arange(epochs), len(kept) // epochs)  # ids ascend, pass after pass
    order = np.lexsort((kept.id, kept.document))
    begins = np.flatnonzero(np.diff(kept.document[order], prepend=-1))
    passes = np.cumsum(np.diff(kept.id[order], prepend=-1) != 0)
    passes -= np.repeat(passes[begins], np.diff(np.append(begins, len(kept))))
    epoch = np.empty(len(kept), np.int64)
    epoch[order] = passes % epochs
    return epoch


def _joined(parts: Sequence[PackPlan]) -> PackPlan:
    """Return the rows of all parts, one after the other."""
    columns = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("example", "start", "stop")
    )
    return PackPlan(offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])), *columns)


def _pack_bands(config: ViewConfig, choice: Choice, kept: Stretches) -> tuple[PackPlan, Int64]:
    """Pack bands of documents; return the rows, and int64[B + 1], where the rows of each band begin.

    By length rows are put into bands, by their longest document: others fill them up.
    """
    lengths = kept.stop - kept.start
    if config.order in ("as-is", "shuffled", "length"):
        packs = _packs(config, lengths)
        if config.order != "length":
            return packs, np.array([0, len(packs)])
        longest = np.maximum.reduceat(packs.stop - packs.start, packs.offsets[:-1])
        edges = np.arange(config.bands + 1) * len(packs) // config.bands
        return _reordered(packs, np.argsort(longest, kind="stable")), edges
    band = _band_of(config, choice, kept, lengths)
    by_band = np.argsort(band, kind="stable")
    parts = []
    for members in np.split(by_band, np.flatnonzero(np.diff(band[by_band])) + 1):
        packs = _packs(config, lengths[members])
        parts.append(replace(packs, example=members[packs.example]))
    return _joined(parts), offsets_of([len(part) for part in parts])


def _band_of(config: ViewConfig, choice: Choice, kept: Stretches, lengths: Int64) -> Int64:
    """Return the band, int64[K], of each stretch that is packed, by what is known of its document."""
    document, documents = kept.document, choice.documents
    if config.order == "sources":
        return choice.source[document].astype(np.int64)
    if config.order == "windows":
        numbers = np.unique(documents.shard[document])
        return np.searchsorted(numbers, documents.shard[document]) // config.window
    share = documents.trained[document] / documents.lengths[document]
    rising = np.argsort(share, kind="stable")
    band = np.empty(len(rising), np.int64)
    tokens = offsets_of(lengths[rising])
    band[rising] = tokens[:-1] * config.bands // tokens[-1]
    return band


def _shuffle(edges: Int64, seed: int) -> Int64:
    """Return an order, int64[P], that shuffles rows inside their bands."""
    keys = draw(np.arange(edges[-1], dtype=np.uint64), seed, "order")
    return np.lexsort((keys, np.repeat(np.arange(len(edges) - 1), np.diff(edges))))


Pictures = tuple[Int64, Int64]
"""Of packed rows: the tokens that stand for each picture, and offsets of the rows, as for `row_costs`."""


def _pictures(choice: Choice, kept: Stretches, packs: PackPlan) -> Pictures | None:
    pictures = choice.documents.pictures
    if pictures is None:
        return None
    numbers, counts = pictures.of(kept.document[packs.example])
    return pictures.gallery.tokens[numbers], offsets_of(counts)[packs.offsets]


def _deal(
    config: ViewConfig, packs: PackPlan, edges: Int64, dealt: Dealt, pictures: Pictures | None
) -> Int64:
    """Return an order, int64[P], that makes steps of equal work, each in one band where it has the rows."""
    (steps, said), count = dealt, len(packs)
    if pictures is not None and steps.cost.picture is None:
        said.append("The work of a vision tower is not in it: --model names none.")
    if count < steps.step_rows:
        raise UsageError(
            f"--steps-for {config.steps_for}: a step takes {counted(steps.step_rows, 'row')};"
            f" the view has {count:,}.",
            "fewer ranks or rows in --steps-for, or a smaller --max-length.",
        )
    costs = _costs(config, packs, steps, pictures)
    borders = np.minimum(np.rint(edges / steps.step_rows), count // steps.step_rows) * steps.step_rows
    borders = np.unique(np.append(borders[:-1].astype(np.int64), count))
    parts = [
        first + deal_rows(costs[first:last], steps, config.seed) for first, last in pairwise(borders.tolist())
    ]
    order = np.concatenate(parts)
    said.append(_said(balance_of(steps, costs[order])))
    return order


def _costs(config: ViewConfig, packs: PackPlan, steps: Steps, pictures: Pictures | None) -> Float64:
    """Return what each row costs, float64[P]."""
    row_length = None if config.packing == "none" else config.max_length
    _, lengths, _, offsets = lay_out(packs, packs.example, row_length, config.pad_to_multiple_of)
    return row_costs(steps.cost, lengths, offsets, pictures)


def _said(balance: Balance) -> str:
    return (
        f"{counted(balance.steps, 'step')} of {balance.ranks} x {counted(balance.rows, 'row')}:"
        f" the busiest rank has {balance.mean:.3f} times the mean work,"
        f" {balance.shuffled:.3f} if rows were shuffled"
        f"{balance.incomplete}."
    )


def _refuse_idle(config: ViewConfig) -> None:
    """Refuse settings of an order that is not asked for."""
    for name, orders in OF_ORDERS.items():
        if getattr(config, name) != ViewConfig.model_fields[name].default and config.order not in orders:
            what = f"--{name} without --order {' or '.join(orders)}: it has no effect."
            raise UsageError(what, f"leave --{name} out.")
    if config.model is not None and config.steps_for is None:
        raise UsageError("--model without --steps-for: it has no effect.", "leave --model out.")


def refuse_unlike(config: ViewConfig) -> None:
    """Refuse settings of order and padding that cannot hold together, or have no effect.

    Args:
        config: with all settings of the layout filled in.

    Raises:
        UsageError: naming the setting.
    """
    _refuse_idle(config)
    _refuse_epochs(config)
    if config.reorders and config.pack_over == "slice":
        asked = f"--order {config.order}" if config.steps_for is None else f"--steps-for {config.steps_for}"
        what = f"{asked}: rows are ordered over the whole view; --pack-over is slice."
        raise UsageError(what, "--pack-over view.")
    multiple = config.pad_to_multiple_of
    if multiple > 1 and config.packing == "none":
        what = f"--pad-to-multiple-of {multiple} with --packing none: such rows hold no padding."
        raise UsageError(what, "--packing bfd, or leave --pad-to-multiple-of out.")
    if config.max_length is not None and config.max_length % multiple:
        below = config.max_length // multiple * multiple or multiple
        what = f"--pad-to-multiple-of {multiple}: max_length {config.max_length:,} is no multiple of it."
        raise UsageError(what, f"--max-length {below}.")


def _refuse_epochs(config: ViewConfig) -> None:
    """Refuse what cannot be had anew for each epoch."""
    ordering = "which orders the rows of all epochs together"
    others = {
        "steps-for": (config.steps_for is not None, ordering),
        f"order {config.order}": (config.order not in ("as-is", "shuffled"), ordering),
        "pack-over slice": (config.pack_over == "slice", "and each epoch packs all documents anew"),
    }
    for name, (given, why) in others.items():
        if config.epochs > 1 and given:
            what = f"--epochs {config.epochs} with --{name}, {why}."
            raise UsageError(what, f"leave --{name.partition(' ')[0]} out, or --epochs.")


def read_steps(config: ViewConfig) -> Dealt | None:
    """Return the steps that are asked for, and say what their balance goes by.

    Raises:
        UsageError: the model's config cannot be used.
    """
    if config.steps_for is None:
        return None
    ranks, rows = read_ranks(config.steps_for)
    cost, said = read_cost(config.model)
    return Steps(ranks=ranks, rows=rows, cost=cost), [said]


def _packs(config: ViewConfig, lengths: Int64) -> PackPlan:
    strategy: Strategy = config.packing or "bfd"
    longest, multiple = int(lengths.max(initial=1)), config.pad_to_multiple_of
    row_length = longest if strategy == "none" else config.max_length or longest
    if multiple == 1:
        return plan_packs(lengths, row_length, strategy)
    packs = plan_packs(-(-lengths // multiple) * multiple, row_length, strategy)
    return replace(packs, stop=np.minimum(packs.stop, lengths[packs.example]))


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
