"""Packing: what lands where, how full rows are, and what it costs."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from sftdata.batches import PackedRows, TokenBatch
from sftdata.pack import gather, plan_packs
from tests.waiting import steps


def tokens_of(examples: list[list[int]], trained: list[list[bool]] | None = None) -> TokenBatch:
    offsets = np.append(0, np.cumsum([len(example) for example in examples])).astype(np.int64)
    ids = np.array([token for example in examples for token in example], np.int32)
    mask = (
        np.array([flag for flags in trained for flag in flags], bool) if trained else np.ones(len(ids), bool)
    )
    return TokenBatch(ids, mask, offsets, np.arange(len(examples)))


def as_lists(rows: PackedRows) -> list[dict[str, list[int]]]:
    found = []
    for row in range(len(rows)):
        tokens = slice(rows.row_offsets[row], rows.row_offsets[row + 1])
        segments = slice(rows.segment_offsets[row], rows.segment_offsets[row + 1])
        found.append(
            {
                "input_ids": rows.input_ids[tokens].tolist(),
                "labels": rows.labels[tokens].tolist(),
                "seq_lengths": rows.seq_lengths[segments].tolist(),
                "example_ids": rows.example_ids[segments].tolist(),
            }
        )
    return found


LENGTH_MIXES = {
    "short chats": lambda rng: rng.lognormal(5, 1, 20_000),
    "uniform": lambda rng: rng.integers(1, 2049, 20_000),
    "long documents": lambda rng: rng.lognormal(7.2, 0.8, 20_000),
    "two humps": lambda rng: np.where(
        rng.random(20_000) < 0.95, rng.normal(60, 15, 20_000), rng.normal(1500, 200, 20_000)
    ),
}


def mix(name: str, max_length: int = 2048) -> np.ndarray:
    return np.clip(LENGTH_MIXES[name](np.random.default_rng(7)).astype(np.int64), 1, max_length)


# ----------------------------------------------------------------------------------------------------- layout


def test_a_packed_row_holds_documents_in_input_order_then_padding() -> None:
    tokens = tokens_of([[11, 12, 13], [21, 22, 23, 24]])
    rows = gather(tokens, np.array([70, 80]), plan_packs(tokens.lengths, 9), row_length=9, pad_id=5)
    assert as_lists(rows) == [
        {
            "input_ids": [11, 12, 13, 21, 22, 23, 24, 5, 5],
            "labels": [-100, 12, 13, -100, 22, 23, 24, -100, -100],
            "seq_lengths": [3, 4, 2],
            "example_ids": [70, 80, -1],
        }
    ]


def test_context_is_not_trained_and_the_pad_id_inside_an_example_may_be() -> None:
    tokens = tokens_of([[7, 8, 5, 5]], [[False, False, True, True]])
    rows = gather(tokens, np.array([0]), plan_packs(tokens.lengths, 6), row_length=6, pad_id=5)
    assert as_lists(rows)[0]["labels"] == [-100, -100, 5, 5, -100, -100]


def test_a_full_row_has_no_padding_segment() -> None:
    tokens = tokens_of([[1, 2], [3, 4]])
    rows = gather(tokens, np.arange(2), plan_packs(tokens.lengths, 4), row_length=4, pad_id=0)
    assert as_lists(rows)[0]["seq_lengths"] == [2, 2]


def test_wrapped_cuts_the_stream_and_keeps_the_tail() -> None:
    tokens = tokens_of([[11, 12, 13], [21, 22, 23, 24], [31]])
    rows = gather(tokens, np.arange(3), plan_packs(tokens.lengths, 5, "wrapped"), row_length=5, pad_id=0)
    assert as_lists(rows) == [
        {
            "input_ids": [11, 12, 13, 21, 22],
            "labels": [-100, 12, 13, -100, 22],
            "seq_lengths": [3, 2],
            "example_ids": [0, 1],
        },
        {
            "input_ids": [23, 24, 31, 0, 0],
            "labels": [-100, 24, -100, -100, -100],
            "seq_lengths": [2, 1, 2],
            "example_ids": [1, 2, -1],
        },
    ]


def test_wrapped_spreads_one_long_example_over_rows() -> None:
    tokens = tokens_of([list(range(1, 12))])
    rows = gather(tokens, np.array([4]), plan_packs(tokens.lengths, 4, "wrapped"), row_length=4, pad_id=0)
    assert [row["input_ids"] for row in as_lists(rows)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
    assert [row["example_ids"] for row in as_lists(rows)] == [[4], [4], [4, -1]]


def test_without_packing_rows_keep_their_length() -> None:
    tokens = tokens_of([[11, 12, 13], [21]])
    rows = gather(
        tokens,
        np.array([3, 9]),
        plan_packs(tokens.lengths, 4, "none"),
        row_length=None,
        pad_id=0,
    )
    assert as_lists(rows) == [
        {"input_ids": [11, 12, 13], "labels": [-100, 12, 13], "seq_lengths": [3], "example_ids": [3]},
        {"input_ids": [21], "labels": [-100], "seq_lengths": [1], "example_ids": [9]},
    ]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", "none"])
def test_nothing_in_gives_nothing_out(strategy: str) -> None:
    tokens = tokens_of([])
    rows = gather(
        tokens,
        np.empty(0, np.int64),
        plan_packs(tokens.lengths, 8, strategy),
        None if strategy == "none" else 8,
        0,
    )
    assert len(rows) == 0
    assert len(rows.input_ids) == len(rows.seq_lengths) == 0


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", "none"])
def test_an_example_without_tokens_makes_no_document(strategy: str) -> None:
    plan = plan_packs(np.array([0, 3, 0, 2, 0]), 8, strategy)
    assert sorted(plan.example.tolist()) == [1, 3]
    assert (plan.stop > plan.start).all()


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_an_example_that_does_not_fit_is_refused_and_never_split(strategy: str) -> None:
    with pytest.raises(ValueError, match="9 tokens does not fit max_length 8"):
        plan_packs(np.array([3, 9]), 8, strategy)


# ------------------------------------------------------------------------------------------------------- fill


def slow_best_fit_rows(lengths: np.ndarray, max_length: int) -> int:
    """Best-fit decreasing, one example at a time, looking at every open row."""
    rows: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [space for space in rows if space >= length]
        if fitting:
            rows.remove(min(fitting))
            rows.append(min(fitting) - length)
        else:
            rows.append(max_length - length)
    return len(rows)


@pytest.mark.parametrize("name", LENGTH_MIXES)
def test_best_fit_over_a_histogram_opens_as_many_rows_as_best_fit_one_by_one(name: str) -> None:
    lengths = mix(name)[:1500]
    assert len(plan_packs(lengths, 2048)) == slow_best_fit_rows(lengths, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("name", LENGTH_MIXES)
@pytest.mark.parametrize("max_length", [2048, 8193])
def test_rows_are_at_least_as_full_as_those_of_trl(name: str, max_length: int) -> None:
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    lengths = mix(name, max_length)
    dataset = Dataset.from_dict({"input_ids": [np.zeros(length, np.int8) for length in lengths.tolist()]})
    theirs = len(pack_dataset(dataset, max_length, "bfd", map_kwargs={"keep_in_memory": True}))
    assert len(plan_packs(lengths, max_length)) <= theirs


@pytest.mark.parametrize("name", ["short chats", "uniform", "two humps"])
@pytest.mark.parametrize("max_length", [2048, 8193])
def test_rows_are_within_half_a_percent_of_the_lower_bound_where_short_examples_exist(
    name: str, max_length: int
) -> None:
    lengths = mix(name, max_length)
    bound = -(-int(lengths.sum()) // max_length)
    assert len(plan_packs(lengths, max_length)) <= bound * 1.005


# ------------------------------------------------------------------------------------------------ order and cost


def test_any_stretch_of_packs_holds_long_and_short_examples_from_all_over_the_input() -> None:
    lengths = mix("two humps")
    plan = plan_packs(lengths, 2048)
    row_of = np.repeat(np.arange(len(plan)), np.diff(plan.offsets))
    tenth = row_of * 10 // len(plan)
    long, early = lengths[plan.example] > 1000, plan.example < len(lengths) // 2
    for part in range(10):
        inside = tenth == part
        assert abs(long[inside].mean() - long.mean()) < 0.05
        assert abs(early[inside].mean() - 0.5) < 0.05


def test_the_plan_of_known_lengths_never_changes() -> None:
    plan = plan_packs(np.array([5, 3, 7, 2, 2, 8, 1, 4, 4]), 10)
    assert [plan.example[a:b].tolist() for a, b in pairwise(plan.offsets)] == [
        [3, 5],
        [0, 6, 7],
        [1, 2],
        [4, 8],
    ]


def test_planning_a_million_lengths_takes_few_steps_more_than_a_hundred_thousand() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64), 1, 2048)
    few, many = (steps(partial(plan_packs, lengths[:number], 2048)) for number in (100_000, 1_000_000))
    assert many < 1.5 * few < 1_000_000


def test_the_search_follows_distinct_lengths_and_not_examples() -> None:
    from sftdata.pack import _best_fit

    counts = np.random.default_rng(0).integers(1, 50, 2048)
    few, _ = _best_fit(list(range(2048, 0, -1)), counts.tolist(), 2048)
    many, _ = _best_fit(list(range(2048, 0, -1)), (counts * 1000).tolist(), 2048)
    assert len(many) < 2 * len(few)
