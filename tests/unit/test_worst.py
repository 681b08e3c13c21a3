"""What stands out in a log of losses, on logs made for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from sftdata.blame.log import DocumentLosses
from sftdata.blame.worst import Ranking, find_excess, find_steps, rank_documents, rank_step

COLUMNS = {
    "step": np.int32, "set": np.int16, "row": np.int64, "example_id": np.int64, "tokens": np.int32, "trained": np.int32,
    "bytes": np.int32, "weight": np.float32, "loss": np.float32,
}  # fmt: skip


def log_of(documents: list[dict[str, Any]]) -> DocumentLosses:
    """Make a log of documents by step; what is not said of one is usual. `mean` is its loss of a token."""
    usual = {"set": 0, "row": 0, "trained": 40, "bytes": 160, "mean": 2.0}
    whole = [usual | document for document in documents]
    for one in whole:
        one |= {"tokens": one["trained"] + 5, "weight": one["trained"] * one.get("weighs", 1)}
        one["loss"] = one["mean"] * one["weight"]
    return DocumentLosses(*(np.array([one[name] for one in whole], kind) for name, kind in COLUMNS.items()))


def usual_run(steps: int, *odd: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Eight usual documents a step, whose loss falls; the odd ones among them."""
    rng = np.random.default_rng(seed)
    made = [
        {"step": step, "example_id": 8 * step + place, "mean": 2 + 4 / step**0.5 + rng.normal() * 0.2}
        for step in range(1, steps + 1)
        for place in range(8)
    ]
    return sorted([*made, *odd], key=lambda document: int(document["step"]))


def ranked(documents: list[dict[str, Any]]) -> Ranking:
    log = log_of(documents)
    return rank_documents(log, find_excess(log))


def worst(documents: list[dict[str, Any]], count: int) -> list[int]:
    return [int(example) for example in ranked(documents).example_id[:count]]


def test_a_late_document_is_held_against_late_ones() -> None:
    late = {"step": 90, "example_id": 9001, "mean": 4.0}  # less than any document of the first steps
    assert worst(usual_run(100, late), 1) == [9001]


def test_no_document_stands_out_for_being_early() -> None:
    first = ranked(usual_run(200)).first[:80]
    assert (first <= 10).mean() < 0.25


def test_a_word_that_lost_much_stands_behind_a_page_that_lost_less() -> None:
    word = {"step": 50, "example_id": 9001, "mean": 16.0, "trained": 1, "bytes": 4}
    page = {"step": 50, "example_id": 9002, "mean": 5.0}
    assert worst(usual_run(100, word, page), 2) == [9002, 9001]


def test_text_in_tokens_of_one_byte_is_held_against_others_by_byte() -> None:
    """Each token is easily guessed, and there are four times as many for the same text."""
    garbled = {"step": 50, "example_id": 9001, "mean": 1.9, "bytes": 40}
    assert worst(usual_run(100, garbled), 1) == [9001]
    assert worst(usual_run(100, garbled | {"bytes": 0}), 1) != [9001]  # no tokenizer, no bytes


def test_a_document_counts_with_the_mean_of_all_times_and_pieces() -> None:
    once = [{"step": 20, "example_id": 9001, "mean": 9.0}, {"step": 80, "example_id": 9001, "mean": 2.4}]
    always = [{"step": step, "example_id": 9002, "mean": 7.5} for step in (20, 80)]
    found = ranked(usual_run(100, *once, *always))
    assert found.example_id[:2].tolist() == [9002, 9001]
    assert (found.seen[0], found.first[0], found.last[0], found.trained[0]) == (2, 20, 80, 80)


def test_weights_change_no_place() -> None:
    page = {"step": 50, "example_id": 9002, "mean": 5.0}
    heavy = {"step": 50, "example_id": 9001, "mean": 3.0, "weighs": 10}
    assert worst(usual_run(100, page, heavy), 2)[0] == 9002


def test_what_is_no_number_comes_first_and_what_trains_nothing_is_left_out() -> None:
    broken = {"step": 50, "example_id": 9001, "mean": float("inf")}
    empty = {"step": 50, "example_id": 9002, "trained": 0, "bytes": 0, "mean": 0.0}
    found = ranked(usual_run(100, broken, empty))
    assert found.example_id[0] == 9001
    assert 9002 not in found.example_id
    assert np.isfinite(found.score[1:]).all()


def test_sets_keep_their_examples_apart() -> None:
    same = [
        {"step": 50, "set": number, "example_id": 400, "mean": mean} for number, mean in ((0, 2.6), (1, 9.0))
    ]
    found = ranked(usual_run(100, *same))
    assert (found.set[0], found.example_id[0]) == (1, 400)


def test_the_losses_of_a_step_are_its_documents_and_a_jump_is_a_spike() -> None:
    jump = [
        {"step": 60, "example_id": 9001, "mean": 30.0},
        {"step": 60, "example_id": 9002, "mean": 12.0, "trained": 200},
    ]
    log = log_of(usual_run(100, *jump))
    steps = find_steps(log)
    for index, step in enumerate(steps.step.tolist()):
        here = log.step == step
        assert steps.loss[index] == np.sum(log.loss[here], dtype=float) / np.sum(
            log.weight[here], dtype=float
        )
    assert steps.step[steps.spike].tolist() == [60]
    found, raised = rank_step(log, find_excess(log), 60)
    assert found.example_id[:2].tolist() == [9002, 9001]  # more tokens raise the step more
    usual = steps.before[59]
    assert np.isclose(steps.loss[59] - usual, raised.sum(), atol=0.2)


def test_an_empty_log_ranks_nothing() -> None:
    assert len(ranked([])) == 0
    assert len(find_steps(log_of([])).step) == 0
