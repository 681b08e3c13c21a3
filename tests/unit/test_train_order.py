"""Every row once an epoch, or shares kept at every step; disjoint over ranks, a function of (seed, step) alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sfttrain.order import FetchAhead
from sfttrain.schedule import FILLER, Mixture, Order, Passes, Schedule, Window

SHAPES = [(1, 8, 1), (8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


def _steps(sizes: list[int], shape: tuple[int, int, int], epoch: int = 0, seed: int = 5) -> list[list[int]]:
    """Rows of every global batch, gathered from all ranks."""
    batch_size, accumulation, ranks = shape
    orders = [
        Order(
            Passes(sizes, [1.0] * len(sizes), seed=seed),
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
    passes = Passes([10, 4], [0.5, 2.0], seed=0)
    halves = []
    for epoch in (0, 1):
        seen = Counter(passes.epoch(epoch).tolist())
        assert all(seen[row] == 2 for row in range(10, 14))
        halves.append({row for row in seen if row < 10})
    assert len(halves[0]) == len(halves[1]) == 5
    assert halves[0] | halves[1] == set(range(10))  # the other half comes in the next epoch


def test_sets_are_mixed() -> None:
    rows = Passes([50, 50], [1.0, 1.0], seed=0).epoch(0)
    assert 10 < np.count_nonzero(rows[:50] < 50) < 40


def test_sets_of_one_size_are_shuffled_each_in_its_own_way() -> None:
    rows = Passes([50, 50], [1.0, 1.0], seed=0).epoch(0)
    assert rows[rows < 50].tolist() != (rows[rows >= 50] - 50).tolist()


def test_without_shuffling_the_order_is_the_one_at_rest() -> None:
    assert Passes([3, 2], [1.0, 1.0], seed=9, shuffle=False).epoch(4).tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------- shares

SIZES, SHARES = (170, 40, 333), (50, 30, 20)


def _mixture(seed: int = 1, shuffle: bool = True, lengths: str = "many") -> tuple[Mixture, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    amounts = [rng.integers(0, 2000, size) if lengths == "many" else np.full(size, 512) for size in SIZES]
    return Mixture(amounts, SHARES, seed=seed, shuffle=shuffle), amounts


@pytest.mark.parametrize("lengths", ["many", "one"])
@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_keeps_its_shares_after_every_row(seed: int, lengths: str) -> None:
    mixture, amounts = _mixture(seed, lengths=lengths)
    rows = mixture.rows(0, 2000, 1)
    which, amount = np.repeat(np.arange(3), SIZES)[rows], np.concatenate(amounts)[rows]
    given = np.cumsum(np.where(which == np.arange(3)[:, None], amount, 0), axis=1)
    asked = np.outer(np.array(SHARES) / 100, given.sum(axis=0))
    assert np.abs(given - asked).max() <= 1.5 * max(part.max() for part in amounts)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mixture_goes_through_a_set_before_it_goes_through_it_again(shuffle: bool) -> None:
    mixture, _ = _mixture(shuffle=shuffle)
    rows = mixture.rows(0, 3000, 1)
    starts = np.cumsum([0, *SIZES])
    orders = set()
    for first, stop in pairwise(starts):
        own = rows[(rows >= first) & (rows < stop)]
        passes = [own[begin : begin + stop - first] for begin in range(0, len(own), stop - first)]
        assert all(sorted(part) == list(range(first, stop)) for part in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        orders.add(tuple(passes[0] - first))
        orders.add(tuple(passes[1] - first))
    assert (len(orders) == 6) == shuffle


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixture_is_the_same_however_it_is_dealt_out(shape: tuple[int, int, int]) -> None:
    batch_size, accumulation, ranks = shape
    whole = _mixture()[0]
    epoch = whole.steps_per_epoch(8)
    dealt = []
    for number in (0, 3, 1):
        orders = [
            Order(_mixture()[0], batch_size=batch_size, accumulation=accumulation, rank=rank, ranks=ranks)
            for rank in range(ranks)
        ]
        for order in orders:
            order.set_epoch(number)
        micro = [row for parts in zip(*orders, strict=True) for part in parts for row in part]
        dealt.append(micro)
        assert micro == whole.rows(number * epoch, (number + 1) * epoch, 8).tolist()
    assert len({tuple(part) for part in dealt}) == 3


def test_an_epoch_of_a_mixture_goes_once_through_the_set_that_is_short() -> None:
    mixture, amounts = _mixture()
    wanted = min(part.sum() / share for part, share in zip(amounts, SHARES, strict=True))
    rows = mixture.rows(0, mixture.steps_per_epoch(1), 1)
    assert np.concatenate(amounts)[rows].sum() == pytest.approx(wanted * 100, rel=0.02)
    counts = np.bincount(np.repeat(np.arange(3), SIZES)[rows])
    assert 0.98 < (counts / SIZES).max() < 1.02
    assert mixture.steps_per_epoch(10_000) == 1


# --------------------------------------------------------------------------- what came, and legs


def _schedules() -> list[Schedule]:
    return [
        Passes([29], [1.0], seed=5),
        Passes([10, 4, 7], [0.5, 2.0, 1.3], seed=5),
        Passes([10, 4], [0.5, 1.0], seed=5, shuffle=False),
        _mixture()[0],
        Mixture([np.arange(5), np.ones(3)], [1, 9], seed=2, shuffle=False),
    ]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_what_came_before_a_step_is_counted_without_walking_there(number: int, batch: int) -> None:
    schedule, walked = _schedules()[number], _schedules()[number]
    rows = np.concatenate([walked.rows(step, step + 1, batch) for step in range(90)]).reshape(90, batch)
    for steps in (0, 1, 2, 13, 14, 57, 90):
        seen = np.concatenate(schedule.seen(steps, batch))
        taken = rows[:steps].ravel()
        assert Counter(taken[taken != FILLER].tolist()) == Counter(
            {row: count for row, count in enumerate(seen.tolist()) if count}
        )
        assert schedule.rows(steps, 90, batch).tolist() == rows[steps:].ravel().tolist()


@pytest.mark.parametrize("number", range(5))
def test_a_leg_begins_its_schedule_where_the_one_before_ends(number: int) -> None:
    order = Order(_schedules()[number], batch_size=2)
    order.begin_at(5)
    alone = _schedules()[number]
    alone.leg = 5
    epoch = order.steps_per_epoch
    taken: list[int] = []
    for start in range(-(-40 // epoch)):
        order.set_epoch(start)
        taken += [row for batch in order for row in batch]
    assert taken[:10] == [FILLER] * 10
    assert taken[10:80] == alone.rows(0, 35, 2).tolist()
    assert [part.tolist() for part in order.seen(25)] == [part.tolist() for part in alone.seen(20, 2)]


def test_a_leg_draws_its_own_order() -> None:
    for schedule in (Passes([40], [1.0], seed=5), _mixture()[0]):
        before = schedule.rows(0, 20, 2).tolist()
        schedule.leg = 20
        assert schedule.rows(0, 20, 2).tolist() != before


# --------------------------------------------------------------------------------------------------- windows


def shards_of(rows: np.ndarray, window: Window) -> np.ndarray:
    return np.searchsorted(window.edges, rows, side="right") - 1


@pytest.mark.parametrize("width", [1, 2, 5, 64])
@pytest.mark.parametrize("each", [1, 7, 100])
def test_a_window_moves_through_all_shards_and_is_never_wider_than_it_may_be(width: int, each: int) -> None:
    window, shards = Window(np.arange(0, 40 * each + 1, each), width), 40
    rows = window.order(np.arange(shards * each), np.random.default_rng(3))
    assert sorted(rows.tolist()) == [*range(shards * each)]
    shard = shards_of(rows, window)
    first = {one: int(np.flatnonzero(shard == one)[0]) for one in range(shards)}
    last = {one: int(np.flatnonzero(shard == one)[-1]) for one in range(shards)}
    for place in range(len(rows)):
        assert sum(first[one] <= place <= last[one] for one in range(shards)) <= width + 1
    assert len(set(shard[:each].tolist())) == 1, "the first rows wait for one shard"
    assert width == 1 or each == 1 or len(set(shard[-3 * each :].tolist())) > 3, "nothing is shuffled"


def test_the_first_batch_of_a_thousand_shards_takes_one_of_them() -> None:
    window = Window(np.arange(0, 1001 * 64, 64), 64)
    order = Order(Passes([64_000], [1.0], seed=1, windows=[window]), batch_size=8)
    assert len({*shards_of(np.array(next(iter(order))), window).tolist()}) == 1


def test_windows_change_with_the_epoch_and_the_seed_alone() -> None:
    window = Window(np.array([0, 3, 10, 11, 20]), 2)
    draws = [
        Passes([20], [1.0], seed=seed, windows=[window]).epoch(epoch).tolist()
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert draws[0] == draws[1]
    assert len({*map(tuple, draws)}) == 3
    assert {*map(tuple, map(sorted, draws))} == {tuple(range(20))}


@pytest.mark.parametrize("shares", [False, True])
def test_sets_in_windows_are_mixed_and_each_keeps_its_own_order(shares: bool) -> None:
    windows, sizes = [Window(np.arange(0, 101, 10), 2), None], [100, 100]
    schedule: Schedule
    if shares:
        schedule = Mixture([np.ones(100, np.int64)] * 2, [1, 1], seed=4, windows=windows)
    else:
        schedule = Passes(sizes, [1.0, 1.0], seed=4, windows=windows)
    rows = schedule.rows(0, 25, 8)
    assert sorted(rows.tolist()) == [*range(200)]
    shard = shards_of(rows[rows < 100], windows[0])
    edges = [np.flatnonzero(shard == one)[[0, -1]] for one in range(10)]
    open_at_once = [sum(first <= place <= last for first, last in edges) for place in range(100)]
    assert max(open_at_once) <= 3
    assert 20 <= int((rows[:100] < 100).sum()) <= 80, "one set comes after the other"


def test_an_order_tells_in_which_window_each_set_is_shuffled() -> None:
    """A run may not go on where one of its sets has another: its rows would come in another order."""
    window = Window(np.arange(0, 101, 10), 2)
    told = [
        Order(
            Passes([100] * len(windows), [1.0] * len(windows), seed=4, windows=windows), batch_size=2
        ).window
        for windows in ([window, None], [None, window], [window, window], [None, None], [window], [None])
    ]
    assert told == [[2, None], [None, 2], [2, 2], None, 2, None]


def test_a_set_without_windows_is_drawn_as_ever() -> None:
    """The orders of earlier versions, by which runs resume."""
    assert Passes([6, 3], [1.0, 1.0], seed=9).epoch(1).tolist() == [3, 2, 5, 4, 7, 1, 8, 0, 6]
    assert Mixture([np.ones(6), np.ones(3)], [2, 1], seed=9).rows(0, 3, 3).tolist() == [
        3,
        8,
        5,
        2,
        7,
        4,
        0,
        6,
        1,
    ]


class _Shards:
    """A set of shards with two rows each, which hears in what order they come."""

    def __init__(self, shards: int) -> None:
        self.manifest = SimpleNamespace(shards=[SimpleNamespace(rows=2)] * shards)
        self.heard: list[int] | None = None

    def __len__(self) -> int:
        return 2 * len(self.manifest.shards)

    def expect(self, shards: list[int], ahead: int) -> None:
        self.heard = shards


def test_shards_are_fetched_in_the_order_of_their_rows_behind_a_set_that_is_trained_by_documents() -> None:
    """Eleven documents in six rows: the rows of the second set begin behind the documents."""
    first, second = _Shards(3), _Shards(4)
    order = Order(Passes([11, 8], [1.0, 1.0], seed=3), batch_size=4)
    ahead: Any = FetchAhead
    ahead([first, second], order).on_epoch_begin(None, SimpleNamespace(global_step=0), None)
    assert first.heard is None
    assert second.heard == list(dict.fromkeys((row - 11) // 2 for row in order.rows(0).tolist() if row >= 11))
    assert sorted(second.heard) == [0, 1, 2, 3]
