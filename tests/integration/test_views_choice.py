"""What views choose: duplicates, evaluation data, caps, splits, mixtures; what they refuse; and what a kill leaves."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import IntegrityError, SftError, UsageError
from sftdata.set.manifest import read_manifest
from sftdata.set.verify import verify
from sftdata.show.stats import measure
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view
from tests.killed import killed_at
from tests.view_sets import TOKENIZER, chats, contents, prepare, split, view, write_lines
from tests.waiting import HANGS

pytestmark = pytest.mark.usefixtures("no_sync")

RENAMES = ("replace", "rename")
OLD = Path(__file__).parents[1] / "sets"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets `one` of sources a and b, `two` of a source c with other rows, all with rest beside the rows."""
    folder = tmp_path_factory.mktemp("sets")
    files = {name: write_lines(folder / f"{name}.jsonl", chats(90, ord(name), 40)) for name in "abc"}
    prepare(folder / "one", [files["a"], files["b"]], max_length=128)
    prepare(folder / "two", [files["c"]], max_length=128, overlong="split")
    return folder


def whole(folder: Path, tmp_path: Path) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return ids and labels of every document of a set that trains something, by its example id."""
    out = tmp_path / f"whole-{len(list(tmp_path.iterdir()))}"
    view(out, folder, packing="none", max_length=100_000, overlong="error")
    return {
        document.example_id: (tuple(document.input_ids.tolist()), tuple(document.labels.tolist()))
        for row in sftdata.open(out)
        for document in row.documents()
    }


def prompt(document: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    ids, labels = document
    return ids[: next(place for place, label in enumerate(labels) if label != -100)]


def kept(folder: Path) -> Counter[int]:
    """Return the example ids in the rows of a set, and how many documents each has there."""
    return Counter(document.example_id for row in sftdata.open(folder) for document in row.documents())


# ---------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("by", ["row", "prompt"])
def test_duplicates_go_and_the_first_stays(sets: Path, tmp_path: Path, by: str) -> None:
    documents = whole(sets / "one", tmp_path)
    seen: set[object] = set()
    expected = []
    for number, document in sorted(documents.items()):
        key = document if by == "row" else prompt(document)
        if key not in seen:
            expected.append(number)
        seen.add(key)
    assert len(expected) < len(documents)
    made = view(tmp_path / "view", sets / "one", dedup=by, packing="none", max_length=100_000)
    assert sorted(kept(tmp_path / "view")) == expected
    # Those without anything to train are compared too: they are in the rest, the first of each.
    assert made.ledger.documents_left_out[f"dedup-{by}"] >= len(documents) - len(expected)
    assert verify(tmp_path / "view").ok


@pytest.mark.parametrize("by", ["row", "prompt"])
def test_what_another_set_holds_is_left_out(sets: Path, tmp_path: Path, by: str) -> None:
    one, two = whole(sets / "one", tmp_path), whole(sets / "two", tmp_path)
    others = {document if by == "row" else prompt(document) for document in two.values()}
    expected = [n for n, d in one.items() if (d if by == "row" else prompt(d)) not in others]
    assert 0 < len(expected) < len(one)
    view(tmp_path / "view", sets / "one", exclude=[sets / "two"], exclude_by=by, max_length=1000)
    assert sorted(kept(tmp_path / "view")) == sorted(expected)


def test_rows_with_and_without_weights_are_equal_where_every_weight_is_1(tmp_path: Path) -> None:
    """A set without weights trains each of its tokens with weight 1: what another weighs otherwise is another row."""
    rows = [[{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}] for n in range(6)]
    for name, weight in (("plain", 1), ("weighed", 0.5)):
        lines = [
            {"messages": [asked, said | {"weight": 1 if n % 2 else weight}]}
            for n, (asked, said) in enumerate(rows)
        ]
        prepare(
            tmp_path / name,
            [write_lines(tmp_path / f"{name}.jsonl", lines)],
            max_length=64,
            loss_weights=weight < 1,
        )
    plain, weighed = tmp_path / "plain", tmp_path / "weighed"
    made = view(tmp_path / "both", plain, weighed, dedup="row")
    assert made.ledger.documents_left_out["dedup-row"] == 3
    assert sorted(kept(tmp_path / "both")) == [0, 1, 2, 3, 4, 5, 6, 8, 10]
    for of, without in ((plain, weighed), (weighed, plain)):
        view(tmp_path / f"of-{of.name}", of, exclude=[without], exclude_by="row", write=False)
        assert sorted(kept(tmp_path / f"of-{of.name}")) == [0, 2, 4]
        assert not verify(tmp_path / f"of-{of.name}").problems


def test_documents_are_named_by_source_line_id_and_length(sets: Path, tmp_path: Path) -> None:
    documents = whole(sets / "one", tmp_path)
    opened = sftdata.open(sets / "one")
    of_b = {number for number in documents if opened.origin(number)[0] == "b.jsonl"}
    view(tmp_path / "b", sets / "one", sources="b*", max_length=1000)
    assert set(kept(tmp_path / "b")) == of_b
    view(tmp_path / "a", sets / "one", without="b.jsonl", max_length=1000)
    assert set(kept(tmp_path / "a")) == set(documents) - of_b
    gone = random.Random(1).sample(sorted(documents), 10)
    lines = [str(number) for number in gone[:5]]
    lines += [":".join(map(str, opened.origin(number))) for number in gone[5:]]
    (tmp_path / "bad.txt").write_text("# what is wrong\n" + "\n".join(lines))
    made = view(tmp_path / "dropped", sets / "one", drop=tmp_path / "bad.txt", max_length=1000)
    assert set(kept(tmp_path / "dropped")) == set(documents) - set(gone)
    assert made.ledger.documents_left_out == {"drop": 10}
    view(tmp_path / "long", sets / "one", min_tokens=100, max_tokens=200, min_trained="30%", max_length=1000)
    share = {
        n: sum(label != -100 for label in labels[1:]) / len(ids) for n, (ids, labels) in documents.items()
    }
    expected = {n for n, (ids, _) in documents.items() if 100 <= len(ids) <= 200 and share[n] >= 0.3}
    assert set(kept(tmp_path / "long")) == expected


def test_a_view_names_lists_and_sets_by_what_they_hold(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_text("3\n")
    settings: dict[str, Any] = {"drop": tmp_path / "list", "exclude": [sets / "two"], "max_length": 64}
    first = view(tmp_path / "view", sets / "one", **settings)
    assert str(tmp_path) not in (tmp_path / "view" / "manifest.json").read_text()
    assert first.settings["view"]["exclude"] == [read_manifest(sets / "two").digest]
    assert [base.digest for base in first.bases] == [read_manifest(sets / "one").digest]
    (tmp_path / "moved").write_text("3\n")
    assert (
        view(tmp_path / "same", sets / "one", **settings | {"drop": tmp_path / "moved"}).digest
        == first.digest
    )
    (tmp_path / "list").write_text("4\n")
    with pytest.raises(UsageError, match=r"made otherwise \(drop differ\)"):
        view(tmp_path / "view", sets / "one", **settings)


def test_a_cap_bounds_a_source_and_more_data_does_not_reshuffle_it(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "first.jsonl", chats(120, 1, 40))
    more = write_lines(tmp_path / "more.jsonl", [*chats(120, 1, 40), *chats(60, 2, 40)])
    chosen = []
    for file in (first, more):
        base = tmp_path / f"set-{file.stem}"
        prepare(base, [file], max_length=1000)
        out = tmp_path / f"view-{file.stem}"
        made = view(out, base, cap={"*": "40 rows"}, seed=5)
        assert made.ledger.rows_kept == 40
        lines = file.read_text().splitlines()
        chosen.append({lines[sftdata.open(out).origin(number)[1] - 1] for number in kept(out)})
    old = set(first.read_text().splitlines())
    assert chosen[1] & old <= chosen[0]
    assert len(chosen[1] & chosen[0]) > 20
    for amount, limit in (("5000 tokens", "tokens"), ("2000 trained", "tokens_trained")):
        made = view(tmp_path / limit, tmp_path / "set-first", cap={"first.jsonl": amount})
        assert int(amount.split()[0]) * 0.8 < getattr(made.ledger, limit) <= int(amount.split()[0])


def test_a_cap_of_several_sources_counts_them_together(sets: Path, tmp_path: Path) -> None:
    made = view(tmp_path / "view", sets / "one", cap={"*.jsonl": "12 rows"})
    assert [source.rows > 12 for source in made.sources] == [True, True]
    assert made.ledger.rows_kept == 12


# -------------------------------------------------------------------------------------------- split


def test_a_split_keeps_a_prompt_on_one_side_and_loses_nothing(sets: Path, tmp_path: Path) -> None:
    documents = whole(sets / "one", tmp_path)
    train, held_out = split(tmp_path / "view", sets / "one", eval="20%", max_length=1000)
    sides = [set(kept(tmp_path / "view" / side)) for side in ("train", "eval")]
    assert sides[0] | sides[1] == set(documents)
    assert not sides[0] & sides[1]
    assert not {prompt(documents[n]) for n in sides[0]} & {prompt(documents[n]) for n in sides[1]}
    assert 0.1 < len(sides[1]) / len(documents) < 0.3
    for made, other in ((train, "eval"), (held_out, "train")):
        assert set(made.ledger.documents_left_out) == {other}
        assert (
            made.digest == read_manifest(tmp_path / "view" / ("train" if other == "eval" else "eval")).digest
        )
    assert verify(tmp_path / "view" / "train").ok
    assert verify(tmp_path / "view" / "eval").ok


def test_no_document_changes_side_when_data_is_added(sets: Path, tmp_path: Path) -> None:
    split(tmp_path / "one", sets / "one", eval="20%", max_length=1000)
    rows = sum(source.rows for source in read_manifest(sets / "one").sources)
    split(tmp_path / "both", sets / "one", sets / "two", eval="20%", max_length=1000)
    for side in ("train", "eval"):
        before, after = (set(kept(tmp_path / name / side)) for name in ("one", "both"))
        assert before == {number for number in after if number < rows}


# ------------------------------------------------------------------------------------------ mixture


@pytest.mark.parametrize("measure", ["rows", "tokens", "trained"])
def test_shares_come_out_as_asked(sets: Path, tmp_path: Path, measure: str) -> None:
    mix = {"a.jsonl": 50, "b.jsonl": 30, "c.jsonl": 20}
    made = view(
        tmp_path / "view", sets / "one", sets / "two",
        mix=mix, mix_by=measure, passes=2.5, max_length=128, overlong="truncate",
    )  # fmt: skip
    got: Counter[str] = Counter()
    for name, counts in made.ledger.sources.items():
        got[name.partition("#")[0]] += {"trained": counts.tokens_trained}.get(
            measure, getattr(counts, measure, 0)
        )
    whole = sum(got.values())
    for name, share in mix.items():
        assert abs(got[name] / whole - share / 100) < (0.01 if measure == "rows" else 0.003)
    assert made.ledger.documents_repeated > 0
    assert verify(tmp_path / "view").ok
    told = {share.name: share for share in made.shares}
    assert {name: (share.asked, share.by) for name, share in told.items()} == {
        name: (share / 100, measure) for name, share in mix.items()
    }
    counts = {name: getattr(share, measure) for name, share in told.items()}
    assert counts == got


def test_a_document_of_a_second_pass_leads_back_to_its_line(sets: Path, tmp_path: Path) -> None:
    made = view(
        tmp_path / "view",
        sets / "one",
        mix={"a.jsonl": 2, "b.jsonl": 1},
        passes=3,
        mix_by="rows",
        max_length=1000,
    )
    opened, base = sftdata.open(tmp_path / "view"), sftdata.open(sets / "one")
    documents = whole(sets / "one", tmp_path)
    by_place = {base.origin(number): document for number, document in documents.items()}
    seen: Counter[tuple[str, int]] = Counter()
    for row in opened:
        for document in row.documents():
            name, line = opened.origin(document.example_id)
            place = name.partition("#")[0], line
            assert tuple(document.input_ids.tolist()) == by_place[place][0]
            seen[place] += 1
    assert max(seen.values()) == 3
    assert sum(count - 1 for count in seen.values()) == made.ledger.documents_repeated


def test_a_view_of_a_mixture_has_each_document_as_often(sets: Path, tmp_path: Path) -> None:
    mix = {"a.jsonl": 2, "b.jsonl": 1}
    view(tmp_path / "mix", sets / "one", mix=mix, passes=2, packing="wrapped", max_length=64)
    view(tmp_path / "again", tmp_path / "mix", packing="bfd", max_length=512)
    view(
        tmp_path / "at-once",
        sets / "one",
        mix=mix,
        passes=2,
        packing="bfd",
        max_length=512,
        overlong="truncate",
    )
    assert kept(tmp_path / "again") == kept(tmp_path / "at-once")
    assert verify(tmp_path / "again").ok


def test_a_mixture_is_read_like_any_set(sets: Path, tmp_path: Path) -> None:
    made = view(tmp_path / "mix", sets / "one", sets / "two", mix={"a.jsonl": 2, "c.jsonl": 1}, passes=2)
    opened = sftdata.open(tmp_path / "mix")
    last = max(kept(tmp_path / "mix"))
    assert opened.origin(last)[0].endswith(".jsonl#2")
    assert opened.view_example(last).documents
    assert {finding.code for finding in sftdata.audit(tmp_path / "mix")} >= {"duplicate-prompt"}
    assert measure(made).rows[0].count == made.ledger.rows_kept
    assert sum(part.count for part in measure(made).rows) == made.ledger.rows_in
    assert sum(part.count for part in measure(made).tokens) == made.ledger.tokens_in


def test_a_further_pass_takes_the_name_of_its_source_beside_a_set_of_the_same_names(
    sets: Path, tmp_path: Path
) -> None:
    view(tmp_path / "mix", sets / "one", mix={"a.jsonl": 3, "b.jsonl": 1}, passes=2, max_length=1000)
    both = view(tmp_path / "both", tmp_path / "mix", sets / "one", max_length=1000)
    assert {source.name for source in both.sources} == {
        *("mix/a.jsonl", "mix/a.jsonl#2", "mix/b.jsonl", "one/a.jsonl", "one/b.jsonl")
    }
    opened = sftdata.open(tmp_path / "both")
    places = {opened.origin(number) for number in kept(tmp_path / "both")}
    line = min(line for name, line in places if name == "mix/a.jsonl#2")
    (tmp_path / "list").write_text(f"mix/a.jsonl:{line}\n")
    made = view(tmp_path / "dropped", tmp_path / "both", drop=tmp_path / "list")
    assert made.ledger.documents_left_out["drop"] == 2


# ---------------------------------------------------------------------------------- packing, order


@pytest.mark.parametrize(
    ("packing", "overlong"), [("bfd", "truncate"), ("wrapped", None), ("none", "split"), ("bfd", "drop")]
)
def test_packing_over_the_whole_view_keeps_every_document_and_can_be_packed_again(
    sets: Path, tmp_path: Path, packing: str, overlong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.views.order.SHARD_TOKENS", 2000)  # documents lie across the ends of shards
    by_slice = view(tmp_path / "slices", sets / "one", packing=packing, overlong=overlong, max_length=96)
    made = view(
        tmp_path / "whole", sets / "one", packing=packing, overlong=overlong, max_length=96, pack_over="view"
    )
    assert len(made.shards) > (1 if overlong == "drop" else 3)
    assert overlong != "drop" or len(list((tmp_path / "whole").glob("rest-*.arrow"))) == len(made.shards)
    assert made.ledger.tokens == by_slice.ledger.tokens
    assert made.ledger.rows_packed <= by_slice.ledger.rows_packed
    assert set(kept(tmp_path / "whole")) == set(kept(tmp_path / "slices"))
    assert verify(tmp_path / "whole").ok
    assert whole(tmp_path / "whole", tmp_path) == whole(sets / "one", tmp_path)


def test_rows_are_shuffled_by_seed_alone(sets: Path, tmp_path: Path) -> None:
    orders = {}
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        view(tmp_path / name, sets / "one", order="shuffled", seed=seed, packing="none", max_length=1000)
        orders[name] = list(kept(tmp_path / name))
    assert orders["x"] == orders["y"] != orders["z"]
    assert sorted(orders["x"]) == sorted(orders["z"]) != orders["x"]


def test_rows_of_one_name_in_two_sets_go_by_the_set(sets: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "a.jsonl", chats(30, 77))
    prepare(tmp_path / "other", [other], max_length=64)
    made = view(tmp_path / "view", sets / "one", tmp_path / "other", sources="other/*")
    assert [source.name for source in made.sources] == ["one/a.jsonl", "b.jsonl", "other/a.jsonl"]
    assert set(made.ledger.sources) == {"other/a.jsonl"}


# ------------------------------------------------------------------------------------------ refusals


def refusal(output: Path, *bases: Path, **settings: Any) -> str:
    with pytest.raises(SftError) as caught:
        view(output, *bases, **settings)
    assert not output.exists()
    said = str(caught.value)
    assert "\n" not in said
    assert caught.value.fix
    return said


def test_what_cannot_be_is_refused_in_one_line_with_the_fix(sets: Path, tmp_path: Path) -> None:
    one, out = sets / "one", tmp_path / "view"
    assert "takes" in refusal(out, one, mix={"a.jsonl": 9, "b.jsonl": 1}, total="500 rows", mix_by="rows")
    assert "counts tokens; mix_by is trained" in refusal(out, one, mix={"a.jsonl": 1}, total="5 tokens")
    assert "a.jsonl has two shares" in refusal(out, one, mix={"a*": 1, "*.jsonl": 1})
    assert "did you mean 'a.jsonl'?" in refusal(out, one, sources="a.json")
    assert "no document is left. Of 180: min-tokens 180" in refusal(out, one, min_tokens=10_000)
    assert "named twice" in refusal(out, one, one)
    assert "leave overlong out" in refusal(out, one, packing="wrapped", overlong="drop")
    assert "no such folder" in refusal(out, tmp_path / "none")
    assert "max_length is 40" in refusal(out, one, max_length=40, overlong="error")
    (tmp_path / "list").write_text("a.jsonl:400\n")
    assert "it has rows 1 to 9" in refusal(out, one, drop=tmp_path / "list")
    (tmp_path / "list").write_text("nonsense\n")
    assert "list:1\": found 'nonsense'" in refusal(out, one, drop=tmp_path / "list")


def test_advice_on_views_is_followed(sets: Path, tmp_path: Path) -> None:
    one, out = sets / "one", tmp_path / "view"
    mix = {"a.jsonl": 9, "b.jsonl": 1}
    said = refusal(out, one, mix=mix, total="500 rows", mix_by="rows")
    passes = said.partition("Fix: passes=")[2].partition(",")[0]
    made = view(tmp_path / "passes", one, mix=mix, total="500 rows", mix_by="rows", passes=passes)
    assert made.ledger.rows_kept >= 498
    view(tmp_path / "smaller", one, mix=mix, total="60 rows", mix_by="rows")
    assert 'give total in trained, or mix_by="tokens"' in refusal(out, one, mix=mix, total="500 tokens")
    view(tmp_path / "tokens", one, mix=mix, total="500 tokens", mix_by="tokens")
    view(tmp_path / "trained", one, mix=mix, total="200 trained")
    assert refusal(out, one, order="shuffled", pack_over="slice").endswith('Fix: pack_over="view".')
    view(tmp_path / "shuffled", one, order="shuffled", pack_over="view")
    assert "take it out of mix, or loosen" in refusal(out, one, mix=mix, without="b.jsonl")
    view(tmp_path / "out-of-it", one, mix={"a.jsonl": 1}, without="b.jsonl")
    assert 'mix={"NAME": SHARE} with passes=2' in refusal(out, one, one)
    made = view(tmp_path / "repeated", one, mix={"*.jsonl": 1}, passes=2)
    assert made.ledger.rows_kept == 2 * read_manifest(one).ledger.rows_kept
    (tmp_path / "list").write_text("zzz:1\n")
    assert "see `sftdata stats` for sources" in refusal(out, one, drop=tmp_path / "list")


def test_a_base_that_is_replaced_meanwhile_is_refused(sets: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    rows = [write_lines(tmp_path / f"{name}.jsonl", chats(40, seed)) for seed, name in enumerate(("x", "y"))]
    prepare(base, rows[:1], max_length=128)

    def replace_it(now: object) -> None:
        if read_manifest(base).sources[0].name == "x.jsonl":
            prepare(base, rows[1:], max_length=128, overwrite=True)

    config = ViewConfig(sets=(str(base),), output=tmp_path / "view", max_length=64)
    with pytest.raises(IntegrityError, match="replaced while it was in use") as caught:
        make_view(config, replace_it)
    assert "run the same command again, with --overwrite" in caught.value.fix
    assert not (tmp_path / "view").exists()
    made = make_view(config.model_copy(update={"overwrite": True}))[0]
    assert [source.name for source in made.sources] == ["y.jsonl"]


def test_a_recipe_is_written_checked_and_run(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    given = ["view", "one", "-o", str(tmp_path / "view"), "--dedup", "row", "--cap", "*.jsonl=30 rows"]
    assert main([*given, "--init"]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert main(["config", "check", str(recipe), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert (checked["dedup"], checked["cap"]) == ("row", {"*.jsonl": "30 rows"})
    assert main(["config", "schema", "--view"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(checked)
    assert main(["view", str(recipe), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (
        made["digest"]
        == view(tmp_path / "same", Path("one"), dedup="row", cap={"*.jsonl": "30 rows"}, write=False).digest
    )
    recipe.write_text("sets: [one]\noutput: out\ndedupe: row\n")
    assert main(["view", str(recipe)]) == 2
    assert "recipe.yaml:3: unknown setting 'dedupe'. Fix: did you mean 'dedup'?" in capsys.readouterr().err


def test_sets_of_two_tokenizers_are_refused(sets: Path, tmp_path: Path) -> None:
    manifest = json.loads((OLD / "version-1-none" / "manifest.json").read_text())
    assert manifest["tokenizer"]["sha256"] == read_manifest(sets / "one").tokenizer.sha256
    from tests.train_sets import make_set

    make_set(tmp_path / "other", tokenizer="7")
    assert "tokenizer 777777777777; " in refusal(tmp_path / "view", sets / "one", tmp_path / "other")


def test_a_changed_base_is_refused(sets: Path, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", chats(40, 5))
    for name in ("shard-00000.arrow", "index-00000.arrow"):
        base = tmp_path / f"base-{name}"
        prepare(base, [rows], max_length=128)
        raw = bytearray((base / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (base / name).write_bytes(raw)
        assert f"{name}: xxh3-128 is " in refusal(tmp_path / "view", base, write=True)
        (base / name).unlink()
        assert f"{name}: missing" in refusal(tmp_path / "view", base)


def test_a_finished_view_is_not_replaced_unasked(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "view"
    view(out, sets / "one", max_length=64)
    before = contents(out)
    again = view(out, sets / "one", max_length=64)
    assert contents(out) == before
    assert again.digest == read_manifest(out).digest
    with pytest.raises(UsageError, match=r"made otherwise \(max_length differ\)"):
        view(out, sets / "one", max_length=32)
    assert contents(out) == before
    assert view(out, sets / "one", max_length=32, overwrite=True).max_length == 32


@pytest.mark.parametrize("name", ["version-1-packed", "version-1-none"])
def test_a_set_of_version_1_is_viewed_where_it_is_exact(tmp_path: Path, name: str) -> None:
    text = Path(TOKENIZER).parent / "text.txt"
    settings = {"slice_bytes": 8 << 20, "max_length": 300}
    if read_manifest(OLD / name).ledger.tokens_cut:
        assert "format version 1, without an index; lost: " in refusal(tmp_path / "view", OLD / name)
        return
    expected = prepare(tmp_path / "made", [text], **settings)
    made = view(tmp_path / "view", OLD / name, packing="bfd", max_length=300)
    assert made.shards == expected.shards
    assert made.digest == expected.digest


# ------------------------------------------------------------------------------ imports and the kill


def test_no_tokenizer_is_imported(sets: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('tokenizers', 'transformers', 'gigatoken', 'jinja2', 'torch', 'datasets'): sys.modules[name] = None\n"
        "from sftdata.cli import main\n"
        f"sys.exit(main(['view', {str(sets / 'one')!r}, '-o', {str(tmp_path / 'view')!r}, '--max-length', '512',"
        " '--dedup', 'prompt', '--eval', '10%', '--json']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {str(tmp_path / "view" / side) for side in ("train", "eval")}


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 64}, {"eval": "20%", "max_length": 64}],
    ids=["whole", "split"],
)
@pytest.mark.parametrize("points", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_view_leaves_no_set_and_is_finished_by_the_same_command(
    sets: Path, tmp_path: Path, settings: dict[str, Any], points: int
) -> None:
    config = ViewConfig(sets=(str(sets / "one"),), output=tmp_path / "whole", **settings)
    expected = [made.digest for made in make_view(config)]
    counted = config.model_copy(update={"output": tmp_path / "counted"})
    renames = -killed_at(partial(make_view, counted), 0, RENAMES)
    chosen = random.Random(points).sample(range(1, renames + 1), min(points, renames))
    for number in sorted({1, renames, *chosen}):
        output = tmp_path / f"killed-{number}"
        killed = config.model_copy(update={"output": output})
        assert killed_at(partial(make_view, killed), number, RENAMES) == -signal.SIGKILL
        if output.exists():  # killed after its last rename
            folders = [output / side for side in ("train", "eval")] if config.eval else [output]
            assert [read_manifest(folder).digest for folder in folders] == expected
        assert [made.digest for made in make_view(killed)] == expected
        assert not output.with_name(output.name + ".partial").exists()
