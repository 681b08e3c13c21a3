"""The report of a run: one page that needs nothing from outside, told by the log alone, for any log there may be."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftdata.errors import UsageError
from sfttrain.cli import main
from sfttrain.report import Curve, line_chart, make_report, nice_ticks, read_log
from tests.run_logs import write_log
from tests.train_sets import make_set


def write_run(folder: Path, lines: list[dict[str, Any]], *, finished: bool = True) -> Path:
    folder.mkdir()
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "run.json").write_text(json.dumps({"finished": True, "model": "tiny", "sets": ["ab" * 32]}))
        (folder / "settings.yaml").write_text(
            "model: tiny\nlora: {r: 16}\ntraining: {learning_rate: 0.001, seed: 42}\n"
        )
    return folder


def logged(step: int, loss: float) -> dict[str, Any]:
    figures = {
        "grad_norm": 1.0,
        "learning_rate": 0.001,
        "tokens": 100 * step,
        "seconds": 2.0,
        "tokens_per_second": 50.0,
    }
    return {"step": step, "loss": loss, **figures}


class Page(HTMLParser):
    """Collect what could reach outside, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        reaching = tag in {"script", "link", "img", "iframe", "object", "base", "form"}
        self.outside += [tag] * reaching + [
            name for name, _ in attrs if name in {"src", "href"} or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_the_figures_of_the_log(tmp_path: Path) -> None:
    lines = [logged(step, 4.0 / step) for step in range(1, 9)]
    lines += [
        {"step": 4, "eval_held_out_loss": 2.5},
        {"step": 8, "eval_held_out_loss": 3.5, "eval_held_out_runtime": 9.0},
    ]
    page = Page(make_report(write_run(tmp_path / "run", lines)))
    for told in (
        "0.5",
        "loss, from 4",
        "800",
        "0:00:16",
        "held_out loss",
        "2.5 at step 4",
        "3.5",
        "r=16",
        "learning_rate",
    ):
        assert told in " ".join(page.text.split()), told
    assert "runtime" not in page.text
    assert not page.outside


def test_names_of_sets_cannot_act_on_the_page(tmp_path: Path) -> None:
    html = make_report(
        write_run(tmp_path / "run", [logged(1, 1.0), {"step": 1, "eval_<script>alert(1)</script>_loss": 1.0}])
    )
    assert not Page(html).outside
    assert "<script>alert(1)</script>" in Page(html).text


def test_a_run_that_goes_on_has_a_report_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [logged(1, 2.0), logged(2, 1.0)], finished=False)
    with (folder / "train_log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_log(folder / "train_log.jsonl")] == [1, 2]
    assert "Not finished" in Page(make_report(folder)).text


def test_values_that_are_no_numbers_are_told_and_leave_a_gap(tmp_path: Path) -> None:
    html = make_report(
        write_run(
            tmp_path / "run", [logged(1, 2.0), logged(2, math.nan), logged(3, math.inf), logged(4, 1.0)]
        )
    )
    assert "2 logged values are no finite number" in Page(html).text
    assert "nan" not in "".join(re.findall(r'points="([^"]*)"', html))


def test_a_run_that_logged_nothing_has_a_report_all_the_same(tmp_path: Path) -> None:
    assert "Nothing was logged" in Page(make_report(write_run(tmp_path / "run", []))).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"no train_log\.jsonl"):
        make_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "Fix: name the folder of a run" in capsys.readouterr().err


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", [logged(1, 2.0)])
    assert main(["report", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!doctype html>")


# ------------------------------------------------------------------------------------------------------ curves


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_are_even_and_enclose_the_values(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high)
    steps = {round((right - left) / (ticks[1] - ticks[0]), 6) for left, right in pairwise(ticks)}
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert steps == {1.0}
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert len(ticks) <= 8


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_the_highest_and_the_lowest_value_are_drawn_however_many_there_are(values: list[float]) -> None:
    chart = line_chart([Curve("loss", "trained", list(enumerate(values)), noisy=False)])
    assert chart is not None
    heights = [float(point.split(",")[1]) for _, points in chart.strokes for point in points.split()]
    ticks = nice_ticks(min(values), max(values))
    for value in (min(values), max(values)):
        wanted = 100 * (ticks[-1] - value) / (ticks[-1] - ticks[0])
        assert min(abs(height - wanted) for height in heights) < 0.01
    assert len(heights) <= 1100
    assert all(-0.01 <= height <= 100.01 for height in heights)


# ------------------------------------------------------------------------------------------ documents


def test_a_run_that_logged_documents_shows_the_worst_and_its_spikes(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", rows=60)
    run = write_run(tmp_path / "run", [logged(1, 2.0)])
    assert "Worst documents" not in make_report(run)

    def loss(number: int, source: str, line: int, step: int) -> float:
        return 2.0 + 0.01 * (line % 7) + 5 * (line == 40) + 3 * (step == 30)

    write_log(run, [shards], loss, epochs=4)
    page = Page(make_report(run))
    assert not page.outside
    told = page.text.partition("Worst documents")[2].partition("Settings")[0]
    assert "drawn:40" in told
    assert "step 30" in told


def test_documents_of_a_set_that_is_gone_have_no_names_and_the_page_says_why(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set")
    run = write_run(tmp_path / "run", [logged(1, 2.0)])
    write_log(run, [shards], lambda *_: 2.0)
    shards.rename(tmp_path / "<moved>")
    page = Page(make_report(run))
    assert "was trained on a set of digest" in page.text
    assert "--sets DIR" in page.text
    assert not page.outside
