"""The order in which a run takes rows, and what it takes of each set: planned before its first step.

By passes, by shares, as a set's own view has them, or in a window that moves through the shards of a set
behind a URL, which are fetched before they come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftdata.batches import Int64, offsets_of
from sftdata.errors import UsageError
from sftdata.output import counted
from sftdata.set.cache import BOUND, cache_bound
from sftdata.set.local import named, origin
from sftdata.set.manifest import Manifest
from sftdata.set.opened import ShardSet
from sftdata.set.steps import Steps, stored_epochs, stored_order, stored_steps, stored_window
from sfttrain.config import WINDOW, TrainConfig
from sfttrain.data import Contents
from sfttrain.process import share_of_rows
from sfttrain.schedule import FILLER, Mixture, Order, Passes, Schedule, Window
from sfttrain.seen import Account

CLOSE = 0.001
"""How near realised shares are to those asked for, where sets are large enough for their rows."""
_HAIR = 0.005  # of a pass, by which an epoch may go further: it ends with a whole step
_AHEAD = 2  # shards that a set fetches before they are needed
_KEPT = ("length", "trained", "sources")
_NAMES = {
    "length": "bands by length", "trained": "bands by trained share", "sources": "one source after the other",
    "windows": "windows of shards",
}  # fmt: skip


def make_order(
    config: TrainConfig,
    sets: Sequence[ShardSet],
    sizes: Sequence[int],
    contents: Sequence[Contents],
    args: TrainingArguments,
) -> Order:
    """Return the batches of this rank.

    Args:
        config: the run.
        sets: none where rows are given that are no set's.
        sizes: rows of each set.
        contents: of the sets; needed for shares alone.
    """
    seed, shuffle = _draws(args)
    stored, note = stored_schedule(config, [opened.manifest for opened in sets], sizes, args)
    windows = windows_of(config, sets, sizes) if shuffle and sets and stored is None else ()
    if shares := config.set_shares():
        amounts = [part.amounts(config.mix_by) for part in contents]
        schedule: Schedule = Mixture(amounts, shares, seed=seed, shuffle=shuffle, windows=windows)
    else:
        weights = config.set_weights or (1.0,)
        schedule = stored or Passes(sizes, weights, seed=seed, shuffle=shuffle, windows=windows)
    rank, ranks = share_of_rows(args)
    return Order(
        schedule,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        rank=rank,
        ranks=ranks,
        note=note or _windows_note(windows),
    )


def _draws(args: TrainingArguments) -> tuple[int, bool]:
    """Return the seed of every draw, and whether rows are shuffled."""
    seed = args.seed if args.data_seed is None else args.data_seed
    return seed, args.train_sampling_strategy != "sequential"


def _windows_note(windows: Sequence[Window | None]) -> str:
    """Say that rows are not shuffled over the whole."""
    shown = [window.shards for window in windows if window is not None and window.shards < len(window.edges)]
    return f"order: shuffled in a window of {max(shown):,} shards that moves through the set" if shown else ""


def total_steps(args: TrainingArguments, order: Order) -> int:
    """Return the steps of the whole run, those before this leg included."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return -int(-args.num_train_epochs * order.steps_per_epoch // 1)


def planned(config: TrainConfig, account: Account, order: Order, steps: int) -> Iterator[str]:
    """Yield what a run takes of each set up to its last step, a line each.

    Raises:
        UsageError: it goes through a set more often than `passes` allows.
    """
    _refuse_passes(config, account, steps)
    leg = account.leg(steps)
    epoch = f"an epoch is {counted(order.steps_per_epoch, 'step')}"
    yield f"data: {counted(leg.steps, 'step')} of {counted(order.global_batch, 'row')}; {epoch}"
    if order.note:
        yield order.note
    yield from map(str, leg.sets)
    for name, folder in config.eval.items():
        if folder.resolve() in [one.resolve() for one in config.sets]:
            yield f"evaluation: {name} is one of the sets that are trained on: its loss is no test"
    worst = max((abs(part.share - part.asked) for part in leg.sets if part.asked is not None), default=0)
    if worst > CLOSE:
        yield (
            f"the shares are met to {worst:.2%} only, since whole rows are taken, and these are long or few;"
            " `sftdata view --mix` makes a set that meets them by documents"
        )


