"""Planning grows as the number of files does, says how far it is, and stays brief about many of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from sftdata.sources.chunks import SourcePlan
from sftdata.sources.planning import grouped, plan_inputs, short_names, with_progress
from sftdata.sources.ranges import Sizes


def planned(folder: Path, files: int) -> tuple[int, list[SourcePlan]]:
    """Return how many calls it takes, of Python's functions and of C's, to plan and name so many files."""
    folder.mkdir()
    for number in range(files):
        (folder / f"rows-{number:05}.jsonl").write_text(json.dumps({"text": str(number)}) + "\n")
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        plans, _ = plan_inputs([str(folder)], None, None, Sizes(1 << 20, 1 << 20))
        short_names([plan.source.path for plan in plans])
    finally:
        sys.setprofile(None)
    return calls, plans


def test_four_times_the_files_take_four_times_the_calls(tmp_path: Path) -> None:
    planned(tmp_path / "warm", 2)
    few, _ = planned(tmp_path / "few", 100)
    many, plans = planned(tmp_path / "many", 400)
    assert len(plans) == 400
    assert many < 4.4 * few


def test_a_long_plan_says_how_far_it_is() -> None:
    said: list[str] = []
    assert list(with_progress(range(3), said.append, "Read", seconds=0)) == [0, 1, 2]
    assert said == ["Read 0 of 3 inputs.", "Read 1 of 3 inputs.", "Read 2 of 3 inputs."]
    assert list(with_progress(range(3), said.append, "Read", seconds=1e9)) == [0, 1, 2]
    assert len(said) == 3


def test_what_is_true_of_many_files_is_said_once() -> None:
    said = [
        (f"{number}.jsonl", [f"{number}.jsonl: text.", *([f"{number}.jsonl: empty."] if number == 7 else [])])
        for number in range(50)
    ]
    assert grouped(said) == ["0.jsonl and 49 more files: text.", "7.jsonl: empty."]
    assert grouped(said[:10]) == [line for _, lines in said[:10] for line in lines]
