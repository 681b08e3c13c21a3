"""Which stretch of a text, or of a row of token ids, its response and instruction markers train."""

from __future__ import annotations

import numpy as np
import pytest

from sftdata.errors import RowError, UsageError
from sftdata.masks.markers import check_markers, find_id_spans, find_spans, match_ids

HUMAN, BOT = "### Human:", "### Assistant:"


def trained_text(text: str, response: str = BOT, instruction: str | None = HUMAN) -> list[str]:
    data = text.encode()
    return [data[start:stop].decode() for start, stop in find_spans(text, response, instruction).spans]


def test_every_answer_between_response_and_instruction_marker_is_trained() -> None:
    text = f"{HUMAN} one\n{BOT} two\n{HUMAN} three\n{BOT} four"
    assert trained_text(text) == [" two\n", " four"]


def test_spans_count_utf8_bytes_not_characters() -> None:
    text = f"{HUMAN} 你好\n{BOT} héllo 🙂"
    start = len(f"{HUMAN} 你好\n{BOT}".encode())
    assert find_spans(text, BOT, HUMAN).spans == [(start, len(text.encode()))]


def test_an_opening_answer_without_a_question_is_trained() -> None:
    assert trained_text(f"{BOT} hello\n{HUMAN} hi\n{BOT} bye") == [" hello\n", " bye"]


def test_consecutive_questions_lose_no_answer() -> None:
    text = f"{HUMAN} a\n{BOT} b\n{HUMAN} c\n{HUMAN} d\n{BOT} e"
    assert trained_text(text) == [" b\n", " e"]


def test_the_header_of_a_second_answer_in_a_row_is_context() -> None:
    text = f"{HUMAN} a\n{BOT} b\n{BOT} c"
    assert trained_text(text) == [" b\n", " c"]
    assert find_spans(text, BOT, HUMAN).repeated


def test_a_text_that_ends_in_an_answer_is_closed_and_one_that_ends_in_a_question_is_not() -> None:
    assert find_spans(f"{HUMAN} a\n{BOT} b", BOT, HUMAN).closed
    assert not find_spans(f"{HUMAN} a\n{BOT} b\n{HUMAN} c", BOT, HUMAN).closed


def test_an_empty_answer_at_the_end_trains_nothing_but_the_end_token() -> None:
    marked = find_spans(f"{HUMAN} a\n{BOT}", BOT, HUMAN)
    assert marked.spans == []
    assert marked.closed


def test_an_empty_answer_in_the_middle_gives_no_span() -> None:
    assert trained_text(f"{HUMAN} a {BOT}{HUMAN} b {BOT} c") == [" c"]


def test_without_an_instruction_marker_only_the_last_answer_is_trained_and_the_row_says_so() -> None:
    text = f"{HUMAN} a\n{BOT} b\n{HUMAN} c\n{BOT} d"
    assert trained_text(text, instruction=None) == [" d"]
    assert find_spans(text, BOT).repeated
    assert not find_spans(f"{HUMAN} a\n{BOT} b", BOT).repeated


def test_where_two_markers_begin_together_the_longer_counts() -> None:
    text = "### Instruction:\na\n### Response:\nb\n### Instruction:\nc"
    assert trained_text(text, "### Response:", "###") == ["\nb\n"]


def test_a_marker_inside_another_marker_does_not_count() -> None:
    text = "Human to Bot: a\nBot: b\nHuman to Bot: c\nBot: d"
    assert trained_text(text, "Bot:", "Human to Bot:") == [" b\n", " d"]


def test_a_marker_that_overlaps_itself_is_taken_from_the_left() -> None:
    assert trained_text("aaaab", "aa", None) == ["b"]
    assert trained_text("aaab", "aa", None) == ["ab"]


def test_marker_characters_of_regular_expressions_are_plain_text() -> None:
    assert trained_text("[INST] a [/INST] b (.*) c", "[/INST]", "[INST]") == [" b (.*) c"]


