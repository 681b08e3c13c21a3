"""Planning grows as the number of files does, says how far it is, and stays brief about many of them."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sftdata
from sftdata import workers
from sftdata.config import make_config
from sftdata.errors import UsageError
from sftdata.sources import planning
from sftdata.sources.chunks import Source, SourcePlan
from sftdata.sources.planning import grouped, plan_inputs, short_names, with_progress
from sftdata.sources.ranges import Sizes
from sftdata.sources.remote import State
from tests.waiting import HANGS

TOKENIZER = Path(__file__).parents[2] / "examples" / "tokenizer"


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


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (["a.jsonl", "a.jsonl"], "a.jsonl: named twice."),
        (["a.jsonl", "b.jsonl", "./a.jsonl"], "a.jsonl: named twice, as a.jsonl and as ./a.jsonl."),
        (["a.jsonl", "{here}/a.jsonl"], "{here}/a.jsonl: named twice, as a.jsonl and as {here}/a.jsonl."),
        (["*.jsonl", "b.jsonl"], "b.jsonl: named twice, as *.jsonl and as b.jsonl."),
        ([".", "b.jsonl"], "b.jsonl: named twice, as . and as b.jsonl."),
        (["link.jsonl", "c.jsonl.gz", "a.jsonl"], "a.jsonl: named twice, as link.jsonl and as a.jsonl."),
        (["file://{here}/a.jsonl", "a.jsonl"], "a.jsonl: named twice, as {here}/a.jsonl and as a.jsonl."),
    ],
)
def test_rows_are_never_taken_twice_in_silence(
    inputs: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path(f"{name}.jsonl").write_text('{"text": "T"}\n')
    Path("c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "T"}\n'))
    Path("d").mkdir()
    Path("d/a.jsonl").write_text('{"text": "T"}\n')  # of the same name and rows, and another file
    if "link.jsonl" in inputs:
        Path("link.jsonl").symlink_to("a.jsonl")
    given = [name.format(here=tmp_path) for name in inputs]
    sizes = Sizes(1 << 20, 1 << 20)
    for split in (None, "train"):
        with pytest.raises(UsageError) as caught:
            plan_inputs(given, split, None, sizes)
        assert str(caught.value).startswith(f"{said.format(here=tmp_path)} Fix: name it once; mix=")
    assert len(plan_inputs(["a.jsonl", "d"], None, None, sizes)[0]) == 2


def test_the_same_row_is_repeated_by_a_mixture_as_the_advice_on_doubles_says(tmp_path: Path) -> None:
    data, more = tmp_path / "rows.jsonl", {"tokenizer": str(TOKENIZER), "max_length": 64}
    data.write_text('{"text": "T"}\n')
    with pytest.raises(UsageError, match=r'rows\.jsonl: named twice\. .*mix={"NAME": SHARE} with passes=2'):
        sftdata.prepare([data, data], output=tmp_path / "set", **more)
    made = sftdata.prepare(data, output=tmp_path / "set", mix={"rows.jsonl": 1}, passes=2, **more)
    assert [source.name for source in made.sources] == ["rows.jsonl", "rows.jsonl#2"]


def test_a_source_of_the_registry_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "T"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "T"}\n')
    (tmp_path / "registry.yaml").write_text(f"chats: {{path: {tmp_path}/a.jsonl}}\n")
    more = {"tokenizer": str(TOKENIZER), "registry": tmp_path / "registry.yaml"}
    with pytest.raises(UsageError, match=r"^chats: named twice\. "):
        sftdata.prepare(["chats", tmp_path / "b.jsonl", "chats"], output=tmp_path / "set", **more)


def test_objects_are_opened_several_at_a_time_and_in_order() -> None:
    urls, together = [f"s3://bucket/{number}.jsonl" for number in range(6)], threading.Barrier(2)

    def opened(url: str) -> Source:
        together.wait(HANGS)
        return Source(url, "jsonl")

    assert [source.path for source in planning._opened(urls, opened, lambda _: None)] == urls

    def refused(url: str) -> Source:
        raise UsageError(f"{url}: not there.")

    with pytest.raises(UsageError, match=r"0\.jsonl: not there"):
        planning._opened(urls, refused, lambda _: None)


def test_of_very_many_objects_some_are_asked_for_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    urls = [f"s3://bucket/{number}.jsonl" for number in range(1000)]

    def state(url: str) -> State:
        asked.append(url)
        return State(1000, "")

    monkeypatch.setattr(workers, "state_of", state)
    config = make_config(inputs=urls, tokenizer="t", output="o")
    assert workers._input_bytes(config) == 992_000
    assert len(asked) == workers.ASKED
