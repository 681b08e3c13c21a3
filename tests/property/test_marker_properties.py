"""Marker masks against an oracle that walks a row one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sftdata.errors import RowError
from sftdata.masks.markers import find_id_spans, find_spans
from tests.marked_texts import mask_rows

PIECES = ["#H:", "#A:", "#H", "#", "A:", "#A:#H:", " ", "é", "你好", "🙂", "a", "\n"]
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
markers = st.sampled_from(["#H:", "#A:", "#", "#A", "A:", "aa", "é", "你", "H:#A"])


def oracle(
    row: Sequence[object], response: Sequence[object], instruction: Sequence[object] | None
) -> list[bool] | None:
    """Say for every element whether it is trained; None where the row has to be refused."""
    trained = [False] * len(row)
    seen = []
    inside = False
    at = 0
    while at < len(row):
        here = [m for m in (response, instruction) if m is not None and row[at : at + len(m)] == m]
        if here:
            marker = max(here, key=len)
            inside = marker == response
            seen.append(inside)
            if instruction is None:
                trained = [False] * len(row)
            at += len(marker)
        else:
            trained[at] = inside
            at += 1
    if True not in seen or (instruction is not None and len(seen) > 1 and all(seen)):
        return None
    return trained


def flags(text: str, response: str, instruction: str | None) -> list[bool] | None:
    try:
        spans = find_spans(text, response, instruction).spans
    except RowError:
        return None
    ends = np.cumsum([0] + [len(character.encode()) for character in text])
    covered = [
        any(start <= ends[i] and ends[i + 1] <= stop for start, stop in spans) for i in range(len(text))
    ]
    assert sum(stop - start for start, stop in spans) == sum(
        len(c.encode()) for c, on in zip(text, covered, strict=True) if on
    )
    return covered


@given(texts, markers, st.none() | markers)
def test_text_masks_equal_the_oracle(text: str, response: str, instruction: str | None) -> None:
    if response != instruction:
        assert flags(text, response, instruction) == oracle(text, response, instruction)


@given(st.lists(texts, max_size=6), markers, st.none() | markers)
def test_id_masks_equal_the_oracle_row_by_row(
    rows: list[str], response: str, instruction: str | None
) -> None:
    if response == instruction:
        return
    ids = np.array([ord(character) for row in rows for character in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)])
    ordinals = None if instruction is None else [*map(ord, instruction)]
    marked = find_id_spans(ids, offsets, [*map(ord, response)], ordinals)
    for index, row in enumerate(rows):
        expected = oracle(row, response, instruction)
        assert (index in marked.faults) == (expected is None)
        assert marked.trained[offsets[index] : offsets[index + 1]].tolist() == (
            expected or [False] * len(row)
        )


@given(st.lists(texts, max_size=6), markers, st.none() | markers)
def test_text_and_ids_agree_on_faults_and_repeats(
    rows: list[str], response: str, instruction: str | None
) -> None:
    if response == instruction:
        return
    ids = np.array([ord(character) for row in rows for character in row], np.int32)
    ordinals = None if instruction is None else [*map(ord, instruction)]
    by_ids = find_id_spans(ids, np.cumsum([0, *map(len, rows)]), [*map(ord, response)], ordinals)
    by_text = mask_rows(rows, response, instruction)
    assert {i: f.code for i, f in by_ids.faults.items()} == {i: f.code for i, f in by_text.faults.items()}
    good = [index not in by_text.faults for index in range(len(rows))]
    assert by_ids.repeated[good].tolist() == by_text.repeated[good].tolist()
