"""The order that a set has of its view, in training: every row once, each rank its share, windows and bands as they lie."""

from __future__ import annotations

from itertools import chain, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sftdata.set.steps import Cost, Steps
from sfttrain.order import Stored, stored_schedule
from sfttrain.schedule import FILLER, Order

COST = Cost(token=1, square=0)
STEPS = Steps(ranks=4, rows=2, cost=COST)
SHAPES = [
    (2, 1, 4),
    (1, 2, 4),
    (4, 2, 2),
    (8, 1, 1),
    (1, 8, 2),
    (2, 3, 4),
    (1, 1, 8),
]  # batch, accumulation, ranks


def _schedule(
    size: int, steps: Steps | None = STEPS, edges: list[int] | None = None, shuffle: bool = True
) -> Stored:
    return Stored(size, np.array(edges or [0, size]), steps, seed=3, shuffle=shuffle)


def _batches(schedule: Stored, shape: tuple[int, int, int], epoch: int = 0) -> list[list[list[int]]]:
    """Return the rows of each rank at each step."""
    batch, accumulation, ranks = shape
    dealt = []
    for rank in range(ranks):
        order = Order(schedule, batch_size=batch, accumulation=accumulation, rank=rank, ranks=ranks)
        order.set_epoch(epoch)
        micro = list(order)
        assert len(micro) == len(order)
        assert {len(rows) for rows in micro} == {batch}
        dealt.append(
            [list(chain(*micro[at : at + accumulation])) for at in range(0, len(micro), accumulation)]
        )
    return [list(step) for step in zip(*dealt, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [8, 29, 64, 67])
def test_every_row_comes_once_an_epoch_and_fillers_in_the_last_step(
    size: int, shape: tuple[int, int, int]
) -> None:
    for epoch in (0, 1):
        steps = _batches(_schedule(size), shape, epoch)
        rows = [row for step in steps for rank in step for row in rank]
        assert sorted(row for row in rows if row != FILLER) == list(range(size))
        assert not any(row == FILLER for step in steps[:-1] for rank in step for row in rank)
        assert len(steps) == -(-size // np.prod(shape))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] <= 4])
def test_each_rank_takes_whole_shares_of_steps_that_are_together(shape: tuple[int, int, int]) -> None:
    for step in _batches(_schedule(8 * 24), shape):
        assert len({row // 8 for rank in step for row in rank}) == np.prod(shape) // 8  # whole stored steps
        for number, rank in enumerate(step):
            shares = {row // 2 for row in rank}
            assert len(shares) == len(rank) // 2
            assert {share % 4 // (4 // shape[2]) for share in shares} == {number}


@pytest.mark.parametrize("shape", SHAPES)
def test_global_batches_do_not_depend_on_how_they_are_split(shape: tuple[int, int, int]) -> None:
    size = np.prod(shape)
    one = _batches(_schedule(67), (int(size), 1, 1))
    split = _batches(_schedule(67), shape)
    assert [sorted(chain(*step)) for step in split] == [sorted(chain(*step)) for step in one]


def test_steps_come_in_another_order_each_epoch_and_as_they_lie_where_asked() -> None:
    shape = (2, 1, 4)
    first, second = (_batches(_schedule(80), shape, epoch) for epoch in (0, 1))
    assert first != second
    assert sorted(map(str, first)) == sorted(map(str, second))
    assert _batches(_schedule(80, shuffle=False), shape)[1][2] == [12, 13]


def test_a_run_sees_what_its_epochs_show() -> None:
    schedule = _schedule(29)
    for steps in range(9):
        seen = np.bincount([row for row in schedule.rows(0, steps, 8) if row != FILLER], minlength=29)
        assert schedule.seen(steps, 8)[0].tolist() == seen.tolist()


@pytest.mark.parametrize("steps", [None, STEPS])
def test_windows_come_one_after_the_other_and_are_shuffled_inside(steps: Steps | None) -> None:
    edges = [0, 24, 56, 60]
    rows = [row for row in _schedule(60, steps, edges).epoch(0).tolist() if row != FILLER]
    assert sorted(rows) == list(range(60))
    windows = [int(np.searchsorted(edges, row, side="right")) for row in rows]
    assert windows == sorted(windows)
    assert rows != list(range(60))
    other = [row for row in _schedule(60, steps, edges).epoch(1).tolist() if row != FILLER]
    assert other != rows


# ------------------------------------------------------------------------------------- what a run does


def _chosen(
    view: dict[str, Any],
    *,
    sets: int = 1,
    strategy: str | None = None,
    shape: tuple[int, int, int] = (2, 1, 4),
    **config: Any,
) -> tuple[Stored | None, str]:
    shards = [SimpleNamespace(rows=10)] * 4
    manifest: Any = SimpleNamespace(
        settings={"view": view}, shards=shards, ledger=SimpleNamespace(rows_packed=40)
    )
    args: Any = SimpleNamespace(
        train_batch_size=shape[0], gradient_accumulation_steps=shape[1], world_size=shape[2], process_index=0,
        seed=1, data_seed=None,
        train_sampling_strategy=strategy or "random",
    )  # fmt: skip
    size = config.pop("size", 40)
    settings: Any = SimpleNamespace(
        **(
            {
                "set_weights": (1.0,) * sets,
                "mix": {},
                "window": None,
                "training": {"train_sampling_strategy": strategy} if strategy else {},
            }
            | config
        )
    )
    found = stored_schedule(settings, [manifest] * sets, [size] * sets, args)
    assert found[0] is None or isinstance(found[0], Stored)
    return found  # type: ignore[return-value]


STORED = {"steps": {"ranks": 4, "rows": 2, "cost": {"token": 1, "square": 0}}}


@pytest.mark.parametrize("view", [{}, {"order": "shuffled"}, {"pad_to_multiple_of": 8}, {"bases": ["x"]}])
def test_a_set_without_an_order_is_shuffled_and_nothing_said(view: dict[str, Any]) -> None:
    assert _chosen(view) == (None, "")


@pytest.mark.parametrize(
    ("view", "settings", "said"),
    [
        (STORED, {"shape": (3, 1, 4)}, "steps for 4 ranks x 2 rows (a step here takes 4 x 3 x 1 = 12 rows, no multiple of 8)"),
        (STORED, {"sets": 2}, "steps for 4 ranks x 2 rows (it is trained with other sets)"),
        (STORED, {"set_weights": (0.5,)}, "steps for 4 ranks x 2 rows (an epoch is 0.5 passes over it)"),
        (STORED, {"size": 90}, "steps for 4 ranks x 2 rows (its documents are trained alone)"),
        (STORED, {"mix": {"a": 1}}, "steps for 4 ranks x 2 rows (it is trained by shares)"),
        ({"order": "length"}, {"window": 3}, "bands by length (window=3)"),
        ({"order": "length"}, {"strategy": "random"}, "bands by length (train_sampling_strategy=random)"),
        (STORED | {"order": "windows"}, {"sets": 3},
         "steps for 4 ranks x 2 rows in windows of shards (it is trained with other sets)"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_said_in_one_line(
    view: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    assert _chosen(view, **settings) == (None, f"order: not the set's own, {said}")


def test_an_order_that_can_be_kept_is() -> None:
    schedule, said = _chosen(STORED, shape=(2, 2, 4))
    assert said == "order: the set's own, steps for 4 ranks x 2 rows"
    assert schedule is not None
    assert schedule.by_rank
    assert _chosen(STORED, shape=(4, 1, 2))[1] == said  # a rank takes the rows of two
    assert (
        "work is not balanced over 8 ranks, of which 4 is no multiple" in _chosen(STORED, shape=(1, 1, 8))[1]
    )

    schedule, said = _chosen({"order": "length"})
    assert said == "order: the set's own, bands by length"
    assert schedule is not None
    assert schedule.epoch(3).tolist() == list(range(40))

    schedule, said = _chosen({"order": "windows", "window": 2})
    assert said == "order: the set's own, windows of shards"
    assert schedule is not None
    assert sorted(schedule.epoch(0)[:20].tolist()) == list(range(20)) != schedule.epoch(0)[:20].tolist()
    assert _chosen({"order": "windows", "window": 2}, strategy="sequential")[0].epoch(0).tolist() == list(
        range(40)
    )  # type: ignore[union-attr]

    schedule, said = _chosen(STORED | {"order": "sources"}, shape=(3, 1, 1))
    assert said == (
        "order: the set's own, one source after the other, but for its steps"
        " (a step here takes 1 x 3 x 1 = 3 rows, no multiple of 8)"
    )
    assert schedule is not None
    assert not schedule.by_rank


def test_steps_in_bands_stay_in_their_order() -> None:
    schedule, _ = _chosen(STORED | {"order": "length"})
    assert schedule is not None
    rows = schedule.epoch(2)
    assert all(one < other for one, other in pairwise(rows.tolist()))
