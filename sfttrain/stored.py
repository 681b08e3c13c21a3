"""The order that a set's own view gave its rows: bands that are kept, windows, steps of equal work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sftdata.batches import Int64, offsets_of
from sftdata.set.manifest import Manifest
from sftdata.set.steps import Steps, stored_epochs, stored_order, stored_steps, stored_window
from sfttrain.process import share_of_rows
from sfttrain.schedule import FILLER, Passes

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sfttrain.config import TrainConfig

_KEPT = ("length", "trained", "sources")
_NAMES = {
    "length": "bands by length", "trained": "bands by trained share", "sources": "one source after the other",
    "windows": "windows of shards",
}  # fmt: skip


class Stored(Passes):
    """One set, once an epoch: its rows, or its steps, shuffled inside windows.

    Args:
        size: rows of the set.
        edges: int64[W + 1], rows where windows begin.
        steps: for which the rows are in order; None where each stands for itself.
        seed, shuffle: see `Schedule`.

    >>> Stored(5, np.array([0, 3, 5]), None, seed=0, shuffle=False).epoch(0).tolist()
    [0, 1, 2, 3, 4]
    """

    def __init__(
        self, size: int, edges: Int64, steps: Steps | None, *, seed: int, shuffle: bool = True
    ) -> None:
        super().__init__([size], [1.0], seed=seed, shuffle=shuffle)
        self.by_rank = steps is not None
        self._steps, self._edges = steps, edges

    def rows(self, first: int, stop: int, batch: int) -> Int64:
        """Return the rows of steps, in each those of one rank after those of the other."""
        rows = super().rows(first, stop, batch)
        if self._steps is None or first == stop:
            return rows
        ranks, each = self._steps.ranks, self._steps.rows
        return rows.reshape(stop - first, -1, ranks, each).swapaxes(1, 2).reshape(-1)

    def epoch(self, epoch: int) -> Int64:
        """Return the rows of one epoch; a step that lacks some is the last one, fillers included."""
        unit = 1 if self._steps is None else self._steps.step_rows
        order = np.arange(-(-self.sizes[0] // unit))
        if self.shuffle:
            whole = self.sizes[0] // unit
            window = np.searchsorted(self._edges, order * unit, side="right")
            keys = np.append(self._generator(epoch, 0).random(whole), np.full(len(order) - whole, 2.0))
            order = np.lexsort((keys, window))
        return order if self._steps is None else self._steps.deal(self.sizes[0])[order].reshape(-1)


class Epochs(Passes):
    """One set with rows for each epoch: epoch e walks the e-th part of it; after the last comes the first.

    Args:
        size: rows of the set.
        epochs: how many parts of equal size it has.
        seed, shuffle: see `Schedule`.

    >>> packs = Epochs(6, 2, seed=0, shuffle=False)
    >>> [packs.epoch(number).tolist() for number in range(3)]
    [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    """

    def __init__(self, size: int, epochs: int, *, seed: int, shuffle: bool = True) -> None:
        super().__init__([size], [1.0], seed=seed, shuffle=shuffle)
        self._epochs = epochs

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch, fillers apart."""
        return self.sizes[0] // self._epochs

    def epoch(self, epoch: int) -> Int64:
        """Return the rows of one epoch in order."""
        rows = epoch % self._epochs * self.rows_per_epoch + np.arange(self.rows_per_epoch)
        return self._generator(epoch, 0).permutation(rows) if self.shuffle else rows

    def seen(self, steps: int, batch: int) -> list[Int64]:
        """Return how often each row comes: whole epochs by arithmetic, the last one by its rows."""
        length = max(self.steps_per_epoch(batch), 1)
        whole = steps // length
        last = self.rows(whole * length, steps, batch)
        times = np.bincount(last[last != FILLER], minlength=self.sizes[0]).astype(np.int64)
        before = (whole + self._epochs - 1 - np.arange(self._epochs)) // self._epochs
        return [times + np.repeat(before, self.rows_per_epoch)]


def stored_schedule(
    config: TrainConfig, manifests: Sequence[Manifest], sizes: Sequence[int], args: TrainingArguments
) -> tuple[Passes | None, str]:
    """Return the schedule that a set's own order asks for, and what is to be said.

    Args:
        config: the run.
        manifests: of its sets.
        sizes: rows of each, as they are trained.
        args: the same, as transformers has it.

    Returns:
        None where rows come in the usual order, and the reason where a set has another.
    """
    several = [number for number in map(stored_epochs, manifests) if number > 1]
    if several:
        what = f"other packs for each of {several[0]:,} epochs"
        if reason := _not_alone(config, manifests, sizes):
            return None, f"order: not the set's own, {what} ({reason})"
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = args.train_sampling_strategy != "sequential"
        return Epochs(sizes[0], several[0], seed=seed, shuffle=shuffle), f"order: the set's own, {what}"
    ordered = [manifest for manifest in manifests if stored_order(manifest) or stored_steps(manifest)]
    if not ordered:
        return None, ""
    order, steps = stored_order(ordered[0]), stored_steps(ordered[0])
    what = " in ".join(filter(None, (_steps_text(steps), _NAMES.get(order))))
    reason = _not_alone(config, manifests, sizes)
    if config.training.get("train_sampling_strategy") == "random":
        reason = "train_sampling_strategy=random"
    if not reason and steps is not None:
        reason = _misfit(steps, args)
        if reason and order:
            what, steps, reason = f"{_NAMES[order]}, but for its steps ({reason})", None, ""
    if reason:
        return None, f"order: not the set's own, {what} ({reason})"
    shuffle = args.train_sampling_strategy != "sequential" and order not in _KEPT
    seed = args.seed if args.data_seed is None else args.data_seed
    schedule = Stored(sizes[0], _edges(ordered[0]), steps, seed=seed, shuffle=shuffle)
    return schedule, f"order: the set's own, {what}{_unbalanced(steps, share_of_rows(args)[1])}"


def _steps_text(steps: Steps | None) -> str:
    return f"steps for {steps.ranks} ranks x {steps.rows} rows" if steps else ""


def _misfit(steps: Steps, args: TrainingArguments) -> str:
    """Return why a run cannot take the steps of a set; empty where a step of the run holds whole ones."""
    ranks = share_of_rows(args)[1]
    rows = args.train_batch_size * args.gradient_accumulation_steps * ranks
    if rows % steps.step_rows == 0:
        return ""
    batch = f"{ranks} x {args.train_batch_size} x {args.gradient_accumulation_steps}"
    return f"a step here takes {batch} = {rows:,} rows, no multiple of {steps.step_rows:,}"


def _not_alone(config: TrainConfig, manifests: Sequence[Manifest], sizes: Sequence[int]) -> str:
    """Return why the order of a set cannot be that of the run; empty where it can."""
    if config.window is not None:
        return f"window={config.window}"
    if len(manifests) > 1 or config.mix:
        return "it is trained by shares" if config.mix else "it is trained with other sets"
    if config.set_weights not in ((), (1.0,)):
        return f"an epoch is {config.set_weights[0]:g} passes over it"
    if sizes[0] != manifests[0].ledger.rows_packed:
        return "its documents are trained alone"
    return ""


def _unbalanced(steps: Steps | None, ranks: int) -> str:
    if steps is None or steps.ranks % ranks == 0:
        return ""
    return f"; work is not balanced over {ranks} ranks, of which {steps.ranks} is no multiple"


def _edges(manifest: Manifest) -> Int64:
    """Return the rows where the windows of a set begin; one window where it has none."""
    ends = offsets_of([shard.rows for shard in manifest.shards])
    if stored_order(manifest) != "windows":
        return ends[[0, -1]]
    return np.append(ends[:-1][:: stored_window(manifest)], ends[-1])
