"""Choosing documents, on arrays: against sets of tuples, greedy loops and other slow and obvious ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftdata.views.choose import (
    closest_to,
    draw,
    drawn_share,
    first_of_each,
    found_in,
    plan_shares,
    take_passes,
    within_cap,
)

few = st.lists(st.integers(0, 6), max_size=40)
pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40)
amounts_and_keys = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=60)


def hashes(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


def rows(values: list[tuple[int, int]]) -> np.ndarray:
    return np.array(values, np.uint64).reshape(-1, 2)


def firsts(values: list[object]) -> list[bool]:
    seen: set[object] = set()
    return [value not in seen and not seen.add(value) for value in values]  # type: ignore[func-returns-value]


@given(few, pairs)
def test_the_first_of_equal_documents_is_kept(one: list[int], two: list[tuple[int, int]]) -> None:
    assert first_of_each(hashes(one)).tolist() == firsts(list(one))
    assert first_of_each(rows(two)).tolist() == firsts(list(two))


@given(few, few, pairs, pairs)
def test_what_another_set_holds_is_found(
    one: list[int], others: list[int], two: list[tuple[int, int]], pairs_of_others: list[tuple[int, int]]
) -> None:
    assert found_in(hashes(one), hashes(others)).tolist() == [value in set(others) for value in one]
    found = found_in(rows(two), rows(pairs_of_others)).tolist()
    assert found == [value in set(pairs_of_others) for value in two]


@given(amounts_and_keys, st.integers(0, 400))
def test_a_cap_takes_the_lowest_keys_that_fit(drawn: list[tuple[int, int]], cap: int) -> None:
    amounts, keys = np.array([a for a, _ in drawn], np.int64), hashes([k for _, k in drawn])
    expected, used = set(), 0
    for index in sorted(range(len(drawn)), key=lambda index: drawn[index][1]):
        used += drawn[index][0]
        if used > cap:
            break
        expected.add(index)
    assert set(np.flatnonzero(within_cap(amounts, keys, cap)).tolist()) == expected


@given(amounts_and_keys, amounts_and_keys, st.integers(0, 400))
def test_more_data_pushes_out_but_never_reshuffles(
    old: list[tuple[int, int]], new: list[tuple[int, int]], cap: int
) -> None:
    """Of the old documents those stay whose keys were lowest: what stays now was there before."""
    both = [*old, *new]
    arrays = [
        (np.array([a for a, _ in part], np.int64), hashes([k for _, k in part])) for part in (old, both)
    ]
    before, after = (within_cap(amounts, keys, cap) for amounts, keys in arrays)
    assert (after[: len(old)] <= before).all()


@given(amounts_and_keys, st.integers(0, 400))
def test_a_target_is_met_as_nearly_as_what_is_left_allows(drawn: list[tuple[int, int]], target: int) -> None:
    amounts, keys = np.array([a for a, _ in drawn], np.int64), hashes([k for _, k in drawn])
    kept = closest_to(amounts, keys, target)
    room = target - int(amounts[kept].sum())
    assert room >= 0
    assert not ((amounts[~kept] > 0) & (amounts[~kept] <= room)).any()
    assert (within_cap(amounts, keys, target) <= kept).all()


@given(amounts_and_keys, st.integers(0, 2000))
def test_passes_are_even(drawn: list[tuple[int, int]], target: int) -> None:
    amounts, keys = np.array([a for a, _ in drawn], np.int64), hashes([k for _, k in drawn])
    times = take_passes(amounts, keys, target)
    total = int((times * amounts).sum())
    assert total <= target
    if amounts.sum():
        assert set(times.tolist()) <= {target // int(amounts.sum()), target // int(amounts.sum()) + 1}


@pytest.mark.parametrize("seed", range(5))
def test_a_share_of_a_million_tokens_is_met_within_a_thousandth(seed: int) -> None:
    """Documents as long as 32,768 tokens, of which the last to be taken could miss the share by far more."""
    rng = np.random.default_rng(seed)
    sources = [np.minimum(rng.lognormal(mean, 1.2, count), 32_768).astype(np.int64) + 1
               for mean, count in ((5, 40_000), (7, 4_000), (9, 900))]  # fmt: skip
    shares = rng.random(3) + 0.2
    targets = plan_shares([int(source.sum()) for source in sources], shares.tolist(), 2.5, None)
    got = [
        int(
            (
                take_passes(source, draw(rng.integers(0, 2**62, len(source)).astype(np.uint64), seed), target)
                * source
            ).sum()
        )
        for source, target in zip(sources, targets, strict=True)
    ]
    assert min(targets) > 1_000_000
    assert np.abs(np.array(got) / sum(got) - shares / shares.sum()).max() < 0.001


def test_a_draw_is_even_independent_of_other_draws_and_the_same_everywhere() -> None:
    numbers = np.arange(200_000, dtype=np.uint64)
    share = drawn_share(numbers, 0.05, 7, "eval")
    assert abs(share.mean() - 0.05) < 0.002
    other = drawn_share(numbers, 0.05, 7, "cap")
    assert abs((share & other).mean() - 0.0025) < 0.001
    assert (share <= drawn_share(numbers, 0.1, 7, "eval")).all()  # a larger share holds the smaller one
    assert not drawn_share(numbers, 0, 7, "eval").any()
    assert drawn_share(numbers, 1, 7, "eval").all()
    assert draw(hashes([1, 2, 3]), 0, "eval").tolist() == [
        slow_draw(number, 0, "eval") for number in (1, 2, 3)
    ]


def slow_draw(number: int, seed: int, purpose: str) -> int:
    """splitmix64 in Python's own numbers."""

    def mixed(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    salt = int.from_bytes(purpose.encode().ljust(8, b"\0"), "little")
    return mixed(number ^ mixed((salt + seed * 0x9E3779B97F4A7C15) % 2**64))


def test_shares_take_the_most_that_the_passes_allow() -> None:
    assert plan_shares([100, 1000], [50, 50], 1, None) == [100, 100]
    assert plan_shares([100, 1000], [50, 50], 3.5, None) == [350, 350]
    assert plan_shares([100, 1000], [1, 9], 1, 500) == [50, 450]
    with pytest.raises(ValueError) as caught:
        plan_shares([100, 1000], [50, 50], 1, 400)
    assert caught.value.args == (0, 2.0)
