"""A finished set given to `prepare` is refused as what it is, with the commands that do what is meant."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.set.manifest import read_manifest
from tests.view_sets import TOKENIZER, chats, prepare, view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets, one with a name that a shell takes apart, and a file."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("one", "the other"):
        prepare(
            folder / name, [write_lines(folder / f"{name}.jsonl", chats(40, ord(name[0]), 30))], max_length=64
        )
    return folder


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[str, str]:
    """Return what is said, and the fix."""
    capsys.readouterr()
    assert main(list(command)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return tuple(said.strip().split(" Fix: "))  # type: ignore[return-value]


def follow(commands: str) -> None:
    """Run what a fix says, as a shell would."""
    for command in commands.split(" && "):
        program, *arguments = shlex.split(command)
        assert program == "sftdata"
        assert main(arguments) == 0


def test_the_fix_is_the_view_that_is_meant(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = str(sets / "one"), str(sets / "the other")
    chosen = ["--max-length", "1024", "--eval", "20%", "--cap", "*=30 rows", "--cap", "one.jsonl=20 rows"]
    given = ["prepare", one, other, "-o", "to be made", *chosen, "--workers", "2", "--set", "seed=3"]
    said, fix = refused(capsys, *given)
    assert said == f"{one}: a finished set, whose rows are tokenized already."
    follow(fix)
    expected = sftdata.view(
        [one, other], output="expected", write=True, max_length=1024, eval="20%", seed=3,
        cap={"*": "30 rows", "one.jsonl": "20 rows"},
    )  # fmt: skip
    for side, made in zip(("train", "eval"), expected, strict=True):
        assert read_manifest(tmp_path / "to be made" / side).digest == made.digest
    Path("sft.yaml").write_text(
        json.dumps({"inputs": one, "output": "file", "packing": "none", "mix": {"*": 1}})
    )
    said, fix = refused(capsys, "prepare", "sft.yaml", "--overwrite")
    assert fix == f"sftdata view {one} -o file --write --packing none --mix '*=1' --overwrite"
    follow(fix)
    assert (
        read_manifest(Path("file")).digest
        == view(tmp_path / "same", Path(one), packing="none", mix={"*": 1}).digest
    )
    with pytest.raises(UsageError, match="tokenized already") as caught:
        sftdata.prepare([one], output="python", max_length=32, packing="bfd")
    follow(caught.value.fix)
    assert read_manifest(Path("python")).max_length == 32


def test_settings_that_need_the_text_are_named(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = str(sets / "one")
    text = ["-t", TOKENIZER, "--train-on", "last-assistant", "--set", "template_kwargs.think=false"]
    said, fix = refused(capsys, "prepare", one, "-o", "out", *text, "--max-length", "32")
    assert said == (
        f"{one}: a finished set, whose rows are tokenized already;"
        " --set template_kwargs, --tokenizer, --train-on would need their text."
    )
    named, without = fix.split("; or do without: ")
    assert named == "name the files that it is made from"
    follow(without)
    assert read_manifest(Path("out")).digest == view(tmp_path / "same", Path(one), max_length=32).digest
    follow(
        shlex.join(
            [
                "sftdata",
                "prepare",
                f"{one}.jsonl",
                "-o",
                "text",
                "-t",
                TOKENIZER,
                "--train-on",
                "last-assistant",
            ]
        )
    )


def test_a_set_beside_files_is_joined_to_theirs(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, file = str(sets / "one"), str(sets / "the other.jsonl")
    said, fix = refused(capsys, "prepare", file, one, "-t", TOKENIZER, "-o", "out", "--dedup", "row")
    assert said == f"{one}: a finished set, whose rows are tokenized already, beside files."
    follow(fix)
    expected = view(tmp_path / "same", Path(one), sets / "the other", dedup="row")
    assert read_manifest(Path("out")).ledger.rows_kept == expected.ledger.rows_kept


@pytest.mark.parametrize("command", ["preview", "detect"])
def test_a_set_is_shown_by_what_shows_sets(
    sets: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    said, fix = refused(capsys, command, str(sets / "the other"))
    assert said == f"{sets / 'the other'}: a finished set, not rows."
    follow(fix)
    arguments: list[Any] = [command, str(sets / "the other"), "-t", TOKENIZER]
    if command == "preview":
        assert refused(capsys, *arguments)[1] == fix


def test_a_stream_is_not_taken_for_a_set_of_its_name(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    view(Path("stream"), sets / "one", max_length=64)
    assert len(list(sftdata.stream([{"text": "so it is"}] * 9, tokenizer=TOKENIZER, max_length=16)))


def test_the_folder_of_a_split_names_its_sides(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sftdata.view(sets / "one", output=tmp_path / "both", eval="30%", max_length=64)
    said, fix = refused(capsys, "prepare", str(tmp_path / "both"), "-o", str(tmp_path / "x"))
    assert said == f"{tmp_path / 'both'}: holds sets and is none itself: eval, train."
    assert fix == f"name one, as {tmp_path / 'both' / 'train'}."
    said, fix = refused(capsys, "prepare", str(tmp_path / "both" / "train"), "-o", str(tmp_path / "x"))
    follow(fix)
