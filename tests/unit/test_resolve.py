"""The ids a marker has in context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from sftdata.errors import UsageError
from sftdata.masks.markers import find_id_spans, find_spans
from sftdata.resolve import Encoded, resolve_marker
from tests.made_tokenizers import MADE


def words(texts: list[str]) -> list[Encoded]:
    """Encode one id per character, but one id for a space and the letter after it, as byte-level BPE does."""
    return [_words(text) for text in texts]


def _words(text: str) -> Encoded:
    offsets = []
    at = 0
    while at < len(text):
        size = 2 if text[at] == " " and at + 1 < len(text) else 1
        offsets.append((at, at + size))
        at += size
    return [sum(map(ord, text[start:stop])) for start, stop in offsets], offsets


def test_every_distinct_sequence_is_counted_with_its_first_example() -> None:
    result = resolve_marker(["x#:a #:b", "none", "#:c"], "#:", words)
    assert (result.texts, result.texts_with_marker, result.occurrences) == (3, 2, 3)
    alone, joined = result.sequences
    assert (alone.ids, alone.count, alone.row, alone.before, alone.after) == ((35, 58), 2, 0, "x", "a #:b")
    assert (joined.ids, joined.count, joined.starts_inside) == ((67, 58), 1, True)
    assert result.alone == (35, 58)
    assert result.alone_count == 2


def test_a_marker_that_ends_inside_a_token_is_told() -> None:
    (only,) = resolve_marker(["a: b"], ": ", words).sequences
    assert (only.ids, only.starts_inside, only.ends_inside) == ((58, 130), False, True)


def test_bos_and_eos_are_no_part_of_a_marker() -> None:
    def with_ends(texts: list[str]) -> list[Encoded]:
        return [([1, *ids, 2], [(0, 0), *offsets, (0, 0)]) for ids, offsets in words(texts)]

    result = resolve_marker(["#:a", "b#:"], "#:", with_ends)
    assert result.alone == (35, 58)
    assert [one.ids for one in result.sequences] == [(35, 58)]


def test_a_character_of_several_tokens_keeps_them_all() -> None:
    def halves(texts: list[str]) -> list[Encoded]:
        return [
            ([n for c in t for n in (ord(c), 0)], [(i, i + 1) for i in range(len(t)) for _ in "ab"])
            for t in texts
        ]

    (only,) = resolve_marker(["x#y"], "#", halves).sequences
    assert (only.ids, only.starts_inside, only.ends_inside) == ((35, 0), False, False)


def test_a_space_that_trimmed_offsets_leave_out_belongs_to_the_next_token() -> None:
    def trimmed(texts: list[str]) -> list[Encoded]:
        return [(ids, [(b - 1, b) for _, b in offsets]) for ids, offsets in words(texts)]

    (only,) = resolve_marker(["a #b"], "#", trimmed).sequences
    assert (only.ids, only.starts_inside) == ((67,), True)


def test_a_marker_in_no_text_still_tells_its_ids_alone() -> None:
    result = resolve_marker(["abc"], "#:", words)
    assert (result.alone, result.occurrences, result.sequences) == ((35, 58), 0, ())


def test_more_texts_than_one_part_are_all_seen() -> None:
    result = resolve_marker(["#:a"] * 600, "#:", words)
    assert result.occurrences == result.alone_count == 600


def test_an_empty_marker_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        resolve_marker(["a"], "", words)


# ------------------------------------------------------------------------------- tokenizers as they are

HUMAN, BOT = "### Human:", "### Assistant:"
TEXTS = [f"{HUMAN} one\n{BOT} two\n{HUMAN} three\n{BOT} yes", f"{HUMAN} Hi\n{BOT} Good day", "nobody speaks"]


def encoded(folder: Path, texts: list[str]) -> list[Encoded]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [(one.ids, one.offsets) for one in tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("name", ["made-prepend", "made-metaspace", "made-strips"])
def test_a_marker_after_a_newline_has_other_ids_than_alone_where_spaces_are_invented(
    made_data: Path, name: str
) -> None:
    folder = made_data / "tokenizers" / name
    answer = resolve_marker(TEXTS, BOT, lambda part: encoded(folder, part))
    assert (answer.texts_with_marker, answer.occurrences, answer.alone_count) == (2, 3, 0)
    question = resolve_marker(TEXTS, HUMAN, lambda part: encoded(folder, part))
    first, later = question.sequences
    assert (first.before, first.ids) == ("", question.alone)
    assert later.before[-1] == "\n"
    assert later.ids != question.alone
    assert later.ids[-2:] == question.alone[-2:]


@pytest.mark.parametrize("name", MADE)
def test_markers_given_as_resolved_ids_train_the_tokens_that_markers_in_the_text_train(
    made_data: Path, name: str
) -> None:
    folder = made_data / "tokenizers" / name
    rows = encoded(folder, TEXTS[:2])
    response, question = (
        resolve_marker(TEXTS, marker, lambda part: encoded(folder, part)).sequences[-1].ids
        for marker in (BOT, HUMAN)
    )
    flat = np.array([token for ids, _ in rows for token in ids], np.int32)
    by_ids = find_id_spans(flat, np.cumsum([0, *(len(ids) for ids, _ in rows)]), response, question)
    expected = []
    for text, (_, offsets) in zip(TEXTS, rows, strict=False):
        spans = find_spans(text, BOT, HUMAN).spans
        expected += [any(first < stop and start < last for first, last in spans) for start, stop in offsets]
    assert by_ids.trained.tolist() == expected
    assert not by_ids.faults
