"""A dozen rounds of what `python -m tests.torture.changes` plays by the hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.changes import play


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [12, pytest.param(300, marks=pytest.mark.torture)])
def test_whatever_changes_while_a_run_goes_on_a_set_is_of_one_version(place: Path, rounds: int) -> None:
    assert play(place, rounds, seed=rounds).total() == rounds
