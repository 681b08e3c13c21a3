"""Choose documents: pure functions on arrays, one value a document.

Whatever is drawn is drawn by hash and seed, never by place: more data changes no choice that was made before,
but for documents that a full cap or share pushes out.
"""

from __future__ import annotations

import numpy as np

from sftdata.batches import Bool, Int64, offsets_of
from sftdata.set.hashes import UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the step of splitmix64
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_CLOSING_STEPS = 64  # documents tried, at most, to close the gap that a share leaves


def draw(hashes: UInt64, seed: int, purpose: str = "") -> UInt64:
    """Return a number for each hash, uint64[N], evenly spread and the same for equal hashes: splitmix64.

    Args:
        purpose: draws for different purposes are independent of each other.

    Source: https://doi.org/10.1145/2660193.2660195.

    >>> drawn = draw(np.array([1, 2, 1], np.uint64), seed=0)
    >>> bool(drawn[0] == drawn[2]), bool(drawn[0] == drawn[1])
    (True, False)
    """
    salt = int.from_bytes(purpose.encode().ljust(8, b"\0")[:8], "little")
    with np.errstate(over="ignore"):
        return _mixed(hashes ^ _mixed(np.uint64(salt) + np.uint64(seed % 2**64) * _GOLDEN))


def _mixed(numbers: UInt64 | np.uint64) -> UInt64:
    state: UInt64 = np.asarray(numbers + _GOLDEN, np.uint64)
    state = (state ^ (state >> np.uint64(30))) * _MIX[0]
    state = (state ^ (state >> np.uint64(27))) * _MIX[1]
    return np.asarray(state ^ (state >> np.uint64(31)), np.uint64)


def first_of_each(hashes: UInt64) -> Bool:
    """bool[N]: documents before which none has their hash, uint64[N] or uint64[N, 2].

    >>> first_of_each(np.array([7, 8, 7, 7], np.uint64)).tolist()
    [True, True, False, False]
    """
    order = _order(hashes)
    ordered = hashes[order]
    new = np.ones(len(hashes), np.bool_)
    same = ordered[1:] == ordered[:-1]
    new[1:] = ~(same if hashes.ndim == 1 else same.all(axis=1))
    first = np.zeros(len(hashes), np.bool_)
    first[order[new]] = True
    return first


def found_in(hashes: UInt64, others: UInt64) -> Bool:
    """bool[N]: hashes, uint64[N] or uint64[N, 2], that are among the others."""
    both = np.concatenate([others, hashes])
    order = _order(both)
    ordered = both[order]
    same = ordered[1:] == ordered[:-1]
    group = offsets_of(~(same if both.ndim == 1 else same.all(axis=1)))[: len(both)]
    known = np.zeros(len(both) + 1, np.bool_)
    known[group[order < len(others)]] = True
    found = np.empty(len(both), np.bool_)
    found[order] = known[group]
    return found[len(others) :]


def _order(hashes: UInt64) -> Int64:
    """Sort by hash; equal ones stay in order."""
    if hashes.ndim == 1:
        return np.argsort(hashes, kind="stable")
    return np.lexsort((hashes[:, 1], hashes[:, 0]))


def drawn_share(hashes: UInt64, share: float, seed: int, purpose: str) -> Bool:
    """bool[N]: documents that a draw by hash puts into a share (0 to 1) of all; equal hashes go together."""
    limit = min(round(share * 2.0**64), 2**64 - 1)
    return draw(hashes, seed, purpose) < np.uint64(limit)


def within_cap(amounts: Int64, keys: UInt64, cap: int) -> Bool:
    """bool[N]: documents, lowest keys first, whose amounts fit into the cap together.

    >>> within_cap(np.array([4, 4, 4]), np.array([3, 1, 2], np.uint64), cap=9).tolist()
    [False, True, True]
    """
    order = np.argsort(keys, kind="stable")
    kept = np.zeros(len(amounts), np.bool_)
    kept[order[np.cumsum(amounts[order]) <= cap]] = True
    return kept


def closest_to(amounts: Int64, keys: UInt64, target: int) -> Bool:
    """bool[N]: documents, lowest keys first, whose amounts come as near to the target as can be, from below.

    What the first one that does not fit leaves open is closed with the largest that fit.

    >>> closest_to(np.array([5, 9, 4, 1]), np.array([0, 1, 2, 3], np.uint64), target=10).tolist()
    [True, False, True, True]
    """
    kept = within_cap(amounts, keys, target)
    room = target - int(amounts[kept].sum())
    order = np.argsort(amounts, kind="stable")
    order = order[~kept[order] & (amounts[order] > 0)]
    for _ in range(_CLOSING_STEPS):
        fits = int(np.searchsorted(amounts[order], room, side="right"))
        if not fits:
            break
        kept[order[fits - 1]] = True
        room -= int(amounts[order[fits - 1]])
        order = order[: fits - 1]  # those above are larger than what was open before
    return kept


def plan_shares(available: list[int], shares: list[float], passes: float, total: int | None) -> list[int]:
    """Return how much to take of each source so that what is taken has the given shares.

    Args:
        available: rows, tokens or trained tokens of each source, one pass over it.
        shares: of the result, in any unit.
        passes: how often a source may be gone through, at most.
        total: how much to take together; None for as much as the passes allow.

    Raises:
        ValueError: a share cannot be met: (index of the source, how many passes it would take).

    >>> plan_shares([100, 1000], [1, 3], passes=2, total=None)
    [200, 600]
    """
    whole = sum(shares)
    most = min(
        passes * amount * whole / share for amount, share in zip(available, shares, strict=True) if share
    )
    if total is None:
        total = int(most)
    elif total > most:
        needed = [
            total * share / whole / amount if amount else float("inf") if share else 0.0
            for amount, share in zip(available, shares, strict=True)
        ]
        raise ValueError(int(np.argmax(needed)), max(needed))
    return [round(total * share / whole) for share in shares]


def take_passes(amounts: Int64, keys: UInt64, target: int) -> Int64:
    """Return how often to take each document, int64[N], so that the amounts come to the target.

    Whole passes take every document; the rest of the target is drawn by key.

    >>> take_passes(np.array([5, 9, 4]), np.array([0, 1, 2], np.uint64), target=24).tolist()
    [2, 1, 1]
    """
    whole = int(amounts.sum())
    times, rest = divmod(target, whole) if whole else (0, 0)
    return times + closest_to(amounts, keys, rest).astype(np.int64)
