"""The masks of trl 0.7.10's DataCollatorForCompletionOnlyLM, quirks included, to match an old run.

Prefer the default of `markers.py`; this mode trains some instructions, loses some answers and misses markers
whose ids differ in context. It exists so that an old experiment can be continued label for label.

Source: behaviour of the released trl 0.7.10 wheel, recorded on 600 random cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64
from sftdata.errors import UsageError
from sftdata.masks.markers import match_ids


@dataclass(frozen=True, slots=True, eq=False)
class TrlMask:
    """Trained tokens of N rows, and what the collator would have warned of.

    Attributes:
        trained: bool[T].
        response_warned: bool[N], rows with "Could not find response key"; all masked.
        instruction_warned: bool[N], rows with "Could not find instruction key"; all masked.
        silently_masked: bool[N], rows that train nothing although no warning was given.
    """

    trained: Bool
    response_warned: Bool
    instruction_warned: Bool
    silently_masked: Bool


def trl_0_7_10_mask(
    input_ids: Int32,
    offsets: Int64,
    response_ids: Sequence[int],
    instruction_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> TrlMask:
    """Mask rows as the collator did.

    Args:
        input_ids: int32[T], the ids of all rows end to end, BOS and EOS included, no padding.
        offsets: int64[N + 1], where rows begin.
        response_ids: the response template; a text was encoded alone there, without special tokens.
        instruction_ids: the instruction template, likewise.
        pad_token_id: tokens with this id are masked *before* the search: when it is the EOS, no EOS is ever
            trained, and a template that holds it is never found.

    Raises:
        UsageError: a template is empty.
    """
    if len(response_ids) == 0 or (instruction_ids is not None and len(instruction_ids) == 0):
        raise UsageError(
            "A response or instruction template has no token ids.",
            "give a template, or leave the option out.",
        )
    labels = input_ids
    if pad_token_id is not None:
        labels = np.where(input_ids == pad_token_id, IGNORE_INDEX, input_ids)
    trained = labels != IGNORE_INDEX
    ends = _matches_by_row(labels, offsets, response_ids)
    response_warned = np.array([len(row) == 0 for row in ends], np.bool_)
    instruction_warned = np.zeros(len(ends), np.bool_)
    if instruction_ids is None:
        for row, own in enumerate(_rows(trained, offsets)):
            _mask_until_last(own, (ends[row] + len(response_ids)).tolist())
    else:
        starts = _matches_by_row(labels, offsets, instruction_ids)
        # A row without a response is masked before instructions are looked for, so there both warnings come.
        instruction_warned = response_warned | np.array([len(row) == 0 for row in starts], np.bool_)
        for row, own in enumerate(_rows(trained, offsets)):
            _mask_turns(own, starts[row].tolist(), (ends[row] + len(response_ids)).tolist())

    before = np.concatenate([[0], np.cumsum(trained)])
    nothing_trained = before[offsets[1:]] == before[offsets[:-1]]
    return TrlMask(
        trained, response_warned, instruction_warned, nothing_trained & ~response_warned & ~instruction_warned
    )


def _rows(values: Bool, offsets: Int64) -> list[Bool]:
    """Return one view per row."""
    return [
        values[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def _matches_by_row(labels: Int32, offsets: Int64, pattern: Sequence[int]) -> list[Int64]:
    """Return for every row where the pattern begins, counted from the row's start."""
    starts = match_ids(labels, offsets, pattern)
    bounds = np.searchsorted(starts, offsets).tolist()
    firsts = offsets[:-1].tolist()
    return [
        starts[low:high] - first for low, high, first in zip(bounds[:-1], bounds[1:], firsts, strict=True)
    ]


def _mask_until_last(trained: Bool, ends: list[int]) -> None:
    """Unmark up to the end of the last response marker; everything, where there is none."""
    trained[: ends[-1] if ends else None] = False


def _mask_turns(trained: Bool, starts: list[int], ends: list[int]) -> None:
    """Unmark from the i-th instruction to the end of the i-th response marker: paired by rank."""
    if not starts or not ends:
        trained[:] = False
        return
    if starts[0] > ends[0]:
        starts = [0, *starts]
    pairs = list(zip(starts, ends, strict=False))
    trained[: pairs[0][1]] = False
    for start, end in pairs[1:]:
        trained[start:end] = False
    if len(ends) < len(starts):
        trained[starts[-1] :] = False
