"""Which rows each rank sees at each step: a function of (schedule, epoch, step) alone.

    schedule ── rows of step s, a global batch ── micro-batch b of it is of one rank

Nothing is kept between steps, so a resumed run skips ahead by arithmetic and a changed number of ranks, at
the same global batch, sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from sftdata.batches import Int64
from sfttrain.schedule import FILLER, Schedule


class Order(Sampler[list[int]]):
    """Batches of row numbers for one rank; `FILLER` is a fully masked row.

    Args:
        schedule: which rows come when.
        batch_size: rows per rank and micro-batch.
        accumulation: micro-batches per step.
        rank, ranks: this process, of how many.
        note: what is to be said of the order, in one line; empty for nothing.

    >>> from sfttrain.schedule import Passes
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
