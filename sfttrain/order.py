"""Which rows each rank sees at each step: a function of (seed, epoch, step) alone.

    epoch ── permutation per set ── one list ── filled to global batches ── batch b of step s is of one rank

Nothing is kept between steps, so a resumed run skips ahead by arithmetic and a changed number of ranks, at
the same global batch, sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from sftdata.batches import Int64

FILLER = -1


class Order(Sampler[list[int]]):
    """Batches of row numbers for one rank; `FILLER` is a fully masked row.

    Args:
        sizes: rows of each set, in the order of the concatenated dataset.
        weights: passes over each set in one epoch; 1 shows every row exactly once, 0.5 another half each
            epoch.
        batch_size: rows per rank and micro-batch.
        accumulation: micro-batches per step.
        rank, ranks: this process, of how many.
        shuffle: False keeps the order at rest.

    >>> list(Order([5], [1.0], seed=0, batch_size=2, accumulation=1, rank=1, ranks=2, shuffle=False))
    [[2, 3], [-1, -1]]
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, batch_size: int,
        accumulation: int = 1, rank: int = 0, ranks: int = 1, shuffle: bool = True,
    ) -> None:  # fmt: skip
        self.sizes, self.weights, self.seed, self.shuffle = list(sizes), list(weights), seed, shuffle
        self.batch_size, self.accumulation, self.rank, self.ranks = batch_size, accumulation, rank, ranks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks through."""
        self.epoch = epoch

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step over all ranks."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch, fillers apart."""
        return sum(_share(size, weight) for size, weight in zip(self.sizes, self.weights, strict=True))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.rows_per_epoch // self.global_batch)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        # Micro-batch m of all ranks is contiguous: ranks x accumulation may change at the same product.
        blocks = self.rows(self.epoch).reshape(-1, self.ranks, self.batch_size)
        return iter(blocks[:, self.rank].tolist())

    def rows(self, epoch: int) -> Int64:
        """int64[steps_per_epoch * global_batch], the rows of one epoch in order, fillers last."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        chosen = [
            start
            + _passes(
                size, weight, epoch, self._generator(epoch, index), self._generator(0, index), self.shuffle
            )
            for index, (start, size, weight) in enumerate(zip(starts, self.sizes, self.weights, strict=True))
        ]
        order = np.concatenate(chosen)
        if self.shuffle and len(self.sizes) > 1:
            self._generator(epoch, len(self.sizes)).shuffle(order)
        missing = self.steps_per_epoch * self.global_batch - len(order)
        return np.concatenate([order, np.full(missing, FILLER, np.int64)])

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, stream])


def _share(size: int, weight: float) -> int:
    return round(size * weight)


def _passes(
    size: int,
    weight: float,
    epoch: int,
    fresh: np.random.Generator,
    fixed: np.random.Generator,
    shuffle: bool,
) -> Int64:
    """Rows of one set in one epoch: whole passes, then a window that moves through a fixed permutation."""
    whole, part = divmod(_share(size, weight), max(size, 1))
    passes = [np.arange(size, dtype=np.int64) for _ in range(whole)]
    if part:
        ring = fixed.permutation(size) if shuffle else np.arange(size)
        passes.append(ring[(epoch * part + np.arange(part)) % size].astype(np.int64))
    rows = np.concatenate(passes) if passes else np.empty(0, np.int64)
    return fresh.permutation(rows) if shuffle else rows
