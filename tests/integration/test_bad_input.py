"""What a user meets who brings something that cannot be used as it is: one true line, and a fix that works."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import build_app
from sftdata.errors import DataError, SftError, UsageError
from sftdata.frame import run_app
from sftdata.set.verify import verify

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------- rows that are good


def test_an_empty_completion_still_trains_its_end_token(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": "Say nothing.", "completion": ""},
        {"prompt": "One", "completion": " two"},
    )
    manifest = sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64)
    assert manifest.ledger.rows_kept == 2
    silent = next(
        document
        for row in sftdata.open(tmp_path / "set")
        for document in row.documents()
        if document.example_id == 0
    )
    assert silent.labels[silent.labels != -100].tolist() == [manifest.tokenizer.eos_id]


def test_tools_that_a_template_leaves_out_are_counted(tmp_path: Path) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    turns = [{"role": "user", "content": "Use weather!"}, {"role": "assistant", "content": "No."}]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": turns, "tools": [tool]}, {"messages": turns})
    manifest = sftdata.prepare(
        path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, chat_template="chatml"
    )
    assert manifest.ledger.counters["rows_without_their_tools"] == 1


# ------------------------------------------------------------------- refused, mended, and run again in place

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BOT, OFF = {"role": "bot", "content": "b"}, TURNS[1] | {"weight": 0}
# rows; settings of the run that is refused; the fix it offers; the settings that follow it
MENDED: dict[str, tuple[list[Any], dict[str, Any], str, dict[str, Any]]] = {
    "an unknown role": (
        [{"messages": [TURNS[0], BOT]}],
        {},
        'map_role={"bot": "assistant"}',
        {"map_role": {"bot": "assistant"}},
    ),
    "too many rejects": (
        [{"messages": TURNS}, {"messages": []}],
        {},
        "max_rejects=1",
        {"max_rejects": "1"},
    ),
    "no answer": ([{"messages": TURNS[:1]}], {}, 'train_on="all"', {"train_on": "all"}),
    "cut before the answer": (
        [{"messages": TURNS}],
        {"max_length": 3},
        "a larger max_length",
        {"max_length": 64},
    ),
    "longer than allowed": (
        [{"messages": TURNS}],
        {"max_length": 11, "overlong": "error"},
        'overlong="truncate"',
        {"max_length": 11},
    ),
    "dropped as too long": (
        [{"messages": TURNS}],
        {"max_length": 11, "overlong": "drop"},
        'overlong="truncate"',
        {"max_length": 11},
    ),
    "another marker": (
        [{"text": "Q: a A: b"}],
        {"response_template": "A :"},
        'response_template="A:"',
        {"response_template": "A:"},
    ),
}


@pytest.mark.parametrize("case", MENDED)
def test_the_fix_of_a_refused_run_works_where_the_run_was_refused(tmp_path: Path, case: str) -> None:
    rows, settings, fix, mended = MENDED[case]
    inputs, output = write_rows(tmp_path / "rows.jsonl", *rows), tmp_path / "set"
    with pytest.raises(DataError) as refused:
        sftdata.prepare(inputs, tokenizer=TOKENIZER, output=output, workers=1, **settings)
    assert fix in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not output.exists()
    sftdata.prepare(inputs, tokenizer=TOKENIZER, output=output, workers=1, **mended)
    assert verify(output).problems == []


def test_a_turn_that_is_switched_off_is_trained_once_it_is_switched_on_as_the_fix_says(
    tmp_path: Path,
) -> None:
    inputs, output = tmp_path / "rows.jsonl", tmp_path / "set"
    with pytest.raises(DataError, match="switch turns on in the data"):
        sftdata.prepare(
            write_rows(inputs, {"messages": [TURNS[0], OFF]}), tokenizer=TOKENIZER, output=output, workers=1
        )
    made = sftdata.prepare(
        write_rows(inputs, {"messages": TURNS}), tokenizer=TOKENIZER, output=output, workers=1
    )
    assert made.ledger.rows_kept == 1


@pytest.mark.parametrize("content", ["", "  \n\n", "[]"], ids=["empty", "blank", "empty array"])
def test_an_input_without_rows_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(
        SftError, match=r"rows\.jsonl: no rows\. Fix: give a file that holds rows\."
    ) as refused:
        sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", workers=1)
    assert refused.value.exit_code == DataError.exit_code


def test_an_unfinished_set_that_was_not_refused_is_kept_from_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TURNS})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sftdata.run.conclude", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", workers=1)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(UsageError, match="an unfinished set made with other settings"):
            sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", workers=1, train_on="all")
    sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", workers=1)


# ---------------------------------------------------------------------------------------- said on the command line

SAID: dict[str, tuple[list[str], int, str]] = {
    "a preview of nothing": (
        ["preview", "empty.jsonl"],
        3,
        "empty.jsonl: no rows. Fix: give a file that holds rows.",
    ),
    "no marker": (
        ["resolve", "rows.jsonl"],
        2,
        "No marker is given as text, so there is nothing to resolve. Fix: --response-template",
    ),
    "a limit in words": (
        ["preview", "rows.jsonl", "--set", "max_rejects=many"],
        2,
        "found 'many'; expected a text like 1% or 20. Fix: correct it: Rejected rows tolerated: a share",
    ),
    "a limit below none": (
        ["prepare", "rows.jsonl", "--max-rejects", "-1", "-o", "set"],
        2,
        "--max-rejects: found '-1'; expected a text like 1% or 20. Fix: correct it: Rejected rows",
    ),
    "a date in words": (
        ["preview", "rows.jsonl", "--date", "today"],
        2,
        "--date: found 'today'; expected a text like 2026-01-31. Fix: correct it: Date",
    ),
    "nothing to prepare": (
        ["prepare", "empty.jsonl", "empty.csv", "-o", "set"],
        3,
        "empty.jsonl, empty.csv: no rows. Fix: give a file that holds rows.",
    ),
    "standard input": (
        ["prepare", "-", "-o", "set"],
        2,
        "-: standard input, which can be read but once. Fix: write the rows to a file, and name that.",
    ),
    "a pipe": (
        ["detect", "pipe"],
        2,
        "pipe: a pipe, which can be read but once. Fix: write the rows to a file, and name that.",
    ),
    "standard output": (
        ["prepare", "rows.jsonl", "-o", "-"],
        2,
        "-o -: standard output; expected the name of a file or folder to be made. Fix: name one, as -o out.",
    ),
    "settings in a folder": (
        ["config", "check", "folder"],
        2,
        "folder: a folder; expected a YAML file of settings. Fix: name the file in it.",
    ),
    "rows to inspect": (
        ["inspect", "rows.jsonl"],
        2,
        "rows.jsonl: rows, and not a finished set. Fix: sftdata preview rows.jsonl -t TOKENIZER, or, if they are token ids,"
        " -t TOKENIZER here.",
    ),
    "a length in words": (
        ["preview", "rows.jsonl", "--max-length", "abc"],
        2,
        "--max-length: found 'abc'; expected a whole number. Fix: ",
    ),
    "no tokenizer": (
        ["preview", "rows.jsonl", "-t", "nowhere/"],
        2,
        "Tokenizer folder 'nowhere/' does not exist. Fix: check the path",
    ),
    "an unknown format": (
        ["preview", "rows.jsonl", "--format", "alpca"],
        2,
        "no such format. Fix: did you mean 'alpaca'?",
    ),
    "a missing file": (
        ["preview", "row.jsonl"],
        2,
        "row.jsonl: no such file or folder. Fix: did you mean rows.jsonl?",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_a_refusal_is_one_line_on_stderr(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, line = SAID[case]
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", {"messages": TURNS})
    write_rows(tmp_path / "ids.jsonl", {"input_ids": [5, 6], "labels": [5, 6]})
    write_rows(tmp_path / "empty.jsonl")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    named = "-t" in arguments or arguments[0] not in ("prepare", "preview", "resolve")
    tokenizer = [] if named else ["-t", TOKENIZER]
    assert run_app(build_app(), "sftdata", [*arguments, *tokenizer]) == code
    said = capsys.readouterr()
    assert line in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_sentencepiece_tokenizer_and_one_without_a_chat_template_are_refused_with_the_way_out(
    tmp_path: Path, shared_data: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TURNS})
    with pytest.raises(
        UsageError, match=r"holds tokenizer\.model but no tokenizer\.json\. Fix: convert it once: "
    ):
        sftdata.prepare(
            path, tokenizer=str(shared_data / "tokenizers" / "yi-chat-spm-only"), output=tmp_path / "set"
        )
    gpt2: dict[str, Any] = {
        "tokenizer": str(shared_data / "tokenizers" / "gpt2"),
        "output": tmp_path / "set",
        "workers": 1,
    }
    with pytest.raises(UsageError, match=r'gpt2 has no chat template\. Fix: chat_template="chatml" '):
        sftdata.prepare(path, **gpt2)
    assert sftdata.prepare(path, **gpt2, chat_template="chatml").ledger.rows_kept == 1


def test_one_of_a_thing_is_said_in_the_singular(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", {"messages": TURNS})
    short = ["--max-length", "64", "-t", TOKENIZER]
    for arguments, code in (
        (["detect", "rows.jsonl"], 0),
        (["preview", "rows.jsonl", *short], 0),
        (["prepare", "rows.jsonl", "-o", "set", *short], 0),
        (["prepare", "rows.jsonl", "-o", "part", "--part", "1/1", *short], 0),
        (["verify", "set"], 0),
        (["diff", "set", "set"], 0),
        (["diff", "set", "part"], 0),
        (["stats", "set"], 0),
        (["inspect", "set"], 0),
        (["audit", "set"], 0),
        (["view", "set", "-o", "view", "--max-length", "32"], 0),
        (["export", "set", "--to", "token-rows", "-o", "rows"], 0),
    ):
        assert run_app(build_app(), "sftdata", arguments) == code
    print(repr(sftdata.open("set")))
    (tmp_path / "set" / "rejects.jsonl").write_text("changed")
    assert run_app(build_app(), "sftdata", ["verify", "set"]) == 4
    said = "".join(capsys.readouterr())
    things = (
        "row|file|document|token|slice|shard|example|record|source|problem|turn|step|time|piece|label|set"
    )
    assert re.findall(rf".*(?<![\d.,/])1 (?:[a-z]+ )?(?:{things})s\b.*", said) == []
    assert "1 problem:" in said
