"""Every row once an epoch, disjoint over ranks, a function of (seed, epoch, step) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sfttrain.order import FILLER, Order

SHAPES = [(1, 8, 1), (8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


def _steps(sizes: list[int], shape: tuple[int, int, int], epoch: int = 0, seed: int = 5) -> list[list[int]]:
    """Rows of every global batch, gathered from all ranks."""
    batch_size, accumulation, ranks = shape
    orders = [
        Order(
            sizes,
            [1.0] * len(sizes),
            seed=seed,
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            ranks=ranks,
        )
        for rank in range(ranks)
    ]
    for order in orders:
        order.set_epoch(epoch)
    batches = [list(order) for order in orders]
    assert len({len(part) for part in batches}) == 1
    assert {len(part) for part in batches} == {len(order) for order in orders}
    firsts = range(0, len(batches[0]), accumulation)
    return [
        [row for micro in range(first, first + accumulation) for part in batches for row in part[micro]]
        for first in firsts
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 29, 64])
def test_every_row_comes_exactly_once_an_epoch(rows: int, shape: tuple[int, int, int]) -> None:
    seen = Counter(row for step in _steps([rows], shape) for row in step)
    fillers = seen.pop(FILLER, 0)
    assert seen == Counter(range(rows))
    assert fillers == -rows % 8


@pytest.mark.parametrize("shape", SHAPES)
def test_global_batches_do_not_depend_on_how_they_are_split(shape: tuple[int, int, int]) -> None:
    assert [sorted(step) for step in _steps([29], shape)] == [
        sorted(step) for step in _steps([29], SHAPES[0])
    ]


def test_fillers_come_in_the_last_global_batch_only() -> None:
    steps = _steps([29], (2, 1, 4))
    assert all(FILLER not in step for step in steps[:-1])
    assert steps[-1].count(FILLER) == 3


def test_epochs_and_seeds_differ_and_repeat() -> None:
    assert _steps([29], (1, 8, 1), epoch=0) != _steps([29], (1, 8, 1), epoch=1)
    assert _steps([29], (1, 8, 1), seed=5) != _steps([29], (1, 8, 1), seed=6)
    assert _steps([29], (1, 8, 1), epoch=3) == _steps([29], (1, 8, 1), epoch=3)


def test_a_weight_counts_passes_over_a_set() -> None:
    order = Order([10, 4], [0.5, 2.0], seed=0, batch_size=1)
    halves = []
    for epoch in (0, 1):
        seen = Counter(order.rows(epoch).tolist())
        assert all(seen[row] == 2 for row in range(10, 14))
        halves.append({row for row in seen if row < 10})
    assert len(halves[0]) == len(halves[1]) == 5
    assert halves[0] | halves[1] == set(range(10))  # the other half comes in the next epoch


def test_sets_are_mixed() -> None:
    rows = Order([50, 50], [1.0, 1.0], seed=0, batch_size=1).rows(0)
    assert 10 < np.count_nonzero(rows[:50] < 50) < 40


def test_sets_of_one_size_are_shuffled_each_in_its_own_way() -> None:
    rows = Order([50, 50], [1.0, 1.0], seed=0, batch_size=1).rows(0)
    assert rows[rows < 50].tolist() != (rows[rows >= 50] - 50).tolist()


def test_without_shuffling_the_order_is_the_one_at_rest() -> None:
    assert Order([3, 2], [1.0, 1.0], seed=9, batch_size=1, shuffle=False).rows(4).tolist() == [0, 1, 2, 3, 4]