def account_of(
    config: TrainConfig, sets: Sequence[ShardSet], contents: Sequence[Contents], order: Order
) -> Account:
    """Return the account of a leg on these sets."""
    return Account(sets, contents, order, measure=config.mix_by, shares=config.set_shares())


def _refuse_passes(config: TrainConfig, account: Account, steps: int) -> None:
    if config.passes is None or max(account.passes(steps)) <= (most := config.passes + _HAIR):
        return
    passes, folder = max(zip(account.passes(steps), config.sets, strict=True), key=lambda pair: pair[0])
    enough, beyond = account.first_step, steps
    while beyond - enough > 1:
        middle = (enough + beyond) // 2
        enough, beyond = (middle, beyond) if max(account.passes(middle)) <= most else (enough, middle)
    alone = " without epochs" if config.training.get("num_train_epochs") else ""
    shorter = f", or --max-steps {enough}{alone}" if enough > account.first_step else ""
    what = f"{folder}: {steps:,} steps go through it {passes:.2f} times; --passes allows {config.passes:g}."
    raise UsageError(what, f"--passes {math.ceil(passes * 100) / 100:.10g}{shorter}.")


# ------------------------------------------------------------------------ windows of shards behind URLs


def windows_of(
    config: TrainConfig, sets: Sequence[ShardSet], sizes: Sequence[int]
) -> tuple[Window | None, ...]:
    """Return in what window the rows of each set are shuffled; None for over the whole.

    Args:
        sizes: rows of each, as they are trained; documents that are trained alone have no window.

    Raises:
        UsageError: the cache is smaller than what the windows hold.
    """
    windows: list[Window | None] = []
    held = 0
    for opened, size in zip(sets, sizes, strict=True):
        shards, far = opened.manifest.shards, origin(opened.folder) is not None
        shown = config.window or (WINDOW if far else None)
        if shown is None or size != len(opened):
            windows.append(None)
            continue
        windows.append(Window(offsets_of([shard.rows for shard in shards]), shown))
        if far:
            held += min(shown + 1 + _AHEAD, len(shards)) * max(shard.bytes for shard in shards)
    if held > (bound := cache_bound() if held else 0):
        names = ", ".join(named(opened.folder) for opened in sets if origin(opened.folder) is not None)
        what = f"{names}: windows of shards take {held:,} bytes; the cache is bound to {bound:,}."
        raise UsageError(what, f"raise {BOUND}, in gigabytes, or --set window=N for N shards.")
    return tuple(windows)


class FetchAhead(TrainerCallback):
    """Tell sets behind URLs in which order their shards come in each epoch.

    Args:
        sets: of the run.
        order: of their rows.
    """

    def __init__(self, sets: Sequence[ShardSet], order: Order) -> None:
        self._sets, self._order = sets, order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Take the shards of the epoch in the order of their first rows."""
        rows = self._order.rows(state.global_step // self._order.steps_per_epoch)
        begin = 0
        for opened, size in zip(self._sets, self._order.schedule.sizes, strict=True):
            here = rows[(rows >= begin) & (rows < begin + size)] - begin
            begin += size
            if size != len(opened):  # documents that are trained alone come from all over the set
                continue
            ends = offsets_of([shard.rows for shard in opened.manifest.shards])[1:]
            shards, first = np.unique(np.searchsorted(ends, here, side="right"), return_index=True)
            opened.expect(shards[np.argsort(first)].tolist(), _AHEAD)


# ------------------------------------------------------------------------------- the order of a view


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
    seed, shuffle = _draws(args)
    several = [number for number in map(stored_epochs, manifests) if number > 1]
    if several:
        what = f"other packs for each of {several[0]:,} epochs"
        if reason := _not_alone(config, manifests, sizes):
            return None, f"order: not the set's own, {what} ({reason})"
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
    shuffle = shuffle and order not in _KEPT
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
