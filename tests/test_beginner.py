"""Forty mistakes of a first day: each is one line, and who does what it says gets what was meant."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftdata.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
SET = "prepare chats.jsonl -t tok -o set --max-length 256"
# What is typed; what the line says, in words that tell what to type instead; and that.
MISTAKES: dict[str, tuple[str, str, str]] = {
    "a name with a letter missing": (
        "prepare chat.jsonl -t tok -o a",
        "did you mean chats.jsonl?",
        "prepare chats.jsonl -t tok -o a",
    ),
    "no tokenizer": (
        "prepare chats.jsonl -o a",
        "name it with --tokenizer",
        "prepare chats.jsonl --tokenizer tok -o a",
    ),
    "no output": (
        "prepare chats.jsonl -t tok",
        "name it with --output",
        "prepare chats.jsonl -t tok --output a",
    ),
    "a command with a letter missing": (
        "prepar chats.jsonl -t tok -o a",
        "did you mean 'prepare'?",
        "prepare chats.jsonl -t tok -o a",
    ),
    "TRL's flag": (
        "prepare chats.jsonl -t tok -o a --max-seq-length 64",
        "here it is --max-length.",
        "prepare chats.jsonl -t tok -o a --max-length 64",
    ),
    "a flag with letters swapped": (
        "prepare chats.jsonl -t tok -o a --max-lenght 64",
        "did you mean '--max-length'?",
        "prepare chats.jsonl -t tok -o a --max-length 64",
    ),
    "a flag without its end": (
        "prepare alpaca.json -t tok -o a --overwrit",
        "did you mean '--overwrite'?",
        "prepare alpaca.json -t tok -o a --overwrite",
    ),
    "a length below 0": (
        "prepare chats.jsonl -t tok -o a --max-length -5",
        "found -5; expected a number above 0",
        "prepare chats.jsonl -t tok -o a --max-length 64",
    ),
    "a switch in place of a kind": (
        "prepare chats.jsonl -t tok -o a --packing true",
        "found 'true'; expected one of 'bfd', 'wrapped', 'none'",
        "prepare chats.jsonl -t tok -o a --packing bfd",
    ),
    "a role that is none": (
        "prepare chats.jsonl -t tok -o a --train-on answer",
        "'assistant', 'last-assistant'",
        "prepare chats.jsonl -t tok -o a --train-on assistant",
    ),
    "the name of an API as a format": (
        "prepare chats.jsonl -t tok -o a --format openai",
        "messages",
        "prepare chats.jsonl -t tok -o a --format messages",
    ),
    "a folder of several splits": (
        "prepare data -t tok -o a",
        "as --split train",
        "prepare data -t tok -o a --split train",
    ),
    "columns of other names": (
        "prepare cols.jsonl -t tok -o a",
        "--map question=COLUMN --map answer=COLUMN",
        "prepare cols.jsonl -t tok -o a --map question=q --map answer=a",
    ),
    "a role of another name": (
        "prepare bot.jsonl -t tok -o a",
        "--map-role bot=assistant",
        "prepare bot.jsonl -t tok -o a --map-role bot=assistant --overwrite",
    ),
    "pairs of preferences": (
        "prepare pref.jsonl -t tok -o a",
        "--map completion=chosen",
        "prepare pref.jsonl -t tok -o a --map completion=chosen",
    ),
    "a column of answers that is not known": (
        "prepare said.jsonl -t tok -o a",
        "as --map answer=COLUMN",
        "prepare said.jsonl -t tok -o a --map answer=said",
    ),
    "a setting misspelled in a file": (
        "prepare sft.yaml",
        "did you mean 'max_length'?",
        "prepare mended.yaml",
    ),
    "a file that is no YAML": ("prepare bad.yaml", "bad.yaml:2: not YAML", "prepare mended.yaml"),
    "a base model's tokenizer": (
        "prepare talk.jsonl -t base -o a",
        "--chat-template chatml",
        "prepare talk.jsonl -t base -o a --chat-template chatml",
    ),
    "a pattern that matches nothing": (
        "prepare *.jsn -t tok -o a",
        "check the pattern",
        "prepare alp*.json -t tok -o a",
    ),
    "a number of rows in place of a share": (
        "prepare chats.jsonl -t tok -o a --eval 5",
        "as 5%",
        "prepare chats.jsonl -t tok -o a --eval 5%",
    ),
    "a share above all": (
        "prepare chats.jsonl -t tok -o a --eval 200%",
        "at most 100%",
        "prepare chats.jsonl -t tok -o a --eval 20%",
    ),
    "shares by half a name": (
        "prepare chats.jsonl alpaca.json -t tok -o a --mix chats=50% --mix alpaca.json=50%",
        "did you mean 'chats.jsonl'?",
        "prepare chats.jsonl alpaca.json -t tok -o a --mix chats.jsonl=50% --mix alpaca.json=50%",
    ),
    "shares that come to too much": (
        "prepare chats.jsonl alpaca.json -t tok -o a --mix chats.jsonl=70% --mix alpaca.json=70%",
        "expected 100%",
        "prepare chats.jsonl alpaca.json -t tok -o a --mix chats.jsonl=70% --mix alpaca.json=30%",
    ),
    "a marker that is not in the text": (
        "prepare text.jsonl -t tok -o a --response-template '### Response:'",
        "set --response-template to the marker",
        "prepare text.jsonl -t tok -o a --response-template '### Assistant:' --overwrite",
    ),
    "a mapping without an equals sign": (
        "prepare chats.jsonl -t tok -o a --map messages",
        "with an equals sign",
        "prepare chats.jsonl -t tok -o a --map messages=messages",
    ),
    "a policy of another name": (
        "prepare chats.jsonl -t tok -o a --overlong cut",
        "'truncate', 'truncate-left', 'drop'",
        "prepare chats.jsonl -t tok -o a --overlong truncate",
    ),
    "a file as the output": (
        "prepare chats.jsonl -t tok -o chats.jsonl",
        "choose another -o",
        "prepare chats.jsonl -t tok -o a",
    ),
    "a folder of other files as the output": (
        "prepare chats.jsonl -t tok -o data",
        "choose an empty or new folder",
        "prepare chats.jsonl -t tok -o new",
    ),
    "other settings in the same folder": (
        "prepare chats.jsonl -t tok -o set --max-length 128",
        "--overwrite",
        "prepare chats.jsonl -t tok -o set --max-length 128 --overwrite",
    ),
    "a set as rows": ("prepare set -t tok -o a", "sftdata view set -o a --write", "view set -o a --write"),
    "a row that there is not": ("inspect set --row 9999", "--row with one of these", "inspect set --row 0"),
    "a set that is not there": ("stats sett", "name the folder that `sftdata prepare -o` wrote", "stats set"),
    "rows in place of a set": (
        "verify chats.jsonl",
        "name the folder that `sftdata prepare -o` wrote",
        "verify set",
    ),
    "a view without a place": ("view set", "name it with --output", "view set --output v"),
    "a source by half its name": (
        "view set -o v --sources chat",
        "the sources are chats.jsonl",
        "view set -o v --sources chats.jsonl",
    ),
    "one set to compare": ("diff set", "see `sftdata diff --help`", "diff --help"),
    "a preview without a tokenizer": (
        "preview chats.jsonl",
        "name it with --tokenizer",
        "preview chats.jsonl --tokenizer tok",
    ),
    "a code that there is not": ("explain no-such", "`sftdata explain` lists them all", "explain"),
    "a setting without its value": (
        "prepare chats.jsonl -t tok -o a --set max_length",
        "--set max_length=2048",
        "prepare chats.jsonl -t tok -o a --set max_length=2048",
    ),
}


def _lines(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="module")
def first_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the mistakes are made on, and a set."""
    folder = tmp_path_factory.mktemp("day")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for ours, name in (("conversations.jsonl", "chats.jsonl"), ("instructions.json", "alpaca.json")):
            shutil.copy(EXAMPLES / ours, name)
        for name in ("tok", "base"):
            shutil.copytree(EXAMPLES / "tokenizer", name)
        plain = json.loads(Path("base/tokenizer_config.json").read_text("utf-8"))
        plain.pop("chat_template", None)
        Path("base/tokenizer_config.json").write_text(json.dumps(plain))
        Path("data").mkdir()
        shutil.copy("chats.jsonl", "data/train.jsonl")
        shutil.copy("chats.jsonl", "data/test.jsonl")
        asked = [{"role": "user", "content": "And May?"}]
        _lines(
            "bot.jsonl",
            [{"messages": [*asked, {"role": "bot", "content": f"{n} beans."}]} for n in range(20)],
        )
        _lines("talk.jsonl", [{"messages": [*asked, {"role": "assistant", "content": "Peas."}]}])
        _lines("cols.jsonl", [{"q": f"{n}?", "a": "Yes."} for n in range(20)])
        _lines("said.jsonl", [{"prompt": f"{n}?", "said": "Yes."} for n in range(20)])
        _lines("pref.jsonl", [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(20)])
        _lines("text.jsonl", [{"text": f"### Human: {n}? ### Assistant: Yes, {n}."} for n in range(20)])
        recipe = "inputs: [chats.jsonl]\ntokenizer: tok\noutput: a\nmax_length: 64\n"
        Path("mended.yaml").write_text(recipe)
        Path("sft.yaml").write_text(recipe.replace("max_length", "max_lenght"))
        Path("bad.yaml").write_text("inputs: [chats.jsonl\n")
        assert main(SET.split()) == 0
    return folder


def test_there_are_forty() -> None:
    assert len(MISTAKES) == 40


@pytest.mark.feature("mistakes")
@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_who_follows_the_line_gets_what_was_meant(
    mistake: str,
    first_day: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(first_day, tmp_path / "day")
    monkeypatch.chdir(tmp_path / "day")
    wrong, said, right = MISTAKES[mistake]
    assert main(shlex.split(wrong)) in (2, 3)
    *_, line = capsys.readouterr().err.splitlines()
    assert said in line
    assert main(shlex.split(right)) == 0
