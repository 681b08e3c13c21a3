"""The ledger: counts merge in any order, and a leak is named with its equation."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftdata.batches import PackedRows
from sftdata.errors import IntegrityError
from sftdata.set.ledger import Ledger, SourceCounts, length_bins


def balanced() -> Ledger:
    return Ledger(
        rows_in=10,
        rows_kept=6,
        rows_rejected={"bad-role": 2},
        rows_filtered={"too-short": 1},
        rows_dropped={"nothing-trained": 1},
        tokens_in=100,
        tokens_trained=40,
        tokens_context=30,
        tokens_cut={"truncate": 20},
        tokens_in_dropped_rows=10,
        rows_packed=8,
        documents=6,
        max_length=10,
        tokens_padding=10,
    )


def changed(**values: object) -> Ledger:
    ledger = balanced()
    for name, value in values.items():
        setattr(ledger, name, value)
    return ledger


def test_a_balanced_ledger_passes() -> None:
    balanced().check()
    Ledger().check()


@pytest.mark.parametrize(
    ("leak", "equation"),
    [
        (
            {"rows_in": 11},
            "rows_in = rows_kept 6 + rejected 2 + filtered 1 + dropped 1 + left out 0 does not hold: 11 is not 10",
        ),
        (
            {"rows_rejected": {}},
            "rows_in = rows_kept 6 + rejected 0 + filtered 1 + dropped 1 + left out 0 does not hold: 10 is not 8",
        ),
        (
            {"tokens_cut": {"t": 19}},
            "tokens_in = trained 40 + context 30 + cut 19 + in dropped rows 10 + left out 0 does not hold: 100 is not 99",
        ),
        (
            {"tokens_padding": 9},
            "rows_packed 8 * max_length 10 = trained 40 + context 30 + padding 9 does not hold: 80 is not 79",
        ),
        (
            {"max_length": None},
            "tokens_padding = 0, as rows keep their own length does not hold: 10 is not 0",
        ),
    ],
)
def test_a_leak_is_named_with_its_equation_and_both_sides(leak: dict[str, object], equation: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        changed(**leak).check("here")
    assert str(caught.value).startswith("here: ")
    assert equation in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merging_adds_every_count_in_any_order() -> None:
    parts = [
        Ledger(
            rows_in=1,
            rows_rejected={"b": 1},
            counters={"boundary_splits": 3},
            examples={"cut": [9, 4]},
            lengths={7: 1},
        ),
        Ledger(
            rows_in=2,
            rows_rejected={"a": 1, "b": 1},
            rows_packed=1,
            max_length=8,
            examples={"cut": [7, 8, 2]},
        ),
        Ledger(rows_in=1, sources={"x": SourceCounts(tokens=5)}, examples={"cut": [1, 4], "none": []}),
        Ledger(
            rows_in=3,
            lengths={5: 2, 7: 1},
            sources={"x": SourceCounts(rows=3, tokens=6), "a": SourceCounts()},
        ),
    ]
    texts = set()
    for order in permutations(parts):
        total = Ledger()
        for part in order:
            total.merge(part)
        texts.add(json.dumps(total.to_json()))
    assert len(texts) == 1
    assert total.rows_in == 7
    assert total.rows_rejected == {"a": 1, "b": 2}
    assert total.sources["x"] == SourceCounts(rows=3, tokens=11)
    assert total.max_length == 8
    assert total.examples == {"cut": [1, 2, 4], "none": []}
    assert parts[0].rows_rejected == {"b": 1}


def test_ledgers_of_different_row_lengths_do_not_merge() -> None:
    with pytest.raises(ValueError, match="rows of 8 and 9 tokens"):
        Ledger(rows_packed=1, max_length=8).merge(Ledger(rows_packed=1, max_length=9))
    with pytest.raises(ValueError, match="cannot be merged"):
        Ledger(rows_packed=1, max_length=8).merge(Ledger(rows_packed=1))


def test_json_gives_the_same_ledger_back_with_keys_in_order() -> None:
    sources = {"b": SourceCounts(rows=1), "a": SourceCounts()}
    ledger = changed(lengths={512: 1, 5: 2, 64: 3}, counters={"z": 1, "a": 2}, sources=sources)
    data = json.loads(json.dumps(ledger.to_json()))
    assert Ledger.from_json(data) == ledger
    assert list(data["lengths"]) == ["5", "64", "512"]
    assert list(data["counters"]) == ["a", "z"]
    assert list(data["sources"]) == ["a", "b"]


def test_two_new_ledgers_share_nothing() -> None:
    first = Ledger()
    first.counters["x"] = 1
    assert Ledger().counters == {}


def test_labels_decide_what_is_trained_and_padding_is_counted_apart() -> None:
    rows = PackedRows(
        input_ids=np.array([3, 4, 5, 6, 0, 0, 3, 4, 5, 6, 7, 8], np.int32),
        labels=np.array([-100, 4, 5, -100, -100, -100, -100, -100, 5, 6, 7, 8], np.int32),
        row_offsets=np.array([0, 6, 12]),
        seq_lengths=np.array([4, 2, 6], np.int32),
        example_ids=np.array([0, -1, 1]),
        segment_offsets=np.array([0, 2, 3]),
    )
    ledger = Ledger()
    ledger.count_packed(rows, 6, {"a.jsonl": 0})
    assert (ledger.tokens_trained, ledger.tokens_context, ledger.tokens_padding) == (6, 4, 2)
    assert (ledger.rows_packed, ledger.documents, ledger.max_length) == (2, 2, 6)
    assert ledger.sources == {"a.jsonl": SourceCounts(rows=2, tokens=10, tokens_trained=6)}


def test_rows_and_tokens_are_credited_to_the_source_that_holds_their_id() -> None:
    rows = PackedRows(
        input_ids=np.arange(12, dtype=np.int32),
        labels=np.array([-100, 1, 2, -100, 4, 5, -100, -100, -100, -100, 10, -100], np.int32),
        row_offsets=np.array([0, 6, 12]),
        seq_lengths=np.array([3, 3, 2, 3, 1], np.int32),
        example_ids=np.array([4, 9, 4, 7, -1]),  # example 4 was split
        segment_offsets=np.array([0, 2, 5]),
    )
    ledger = Ledger()
    ledger.count_packed(rows, 6, {"a": 0, "empty": 7, "b": 7, "c": 9})
    assert ledger.sources == {
        "a": SourceCounts(rows=1, tokens=5, tokens_trained=2),
        "b": SourceCounts(rows=1, tokens=3, tokens_trained=1),
        "c": SourceCounts(rows=1, tokens=3, tokens_trained=2),
    }


@given(st.lists(st.integers(0, 10**9), max_size=50))
def test_a_length_falls_into_a_bin_at_most_an_eighth_below_it(lengths: list[int]) -> None:
    for length, lower in zip(lengths, length_bins(np.array(lengths, np.int64)).tolist(), strict=True):
        assert lower <= length
        assert length - lower < max(1, length / 8)
        assert lower == length or length > 15
        assert length_bins(np.array([lower])).tolist() == [lower]


def test_the_histogram_counts_every_example() -> None:
    ledger = Ledger()
    ledger.count_lengths(np.array([3, 3, 100, 101, 5000]))
    ledger.count_lengths(np.array([3]))
    assert ledger.lengths == {3: 3, 96: 2, 4608: 1}
