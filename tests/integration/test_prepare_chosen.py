"""`prepare` with a choice makes, digest for digest, what a view of the whole set does; killed or not."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.config import PrepareConfig
from sftdata.errors import SftError, UsageError
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.verify import verify
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view
from tests.killed import killed_at
from tests.view_sets import (
    KINDS,
    TOKENIZER,
    Settings,
    chats,
    contents,
    layouts,
    prepare,
    write_inputs,
    write_lines,
)

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Path], Settings]]:
    """Inputs of eight kinds."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources of several slices."""
    folder = tmp_path_factory.mktemp("files")
    return [write_lines(folder / f"{name}.jsonl", chats(60, ord(name), 40)) for name in "ab"]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set to exclude, which shares prompts with the others."""
    folder = tmp_path_factory.mktemp("other")
    prepare(folder / "other", [write_lines(folder / "other.jsonl", chats(40, 97, 40))], max_length=64)
    return folder / "other"


def choices(names: list[str], other: Path) -> list[Settings]:
    """Return ways to choose among documents."""
    shares = {name: number + 1 for number, name in enumerate(names)}
    return [
        {"eval": "20%"},
        {"eval": "30%", "seed": 3, "dedup": "prompt"},
        {"dedup": "row"},
        {"exclude": (str(other),)},
        {"exclude": (str(other),), "exclude_by": "row", "eval": "10%"},
        {"cap": {"*": "40 rows"}, "seed": 7},
        {"cap": {names[0]: "3k tokens"}},
        {"mix": shares, "passes": 2.5},
        {"mix": shares, "mix_by": "rows", "total": "30 rows", "eval": "25%"},
    ]


def both_ways(
    tmp_path: Path, files: list[Path], settings: Settings, chosen: Settings
) -> tuple[tuple[Manifest, ...], tuple[Manifest, ...]]:
    """Make sets at once, and as a view of the whole set; return the manifests of both."""
    made = prepare(tmp_path / "made", files, **settings, **chosen)
    prepare(tmp_path / "whole", files, **settings)
    view = ViewConfig(sets=(str(tmp_path / "whole"),), output=tmp_path / "view", write=True, **chosen)
    return made if isinstance(made, tuple) else (made,), make_view(view)


def assert_equal_both_ways(tmp_path: Path, files: list[Path], settings: Settings, chosen: Settings) -> None:
    found, expected = both_ways(tmp_path, files, settings, chosen)
    assert [one.digest for one in found] == [one.digest for one in expected], chosen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "view", "whole"]
    for side in ("train", "eval") if "eval" in chosen else ("",):
        assert contents(tmp_path / "made" / side) == contents(tmp_path / "view" / side)
        assert not verify(tmp_path / "made" / side).problems
        made = read_manifest(tmp_path / "made" / side)
        assert not made.bases
        assert "made by `sftdata prepare`" in (tmp_path / "made" / side / "README.md").read_text()
    assert [share.name for one in found for share in one.shares] == list(chosen.get("mix", {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_is_what_a_view_of_the_whole_makes(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], other: Path, kind: str
) -> None:
    files, settings = inputs[kind]
    rng = random.Random(kind)
    for number, chosen in enumerate(rng.sample(choices([file.name for file in files], other), 2)):
        (tmp_path / str(number)).mkdir()
        layout = rng.choice(layouts(200, 1000))
        assert_equal_both_ways(tmp_path / str(number), files, settings | layout, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_choice_is_what_a_view_of_the_whole_makes(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], other: Path, kind: str
) -> None:
    files, settings = inputs[kind]
    rng = random.Random(f"{kind} all")
    for number, chosen in enumerate(choices([file.name for file in files], other)):
        (tmp_path / str(number)).mkdir()
        layout = rng.choice(layouts(200, 1000))
        assert_equal_both_ways(tmp_path / str(number), files, settings | layout, chosen)


def test_a_choice_is_given_by_flags_by_a_file_and_from_python(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"eval": "20%", "mix": {"a.jsonl": "60%", "b.jsonl": "40%"}, "dedup": "row", "seed": 2}
    expected = [one.digest for one in prepare(tmp_path / "python", files, **chosen)]
    plain = {"max_length": 256, "slice_bytes": 30_000, "workers": 1}
    flags = [f"--eval={chosen['eval']}", "--mix=a.jsonl=60%", "--mix=b.jsonl=40%", "--dedup=row", "--seed=2"]
    command = ["prepare", *map(str, files), "-t", TOKENIZER, "--max-length=256"]
    command += ["--workers=1", "--set", "slice_bytes=30000"]
    assert main([*command, *flags, "-o", str(tmp_path / "flags"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["digest"] for one in printed.values()] == expected
    assert list(printed) == [str(tmp_path / "flags" / side) for side in ("train", "eval")]
    assert all("audit" in one for one in printed.values())
    settings = plain | chosen | {"inputs": list(map(str, files)), "tokenizer": TOKENIZER}
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(json.dumps(settings | {"output": str(tmp_path / "file")}))
    assert main(["config", "check", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mix"] == {"a.jsonl": 60, "b.jsonl": 40}
    assert main(["preview", str(recipe)]) == 0
    assert "All rows are sampled, before any is chosen or left out." in capsys.readouterr().out
    assert main(["prepare", str(recipe)]) == 0
    said = capsys.readouterr().err
    assert "a.jsonl: 60.000% asked, " in said
    assert f"{tmp_path / 'file' / 'eval'}: " in said
    assert [read_manifest(tmp_path / "file" / side).digest for side in ("train", "eval")] == expected
    written = ["init", *command[1:5], *flags, "-f", "-", "-o", str(tmp_path / "written")]
    assert main([*written, "--max-length=256", "--workers=1", "--set", "slice_bytes=30000"]) == 0
    recipe.write_text(capsys.readouterr().out)
    assert main(["prepare", str(recipe)]) == 0
    assert [read_manifest(tmp_path / "written" / side).digest for side in ("train", "eval")] == expected


# --------------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("chosen", [{"eval": "20%"}, {"dedup": "row"}])
def test_a_choice_is_up_to_date_without_tokenizing(
    files: list[Path], tmp_path: Path, chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    made = prepare(tmp_path / "set", files, **chosen)
    monkeypatch.setattr("sftdata.run.run_tasks", None)
    monkeypatch.setattr("sftdata.selected.make_view", None)
    again = prepare(tmp_path / "set", files, **chosen, on_note=notes.append)
    assert again == made
    assert notes[-1] == f"{tmp_path / 'set'} is up to date: same data, same settings."


def test_what_is_finished_is_not_replaced_unasked(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "set"

    def refused(what: str, *, inputs: list[Path] = files, **settings: Any) -> None:
        with pytest.raises(UsageError) as caught:
            prepare(output, inputs, **settings)
        assert f"holds a finished set made otherwise ({what} differ)" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["set"]

    prepare(output, files, dedup="row")
    refused("view")
    refused("dedup", dedup="prompt")
    refused("cap, dedup, seed", cap={"*": "9 rows"}, seed=1)
    refused("max_length", dedup="row", max_length=64)
    refused("eval", eval="20%", dedup="row")
    prepare(output, files, eval="20%", overwrite=True)
    refused("eval", eval="30%")
    refused("formats, sources", inputs=files[:1], eval="20%")
    both = prepare(output, files, eval="30%", overwrite=True)
    assert [read_manifest(output / side).digest for side in ("train", "eval")] == [one.digest for one in both]


def test_inputs_that_have_grown_are_taken_in_by_the_same_command(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", chats(60, 5, 40))
    chosen: Settings = {"eval": "30%", "mix": {"*": 1}, "passes": 2}
    before = prepare(tmp_path / "set", [source], **chosen)
    write_lines(source, chats(80, 5, 40))
    notes: list[str] = []
    made = prepare(tmp_path / "set", [source], **chosen, on_note=notes.append)
    assert any("all documents are prepared anew, as it holds those chosen alone." in note for note in notes)
    assert [one.digest for one in made] != [one.digest for one in before]
    expected = prepare(tmp_path / "new", [source], **chosen)
    assert [one.digest for one in made] == [one.digest for one in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "new", "set"]


def test_an_unfinished_set_of_all_documents_is_not_discarded(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.run.run_tasks", None)
        with pytest.raises(TypeError):
            prepare(tmp_path / "set", files)
        with pytest.raises(UsageError, match="an unfinished set of all documents") as caught:
            prepare(tmp_path / "set", files, dedup="row")
    assert caught.value.fix.endswith("or start anew with --overwrite.")
    made = prepare(tmp_path / "set", files, dedup="row", overwrite=True)
    assert made.ledger.documents_left_out
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_view_is_not_taken_for_the_whole_set(files: list[Path], tmp_path: Path) -> None:
    whole = prepare(tmp_path / "whole", files)
    make_view(ViewConfig(sets=(str(tmp_path / "whole"),), output=tmp_path / "view", dedup="row"))
    with pytest.raises(UsageError, match=r"made otherwise \(view differ\)"):
        prepare(tmp_path / "view", files)
    assert prepare(tmp_path / "view", files, overwrite=True).digest == whole.digest


def test_a_choice_that_cannot_be_met_keeps_what_was_tokenized(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Settings = {"mix": {"a.jsonl": 9, "b.jsonl": 1}, "mix_by": "rows", "total": "200 rows"}
    with pytest.raises(UsageError, match="passes for total") as caught:
        prepare(tmp_path / "set", files, **settings)
    passes = caught.value.fix.partition("--passes ")[2].partition(",")[0]
    assert not (tmp_path / "set").exists()
    with pytest.raises(UsageError, match="unfinished run"):
        sftdata.open(tmp_path / "set")
    monkeypatch.setattr("sftdata.run.run_tasks", None)
    made = prepare(tmp_path / "set", files, **settings, passes=float(passes))
    assert made.ledger.documents_repeated
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("later", [{}, {"eval": "20%", "max_length": 64}, {"dedup": "row"}], ids=str)
def test_a_refused_choice_is_in_nobodys_way(files: list[Path], tmp_path: Path, later: Settings) -> None:
    with pytest.raises(SftError, match="no document is left"):
        prepare(tmp_path / "set", files, eval="0.0001%")
    made = prepare(tmp_path / "set", files[:1], **later)
    expected = prepare(tmp_path / "other", files[:1], **later)
    assert made == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "set"]


@pytest.mark.parametrize("stopped", ["run.run_tasks", "selected.make_view"])
def test_a_stopped_choice_is_discarded_by_the_set_of_all_if_asked_for(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"sftdata.{stopped}", None)
        with pytest.raises(TypeError):
            prepare(tmp_path / "set", files, dedup="row")
        with pytest.raises(UsageError, match="of an unfinished run that chooses") as caught:
            prepare(tmp_path / "set", files)
    assert caught.value.fix.endswith("or start anew with --overwrite.")
    prepare(tmp_path / "set", files, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_split_holds_nothing_of_a_refused_set_in_whose_place_it_is_built(
    files: list[Path], tmp_path: Path
) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [*chats(9, 1), {"messages": 3}])
    with pytest.raises(SftError, match="1 of 10 rows rejected"):
        prepare(tmp_path / "set", [bad])
    prepare(tmp_path / "set", files, eval="20%")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["eval", "train"]


def test_documents_of_a_choice_refused_for_its_rows_do_not_stay(files: list[Path], tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [*chats(9, 1), {"messages": 3}])
    with pytest.raises(SftError, match="1 of 10 rows rejected"):
        prepare(tmp_path / "set", [bad], dedup="row")
    prepare(tmp_path / "set", files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "set"]


def test_a_set_to_exclude_that_goes_meanwhile_is_in_nobodys_way(
    files: list[Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(other, tmp_path / "other")
    monkeypatch.setattr(
        "sftdata.selected._refuse_unknown", lambda *_: (tmp_path / "other/index-00000.arrow").unlink()
    )
    with pytest.raises(SftError, match="index-00000.arrow: missing"):
        prepare(tmp_path / "set", files, exclude=[tmp_path / "other"])
    monkeypatch.undo()
    prepare(tmp_path / "set", files, dedup="row", max_length=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "set"]


def test_other_settings_do_not_go_on_with_an_unfinished_choice(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.selected.make_view", None)
        with pytest.raises(TypeError):
            prepare(tmp_path / "set", files, dedup="row")
    with pytest.raises(UsageError, match=r"made otherwise \(max_length differ\)"):
        prepare(tmp_path / "set", files, dedup="row", max_length=64)
    expected = prepare(tmp_path / "other", files, dedup="row", max_length=64)
    made = prepare(tmp_path / "set", files, dedup="row", max_length=64, overwrite=True)
    assert made.digest == expected.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "set"]


# --------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused_before_anything_is_tokenized(
    files: list[Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.train_sets import make_set

    make_set(tmp_path / "foreign", tokenizer="7")
    shutil.copytree(other, tmp_path / "damaged")
    (tmp_path / "damaged" / "index-00000.arrow").unlink()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("sftdata.run.run_tasks", None)
    for settings, said in (
        ({"total": "5 trained"}, "total without mix: it has no effect. Fix: leave total out."),
        ({"passes": 2}, "passes without mix"),
        ({"mix_by": "rows"}, "mix_by without mix"),
        ({"exclude_by": "row"}, "exclude_by without exclude"),
        ({"seed": 1}, "seed: nothing is drawn"),
        ({"mix": {"c.jsonl": 1}}, "mix c.jsonl: no source of that name. Fix: did you mean"),
        ({"cap": {"z": "3 rows"}}, "cap z: no source of that name"),
        ({"mix": {"a*": 1, "*": 1}}, "mix: a.jsonl has two shares"),
        ({"mix": {"a*": 1}, "total": "5 tokens"}, "counts tokens; mix_by is trained"),
        ({"exclude": [tmp_path / "none"]}, "no such folder"),
        ({"exclude": [tmp_path / "foreign"]}, "tokenizer 777777777777; here it is"),
        ({"exclude": [other], "chat_template": "chatml"}, f'exclude="{other}": chat template '),
        ({"exclude": [tmp_path / "damaged"]}, "index-00000.arrow: missing."),
        ({"exclude": [other, other]}, f'exclude="{other}": named twice. Fix: name it once.'),
        ({"mix": {"*": 1}, "total": "0 trained"}, "'0 trained' is nothing; expected more"),
        ({"cap": {"*": "0.4 rows"}}, "'0.4 rows' is nothing; expected more, or the source left out"),
        ({"eval": "120%"}, "a share is at most 100%"),
        ({"eval": "0%"}, "a share of none or all leaves a side of the split empty"),
        ({"eval": 1}, "a share of none or all leaves a side of the split empty"),
    ):
        with pytest.raises(SftError) as caught:
            prepare(tmp_path / "set", files, **settings)
        assert said in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UsageError, match="lies inside"):
        prepare(other / "set", files, exclude=[other])


def test_an_unfinished_set_in_the_way_of_a_split_is_refused_before_anything_is_tokenized(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.views.write._refuse_changed", None)
        with pytest.raises(TypeError):
            prepare(tmp_path / "set", files, dedup="row")
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.selected.make", None)
        with pytest.raises(UsageError, match="an unfinished set, and no split") as caught:
            prepare(tmp_path / "set", files, eval="20%")
    assert caught.value.fix.endswith("or start anew with --overwrite.")
    prepare(tmp_path / "set", files, eval="20%", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("later", [{}, {"dedup": "row"}, {"cap": {"*": "9 rows"}, "max_length": 64}], ids=str)
def test_a_set_takes_the_place_of_a_split_if_asked_for(
    files: list[Path], tmp_path: Path, later: Settings
) -> None:
    prepare(tmp_path / "set", files, eval="20%")
    before = contents(tmp_path / "set" / "train")
    with pytest.raises(UsageError, match=r"made otherwise \(eval differ\).* with overwrite=True"):
        prepare(tmp_path / "set", files, **later)
    assert contents(tmp_path / "set" / "train") == before
    made = prepare(tmp_path / "set", files, **later, overwrite=True)
    assert read_manifest(tmp_path / "set") == made
    assert not verify(tmp_path / "set").problems
    prepare(tmp_path / "set", files, eval="20%", overwrite=True)
    shutil.rmtree(tmp_path / "set" / "eval")
    both = prepare(tmp_path / "set", files, eval="20%", overwrite=True)
    assert [read_manifest(tmp_path / "set" / side) for side in ("train", "eval")] == [*both]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_sets_that_are_no_split_are_not_replaced_by_the_set_around_them(
    files: list[Path], tmp_path: Path
) -> None:
    for side in ("train", "eval"):
        prepare(tmp_path / "set" / side, files)
        for later in ({}, {"dedup": "row"}):
            with pytest.raises(UsageError, match="holds files, but is no set; nothing was touched"):
                prepare(tmp_path / "set", files, **later, overwrite=True)
    assert not verify(tmp_path / "set" / "train").problems


def test_nothing_is_made_where_nothing_is_left(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SftError, match=f"^{tmp_path / 'set'}/eval: no document is left"):
        prepare(tmp_path / "set", files, eval="0.0001%")
    assert not (tmp_path / "set").exists()
    prepare(tmp_path / "set", files, eval="20%")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# ------------------------------------------------------------------------------------------------ kills


@pytest.mark.parametrize(
    "chosen", [{"dedup": "prompt"}, {"eval": "30%", "mix": {"a*": 1, "b*": 2}}], ids=["whole", "split"]
)
@pytest.mark.parametrize("points", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_killed_choice_is_finished_by_the_same_command(
    files: list[Path], tmp_path: Path, chosen: Settings, points: int
) -> None:
    def make(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        made = prepare(tmp_path / name / "set", files, **chosen)
        return [one.digest for one in (made if isinstance(made, tuple) else (made,))]

    expected = make("expected")
    steps = -killed_at(partial(make, "counted"), 0)
    last = (steps - 3, steps - 1, steps)
    for number in sorted({1, *last, *random.Random(points).sample(range(1, steps + 1), min(points, steps))}):
        name = f"killed-{number}"
        assert killed_at(partial(make, name), number) == -signal.SIGKILL
        output = tmp_path / name / "set"
        if output.exists():
            folders = [output / side for side in ("train", "eval")] if "eval" in chosen else [output]
            assert [read_manifest(folder).digest for folder in folders] == expected
        assert make(name) == expected
        assert [path.name for path in output.parent.iterdir()] == ["set"]


RUNS: list[Settings] = [
    {},
    {"dedup": "row"},
    {"dedup": "prompt", "packing": "none"},
    {"eval": "30%"},
    {"eval": "0.0001%"},
    {"cap": {"*": "10 rows"}, "max_length": 64},
    {"mix": {"*": 1}, "total": "900k trained"},
    {"eval": "30%", "mix": {"*": 1}, "max_length": 64},
]


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 40))])
def test_runs_that_are_killed_or_refused_are_in_nobodys_way(tmp_path: Path, seed: int) -> None:
    rng, output = random.Random(seed), tmp_path / "set"
    rows = [[*chats(40, 5, 30)], [*chats(20, 6, 30)], [*chats(9, 1), {"messages": 3}]]
    inputs = [write_lines(tmp_path / f"{number}.jsonl", part) for number, part in enumerate(rows)]
    for _ in range(6):
        files, settings = [rng.choice(inputs)], rng.choice(RUNS)
        if rng.random() < 0.5:
            run = partial(prepare, output, files, **settings, overwrite=rng.random() < 0.3)
            killed_at(run, rng.randint(1, 40))
            continue
        try:
            _as_advised(output, files, settings)
        except SftError as error:
            if not re.search("rows rejected|no document is left|passes for total", str(error)):
                raise
        else:
            assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl") == ["set"]
            sides = ("train", "eval") if "eval" in settings else ("",)
            assert not [problem for side in sides for problem in verify(output / side).problems]


def _as_advised(output: Path, files: list[Path], settings: Settings) -> None:
    """Make a set; where that is refused and --overwrite advised, make it so."""
    try:
        prepare(output, files, **settings)
    except SftError as error:
        if "overwrite=True" not in str(error):
            raise
        prepare(output, files, **settings, overwrite=True)


def test_the_settings_that_choose_do_not_change_what_a_whole_set_is(files: list[Path]) -> None:
    plain = PrepareConfig(inputs=("a",), tokenizer="t", output=Path("o"))
    chosen = plain.model_copy(update={"eval": "5%", "seed": 3})
    assert plain.content() == chosen.content()
    assert not plain.chosen()
    assert chosen.chosen() == {"eval": "5%", "seed": 3}
