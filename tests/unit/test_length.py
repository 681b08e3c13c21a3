from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.batches import TokenBatch
from sftdata.limit import OverlongError
from tests.one_stage import LengthCounts, limit_length

POLICIES = ("truncate", "truncate-left", "drop", "split")


def batch_of(*examples: str) -> TokenBatch:
    """One example per word: capitals are trained; ids are the letters."""
    text = "".join(examples)
    offsets = np.append(0, np.cumsum([len(example) for example in examples])).astype(np.int64)
    ids = np.array([ord(letter) for letter in text], np.int32)
    return TokenBatch(
        ids, np.array([letter.isupper() for letter in text], np.bool_), offsets, np.arange(len(examples)) * 10
    )


def words(batch: TokenBatch) -> list[tuple[int, str]]:
    letters = "".join(map(chr, batch.input_ids))
    assert [letter.isupper() for letter in letters] == batch.trained.tolist()
    bounds = batch.offsets.tolist()
    return [(row, letters[a:b]) for row, a, b in zip(batch.row.tolist(), bounds, bounds[1:], strict=False)]


def limited(policy: str, *examples: str) -> tuple[list[tuple[int, str]], LengthCounts]:
    result, counts = limit_length(batch_of(*examples), 4, policy)  # type: ignore[arg-type]
    return words(result), counts


def test_truncate_keeps_the_start_and_says_which_rows_lost_their_ending() -> None:
    kept, counts = limited("truncate", "abCDEF", "aBcdef", "ab", "aBC")
    assert kept == [(0, "abCD"), (10, "aBcd"), (30, "aBC")]
    assert (counts.tokens_cut, counts.rows_cut, counts.rows_without_ending) == (4, 2, 1)
    assert (counts.rows_dropped, counts.tokens_in_dropped_rows) == (
        {"nothing-trained": 1},
        {"nothing-trained": 2},
    )


def test_truncate_drops_a_row_whose_trained_tokens_all_lie_beyond_the_cut() -> None:
    kept, counts = limited("truncate", "abcdEF")
    assert kept == []
    assert counts == LengthCounts(
        0, {"no-trained-tokens": 6}, {"no-trained-tokens": 1}, 0, 0, [(0, "no-trained-tokens", 6)]
    )


def test_truncate_left_keeps_the_end() -> None:
    kept, counts = limited("truncate-left", "abCDEF", "ABcdef")
    assert kept == [(0, "CDEF")]
    assert (counts.tokens_cut, counts.rows_without_ending) == (2, 0)
    assert counts.tokens_in_dropped_rows == {"no-trained-tokens": 6}


def test_drop_drops_whole_rows() -> None:
    kept, counts = limited("drop", "abCDEF", "aB")
    assert kept == [(10, "aB")]
    assert counts == LengthCounts(0, {"over-long": 6}, {"over-long": 1}, 0, 0, [(0, "over-long", 6)])


def test_split_keeps_every_piece_that_trains_something_under_its_row() -> None:
    kept, counts = limited("split", "abcdefghIJKLm", "aA")
    assert kept == [(0, "IJKL"), (10, "aA")]
    assert (counts.tokens_in_dropped_rows, counts.rows_dropped) == ({"no-trained-tokens": 9}, {})
    assert limited("split", "aBcdEfGhI")[0] == [(0, "aBcd"), (0, "EfGh")]


def test_error_names_the_first_overlong_row() -> None:
    with pytest.raises(
        OverlongError, match=r"row 10 has 6 tokens; max_length is 4\. Fix: overlong"
    ) as caught:
        limited("error", "aB", "abCDEF", "abCDEFG")
    assert caught.value.row == 10
    assert limited("error", "aB", "abCD")[0] == [(0, "aB"), (10, "abCD")]


def test_a_trained_first_token_is_nothing_to_train() -> None:
    assert limited("truncate", "Ab", "AB")[0] == [(10, "AB")]
    assert limited("split", "abcdE")[1].tokens_in_dropped_rows == {"no-trained-tokens": 5}


def test_no_limit_leaves_everything_but_what_trains_nothing() -> None:
    batch = batch_of("abcdefG", "abc")
    result, counts = limit_length(batch, None, "truncate")
    assert words(result) == [(0, "abcdefG")]
    assert counts.rows_dropped == {"nothing-trained": 1}


@settings(max_examples=300)
@given(
    st.lists(st.text("abAB", max_size=13), max_size=6),
    st.integers(1, 6),
    st.sampled_from(POLICIES),
)
def test_every_token_and_every_row_is_accounted_for(examples: list[str], limit: int, policy: str) -> None:
    result, counts = limit_length(batch_of(*examples), limit, policy)  # type: ignore[arg-type]
    kept = words(result)
    assert all(len(word) <= limit and any(letter.isupper() for letter in word[1:]) for _, word in kept)
    assert sum(map(len, examples)) == sum(len(word) for _, word in kept) + counts.tokens_cut + sum(
        counts.tokens_in_dropped_rows.values()
    )
    assert len(examples) == len({row for row, _ in kept}) + sum(counts.rows_dropped.values())
    lost = 0
    for row in {row for row, _ in kept}:
        whole, left = examples[row // 10], "".join(word for at, word in kept if at == row)
        end = whole[max(index for index, letter in enumerate(whole) if letter.isupper()) :]
        lost += policy == "truncate" and not (left == whole or len(left) > len(whole) - len(end))
    if policy == "truncate":
        assert counts.rows_without_ending == lost
