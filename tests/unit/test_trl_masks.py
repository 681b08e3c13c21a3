"""The masks of DataCollatorForCompletionOnlyLM (trl 0.7.10): each known case, and 600 results of the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftdata.errors import UsageError
from sftdata.masks.markers import TrlMask, trl_0_7_10_mask

H, A = [8], [9]
EOS = 2


def mask(
    *rows: list[int], response: list[int] = A, instruction: list[int] | None = H, pad: int | None = None
) -> TrlMask:
    ids = np.array([token for row in rows for token in row], np.int32)
    return trl_0_7_10_mask(ids, np.cumsum([0, *map(len, rows)]), response, instruction, pad)


def labels_of(
    row: list[int], response: list[int], instruction: list[int] | None, pad: int | None
) -> list[int]:
    trained = mask(row, response=response, instruction=instruction, pad=pad).trained.tolist()
    return [token if label else -100 for token, label in zip(row, trained, strict=True)]


def kept(
    row: list[int], response: list[int] = A, instruction: list[int] | None = H, pad: int | None = None
) -> list[int]:
    """The ids that a row trains."""
    return [label for label in labels_of(row, response, instruction, pad) if label != -100]


def test_without_instruction_the_last_response_wins_and_all_before_it_is_masked() -> None:
    assert kept([8, 10, 9, 11, 8, 12, 9, 13, EOS], instruction=None) == [13, EOS]


def test_without_a_response_the_row_is_masked_with_one_warning() -> None:
    found = mask([8, 10, EOS], instruction=None)
    assert not found.trained.any()
    assert (found.response_warned.tolist(), found.instruction_warned.tolist()) == ([True], [False])


def test_with_instructions_a_missing_response_gives_both_warnings() -> None:
    found = mask([8, 10, EOS])
    assert not found.trained.any()
    assert (found.response_warned.tolist(), found.instruction_warned.tolist()) == ([True], [True])


def test_a_missing_instruction_masks_the_row_with_one_warning() -> None:
    found = mask([9, 10, EOS])
    assert not found.trained.any()
    assert (found.response_warned.tolist(), found.instruction_warned.tolist()) == ([False], [True])


def test_question_answer_twice_trains_both_answers() -> None:
    assert kept([8, 10, 9, 11, 8, 12, 9, 13, EOS]) == [11, 13, EOS]


def test_an_opening_answer_is_trained_too() -> None:
    assert kept([9, 11, 8, 12, 9, 13, EOS]) == [11, 13, EOS]


def test_a_second_answer_in_a_row_trains_its_header() -> None:
    assert kept([8, 10, 9, 11, 9, 13, EOS]) == [11, 9, 13, EOS]


def test_two_questions_before_an_answer_train_nothing_without_a_warning() -> None:
    found = mask([8, 10, 8, 12, 9, 13, EOS])
    assert not found.trained.any()
    assert not found.response_warned.any()
    assert not found.instruction_warned.any()
    assert found.silently_masked.tolist() == [True]


def test_two_questions_later_on_lose_the_last_answer() -> None:
    assert kept([8, 10, 9, 11, 8, 12, 8, 13, 9, 14, EOS]) == [11]


def test_a_trailing_question_is_masked() -> None:
    assert kept([8, 10, 9, 11, 8, 12]) == [11]


def test_more_answers_than_questions_leave_the_rest_trained() -> None:
    assert kept([8, 10, 9, 11, 9, 12, 8, 13, 9, 14]) == [11, 9, 12, 8, 13, 9, 14]


def test_pad_equal_to_eos_never_trains_an_eos() -> None:
    assert kept([8, 10, 9, 11, EOS, 8, 12, 9, 13, EOS], pad=EOS) == [11, 13]


def test_a_response_template_that_holds_the_pad_id_is_never_found() -> None:
    assert mask([8, 10, EOS, 9, 11], response=[EOS, 9], pad=EOS).response_warned.tolist() == [True]
    assert kept([8, 10, EOS, 9, 11], response=[EOS, 9], pad=None) == [11]


def test_an_instruction_template_that_holds_the_pad_id_is_never_found() -> None:
    assert mask([EOS, 8, 10, 9, 11], instruction=[EOS, 8], pad=EOS).instruction_warned.tolist() == [True]


def test_matches_of_a_template_may_overlap() -> None:
    assert kept([8, 9, 9, 9, 10], response=[9, 9]) == [9, 10]
    assert kept([8, 9, 9, 9, 10], response=[9, 9], instruction=None) == [10]


def test_a_response_at_the_very_end_trains_nothing_silently() -> None:
    assert mask([8, 10, 9]).silently_masked.tolist() == [True]


def test_a_template_never_matches_across_rows() -> None:
    found = mask([8, 10, 9], [9, 8, 11], response=[9, 9], instruction=None)
    assert found.response_warned.tolist() == [True, True]


def test_an_empty_row_is_masked_like_one_without_response() -> None:
    assert mask([8, 10, 9, 11], [], [8, 9, 12]).response_warned.tolist() == [False, True, False]


def test_no_rows_give_no_mask() -> None:
    assert len(mask().trained) == 0


def test_an_empty_template_is_refused() -> None:
    with pytest.raises(UsageError, match="no token ids"):
        mask([1, 2], response=[])
    with pytest.raises(UsageError, match="no token ids"):
        mask([1, 2], instruction=[])


def old_collator(
    row: list[int], response: list[int], instruction: list[int] | None, pad: int | None
) -> list[bool]:
    """What DataCollatorForCompletionOnlyLM of trl 0.7.10 trains, statement by statement as it stands there."""

    def found(template: list[int]) -> list[int]:
        return [at for at in range(len(labels)) if labels[at : at + len(template)] == template]

    labels = [-100 if token == pad else token for token in row]
    answers, questions = [at + len(response) for at in found(response)], found(instruction or [])
    if instruction is None:
        end = answers[-1] if answers else len(labels)
        return [at >= end and label != -100 for at, label in enumerate(labels)]
    if not answers or not questions:
        return [False] * len(labels)
    if questions[0] > answers[0]:
        questions = [0, *questions]
    for number, (start, end) in enumerate(zip(questions, answers, strict=False)):
        first = start if number else 0
        labels[first:end] = [-100] * len(labels[first:end])
    if len(answers) < len(questions):
        labels[questions[-1] :] = [-100] * len(labels[questions[-1] :])
    return [label != -100 for label in labels]


@given(
    rows=st.lists(st.lists(st.integers(0, 4), max_size=14), max_size=4),
    response=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    instruction=st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=2),
    pad=st.sampled_from([None, 0]),
)
def test_rows_are_masked_as_the_old_collator_masks_each_of_them(
    rows: list[list[int]], response: list[int], instruction: list[int] | None, pad: int | None
) -> None:
    together = mask(*rows, response=response, instruction=instruction, pad=pad)
    alone = [old_collator(row, response, instruction, pad) for row in rows]
    assert together.trained.tolist() == [flag for flags in alone for flag in flags]


def test_600_results_of_the_real_collator_are_met_label_for_label(shared_data: Path) -> None:
    lines = (shared_data / "golden" / "trl_0_7_10_completion_collator.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) == 600
    for case in cases:
        ids, pad = case["input_ids"], case["pad_token_id"]
        response, instruction = case["response_template"], case["instruction_template"]
        labels = labels_of(ids, response, instruction, pad)
        found = mask(ids, response=response, instruction=instruction, pad=pad)
        assert labels == case["labels"], case
        assert int(found.response_warned.sum() + found.instruction_warned.sum()) == case["warned"], case


def test_rows_masked_together_are_masked_as_alone(shared_data: Path) -> None:
    lines = (shared_data / "golden" / "trl_0_7_10_completion_collator.jsonl").read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    # One pair of short templates for all rows, so that many rows hold them in many orders.
    for response, instruction in [([1], [20]), ([17], [22]), ([30], None)]:
        together = mask(*rows, response=response, instruction=instruction, pad=0)
        alone = [mask(row, response=response, instruction=instruction, pad=0) for row in rows]
        assert together.trained.tolist() == [flag for one in alone for flag in one.trained.tolist()]
        for column in ("response_warned", "instruction_warned", "silently_masked"):
            assert getattr(together, column).tolist() == [getattr(one, column)[0] for one in alone]
        assert together.trained.any()
