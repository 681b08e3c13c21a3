"""Deal rows to steps so that every rank has the same work in each, and rows stay shuffled as far as can be.

First every step takes rows at random and shares them out. What no sharing makes even, as where one row costs
more than all that the others have, is pooled: shares are made over all rows of the pool, sorted by what they
cost, and neighbours are put into one step.
"""

from __future__ import annotations

import numpy as np

from sftdata.batches import Int64
from sftdata.set.steps import Float64, Steps, last_step
from sftdata.views.choose import draw

EVEN = 1.004  # the busiest rank, as a multiple of the mean, of a step that stays as it was drawn
_EXCHANGES = 4  # tried for each rank of a step, at most
_PARTNERS = 8  # of the busiest rank in an exchange: so many of those with least work


def deal_rows(costs: Float64, steps: Steps, seed: int) -> Int64:
    """Return the order, int64[P], in which rows of these costs, float64[P], make the steps; see `Steps`."""
    drawn = np.argsort(draw(np.arange(len(costs), dtype=np.uint64), seed, "steps"), kind="stable")
    whole = len(costs) // steps.step_rows
    body, left = drawn[: whole * steps.step_rows], drawn[whole * steps.step_rows :]
    dealt = _even_out(_shares(body.reshape(whole, steps.step_rows), costs, steps.ranks), costs)
    uneven = _ratios(dealt, costs) > EVEN
    if uneven.any():
        dealt[uneven] = _pooled(dealt[uneven], costs)
    shuffled = np.argsort(draw(np.arange(whole, dtype=np.uint64), seed, "step"), kind="stable")
    return np.concatenate([dealt[shuffled].reshape(-1), _last(left, costs, steps.ranks)])


def _pooled(dealt: Int64, costs: Float64) -> Int64:
    """Make shares of all these rows together, and steps of shares that cost alike; int64[S, ranks, rows]."""
    steps, ranks, _ = dealt.shape
    shares = _shares(dealt.reshape(1, -1), costs, steps * ranks)[0]
    alike = np.argsort(costs[shares].sum(axis=1), kind="stable")
    return _even_out(shares[alike].reshape(dealt.shape), costs)


def _last(rows: Int64, costs: Float64, ranks: int) -> Int64:
    """Share out the rows that make no whole step: those with a row less get what costs most."""
    if not len(rows):
        return rows
    most = -(-len(rows) // ranks)
    places = np.concatenate([rows, np.full(most * ranks - len(rows), len(costs))])
    shares = _shares(places[None], np.append(costs, 0.0), ranks)[0]
    here = shares < len(costs)
    shares = shares[np.argsort(-here.sum(axis=1), kind="stable")]
    here = shares < len(costs)
    assert np.array_equal(here.sum(axis=1), last_step(len(rows), ranks))
    shared: Int64 = shares[here]
    return shared


def _shares(rows: Int64, costs: Float64, ranks: int) -> Int64:
    """Share out the rows of each step, int64[S, G]; return int64[S, ranks, G / ranks].

    The costliest rows come first, one to each rank, then the next to the ranks with least work, and so on:
    https://en.wikipedia.org/wiki/Longest-processing-time-first_scheduling with as many rows for every rank.
    """
    steps, count = rows.shape
    falling = np.argsort(-costs[rows], axis=1, kind="stable")
    rows = np.take_along_axis(rows, falling, axis=1).reshape(steps, count // ranks, ranks)
    shares = np.empty((steps, ranks, count // ranks), np.int64)
    work = np.zeros((steps, ranks))
    for turn in range(count // ranks):
        least = np.argsort(work, axis=1, kind="stable")
        np.put_along_axis(shares[:, :, turn], least, rows[:, turn], axis=1)
        work += costs[shares[:, :, turn]]
    return shares


def _even_out(dealt: Int64, costs: Float64) -> Int64:
    """Exchange rows of the busiest rank of each step for cheaper ones while that helps."""
    ranks = dealt.shape[1]
    work = costs[dealt].sum(axis=2)
    mean, live = work.mean(axis=1), np.arange(len(dealt))
    for _ in range(_EXCHANGES * ranks):
        live = live[work[live].max(axis=1, initial=0) > mean[live] * EVEN]
        if not len(live):
            break
        live = _exchange(dealt, costs, work, live)
    return dealt


def _exchange(dealt: Int64, costs: Float64, work: Float64, live: Int64) -> Int64:
    """Make the best exchange in each of these steps; return the steps where there was one."""
    ranks, rows = dealt.shape[1:]
    busy = work[live].argmax(axis=1)
    idle = np.argsort(work[live], axis=1, kind="stable")[:, : min(_PARTNERS, max(ranks // 2, 1))]
    theirs = costs[dealt[live[:, None], idle]]
    moved = costs[dealt[live, busy]][:, None, :, None] - theirs[:, :, None, :]
    gap = (work[live, busy][:, None] - work[live[:, None], idle])[:, :, None, None]
    gain = (gap / 2 - np.abs(moved - gap / 2)).reshape(len(live), -1)
    best = gain.argmax(axis=1)
    helps = gain[np.arange(len(live)), best] > 1e-9 * work[live, busy]
    partner, mine, other = np.unravel_index(best[helps], (idle.shape[1], rows, rows))
    live, busy, idle = live[helps], busy[helps], idle[helps]
    to = idle[np.arange(len(live)), partner]
    given, taken = dealt[live, busy, mine], dealt[live, to, other]
    dealt[live, busy, mine], dealt[live, to, other] = taken, given
    moved = costs[given] - costs[taken]
    work[live, busy] -= moved
    work[live, to] += moved
    return live


def _ratios(dealt: Int64, costs: Float64) -> Float64:
    work = costs[dealt].sum(axis=2)
    ratios: Float64 = work.max(axis=1) / work.mean(axis=1)
    return ratios
