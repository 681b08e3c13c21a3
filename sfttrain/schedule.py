"""Which rows come when, over all sets of a run: a function of the seed and of the steps before alone.

    Passes    weights: so many passes over each set make an epoch, whose rows come in one random order
    Mixture   shares: one endless stream; the set that is furthest behind its share gives the next row
    Order     deals the rows of each step out to ranks and micro-batches

Nothing is kept between steps: any step's rows, and how often each row came before it, are found by
arithmetic. So a resumed run skips ahead, and a changed number of ranks, at the same global batch, sees the
same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sftdata.batches import Int64

FILLER = -1
"""In place of a row: one that trains nothing."""
_PASSES_KEPT = 4


class Window(NamedTuple):
    """Shards among which rows are shuffled: a window that moves through a set.

    It begins with one shard and grows by one at a time, until it is as wide as it may be: the first rows of a
    run wait for a single shard.

    Attributes:
        edges: int64[S + 1], rows where shards begin.
        shards: how wide it may be.

    >>> Window(np.array([0, 3, 6, 9]), 2).order(np.arange(9), np.random.default_rng(0)).tolist()
    [4, 5, 3, 1, 0, 6, 8, 7, 2]
    """

    edges: Int64
    shards: int

    def order(self, rows: Int64, generator: np.random.Generator) -> Int64:
        """Return rows in an order that is drawn."""
        place = generator.permutation(len(self.edges) - 1)[
            np.searchsorted(self.edges, rows, side="right") - 1
        ]
        keys = place + generator.random(len(rows)) * np.minimum(place + 1, self.shards)
        drawn: Int64 = rows[np.argsort(keys, kind="stable")]
        return drawn


class Schedule(Protocol):
    """Rows are numbered through all sets, in their order; a step takes `batch` of them.

    Attributes:
        sizes: rows of each set.
        seed: of every draw.
        shuffle: False keeps the order at rest.
        leg: first step of the leg of the run, which draws rows in other orders than the legs before.
        windows: in which the rows of each set are shuffled; None for over the whole.
        by_rank: whether the rows of a step come rank after rank; else micro-batch after micro-batch.
    """

    sizes: list[int]
    seed: int
    shuffle: bool
    leg: int
    windows: tuple[Window | None, ...]
    by_rank: bool

    def steps_per_epoch(self, batch: int) -> int:
        """Return how many steps make an epoch."""

    def rows(self, first: int, stop: int, batch: int) -> Int64:
        """int64[(stop - first) * batch]: the rows of these steps in order; `FILLER` where there is none."""

    def seen(self, steps: int, batch: int) -> list[Int64]:
        """Return how often the first steps take each row, int64[rows] for each set."""


class Passes:
    """So many passes over each set make an epoch, filled up to whole steps.

    Args:
        sizes: rows of each set.
        weights: passes over each in one epoch; 1 shows every row exactly once, 0.5 another half each epoch.
        seed, shuffle: see `Schedule`.
        windows: in which the rows of each set are shuffled; None, or nothing at all, for over the whole.

    >>> Passes([3, 2], [1, 1], seed=0, shuffle=False).rows(0, 3, 2).tolist()
    [0, 1, 2, 3, 4, -1]
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool = True,
        windows: Sequence[Window | None] = (),
    ) -> None:  # fmt: skip
        self.sizes, self.weights, self.seed, self.shuffle = list(sizes), list(weights), seed, shuffle
        self.windows = tuple(windows) or (None,) * len(self.sizes)
        self.leg, self.by_rank = 0, False

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch, fillers apart."""
        return sum(_share(size, weight) for size, weight in zip(self.sizes, self.weights, strict=True))

    def steps_per_epoch(self, batch: int) -> int:
        """Return in how many steps an epoch's rows are taken."""
        return -(-self.rows_per_epoch // batch)

    def rows(self, first: int, stop: int, batch: int) -> Int64:
        """Return the rows of steps; fillers come in the last step of an epoch only."""
        length = self.steps_per_epoch(batch)
        epochs = range(first // length, -(-stop // length))
        rows = [np.empty(0, np.int64)]
        for epoch in epochs:
            order = self.epoch(epoch)
            rows += [order, np.full(length * batch - len(order), FILLER, np.int64)]
        begin = (first - epochs.start * length) * batch
        return np.concatenate(rows)[begin : begin + (stop - first) * batch]

    def epoch(self, epoch: int) -> Int64:
        """int64[rows_per_epoch], the rows of one epoch in order."""
        chosen = [self._passes(index, epoch) for index in range(len(self.sizes))]
        order = np.concatenate(
            [start + rows for start, rows in zip(_starts(self.sizes), chosen, strict=True)]
        )
        if self.shuffle and len(self.sizes) > 1:
            generator = self._generator(epoch, len(self.sizes))
            if not any(self.windows):
                generator.shuffle(order)
                return order
            which = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
            generator.shuffle(which)
            order[np.argsort(which, kind="stable")] = order.copy()  # each set's rows stay in their order
        return order

    def seen(self, steps: int, batch: int) -> list[Int64]:
        """Return how often each row comes: whole epochs by arithmetic, the last one by its rows."""
        length = max(self.steps_per_epoch(batch), 1)
        epochs = steps // length
        last = self.rows(epochs * length, steps, batch) if steps % length else np.empty(0, np.int64)
        counts = np.bincount(last[last != FILLER], minlength=sum(self.sizes))
        times = np.split(counts.astype(np.int64), np.cumsum(self.sizes[:-1]))
        for index, size in enumerate(self.sizes):
            whole, part = divmod(_share(size, self.weights[index]), max(size, 1))
            rounds, rest = divmod(epochs * part, max(size, 1))
            times[index] += epochs * whole + rounds
            times[index][self._ring(index)[:rest]] += 1
        return times

    def _passes(self, index: int, epoch: int) -> Int64:
        """Rows of a set in an epoch: whole passes, then a window that moves through a fixed permutation."""
        size = self.sizes[index]
        whole, part = divmod(_share(size, self.weights[index]), max(size, 1))
        passes = [np.empty(0, np.int64), *[np.arange(size, dtype=np.int64)] * whole]
        if part:
            passes.append(self._ring(index)[(epoch * part + np.arange(part)) % size])
        generator, window = self._generator(epoch, index), self.windows[index]
        if self.shuffle and window is not None:
            return np.concatenate([window.order(rows, generator) for rows in passes])
        rows = np.concatenate(passes)
        return generator.permutation(rows) if self.shuffle else rows

    def _ring(self, index: int) -> Int64:
        size = self.sizes[index]
        order = self._generator(0, index).permutation(size) if self.shuffle else np.arange(size)
        return order.astype(np.int64)

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return _generator(self.seed, epoch, stream, self.leg)


class Mixture:
    """One endless stream that keeps to the shares at every step.

    Each set is gone through again and again, in another order each time. Its rows fall due when its share
    has come to the middle of them; the stream is all rows as they fall due. So whatever is taken from its
    beginning has of each set what its share asks for, to less than a row and a half.

    Args:
        amounts: int64[rows] for each set, what each row counts for. A row that counts for nothing counts for
            1, so that it has a place too.
        shares: of the sets, in any unit.
        seed, shuffle: see `Schedule`.
        windows: as for `Passes`.

    >>> Mixture([np.ones(4), np.ones(4)], [3, 1], seed=0, shuffle=False).rows(0, 4, 2).tolist()
    [0, 1, 4, 2, 3, 0, 5, 1]
    """

    def __init__(
        self, amounts: Sequence[Int64], shares: Sequence[float], *, seed: int, shuffle: bool = True,
        windows: Sequence[Window | None] = (),
    ) -> None:  # fmt: skip
        self.sizes, self.seed, self.shuffle, self.leg = [len(part) for part in amounts], seed, shuffle, 0
        self.by_rank = False
        self.windows = tuple(windows) or (None,) * len(self.sizes)
        self._amounts = [np.maximum(part, 1).astype(np.int64) for part in amounts]
        self._wholes = [int(part.sum()) for part in self._amounts]
        self._shares = [share / sum(shares) for share in shares]
        self._kept: dict[tuple[int, int, int], tuple[Int64, npt.NDArray[np.float64]]] = {}
        once = [whole / share for whole, share in zip(self._wholes, self._shares, strict=True)]
        self._epoch = sum(self._due_before(min(once)))  # of the first leg; the others keep its length

    def steps_per_epoch(self, batch: int) -> int:
        """Return the whole steps in which the stream goes through none of the sets twice; at least one."""
        return max(1, self._epoch // batch)

    def rows(self, first: int, stop: int, batch: int) -> Int64:
        """Return the rows of steps; there are always some."""
        begins, ends = self._taken(first * batch), self._taken(stop * batch)
        rows, dues = [np.empty(0, np.int64)], [np.empty(0, np.float64)]
        for index, start in enumerate(_starts(self.sizes)):
            size, begin, end = self.sizes[index], begins[index], ends[index]
            for number in range(begin // size, -(-end // size)):
                order, due = self._pass(index, number)
                here = slice(max(begin - number * size, 0), end - number * size)
                rows.append(start + order[here])
                dues.append(due[here])
        return np.concatenate(rows)[np.argsort(np.concatenate(dues), kind="stable")]

    def seen(self, steps: int, batch: int) -> list[Int64]:
        """Return how often each row comes: whole passes over its set, and the one that is under way."""
        times = []
        for index, taken in enumerate(self._taken(steps * batch)):
            passes, more = divmod(taken, self.sizes[index])
            times.append(np.full(self.sizes[index], passes, np.int64))
            times[index][self._pass(index, passes)[0][:more]] += 1
        return times

    def _taken(self, rows: int) -> list[int]:
        """Return how many rows of each set are among the first ones of the stream."""
        early, late = 0.0, 1.0
        while sum(self._due_before(late)) < rows:
            late *= 2
        while early < (middle := (early + late) / 2) < late:
            early, late = (early, middle) if sum(self._due_before(middle)) >= rows else (middle, late)
        taken, also = self._due_before(early), self._due_before(late)
        missing = rows - sum(taken)
        for index, count in enumerate(also):  # those that fall due at once come in the order of the sets
            more = min(count - taken[index], missing)
            taken[index] += more
            missing -= more
        return taken

    def _due_before(self, time: float) -> list[int]:
        """Return how many rows of each set fall due before all sets together have come to an amount."""
        counts = []
        for index, (whole, share) in enumerate(zip(self._wholes, self._shares, strict=True)):
            number = int(time * share / whole)
            due = self._pass(index, number)[1]
            counts.append(number * self.sizes[index] + int(np.searchsorted(due, time)))
        return counts

    def _pass(self, index: int, number: int) -> tuple[Int64, npt.NDArray[np.float64]]:
        """Return the rows of one pass over a set in their order, and when they fall due."""
        key = index, number, self.leg
        if key not in self._kept:
            size, whole = self.sizes[index], self._wholes[index]
            generator = _generator(self.seed, number, index, self.leg)
            order, window = np.arange(size, dtype=np.int64), self.windows[index]
            if self.shuffle:
                order = generator.permutation(order) if window is None else window.order(order, generator)
            amounts = self._amounts[index][order]
            due = (number * whole + np.cumsum(amounts) - amounts / 2) / self._shares[index]
            for old in [old for old in self._kept if old[0] == index][: 1 - _PASSES_KEPT]:
                del self._kept[old]
            self._kept[key] = order, due
        return self._kept[key]


class Order:
    """Batches of row numbers for one rank; `FILLER` is a fully masked row.

    Args:
        schedule: which rows come when.
        batch_size: rows per rank and micro-batch.
        accumulation: micro-batches per step.
        rank, ranks: this process, of how many.
        note: what is to be said of the order, in one line; empty for nothing.

    >>> passes = Passes([5], [1.0], seed=0, shuffle=False)
    >>> list(Order(passes, batch_size=2, accumulation=1, rank=1, ranks=2))
    [[2, 3], [-1, -1]]
    """

    def __init__(
        self, schedule: Schedule, *, batch_size: int, accumulation: int = 1, rank: int = 0, ranks: int = 1,
        note: str = "",
    ) -> None:  # fmt: skip
        self.schedule, self.epoch, self.note = schedule, 0, note
        self.batch_size, self.accumulation, self.rank, self.ranks = batch_size, accumulation, rank, ranks

    @property
    def window(self) -> int | list[int | None] | None:
        """Shards of the window in which rows are shuffled, of each set where there are several."""
        shards = [window and window.shards for window in self.schedule.windows]
        return shards[0] if len(shards) == 1 else shards if any(shards) else None

    def begin_at(self, step: int) -> None:
        """Let the schedule begin at a step of the run: what came before was trained on other data."""
        self.schedule.leg = step

    @property
    def first_step(self) -> int:
        """Where the schedule begins."""
        return self.schedule.leg

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks through."""
        self.epoch = epoch

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.schedule.steps_per_epoch(self.global_batch)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        # Micro-batch m of all ranks is contiguous: ranks x accumulation may change at the same product.
        rows = self.rows(self.epoch)
        if self.schedule.by_rank:
            own = rows.reshape(-1, self.ranks, self.accumulation, self.batch_size)[:, self.rank]
            return iter(own.reshape(-1, self.batch_size).tolist())
        return iter(rows.reshape(-1, self.ranks, self.batch_size)[:, self.rank].tolist())

    def rows(self, epoch: int) -> Int64:
        """int64[steps_per_epoch * global_batch], the rows of one epoch of the run in order."""
        length, batch = self.steps_per_epoch, self.global_batch
        begin = epoch * length - self.first_step
        first, stop = max(begin, 0), max(begin + length, 0)
        before = np.full((length - stop + first) * batch, FILLER, np.int64)  # those steps are taken
        return np.concatenate([before, self.schedule.rows(first, stop, batch)])

    def seen(self, step: int) -> list[Int64]:
        """Return how often each row was taken before a step of the run, int64[rows] for each set."""
        return self.schedule.seen(step - self.first_step, self.global_batch)


def _generator(seed: int, number: int, stream: int, leg: int) -> np.random.Generator:
    """Return the draws of one pass over a set, or of one epoch; without a leg, those of earlier versions."""
    return np.random.default_rng([seed, number, stream, *([leg] if leg else [])])


def _share(size: int, weight: float) -> int:
    return round(size * weight)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts: list[int] = np.cumsum([0, *sizes[:-1]]).tolist()
    return starts
