"""`sftdata blame`: the documents that a run found hardest, by file and line, in lists that `view --drop` takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdata.blame import named
from sftdata.blame.log import log_batch, log_path, log_schema, read_log
from sftdata.cli import main
from sftdata.set.opened import open_set
from tests.run_logs import write_log
from tests.view_sets import chats, prepare, view, write_lines

BAD = {("one", 7), ("one", 31), ("two", 12), ("two", 57)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets whose sources have the same name."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed in (("one", 1), ("two", 2)):
        (folder / f"in-{name}").mkdir()
        rows = [row for row in chats(90, seed) if "weight" not in row["messages"][0]]
        path = write_lines(folder / f"in-{name}" / "rows.jsonl", rows)
        prepare(folder / name, [path])
    return folder


def loss_of(bad: set[tuple[int, int]], seed: int = 0) -> Any:
    """Losses that fall with the steps and vary; bad lines lose 4 more."""
    rng = np.random.default_rng(seed)

    def loss(number: int, source: str, line: int, step: int) -> float:
        return float(2 + 3 / step + rng.normal() * 0.2 + 4 * ((number, line) in bad))

    return loss


@pytest.fixture
def run(sets: Path, tmp_path: Path) -> Path:
    """A run on both sets."""
    bad = {(int(name == "two"), line) for name, line in BAD}
    write_log(tmp_path / "run", [sets / "one", sets / "two"], loss_of(bad))
    return tmp_path / "run"


def blame(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["blame", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def worst(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    code, out, err = blame(capsys, *arguments, "--json")
    assert code == 0, err
    return list(json.loads(out)["documents"])


def lines_left(folder: Path) -> set[tuple[str, int]]:
    opened = open_set(folder)
    return {
        opened.origin(document.example_id) for row in opened for document in row.documents()
    }  # fmt: skip


@pytest.mark.feature("losses of documents")
def test_bad_lines_are_named_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = worst(capsys, run, "--worst", "4")
    assert {(Path(one["set"]).name, one["line"]) for one in found} == BAD
    for one in found:
        assert one["source"] == "rows.jsonl"
        assert one["place"] == f"{Path(one['set']).name}/rows.jsonl:{one['line']}"
        assert one["over"] == pytest.approx(4, abs=1)
        assert one["seen"] == 2
        opened = open_set(one["set"])
        assert one["example_id"] in opened[one["row"]].examples
        assert one["excerpt"]
    code, out, _ = blame(capsys, run, "--worst", "4")
    assert code == 0
    assert all(f"{name}/rows.jsonl:{line} " in out for name, line in BAD)


def test_a_list_for_drop_leaves_out_these_lines_and_no_others(
    sets: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = blame(capsys, run, "--worst", "4", "-o", tmp_path / "bad.txt")
    assert code == 0
    assert (tmp_path / "bad.txt").read_text().count("\n") == 4
    command = err.partition("Leave them out: sftdata ")[2].split()
    assert main([str(tmp_path / "new") if part == "NEW" else part for part in command]) == 0
    whole = view(tmp_path / "whole", sets / "one", sets / "two")
    left, all_of = lines_left(tmp_path / "new"), lines_left(tmp_path / "whole")
    assert all_of - left == {(f"{name}/rows.jsonl", line) for name, line in BAD}
    assert whole.ledger.documents > len(left)


def test_a_list_of_documents_of_one_set_is_for_a_view_of_it_alone(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "run", [sets / "one", sets / "two"], loss_of({(1, 12)}))
    code, _, err = blame(capsys, tmp_path / "run", "--worst", "1", "-o", tmp_path / "bad.txt")
    assert code == 0
    assert f"sftdata view {sets / 'two'} -o NEW" in err
    assert (tmp_path / "bad.txt").read_text() == "rows.jsonl:12\n"


def test_after_a_new_leg_the_list_is_for_its_sets_and_leaves_out_what_an_earlier_set_lost_too(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first.txt").write_text("rows.jsonl:31\n")
    view(tmp_path / "cleaned", sets / "one", drop=tmp_path / "first.txt")
    write_log(tmp_path / "run", [sets / "one"], loss_of({(0, 31), (0, 7)}))
    write_log(tmp_path / "run", [tmp_path / "cleaned"], loss_of(set()), behind=100)
    code, _, err = blame(capsys, tmp_path / "run", "--worst", "2", "-o", tmp_path / "bad.txt")
    assert code == 0
    assert f"Leave them out: sftdata view {tmp_path / 'cleaned'} -o NEW" in err
    assert {*(tmp_path / "bad.txt").read_text().split()} == {"rows.jsonl:7", "rows.jsonl:31"}
    view(tmp_path / "new", tmp_path / "cleaned", drop=tmp_path / "bad.txt")
    assert lines_left(sets / "one") - lines_left(tmp_path / "new") == {("rows.jsonl", 7), ("rows.jsonl", 31)}


def test_what_the_sets_of_a_new_leg_do_not_hold_is_said_and_not_listed(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "run", [sets / "one", sets / "two"], loss_of({(0, 7), (1, 12)}))
    write_log(tmp_path / "run", [sets / "one"], loss_of({(0, 7)}), behind=100)
    code, _, err = blame(capsys, tmp_path / "run", "--worst", "2", "-o", tmp_path / "bad.txt")
    assert code == 0
    assert f": 1 document. Leave them out: sftdata view {sets / 'one'} -o NEW" in err
    assert "1 of those named is in none of these sets, and not listed." in err
    assert (tmp_path / "bad.txt").read_text() == "rows.jsonl:7\n"


def test_documents_of_an_earlier_leg_whose_set_is_gone_are_counted_and_the_others_are_named(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sets / "one", tmp_path / "first")
    view(tmp_path / "second", tmp_path / "first", write=False)  # its rows lie in the first
    shutil.copytree(sets / "two", tmp_path / "third")
    run = tmp_path / "run"
    write_log(run, [tmp_path / "first"], loss_of({(0, 31)}), epochs=1)
    write_log(
        run, [tmp_path / "second", tmp_path / "third"], loss_of({(0, 7), (1, 12)}), behind=100, epochs=1
    )
    assert len(worst(capsys, run, "--worst", "3")) == 3
    digest = open_set(tmp_path / "first").manifest.digest[:12]
    shutil.rmtree(tmp_path / "first")
    code, out, err = blame(capsys, run, "--json", "--worst", "1", "-o", tmp_path / "bad.txt")
    assert code == 0, err
    found = json.loads(out)
    assert [(one["place"], one["line"]) for one in found["documents"]] == [("rows.jsonl:12", 12)]
    assert (tmp_path / "bad.txt").read_text() == "rows.jsonl:12\n"
    assert f"sftdata view {tmp_path / 'third'} -o NEW" in err
    first, second = found["unnamed"]
    assert f"was trained on a set of digest {digest}, which is not there: " in first
    assert f"{tmp_path / 'first'}: no such folder. 82 documents have no name here" in first
    assert f"{tmp_path / 'second'}: a view by index of {tmp_path / 'first'}" in second
    assert blame(capsys, run)[1].splitlines()[-2:] == [first, second]
    at = json.loads(blame(capsys, run, "--step", "1", "--json")[1])  # a step of the first leg alone
    assert (at["documents"], at["unnamed"]) == ([], [first, second])
    shutil.copytree(sets / "one", tmp_path / "elsewhere")
    given = worst(capsys, run, "--worst", "2", "--sets", tmp_path / "elsewhere")
    assert {Path(one["set"]).name for one in given} == {"elsewhere", "third"}
    shutil.rmtree(tmp_path / "third")
    code, _, err = blame(capsys, run)
    assert code == 2
    assert "which is not there" in err


def test_of_one_set_it_is_a_list_of_its_own_names(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "run", [sets / "one"], loss_of({(0, 31)}))
    assert blame(capsys, tmp_path / "run", "--worst", "1", "-o", tmp_path / "bad.txt")[0] == 0
    assert (tmp_path / "bad.txt").read_text() == "rows.jsonl:31\n"


def test_a_line_that_a_mixture_goes_through_again_is_one_document_and_is_left_out_each_time(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    view(mixed, sets / "one", mix={"rows.jsonl": 1.0}, passes=3, total="14k trained", max_length=512)
    names = [source.name for source in open_set(mixed).manifest.sources]
    assert names[:2] == ["rows.jsonl", "rows.jsonl#2"]
    write_log(tmp_path / "run", [mixed], loss_of({(0, 31)}), epochs=1)
    (found,) = worst(capsys, tmp_path / "run", "--worst", "1", "-o", tmp_path / "bad.txt")
    assert (found["place"], found["seen"]) == (
        "rows.jsonl:31",
        len([line for _, line in _all(mixed) if line == 31]),
    )
    assert found["seen"] >= 2
    view(tmp_path / "again", mixed, drop=tmp_path / "bad.txt")
    assert set(_all(mixed)) - set(_all(tmp_path / "again")) == {(name, 31) for name in names[: found["seen"]]}
    view(tmp_path / "base", sets / "one", drop=tmp_path / "bad.txt")
    assert lines_left(sets / "one") - lines_left(tmp_path / "base") == {("rows.jsonl", 31)}


def _all(folder: Path) -> list[tuple[str, int]]:
    opened = open_set(folder)
    return [opened.origin(document.example_id) for row in opened for document in row.documents()]


def test_a_view_of_two_sets_names_the_lines_of_both(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view(tmp_path / "both", sets / "one", sets / "two")

    def loss(number: int, source: str, line: int, step: int) -> float:
        return 2.0 + 0.1 * (line % 3) + 4 * ((source, line) == ("two/rows.jsonl", 12))

    write_log(tmp_path / "run", [tmp_path / "both"], loss)
    (found,) = worst(capsys, tmp_path / "run", "--worst", "1")
    assert found["place"] == "two/rows.jsonl:12"


def test_the_documents_of_a_step_are_named_by_how_much_they_raised_it(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, jump = tmp_path / "run", 25

    def loss(number: int, source: str, line: int, step: int) -> float:
        return 2.0 + 0.01 * (line % 5) + 6 * (step == jump and line % 2)

    write_log(run, [sets / "one"], loss, a_step=6)
    code, out, err = blame(capsys, run, "--step", str(jump), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["step"] == jump
    documents = found["documents"]
    raised = [one["raised"] for one in documents]
    assert raised == sorted(raised, reverse=True)
    assert found["loss"] - 2.02 == pytest.approx(sum(raised), abs=0.05)
    assert all((one["line"] % 2 == 1) == (one["over"] > 3) for one in documents)
    whole = json.loads(blame(capsys, run, "--json")[1])
    assert [spike["step"] for spike in whole["spikes"]] == [jump]
    assert whole["spikes"][0]["documents"] == documents[:3]
    assert f"step {jump}" in blame(capsys, run)[1]


def test_a_log_is_held_against_itself_once_however_often_its_loss_jumps(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(number: int, source: str, line: int, step: int) -> float:
        return 2.0 + 0.01 * (line % 5) + 6 * (step in (12, 16, 20))

    calls, find = [], named.find_excess
    monkeypatch.setattr(named, "find_excess", lambda losses: calls.append(len(losses)) or find(losses))
    write_log(tmp_path / "run", [sets / "one"], loss, a_step=6)
    found = json.loads(blame(capsys, tmp_path / "run", "--json")[1])
    assert [spike["step"] for spike in found["spikes"]] == [12, 16, 20]
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["#rows.jsonl", "two\nlines.jsonl", " rows.jsonl", "\x1b[31mred.jsonl"])
def test_a_name_that_no_list_can_hold_is_listed_by_its_example_and_shown_in_one_line(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes((sets / "in-one/rows.jsonl").read_bytes())
    prepare(tmp_path / "set", [tmp_path / name])
    write_log(tmp_path / "run", [tmp_path / "set"], loss_of({(0, 31)}))
    code, out, _ = blame(capsys, tmp_path / "run", "--worst", "1", "-o", tmp_path / "bad.txt")
    assert code == 0
    assert len([line for line in out.splitlines() if "loss" in line and "score" in line]) == 1
    assert "\x1b" not in out
    view(tmp_path / "clean", tmp_path / "set", drop=tmp_path / "bad.txt")
    assert {line for _, line in lines_left(tmp_path / "set") - lines_left(tmp_path / "clean")} == {31}


def test_a_step_that_was_not_logged_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = blame(capsys, run, "--step", "100000")
    assert code == 2
    assert "no documents of step 100000; it logged those of steps 1 to" in err
    last = err.partition("steps 1 to ")[2].partition(".")[0]
    assert blame(capsys, run, "--step", last)[0] == 0


def test_of_a_step_that_trained_nothing_no_list_is_made(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "run", [sets / "one"], loss_of(set()))
    trained_on, losses = read_log(tmp_path / "run")
    trains = losses.step != 3
    masked = replace(
        losses, **{name: getattr(losses, name) * trains for name in ("trained", "weight", "loss")}
    )
    schema = log_schema(trained_on)
    log_path(tmp_path / "run", 0, 0).write_bytes(
        bytes(schema.serialize()) + bytes(log_batch(masked, schema).serialize())
    )
    code, _, err = blame(capsys, tmp_path / "run", "--step", "3", "-o", tmp_path / "bad.txt")
    assert code == 2
    assert "nothing was trained there that could be listed. Fix: leave -o out." in err
    assert not (tmp_path / "bad.txt").exists()
    assert blame(capsys, tmp_path / "run", "--step", "3")[0] == 0


def test_a_loss_that_is_no_number_comes_first(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = loss_of({(0, 7)})
    write_log(tmp_path / "run", [sets / "one"], lambda *at: float("nan") if at[2] == 31 else usual(*at))
    found = worst(capsys, tmp_path / "run", "--worst", "2")
    assert [one["line"] for one in found] == [31, 7]
    assert (found[0]["loss"], found[0]["score"]) == (None, None)
    assert "no finite number" in blame(capsys, tmp_path / "run")[1]


def test_runs_and_sets_are_found_where_they_were_moved(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sets, tmp_path / "data")
    write_log(tmp_path / "run", [tmp_path / "data/one"], loss_of({(0, 31)}))
    (tmp_path / "run").rename(tmp_path / "other")
    assert worst(capsys, tmp_path / "other", "--worst", "1")[0]["line"] == 31
    (tmp_path / "other").rename(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("run", "data"):
        (tmp_path / name).rename(elsewhere / name)
    assert worst(capsys, elsewhere / "run", "--worst", "1")[0]["line"] == 31
    (elsewhere / "data/one").rename(tmp_path / "moved")
    code, _, err = blame(capsys, elsewhere / "run")
    digest = open_set(tmp_path / "moved").manifest.digest[:12]
    assert code == 2
    assert f"was trained on a set of digest {digest}, which is not there" in err
    assert "elsewhere/data/one" in err
    assert "--sets DIR" in err
    assert worst(capsys, elsewhere / "run", "--worst", "1", "--sets", tmp_path / "moved")[0]["line"] == 31
    (elsewhere / "data/two").rename(elsewhere / "data/one")
    assert "holds another set" in blame(capsys, elsewhere / "run")[2]
    code, _, err = blame(capsys, elsewhere / "run", "--sets", elsewhere / "data/one")
    assert code == 2
    assert f"was trained on {digest}" in err


def test_a_folder_without_a_log_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = blame(capsys, tmp_path)
    assert code == 2
    assert "holds no losses of documents" in err
