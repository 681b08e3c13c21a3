"""What is said of a view's split, shares, repeats and steps is what its ledger, its rows and its settings say."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import IntegrityError
from sftdata.set.manifest import Manifest, read_manifest, seal
from sftdata.set.steps import measure_balance
from sftdata.show.audit import audit_set
from sftdata.show.choice import choices_of, shares_of, tell_shares
from sftdata.show.report import make_report
from sftdata.show.stats import flow_of, measure, ribbon
from sftdata.show.view import open_shown
from tests.view_sets import chats, prepare, view, write_lines

NAMES = ("a.jsonl", "b.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    prepare(folder / "base", [write_lines(folder / name, chats(60, ord(name[0]), 30)) for name in NAMES])
    return folder / "base"


def counted(manifest: Manifest) -> dict[str, list[int]]:
    """Return rows, tokens and trained tokens of each source, all passes together, from the ledger."""
    found = {name: [0, 0, 0] for name in NAMES}
    for name, own in manifest.ledger.sources.items():
        for index, count in enumerate((own.rows, own.tokens, own.tokens_trained)):
            found[name.partition("#")[0]][index] += count
    return found


@pytest.mark.parametrize("by", ["rows", "tokens", "trained"])
def test_shares_are_counts_of_the_set(base: Path, tmp_path: Path, by: str) -> None:
    made = view(tmp_path / "mix", base, mix={"a.jsonl": 1, "b.jsonl": 3}, mix_by=by, passes=2)
    assert [share.asked for share in made.shares] == [0.25, 0.75]
    found = {share.name: [share.rows, share.tokens, share.trained] for share in made.shares}
    assert found == counted(made)
    once = view(tmp_path / "once", base, mix={"*.jsonl": 1}, mix_by=by)
    assert once.shares[0].available == getattr(once.shares[0], by)
    assert once.shares[0].passes == 1
    assert max(share.passes for share in made.shares) == pytest.approx(2, abs=0.02)
    assert read_manifest(tmp_path / "mix").shares == made.shares


def test_shares_that_are_not_those_of_the_set_are_refused(base: Path, tmp_path: Path) -> None:
    made = view(tmp_path / "mix", base, mix={"a.jsonl": 1, "b.jsonl": 1})
    assert dict(choices_of(made))["mix"].startswith("by trained tokens, at most 1 pass: ")
    one = msgspec.structs.replace(made.shares[0], rows=made.shares[0].rows + 1)
    with pytest.raises(IntegrityError, match="its shares hold"):
        seal(msgspec.structs.replace(made, shares=(one, *made.shares[1:])))


def test_a_set_without_a_mixture_says_what_each_source_has(base: Path) -> None:
    manifest = read_manifest(base)
    shares = shares_of(manifest)
    assert [share.name for share in shares] == [*NAMES]
    wholes = [sum(column) for column in zip(*counted(manifest).values(), strict=True)]
    for share in shares:
        parts = [own / whole for own, whole in zip(counted(manifest)[share.name], wholes, strict=True)]
        assert [share.rows, share.tokens, share.trained] == parts
    assert "shares" not in manifest.to_json()
    assert choices_of(manifest) == ()
    assert len([*tell_shares(manifest)]) == 2


def test_all_passes_over_a_source_count_together(base: Path, tmp_path: Path) -> None:
    made = view(tmp_path / "mix", base, mix={"a.jsonl": 1, "b.jsonl": 1}, passes=3)
    assert "at most 3 passes" in dict(choices_of(made))["mix"]
    again = view(tmp_path / "again", tmp_path / "mix", max_length=100)
    assert again.shares == ()
    assert [share.name for share in shares_of(again)] == [*NAMES]
    assert dict(choices_of(made))["repeated"].startswith(f"{made.ledger.documents_repeated} of ")


def test_each_step_says_what_it_left_out(base: Path, tmp_path: Path) -> None:
    made = view(
        tmp_path / "view",
        base,
        dedup="prompt",
        max_tokens=150,
        cap={"a.jsonl": "9 rows"},
        eval="20%",
        seed=3,
    )
    told, left = dict(choices_of(made)), made.ledger.documents_left_out
    assert set(left) == {"dedup-prompt", "max-tokens", "cap", "eval"}
    assert told["dedup"] == f"prompt: {left['dedup-prompt']} documents left out"
    assert told["max tokens"] == f"150: {left['max-tokens']} documents left out"
    assert told["cap"] == f"a.jsonl=9 rows: {left['cap']} documents left out"
    assert told["split"].startswith("this is train: 20% of the prompts are drawn for eval, with seed 3;")
    assert told["split"].endswith(f" {left['eval']} documents in eval")
    other = read_manifest(tmp_path / "view" / "eval")
    assert dict(choices_of(other))["split"].startswith("this is eval: ")
    assert (
        told["made of"] == f"../../{base.name} ({read_manifest(base).digest[:12]})"
        or base.name in told["made of"]
    )


def test_a_view_of_a_view_says_what_was_left_out_before(base: Path, tmp_path: Path) -> None:
    first = view(tmp_path / "first", base, dedup="row")
    second = view(tmp_path / "second", tmp_path / "first", min_tokens=20)
    gone = first.ledger.documents_left_out["dedup-row"]
    told = dict(choices_of(second))
    assert told["dedup"] == f"in a set it is made of: {gone} documents left out"


def test_stats_report_summary_and_notebook_say_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--mix", "a.jsonl=25", "--mix", "b.jsonl=75", "--passes", "2", "--dedup", "row"]
    assert main(["view", str(base), "-o", str(tmp_path / "mix"), *arguments]) == 0
    made = read_manifest(tmp_path / "mix")
    said = capsys.readouterr().err
    assert f"{made.ledger.documents_repeated} of them again" in said
    assert "shares  b.jsonl: 75.000% asked, " in said
    assert main(["stats", str(tmp_path / "mix")]) == 0
    told = capsys.readouterr().out
    shown = open_shown(tmp_path / "mix")
    pages = make_report(shown, audit_set(shown)), shown._repr_html_(), told
    for name, sentence in measure(made).choices:
        assert all(name in page and sentence.partition(" ")[0] in page for page in pages), name
    realised = made.shares[0].trained / sum(share.trained for share in made.shares)
    assert all(f"{realised:.3%}" in page for page in pages)
    assert main(["stats", str(tmp_path / "mix"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["manifest"]["shares"][0]["trained"] == made.shares[0].trained
    assert data["stats"]["shares"][0]["trained"] == realised
    assert sftdata.verify(tmp_path / "mix").ok


def test_what_was_left_out_flows_to_its_own_tokens(base: Path, tmp_path: Path) -> None:
    stats = measure(view(tmp_path / "view", base, min_tokens=30))
    kept, left = stats.rows[0].count / 120, stats.tokens[-1].count / sum(p.count for p in stats.tokens)
    assert flow_of(stats).between[0] == [
        ("kept", ribbon((0, sum(p.count for p in stats.rows if p.kind != "out") / 120), (0, 1 - left))),
        ("out", ribbon((1 - stats.rows[-1].count / 120, 1), (1 - left, 1))),
    ]
    assert kept < 1


def test_what_only_its_sets_counted_is_not_said_of_a_view(base: Path, tmp_path: Path) -> None:
    assert "turns" in measure(read_manifest(base)).counters
    assert "turns" in measure(view(tmp_path / "same", base, max_length=100)).counters
    chosen = measure(view(tmp_path / "chosen", base, min_tokens=100, max_length=100))
    assert "turns" not in chosen.counters
    assert chosen.counters["rows_cut"] > 0


def test_order_and_balance_are_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bands = view(tmp_path / "bands", base, order="length", bands=3)
    assert dict(choices_of(bands))["order"] == "length, 3 bands"
    view(tmp_path / "steps", base, steps_for="2x1")
    balance = measure_balance(open_shown(tmp_path / "steps"))
    assert balance is not None
    assert main(["stats", str(tmp_path / "steps")]) == 0
    told = capsys.readouterr().out
    assert f"{balance.steps} of 2 x 1 row: the busiest rank has {balance.mean:.3f} times the mean" in told
    assert f"{balance.worst:.3f} in the worst step; one more, the last, lacks 1 row\n" in told
    shown = open_shown(tmp_path / "steps")
    assert f"{balance.worst:.3f} in the worst step" in make_report(shown, audit_set(shown))
    assert f"{balance.worst:.3f} in the worst step" in shown._repr_html_()


def test_further_passes_are_no_duplicates_to_the_audit(base: Path, tmp_path: Path) -> None:
    def duplicates(folder: Path) -> int:
        return sum(found.count for found in sftdata.audit(folder) if found.code == "duplicate-prompt")

    view(tmp_path / "once", base, dedup="prompt", max_length=512)
    made = view(tmp_path / "twice", base, dedup="prompt", max_length=512, mix={"*.jsonl": 1}, passes=2)
    assert made.ledger.documents_repeated > 50
    assert duplicates(tmp_path / "once") == duplicates(tmp_path / "twice") == 0
    view(tmp_path / "all", base, max_length=512, mix={"*.jsonl": 1}, passes=2)
    assert duplicates(tmp_path / "all") == duplicates(base) > 0
