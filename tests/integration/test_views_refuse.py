"""Views refuse what would lose or mix up documents: damaged bases, names that collide, settings without effect."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftdata.cli import main
from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.set.manifest import read_manifest
from sftdata.set.opened import open_set
from sftdata.set.verify import verify
from sftdata.settings import check_settings
from sftdata.views.recipe import ViewConfig
from tests.view_sets import chats, prepare, split, view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    files = [write_lines(folder / f"{name}.jsonl", chats(40, ord(name), 40)) for name in "ab"]
    prepare(folder / "base", files, max_length=128)
    return folder / "base"


def refusal(output: Path, *bases: Path, **settings: Any) -> str:
    """Return what is said; nothing may be left on the disk."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(SftError) as caught:
        split(output, *bases, **settings)
    assert sorted(output.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "counted.jsonl", "rejects.jsonl", "dropped.jsonl"]
)
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_base_with_a_damaged_list_or_tokenizer_is_refused(
    base: Path, tmp_path: Path, name: str, damage: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / name).write_bytes((copy / name).read_bytes() + b" ") if damage == "changed" else (
        copy / name
    ).unlink()
    with pytest.raises(IntegrityError, match=name):
        view(tmp_path / "view", copy, max_length=64)


def test_a_base_whose_tokenizer_has_another_byte_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"q", b"z", 1))
    with pytest.raises(IntegrityError, match="tokenizer.json: xxh3"):
        view(tmp_path / "view", tmp_path / "copy", max_length=64)


@pytest.mark.parametrize("line", ["b.jsonl:0", "a.jsonl:0", "a.jsonl:4000", "4000"])
def test_a_list_of_documents_that_are_not_there_is_refused(base: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "list").write_text(f"a.jsonl:1\n{line}\n")
    assert f"found {line if ':' in line else f'example {line}'}; " in refusal(
        tmp_path / "view", base, drop=tmp_path / "list"
    )


