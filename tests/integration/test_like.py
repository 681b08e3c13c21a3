"""`--like SET` repeats the settings of a set: on the same inputs it makes the same set, digest for digest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.manifest import read_manifest
from tests.view_sets import TOKENIZER, Settings, chats, prepare, view, write_inputs, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")

ROWS = [{"instruction": f"Name {number}", "input": "", "output": f"it is {number}"} for number in range(20)]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Path], Settings]]:
    """Inputs of eight kinds."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("source") / "a.jsonl", chats(60, 5, 40))


def digests(made: Any) -> list[str]:
    return [one.digest for one in (made if isinstance(made, tuple) else (made,))]


KINDS: dict[str, Settings] = {
    "chats": {"packing": "wrapped", "max_length": 100, "train_on": "last-assistant"},
    "weighted": {"overlong": "split", "max_length": 64},
    "texts": {"eos_token": "<|eot|>", "packing": "none", "max_length": 300},
    "table": {"map": {"prompt": "prompt"}, "boundary": "merge", "dedup": "row"},
    "array": {"chat_template": "llama-3", "eval": "30%", "seed": 4},
    "rejects": {"trust_control_tokens": True, "mix": {"bad.jsonl": 1}, "passes": 1.5, "total": "2k trained"},
    "filtered": {"cap": {"*": "20 rows"}},
    "tokens": {"train_on": "auto", "slice_bytes": 20_000},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_make_the_same_set(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], kind: str
) -> None:
    files, settings = inputs[kind]
    made = prepare(tmp_path / "set", files, **settings, **KINDS[kind])
    like = tmp_path / "set" / "eval" if "eval" in KINDS[kind] else tmp_path / "set"
    manner = {"workers": 1, "max_rejects": "50%"}
    again = sftdata.prepare(files, like=like, output=tmp_path / "again", **manner)
    assert digests(again) == digests(made)
    command = ["prepare", *map(str, files), "--like", str(like), "-o", str(tmp_path / "flags")]
    assert main([*command, "--workers", "1", "--max-rejects", "50%"]) == 0
    flags = tmp_path / "flags"
    folders = [flags / side for side in ("train", "eval")] if "eval" in KINDS[kind] else [flags]
    assert [read_manifest(folder).digest for folder in folders] == digests(made)


def test_a_prompt_template_is_repeated_from_its_text(tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "prompt.txt").write_text("Q: {instruction}\n\nA: {output}\n")
    made = prepare(tmp_path / "set", [rows], prompt_template=str(tmp_path / "prompt.txt"), kind="completion")
    (tmp_path / "prompt.txt").unlink()
    again = sftdata.prepare(rows, like=tmp_path / "set", output=tmp_path / "again", workers=1)
    assert again.digest == made.digest
    other = sftdata.prepare(rows, like=tmp_path / "set", output=tmp_path / "other", kind="auto", workers=1,
                            prompt_template=None)  # fmt: skip
    assert other.settings["kind"] == "auto"
    assert other.settings["prompt_template_text"] is None


def test_tokens_that_were_added_stay_new_to_the_model(source: Path, tmp_path: Path) -> None:
    made = prepare(tmp_path / "set", [source], chat_template="gemma", max_length=64)
    assert made.tokenizer.tokens_added
    again = sftdata.prepare(source, like=tmp_path / "set", output=tmp_path / "again", workers=1)
    assert again.tokenizer.tokens_added == made.tokenizer.tokens_added
    assert again.digest == made.digest
    more = sftdata.prepare(
        source, like=tmp_path / "set", output=tmp_path / "more", chat_template="llama-3", workers=1
    )
    assert more.tokenizer.tokens_added[: len(made.tokenizer.tokens_added)] == made.tokenizer.tokens_added
    assert len(more.tokenizer.tokens_added) > len(made.tokenizer.tokens_added)


