"""Every number of stats is the ledger's, every part adds up, and the report is one page that needs nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftdata.pages import macro
from sftdata.set.ledger import Ledger, length_bins
from sftdata.show.audit import audit_set
from sftdata.show.report import make_report
from sftdata.show.stats import (
    LengthBin,
    Part,
    histogram_of,
    length_histogram,
    measure,
    ribbon,
    spread,
    stats_json,
)
from sftdata.show.terminal import make_console, print_stats
from sftdata.show.view import ShownSet, open_shown
from tests.shown_sets import CHAT, encode_marked, write_set

ROWS = [CHAT.format("What is it? " * (number % 5 + 1), "This. " * (number % 3 + 1)) for number in range(30)]


@pytest.fixture
def shards(tmp_path: Path) -> ShownSet:
    folder = write_set(
        tmp_path / "set", [*ROWS, CHAT.format("<b>x</b>", "\x1b[31m")], cut=17, counters={"rows_cut": 2}
    )
    return open_shown(folder)


# ------------------------------------------------------------------------------------------------- numbers


def test_the_numbers_are_those_of_the_labels(shards: ShownSet) -> None:
    encoded = [encode_marked(row)[1] for row in [*ROWS, CHAT.format("<b>x</b>", "\x1b[31m")]]
    trained, total = sum(map(sum, encoded)), sum(map(len, encoded))
    stats = measure(shards.manifest)
    assert stats.tokens == (
        Part("trained", "trained", trained),
        Part("context", "context", total - trained),
        Part("cut: truncate", "lost", 17),
    )
    assert sum(part.count for part in stats.slots) == stats.rows_packed * 96
    assert stats.fill == total / (stats.rows_packed * 96)
    assert stats.trained_share == trained / total
    assert [(source.name, source.rows, source.tokens) for source in stats.sources] == [
        ("data.jsonl", 31, total)
    ]


def test_the_parts_of_every_bar_add_up_to_the_laws(shards: ShownSet) -> None:
    stats, ledger = measure(shards.manifest), shards.manifest.ledger
    assert sum(part.count for part in stats.rows) == ledger.rows_in
    assert sum(part.count for part in stats.tokens) == ledger.tokens_in


def test_json_is_the_whole(shards: ShownSet) -> None:
    told = stats_json(shards.manifest)
    assert told["manifest"]["ledger"] == shards.manifest.ledger.to_json()
    assert told["stats"]["digest"] == shards.manifest.digest


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=50))
def test_the_histogram_holds_every_length_once_and_has_no_gaps(lengths: list[int]) -> None:
    ledger = Ledger()
    ledger.count_lengths(np.array(lengths))
    bins = length_histogram(ledger.lengths)
    assert [sum(found.start <= length < found.stop for length in lengths) for found in bins] == [
        found.examples for found in bins
    ]
    assert all(left.stop == right.start for left, right in pairwise(bins))
    assert sum(found.examples for found in bins) == len(lengths)
    assert set(length_bins(np.array(lengths)).tolist()) <= {found.start for found in bins}


# -------------------------------------------------------------------------------------------------- charts


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6))
def test_parts_take_stretches_that_follow_each_other_to_the_end(counts: list[int]) -> None:
    stretches = spread([Part("p", "kept", count) for count in counts])
    assert stretches[0][0] == 0
    assert all(left[1] == right[0] for left, right in pairwise(stretches))
    assert stretches[-1][1] == pytest.approx(1 if sum(counts) else 0)


def test_a_part_of_nothing_draws_nothing() -> None:
    html = macro("charts.html.jinja", "bar")([Part("trained", "trained", 5), Part("c", "context", 0)])
    assert re.findall(r'<i class="(\w+)"', html) == ["trained"]


def drawn(bins: Sequence[LengthBin], max_length: int | None) -> str:
    return macro("charts.html.jinja", "histogram")(histogram_of(bins, max_length))


@pytest.mark.parametrize(("max_length", "place"), [(16, 0), (32, 8 / 16), (40, 10 / 16), (2, 0)])
def test_the_line_stands_where_rows_are_cut(max_length: int, place: float) -> None:
    bins = length_histogram({16: 3, 60: 1})
    (found,) = re.findall(r'class="limit[^"]*" style="left:([\d.]+)%', drawn(bins, max_length))
    assert float(found) == pytest.approx(100 * place)


def test_the_line_is_seen_where_all_examples_are_shorter() -> None:
    html = drawn([LengthBin(16, 18, 3)], 64)
    (found,) = re.findall(r'class="limit[^"]*" style="left:([\d.]+)%', html)
    assert 0 < float(found) < 100


def test_bars_beyond_the_line_are_marked_as_lost() -> None:
    html = drawn(length_histogram({16: 3, 32: 2}), 32)
    assert re.findall(r'<i class="(\w+)" style="height:100\.00%', html) == ["trained"]
    assert html.count('class="lost"') == 1


def test_a_ribbon_ends_where_it_should() -> None:
    path = "M0.000 0C0.000 11 50.000 9 50.000 20L100.000 20C100.000 9 25.000 11 25.000 0Z"
    assert ribbon((0, 0.25), (0.5, 1)) == path


# -------------------------------------------------------------------------------------------------- report


def report_on(shards: ShownSet) -> str:
    return make_report(shards, audit_set(shards))


class Page(HTMLParser):
    """Check that tags close, and collect what could reach outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br", "path"}:
            self.open.append(tag)
        reaching = tag in {"script", "link", "img", "iframe", "object", "base", "form"}
        self.outside += [tag] * reaching + [
            name for name, _ in attrs if name in {"src", "href", "action"} or name.startswith("on")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_reaches_nowhere(shards: ShownSet) -> None:
    html, page = report_on(shards), Page()
    page.feed(html)
    assert page.open == []
    assert page.outside == []
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_the_report_tells_all_there_is(shards: ShownSet) -> None:
    page = Page()
    page.feed(report_on(shards))
    for words in (
        "From rows to trained tokens",
        "max_length 96",
        "data.jsonl",
        "cut: truncate",
        "duplicate-prompt",
        "What is it?",
    ):
        assert words in page.text
    assert shards.manifest.digest[:16] in page.text


def test_the_report_tells_what_the_audit_found(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [CHAT.format("Hi", "Hello"), "<|im_start|>user\nHo⟦ no end⟧"])
    page = Page()
    page.feed(report_on(open_shown(folder)))
    assert "no-trained-end" in page.text
    assert "data.jsonl:2" in page.text


def test_names_from_outside_are_escaped_in_the_report(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "<img src=x>", ROWS, name="<script>bad()</script>", counters={"<i>": 1})
    page = Page()
    page.feed(report_on(open_shown(folder)))
    assert page.outside == []
    assert "<script>bad()</script>" in page.text


def test_the_report_is_the_same_for_the_same_set(shards: ShownSet) -> None:
    assert report_on(shards) == report_on(open_shown(shards.folder))


# -------------------------------------------------------------------------------------------------- terminal


def test_the_terminal_tells_parts_by_glyph_and_draws_the_line(shards: ShownSet) -> None:
    out = io.StringIO()
    print_stats(measure(shards.manifest), "set", make_console(out, 100))
    text = out.getvalue()
    assert "\x1b" not in text
    for words in (
        "rows in",
        "tokens in",
        "█ trained",
        "▒ context",
        "╱ cut: truncate",
        "── max_length 96",
        "data.jsonl",
        "rows cut",
    ):
        assert words in text