@pytest.mark.parametrize("name", ["shard-00000.arrow", "index-00000.arrow", "rest-00000.arrow", "README.md"])
def test_a_set_with_damaged_files_is_not_up_to_date(tmp_path: Path, name: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", chats(40, 5, 40))
    made = prepare(tmp_path / "set", [source], max_length=64)
    path = tmp_path / "set" / name
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match=rf"{name}: missing\. Fix: replace the set with overwrite=True"):
        prepare(tmp_path / "set", [source], max_length=64)
    assert prepare(tmp_path / "set", [source], max_length=64, overwrite=True).digest == made.digest
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    prepare(tmp_path / "set", [source], max_length=64, overwrite=True)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("write", [False, True])
def test_a_damaged_view_is_made_again(tmp_path: Path, write: bool) -> None:
    prepare(tmp_path / "base", [write_lines(tmp_path / "a.jsonl", chats(30, 1))])
    made = view(tmp_path / "view", tmp_path / "base", max_length=64, write=write)
    (tmp_path / "view" / "index-00000.arrow").unlink()
    anew = "Fix: restore the file, or repeat the command that made the set, with overwrite=True."
    (problem,) = verify(tmp_path / "view").problems
    assert problem.endswith(f"missing. {anew}")
    shard = next((tmp_path / "view").glob("shard-*.arrow" if write else "packs-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=re.escape(anew)):
        open_set(tmp_path / "view")[0]
    again = view(tmp_path / "view", tmp_path / "base", max_length=64, write=write, overwrite=True)
    assert again.digest == made.digest
    next((tmp_path / "base").glob("rest-*.arrow")).unlink()
    problems = verify(tmp_path / "view").problems
    assert [str(tmp_path / "base") in problem for problem in problems] == [True] * (not write)


def test_a_list_may_come_from_windows(base: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfa.jsonl:1\r\n\r\n# a remark\r\nb.jsonl:2\r\n")
    ledger = view(tmp_path / "view", base, drop=tmp_path / "list").ledger
    assert ledger.documents_left_out == {"drop": 2}


@pytest.mark.parametrize(
    "setting", [{"total": "5 trained"}, {"passes": 2}, {"mix_by": "rows"}, {"exclude_by": "row"}, {"seed": 1}]
)
def test_a_setting_without_effect_is_refused(base: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    (name,) = setting
    assert refusal(tmp_path / "view", base, **setting).endswith(f"it has no effect. Fix: leave {name} out.")
    view(tmp_path / "view", base)


def test_advice_on_an_empty_view_is_followed(base: Path, tmp_path: Path) -> None:
    said = refusal(tmp_path / "view", base, max_length=2)
    assert said.endswith("Fix: a larger max_length, or another overlong.")
    view(tmp_path / "larger", base, max_length=64)
    said = refusal(tmp_path / "both", base, eval="0.0001%")
    assert said.startswith(f"{tmp_path / 'both' / 'eval'}: no document is left.")
    assert said.endswith("Fix: choose another share for eval.")
    split(tmp_path / "both", base, eval="30%")
    said = refusal(tmp_path / "filtered", base, eval="30%", min_tokens=10**6)
    assert said.endswith("Fix: loosen the filters.")
    split(tmp_path / "filtered", base, eval="30%", min_tokens=1)
    said = refusal(
        tmp_path / "few", base, eval="0.0001%", max_length=2, overlong="drop", sources=("a.jsonl",)
    )
    assert said.startswith(f"{tmp_path / 'few' / 'train'}: no document is left.")
    assert said.endswith("Fix: a larger max_length, or another overlong, or loosen the filters.")
    said = refusal(tmp_path / "short", base, max_length=2, without=("a.jsonl",))
    assert said.endswith("Fix: a larger max_length, or another overlong, or loosen the filters.")
    view(tmp_path / "short", base, max_length=64, without=("a.jsonl",))


def test_a_split_does_not_discard_an_unfinished_set(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.views.write._refuse_changed", None)
        with pytest.raises(TypeError):
            view(tmp_path / "both", base)
    with pytest.raises(UsageError, match="an unfinished set, and no split"):
        split(tmp_path / "both", base, eval="30%")
    split(tmp_path / "both", base, eval="30%", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["eval", "train"]


def test_a_step_that_is_there_twice_counts_all_that_it_left_out(base: Path, tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{name}.jsonl", chats(30, ord(name), 20)) for name in "abc"]
    prepare(tmp_path / "three", files)
    three = tmp_path / "three"
    gone = view(tmp_path / "without", three, without=("a.jsonl", "b.jsonl")).ledger.documents_left_out
    assert gone == {"without": 60}
    gone = view(tmp_path / "capped", three, cap={"a*": "10 rows", "b*": "5 rows"}).ledger.documents_left_out
    kept = view(tmp_path / "whole", three).ledger.sources
    assert gone == {"cap": kept["a.jsonl"].rows - 10 + kept["b.jsonl"].rows - 5}
    ledger = view(
        tmp_path / "mixed", three, mix={"a.jsonl": 1, "b.jsonl": 1}, mix_by="rows", total="10 rows"
    ).ledger
    assert ledger.documents_left_out["mix"] == ledger.rows_in - sum(ledger.rows_dropped.values()) - 10


def test_a_view_that_trains_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token of its rows is trained.*Fix: a larger max_length\.$"):
        view(tmp_path / "view", base, packing="wrapped", max_length=1)
    assert not (tmp_path / "view").exists()
    view(tmp_path / "view", base, packing="wrapped", max_length=64)


def test_a_view_in_or_around_its_base_is_refused(base: Path, tmp_path: Path) -> None:
    split(tmp_path / "both", base, eval="30%")
    for output in (tmp_path / "both", tmp_path / "both" / "train" / "view"):
        said = refusal(output, tmp_path / "both" / "train", overwrite=True, max_length=64)
        assert said.endswith("Fix: choose a folder beside it for output.")
    assert verify(tmp_path / "both" / "train").ok
    view(tmp_path / "beside", tmp_path / "both" / "train", max_length=64)


@pytest.mark.parametrize("write", [False, True])
def test_a_view_takes_the_place_of_a_split_if_asked_for(base: Path, tmp_path: Path, write: bool) -> None:
    split(tmp_path / "both", base, eval="30%", write=write)
    said = refusal(tmp_path / "both", base, max_length=64, write=write)
    assert "holds a finished set made otherwise (eval differ)" in said
    made = view(tmp_path / "both", base, max_length=64, write=write, overwrite=True)
    assert read_manifest(tmp_path / "both") == made
    split(tmp_path / "both", base, eval="30%", write=write, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["eval", "train"]


def test_a_written_view_is_the_set_that_was_prepared_alike(base: Path, tmp_path: Path) -> None:
    files = [base.parent / f"{name}.jsonl" for name in "ab"]
    made = prepare(tmp_path / "set", files, max_length=64)
    again = view(tmp_path / "set", base, max_length=64)
    assert again == made == read_manifest(tmp_path / "set")
    written = view(tmp_path / "view", base, max_length=64)
    assert written.digest == made.digest
    assert prepare(tmp_path / "view", files, max_length=64) == written
    globbed = prepare(tmp_path / "globbed", [base.parent / "*.jsonl"], max_length=64)
    assert view(tmp_path / "globbed", base, max_length=64) == globbed
    said = refusal(tmp_path / "set", base, max_length=60, write=True)
    assert said.endswith(
        "(max_length differ). Fix: choose another output, or replace the set with overwrite=True."
    )
    write_lines(tmp_path / "c.jsonl", chats(40, 3, 40))
    prepare(tmp_path / "other", [tmp_path / "c.jsonl"], max_length=64)
    assert "(formats, sources differ)" in refusal(tmp_path / "other", base, max_length=64, write=True)


def test_sets_of_one_folder_name_are_told_apart(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(base, tmp_path / name / "train")
    made = view(tmp_path / "view", tmp_path / "one/train", tmp_path / "two/train")
    assert [source.name for source in made.sources] == [
        f"{folder}/train/{name}.jsonl" for folder in ("one", "two") for name in "ab"
    ]


def test_passes_over_a_mixture_get_names_of_their_own(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "mixed", base, mix={"a.jsonl": 1}, passes=2)
    made = view(tmp_path / "again", tmp_path / "mixed", mix={"a.jsonl": 1}, passes=3)
    names = [source.name for source in made.sources]
    assert len({*names}) == len(names) == 5


def test_rows_that_a_formatter_left_out_keep_their_source(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows = [row | {"number": number} for number, row in enumerate(chats(8, 9, 9))]
        source = write_lines(tmp_path / name / "a.jsonl", rows)
        prepare(tmp_path / name / "set", [source], formatter=f"{__name__}:every_other")
    sets = [tmp_path / name / "set" for name in ("one", "two")]
    made = view(tmp_path / "view", *sets)
    assert sum(made.ledger.rows_filtered.values()) == 8
    made = view(tmp_path / "again", tmp_path / "view", max_length=64)
    listed = [json.loads(line) for line in (tmp_path / "again" / "dropped.jsonl").read_text().splitlines()]
    filtered = [line["file"] for line in listed if line["reason"] in made.ledger.rows_filtered]
    assert filtered == ["one/set/a.jsonl"] * 4 + ["two/set/a.jsonl"] * 4
    assert {source.name for source in read_manifest(tmp_path / "view").sources} == {*filtered}


def every_other(row: dict[str, Any]) -> dict[str, Any] | None:
    """Leave out every second row."""
    return {"messages": row["messages"]} if row["number"] % 2 else None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"cap": {"*": "-1 rows"}}, "Fix: correct it: Most of a source"),
        ({"eval": "x"}, "found 'x'; expected a share, as 5% or 0.05. Fix: "),
        ({"dedup": "rows"}, "Fix: did you mean 'row'?"),
    ],
)
def test_values_are_refused_with_a_fix_that_helps(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_settings(ViewConfig, "sftdata", {"sets": ["x"], "output": "y", **setting})
    assert said in str(caught.value)


@pytest.mark.parametrize("command", ["view", "prepare"])
def test_a_command_alone_shows_its_help_in_lines(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    out, said = capsys.readouterr()
    assert not out
    assert said.startswith("Usage: ")
    assert max(map(len, said.splitlines())) <= 110
