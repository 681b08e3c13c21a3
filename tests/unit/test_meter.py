"""Progress: lines where there is no terminal, a bar where there is one, nothing that acts on either."""

from __future__ import annotations

import io
import sys

import pytest

from sftdata import output
from sftdata.output import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def test_a_line_is_written_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    shown = Meter("{done}/{total} slices")
    for second in range(1, 26):
        clock[0] = 100.0 + second
        shown.show(second, 100, "7 tokens")
    assert capsys.readouterr().err.splitlines() == [
        "10/100 slices, 7 tokens, 0:01:30 left",
        "20/100 slices, 7 tokens, 0:01:20 left",
    ]


def test_what_was_done_before_says_nothing_about_speed(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Meter("step {done}/{total}", before=50)
    clock[0] += 2
    shown.show(51, 100, "", line=True)
    assert capsys.readouterr().err == "step 51/100, 0:01:38 left\n"


def test_a_bar_is_drawn_on_a_terminal_and_sentences_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Meter("{done}/{total} slices")
    shown.show(1, 2, "[red]seven[/red] tokens")
    shown.write("a \x1b[31mnote\nof two lines [b]")
    shown.show(2, 2, "eight tokens")
    shown.close()
    written = terminal.getvalue()
    assert "1/2 slices, [red]seven[/red] tokens" in written
    assert "a ␛[31mnote␊of two lines [b]" in written
    assert "2/2 slices, eight tokens" in written
    shown.write("done")
    assert terminal.getvalue().endswith("done\n")