def test_a_text_without_the_response_marker_is_named_with_its_nearest_variant() -> None:
    with pytest.raises(RowError) as caught:
        find_spans("### Human: a\n### assistant : b", BOT, HUMAN)
    fault = caught.value.fault
    assert fault.code == "no-response-marker"
    assert "found '### assistant :'" in fault.reason
    assert fault.fix == "--response-template '### assistant :', or fix the row."


def test_a_mistyped_instruction_marker_never_trains_questions_silently() -> None:
    with pytest.raises(RowError) as caught:
        find_spans(f"### User: a\n{BOT} b\n### User: c\n{BOT} d", BOT, HUMAN)
    assert caught.value.fault.code == "no-instruction-marker"
    assert "'### User:'" in caught.value.fault.reason


def test_one_answer_without_any_instruction_marker_is_trained_to_the_end() -> None:
    assert trained_text(f"Some context.\n{BOT} b") == [" b"]


def test_a_lone_surrogate_is_left_to_the_encoder_and_stops_no_batch() -> None:
    assert len(find_spans(f"\ud800 {BOT} b", BOT).spans) == 1


@pytest.mark.parametrize(
    ("response", "instruction", "message"),
    [
        ("", None, "empty"),
        (BOT, "", "empty"),
        ((), None, "empty"),
        (BOT, BOT, "both"),
        ((1, 2), (1, 2), "both"),
        (BOT, (1, 2), "not of one kind"),
    ],
)
def test_markers_that_cannot_tell_turns_apart_are_refused(
    response: object, instruction: object, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_markers(response, instruction)  # type: ignore[arg-type]


def flat(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([token for row in rows for token in row], np.int32)
    return ids, np.cumsum([0, *map(len, rows)])


def test_an_id_pattern_never_matches_across_two_rows() -> None:
    assert match_ids(*flat([1, 2], [3, 2, 3], [], [2], [3]), [2, 3]).tolist() == [3]


def test_a_pattern_longer_than_all_ids_is_not_found() -> None:
    assert match_ids(*flat([1, 2]), [1, 2, 3]).tolist() == []
    assert match_ids(*flat(), [1]).tolist() == []


# H = 8, A = 9 9, EOS = 2
def test_ids_between_response_and_instruction_ids_are_trained_with_their_eos() -> None:
    marked = find_id_spans(*flat([8, 5, 9, 9, 6, 2, 8, 5, 9, 9, 7, 2], [9, 9, 4]), [9, 9], [8])
    assert marked.trained.astype(int).tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1]
    assert not marked.faults
    assert not marked.repeated.any()


def test_ids_without_instruction_ids_train_the_last_answer_only() -> None:
    marked = find_id_spans(*flat([9, 9, 6, 9, 9, 7], [9, 9, 4]), [9, 9])
    assert marked.trained.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    assert marked.repeated.tolist() == [True, False]


def test_rows_without_their_marker_ids_are_named_and_train_nothing() -> None:
    marked = find_id_spans(*flat([8, 5], [9, 9, 6, 9, 9, 7], [8, 9, 9, 3], []), [9, 9], [8])
    assert {row: fault.code for row, fault in marked.faults.items()} == {
        0: "no-response-marker",
        1: "no-instruction-marker",
        3: "no-response-marker",
    }
    assert marked.trained.astype(int).tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_overlapping_marker_ids_follow_the_same_rule_as_overlapping_text() -> None:
    marked = find_id_spans(*flat([1, 1, 5, 1, 2, 6]), [1, 2], [1])
    assert marked.trained.astype(int).tolist() == [0, 0, 0, 0, 0, 1]


def test_no_rows_of_ids_give_no_mask() -> None:
    marked = find_id_spans(*flat(), [1], [2])
    assert (len(marked.trained), len(marked.repeated), marked.faults) == (0, 0, {})
