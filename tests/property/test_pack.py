"""Whatever the lengths: every token arrives once, in order, and can be traced back."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftdata.batches import PackedRows, TokenBatch
from sftdata.pack import gather, plan_packs

LIMITS = st.sampled_from([1, 2, 5, 16, 63, 64, 100])


@st.composite
def batches(draw: st.DrawFn, fitting: bool) -> tuple[TokenBatch, int]:
    """Examples whose tokens are all different, so that each can be followed, and a max_length."""
    max_length = draw(LIMITS)
    lengths = draw(st.lists(st.integers(0, max_length if fitting else 3 * max_length), max_size=60))
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    total = int(offsets[-1])
    trained = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
    return TokenBatch(
        np.arange(1, total + 1, dtype=np.int32), trained, offsets, np.arange(len(lengths))
    ), max_length


def documents(rows: PackedRows) -> list[tuple[int, int, list[int], list[int]]]:
    """(row, example id, ids, labels) of each segment, read token by token."""
    found = []
    for row in range(len(rows)):
        at = int(rows.row_offsets[row])
        for segment in range(rows.segment_offsets[row], rows.segment_offsets[row + 1]):
            length = int(rows.seq_lengths[segment])
            ids, labels = rows.input_ids[at : at + length].tolist(), rows.labels[at : at + length].tolist()
            found.append((row, int(rows.example_ids[segment]), ids, labels))
            at += length
        assert at == rows.row_offsets[row + 1]
    return found


def pack(tokens: TokenBatch, max_length: int, strategy: str) -> PackedRows:
    plan = plan_packs(tokens.lengths, max_length, strategy)
    return gather(tokens, tokens.row + 1000, plan, None if strategy == "none" else max_length, pad_id=0)


def expected_labels(tokens: TokenBatch, ids: list[int]) -> list[int]:
    labels = [token if tokens.trained[token - 1] else -100 for token in ids]
    return [-100, *labels[1:]]


@given(batches(fitting=True))
def test_pack_never_splits_an_example(batch: tuple[TokenBatch, int]) -> None:
    tokens, max_length = batch
    whole = {i + 1000: tokens.input_ids[a:b].tolist() for i, (a, b) in enumerate(pairwise(tokens.offsets))}
    found = {
        example: ids for _, example, ids, _ in documents(pack(tokens, max_length, "bfd")) if example >= 0
    }
    assert found == {example: ids for example, ids in whole.items() if ids}


@given(batches(fitting=True))
def test_each_example_is_packed_once_and_in_input_order_inside_its_row(batch: tuple[TokenBatch, int]) -> None:
    tokens, max_length = batch
    by_row = defaultdict(list)
    for row, example, _, _ in documents(pack(tokens, max_length, "bfd")):
        if example >= 0:
            by_row[row].append(example)
    assert sorted(chain(*by_row.values())) == (np.flatnonzero(tokens.lengths) + 1000).tolist()
    assert all(examples == sorted(examples) for examples in by_row.values())


@given(batches(fitting=False))
def test_wrapped_gives_the_stream_back_token_for_token(batch: tuple[TokenBatch, int]) -> None:
    tokens, max_length = batch
    found = documents(pack(tokens, max_length, "wrapped"))
    assert [
        token for _, example, ids, _ in found if example >= 0 for token in ids
    ] == tokens.input_ids.tolist()
    for _, example, ids, _ in found:
        if example >= 0:
            start, stop = tokens.offsets[example - 1000 : example - 998]
            assert set(ids) <= set(tokens.input_ids[start:stop].tolist())


@given(batches(fitting=True), st.sampled_from(["bfd", "wrapped"]))
def test_every_packed_row_is_exactly_max_length(batch: tuple[TokenBatch, int], strategy: str) -> None:
    tokens, max_length = batch
    rows = pack(tokens, max_length, strategy)
    assert np.diff(rows.row_offsets).tolist() == [max_length] * len(rows)
    for row in range(len(rows)):
        assert rows.seq_lengths[rows.segment_offsets[row] : rows.segment_offsets[row + 1]].sum() == max_length


@given(batches(fitting=True), st.sampled_from(["bfd", "wrapped", "none"]))
def test_labels_are_the_trained_ids_but_for_the_first_of_a_document(
    batch: tuple[TokenBatch, int], strategy: str
) -> None:
    tokens, max_length = batch
    for _, example, ids, labels in documents(pack(tokens, max_length, strategy)):
        if example >= 0:
            assert labels == expected_labels(tokens, ids)


@given(batches(fitting=True), st.sampled_from(["bfd", "wrapped", "none"]))
def test_padding_comes_last_and_is_never_trained(batch: tuple[TokenBatch, int], strategy: str) -> None:
    tokens, max_length = batch
    found = documents(pack(tokens, max_length, strategy))
    for index, (row, example, ids, labels) in enumerate(found):
        if example < 0:
            assert strategy != "none"
            assert set(ids) == {0}
            assert set(labels) == {-100}
            assert index + 1 == len(found) or found[index + 1][0] > row


@given(st.lists(st.integers(0, 50), max_size=200), st.integers(50, 70))
def test_best_fit_needs_no_more_rows_than_one_example_at_a_time(lengths: list[int], max_length: int) -> None:
    rows: list[int] = []
    for length in sorted(filter(None, lengths), reverse=True):
        fitting = [space for space in rows if space >= length]
        if fitting:
            rows.remove(min(fitting))
        rows.append(min(fitting, default=max_length) - length)
    assert len(plan_packs(np.array(lengths, np.int64), max_length)) == len(rows)