def test_what_is_given_wins_however_it_is_given(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "set"
    settings: Settings = {
        "packing": "none",
        "max_length": 64,
        "overlong": "drop",
        "map_role": {"user": "user"},
    }
    prepare(old, [source], **settings)
    given: Settings = {"packing": "bfd", "overlong": "truncate", "workers": 1}
    made = sftdata.prepare(source, like=old, output=tmp_path / "python", **given)
    assert {name: made.settings[name] for name in settings} == settings | {
        "packing": "bfd",
        "overlong": "truncate",
    }
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        json.dumps({"inputs": [str(source)], "like": str(old), "output": "out", "packing": "bfd"})
    )
    assert main(["config", "check", str(recipe), "--json", "--set", "map_role.assistant=assistant"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["like"] == str(old)
    assert checked["tokenizer"] == str(old / "tokenizer")
    assert [checked[name] for name in ("packing", "overlong", "max_length")] == ["bfd", "drop", 64]
    assert checked["map_role"] == {"user": "user", "assistant": "assistant"}
    assert (
        main(["init", str(source), "--like", str(old), "--overlong", "truncate", "-f", "-", "-o", "x"]) == 0
    )
    (tmp_path / "init.yaml").write_text(capsys.readouterr().out)
    assert main(["config", "check", str(tmp_path / "init.yaml"), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert [checked[name] for name in ("packing", "overlong")] == ["none", "truncate"]
    assert main(["preview", str(source), "--like", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["projected"]["packed_rows"]
    assert sftdata.preview(source, like=old).max_length == 64


def test_a_formatter_is_repeated_where_its_code_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", [{"q": "what", "a": "that"}] * 5)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = "def fix(row):\n    return {'prompt': row['q'], 'completion': row['a']}\n"
    Path("rows_of_like.py").write_text(code)
    made = prepare(tmp_path / "set", [rows], formatter="rows_of_like:fix")
    like = {"like": tmp_path / "set", "workers": 1}
    assert sftdata.prepare(rows, output=tmp_path / "again", **like).digest == made.digest
    Path("rows_of_like.py").write_text(code + "# changed\n")
    with pytest.raises(UsageError, match="the code of its formatter rows_of_like:fix has changed") as caught:
        sftdata.prepare(rows, output=tmp_path / "refused", **like)
    assert caught.value.fix == "--formatter rows_of_like:fix takes the code as it is now."
    assert (
        sftdata.prepare(rows, output=tmp_path / "now", formatter="rows_of_like:fix", **like).ledger.rows_kept
        == 5
    )
    prepare(tmp_path / "lambda", [rows], formatter=lambda row: {"prompt": row["q"], "completion": row["a"]})
    with pytest.raises(UsageError, match="was known to one process alone"):
        sftdata.prepare(rows, output=tmp_path / "refused", like=tmp_path / "lambda")


def test_a_set_that_cannot_be_repeated_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    prepare(base, [source], max_length=64)
    prepare(other, [write_lines(tmp_path / "b.jsonl", chats(10, 9, 20))])
    prepare(tmp_path / "without", [source], exclude=[other])
    with pytest.raises(UsageError, match="keeps but a hash of what its 'exclude' named") as caught:
        sftdata.prepare(source, like=tmp_path / "without", output=tmp_path / "x")
    assert caught.value.fix == "name each set again: --exclude SET."
    again = sftdata.prepare(
        source, like=tmp_path / "without", output=tmp_path / "x", exclude=[other], workers=1
    )
    assert again.digest == read_manifest(tmp_path / "without").digest
    view(tmp_path / "view", base, min_tokens=20)
    with pytest.raises(UsageError, match="a view, made of a set that was prepared") as caught:
        sftdata.prepare(source, like=tmp_path / "view", output=tmp_path / "y")
    assert (
        caught.value.fix
        == f"prepare the inputs like that set, then: sftdata view NEW_SET -o OUT --like {tmp_path / 'view'}"
    )
    sftdata.prepare(source, like=base, output=tmp_path / "new", workers=1)
    assert (
        main(["view", str(tmp_path / "new"), "-o", str(tmp_path / "y"), "--like", str(tmp_path / "view")])
        == 0
    )
    assert read_manifest(tmp_path / "y").digest == read_manifest(tmp_path / "view").digest
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(
        IntegrityError,
        match=r'like=".*/tokenizer/.*": missing\. Fix: .* name the tokenizer with tokenizer\.$',
    ):
        sftdata.prepare(source, like=base, output=tmp_path / "z")
    kept = sftdata.prepare(source, like=base, tokenizer=TOKENIZER, output=tmp_path / "z", workers=1)
    assert kept.digest == read_manifest(base).digest
    with pytest.raises(UsageError, match="no such folder"):
        sftdata.prepare(source, like=tmp_path / "none", output=tmp_path / "w")


def test_views_are_repeated_on_other_sets(source: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(one, [source], max_length=64)
    prepare(two, [write_lines(tmp_path / "a.jsonl", chats(50, 8, 40))], max_length=200, overlong="drop")
    (tmp_path / "list").write_text("a.jsonl:3\n")
    settings: Settings = {"cap": {"a.jsonl": "20 rows"}, "seed": 3, "packing": "none", "min_tokens": 10}
    settings |= {"max_length": 100, "order": "shuffled", "overlong": "truncate", "drop": tmp_path / "list"}
    view(tmp_path / "view", one, **settings)
    expected = view(tmp_path / "expected", two, **settings)
    with pytest.raises(UsageError, match="keeps but a hash of what its 'drop' named"):
        sftdata.view(two, like=tmp_path / "view", output=tmp_path / "x")
    made = sftdata.view(two, like=tmp_path / "view", output=tmp_path / "x", drop=tmp_path / "list")
    assert made.digest == expected.digest
    assert sftdata.view(two, like=one, output=tmp_path / "y").digest == view(
        tmp_path / "plain", two, max_length=64, packing="bfd", overlong="truncate", write=False
    ).digest  # fmt: skip
    train, held_out = sftdata.view(one, eval="30%", output=tmp_path / "both")
    assert digests(sftdata.view(one, like=tmp_path / "both/train", output=tmp_path / "z")) == [
        train.digest,
        held_out.digest,
    ]


def test_steps_are_dealt_again_by_the_cost_that_they_had(source: Path, tmp_path: Path) -> None:
    base, like = tmp_path / "base", tmp_path / "steps"
    prepare(base, [source], max_length=64)
    model = tmp_path / "model"
    shutil.copytree(Path(TOKENIZER).parent / "tiny-model", model)
    made = view(like, base, steps_for="2x1", model=model, order="length", bands=2)
    shutil.rmtree(model)
    assert sftdata.view(base, like=like, output=tmp_path / "again").digest == made.digest
    other = sftdata.view(base, like=like, output=tmp_path / "other", steps_for="3x2", order="as-is")
    cost = made.settings["view"]["steps"]["cost"]
    assert other.settings["view"]["steps"] == {"ranks": 3, "rows": 2, "cost": cost}
    with pytest.raises(UsageError, match="a set, and not in steps of equal work") as caught:
        sftdata.view(base, output=tmp_path / "refused", steps_for="2x1", model=base)
    assert caught.value.fix.endswith(" or a set made with --steps-for.")
    sftdata.view(base, output=tmp_path / "taken", steps_for="2x1", model=like)


def test_what_is_turned_off_takes_what_acts_beside_it_along(source: Path, tmp_path: Path) -> None:
    base, like = tmp_path / "base", tmp_path / "like"
    prepare(base, [source], max_length=64)
    view(like, base, steps_for="2x1", order="length", bands=2, mix={"*": 1}, passes=2, mix_by="rows")
    plain = view(tmp_path / "plain", base, pack_over="view", max_length=64)
    off: Settings = {"steps_for": None, "order": "as-is", "mix": {}}
    assert sftdata.view(base, like=like, output=tmp_path / "python", **off).digest == plain.digest
    arguments = ["--set", "steps_for=null", "--set", "mix={}", "--order", "as-is"]
    assert main(["view", str(base), "--like", str(like), "-o", str(tmp_path / "flags"), *arguments]) == 0
    assert read_manifest(tmp_path / "flags").digest == plain.digest
    other = sftdata.view(base, like=like, output=tmp_path / "other", order="trained", mix={"a.jsonl": 1})
    assert {name: other.settings["view"][name] for name in ("bands", "passes", "mix_by")} == {
        "bands": 2, "passes": 2, "mix_by": "rows"
    }  # fmt: skip
