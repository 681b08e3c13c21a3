"""Steps of equal work: what a row costs, and which rows of a set each rank takes at each step.

A set that was made for steps holds its rows in their order: of each step the rows of rank 0, then those of
rank 1, and so on. What is left at the end is one more step, in which some ranks have a row less, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from sftdata.batches import Int64, offsets_of
from sftdata.config import WINDOW
from sftdata.errors import RESTORE, IntegrityError
from sftdata.output import counted

if TYPE_CHECKING:
    from sftdata.set.manifest import Manifest
    from sftdata.set.opened import ShardSet

Float64 = npt.NDArray[np.float64]
NO_ROW = -1
"""Stands for a row where the last step has none."""

_Positive = Annotated[int, Meta(ge=1)]
_Natural = Annotated[int, Meta(ge=0)]


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a document costs in the forward pass of a model, in floating-point operations.

    Attributes:
        token: of each token, attention aside.
        square: of attention in all layers that see the whole document, for each squared token.
        windowed: the same, of all layers that see no further back than a window.
        window: tokens of that window.
        picture: what a picture costs besides, in the vision tower, by the tokens that stand for it.
    """

    token: _Positive
    square: _Natural
    windowed: _Natural = 0
    window: _Natural = 0
    picture: Cost | None = None

    def of(self, lengths: Int64 | npt.NDArray[np.int32]) -> Float64:
        """Return what documents of these lengths cost, float64[N].

        >>> Cost(token=2, square=1).of(np.array([1, 10])).tolist()
        [3.0, 120.0]
        """
        tokens = lengths.astype(np.float64)
        near = np.minimum(tokens, self.window)
        cost: Float64 = (
            tokens * self.token + tokens**2 * self.square + near * (2 * tokens - near) * self.windowed
        )
        return cost


class Steps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the steps of a set are made for.

    Attributes:
        ranks: processes that train together.
        rows: of each rank in each step.
        cost: what was balanced.
    """

    ranks: _Positive
    rows: _Positive
    cost: Cost

    @property
    def step_rows(self) -> int:
        """Rows of a step over all ranks."""
        return self.ranks * self.rows

    def deal(self, count: int) -> Int64:
        """Return the rows of each rank at each step, int64[steps, ranks, rows]; `NO_ROW` where there is none.

        >>> cost = Cost(token=1, square=0)
        >>> Steps(ranks=2, rows=2, cost=cost).deal(7).tolist()
        [[[0, 1], [2, 3]], [[4, 5], [6, -1]]]
        """
        whole, left = divmod(count, self.step_rows)
        dealt = np.full((whole + (left > 0), self.ranks, self.rows), NO_ROW, np.int64)
        dealt[:whole] = np.arange(whole * self.step_rows).reshape(-1, self.ranks, self.rows)
        if left:
            sizes = last_step(left, self.ranks)
            taken = np.arange(self.rows) < sizes[:, None]
            dealt[-1][taken] = whole * self.step_rows + np.arange(left)
        return dealt


def last_step(left: int, ranks: int) -> Int64:
    """Return how many rows each rank has of those that make no whole step, int64[ranks].

    >>> last_step(5, ranks=3).tolist()
    [2, 2, 1]
    """
    return left // ranks + (np.arange(ranks) < left % ranks)


def stored_steps(manifest: Manifest) -> Steps | None:
    """Return the steps that a set was made for; None for one in another order.

    Raises:
        IntegrityError: they are not such as `sftdata view` writes.
    """
    stored = _view(manifest).get("steps")
    try:
        return None if stored is None else msgspec.convert(stored, Steps)
    except msgspec.ValidationError as error:
        raise IntegrityError(f"view.steps of the manifest: {error}.", RESTORE) from None


def stored_order(manifest: Manifest) -> str:
    """Return in what order the rows of a set are meant to stay: `order` of `sftdata view`; empty for none."""
    order = _view(manifest).get("order")
    return order if isinstance(order, str) and order != "shuffled" else ""


def stored_window(manifest: Manifest) -> int:
    """Return the shards of a window in which rows may be shuffled."""
    window = _view(manifest).get("window")
    return window if isinstance(window, int) and window > 0 else WINDOW


def stored_epochs(manifest: Manifest) -> int:
    """Return for how many epochs a set holds rows of their own: as many for each, one after the other.

    Raises:
        IntegrityError: its rows are not so many epochs.
    """
    epochs = _view(manifest).get("epochs")
    if not isinstance(epochs, int) or epochs < 2:
        return 1
    if manifest.ledger.rows_packed % epochs:
        what = f"view.epochs of the manifest: {epochs} epochs of {manifest.ledger.rows_packed} rows together."
        raise IntegrityError(what, RESTORE)
    return epochs


def _view(manifest: Manifest) -> dict[str, object]:
    view = manifest.settings.get("view")
    return view if isinstance(view, dict) else {}


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly the work of a set's steps falls on the ranks.

    Attributes:
        ranks, rows: that the steps are made for.
        steps: how many, the last one aside where some ranks lack rows in it.
        mean, worst: over the steps, the cost of the busiest rank as a multiple of the mean of all ranks.
        shuffled: that mean where the same rows are dealt at random.
        missing: rows that the last step lacks.
    """

    ranks: int
    rows: int
    steps: int
    mean: float
    worst: float
    shuffled: float
    missing: int

    @property
    def incomplete(self) -> str:
        """The step that is not among `steps`, in words behind these; empty where there is none."""
        return f"; one more, the last, lacks {counted(self.missing, 'row')}" if self.missing else ""


def measure_balance(opened: ShardSet) -> Balance | None:
    """Measure the steps of a set, from the lengths in its rows alone; None where it was not made for steps.

    Raises:
        IntegrityError: a shard is missing or damaged.
    """
    steps = stored_steps(opened.manifest)
    if steps is None:
        return None
    costs, row = [np.zeros(0)], 0
    for batch in opened.batches():
        pictures, stored = None, opened.stored_pictures(row)
        if stored is not None and batch.images is not None and batch.image_counts is not None:
            edges = offsets_of(batch.image_counts)[batch.segment_offsets]
            pictures = stored.tokens[batch.images].astype(np.int64), edges
        lengths = batch.seq_lengths.astype(np.int64)
        costs.append(row_costs(steps.cost, lengths, batch.segment_offsets, pictures))
        row += len(batch)
    return balance_of(steps, np.concatenate(costs))


def balance_of(steps: Steps, costs: Float64) -> Balance:
    """Measure steps by what each row costs, float64[P], in the order of the set."""
    whole = len(costs) // steps.step_rows * steps.step_rows
    order = np.random.default_rng(0).permutation(len(costs))
    dealt, shuffled = (_ratios(part[:whole], steps) for part in (costs, costs[order]))
    return Balance(
        ranks=steps.ranks,
        rows=steps.rows,
        steps=len(dealt),
        mean=float(dealt.mean()) if whole else 1.0,
        worst=float(dealt.max(initial=1.0)),
        shuffled=float(shuffled.mean()) if whole else 1.0,
        missing=-len(costs) % steps.step_rows,
    )


def _ratios(costs: Float64, steps: Steps) -> Float64:
    """Return the cost of the busiest rank of each step as a multiple of the mean."""
    work = costs.reshape(-1, steps.ranks, steps.rows).sum(axis=2)
    ratios: Float64 = work.max(axis=1) / work.mean(axis=1)
    return ratios


def row_costs(
    cost: Cost, lengths: Int64, offsets: Int64, pictures: tuple[Int64, Int64] | None = None
) -> Float64:
    """Return what rows cost, float64[P], padding as a document of its own.

    Args:
        cost: of documents.
        lengths: int64[S], of the segments of the rows.
        offsets: int64[P + 1], into these.
        pictures: int64[K], the tokens that stand for each picture of the rows, and int64[P + 1], into these.
    """
    ends = np.append(0.0, np.cumsum(cost.of(lengths)))[offsets]
    costs: Float64 = np.diff(ends)
    if pictures is not None and cost.picture is not None:
        costs += row_costs(cost.picture, *pictures)
    return costs
