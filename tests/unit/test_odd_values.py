"""Rows that are nearly right: the trouble is named, and the advice, followed to the letter, gives the rows that are meant."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sftdata.batches import Completion, Conversation, Row, Text
from sftdata.errors import UsageError
from sftdata.formats.detect import Detection, detect
from sftdata.formats.fields import FormatOptions
from sftdata.formats.formatter import load_formatter
from sftdata.formats.table import FORMATS
from sftdata.sources.source import open_source, plan_source, read_chunk
from sftdata.sources.streams import close_streams
from tests.one_stage import Converted, convert_rows

ASKED, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
HUMAN, GPT, OTHER = (
    {"from": name, "value": text} for name, text in (("human", "Q"), ("gpt", "A"), ("gpt", "B"))
)


def look(folder: Path, rows: list[Any], name: str = "rows.jsonl", **options: Any) -> Detection:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        return detect([plan_source(open_source(str(path)), 0, 32 << 20)], **options)
    finally:
        close_streams()


def refusal(folder: Path, rows: list[Any], **options: Any) -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        look(folder, rows, **options)
    assert "\n" not in str(caught.value)
    return caught.value.message.replace(f"{folder}/", ""), caught.value.fix


def read(folder: Path, format_name: str, **options: Any) -> Converted:
    plan = plan_source(open_source(str(folder / "rows.jsonl")), 0, 32 << 20)
    try:
        return convert_rows(read_chunk(plan.chunks[0])[0], format_name, FormatOptions(**options))
    finally:
        close_streams()


def followed(fix: str, folder: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Do what a fix says, to the letter; return the canonical rows."""
    if written := re.search(
        r"--formatter rows:fix, with a file rows\.py that holds: (def fix\(row\): return [^;]+)", fix
    ):
        (folder / "rows.py").write_text(written[1].rstrip("."), encoding="utf-8")
        monkeypatch.chdir(folder)
        sys.modules.pop("rows", None)
        load_formatter.cache_clear()
        found = read(folder, "text", formatter="rows:fix")
    else:
        flags = re.findall(r"--map (\S+)=([^\s.]+)", fix)
        assert flags, fix
        columns = dict(flags)
        found = read(folder, look(folder, rows, columns=columns).format, columns=columns)
    assert not found.faults, found.faults
    return found.rows


def said(row: Row) -> list[str]:
    """Return what is asked and answered in a row, in order."""
    if isinstance(row, Conversation):
        return [f"{message['role']}: {message['content']}" for message in row.messages]
    if isinstance(row, Completion):
        return [row.prompt, row.completion]
    return [row.text] if isinstance(row, Text) else [str(row)]


Q_A = ["user: Q", "assistant: A"]
# rows; words of the reason; what the fix gives for the first row, None where it is no command
ODD: dict[str, tuple[list[Any], list[str], list[str] | None]] = {
    "a number": ([{"instruction": "Q", "output": 1}], ["'output'", "a number (1)"], ["user: Q", "assistant: 1"]),
    "a share": ([{"question": "Q", "answer": 0.5}], ["'answer'", "a number (0.5)"], ["user: Q", "assistant: 0.5"]),
    "a boolean": ([{"query": "Q", "response": True}], ["'response'", "a boolean"], ["user: Q", "assistant: True"]),
    "a list of answers": (
        [{"instruction": "Q", "output": ["A", "B"]}], ["'output'", "a list of 2 strings"], Q_A
    ),
    "an object": ([{"question": "Q", "answer": {"text": "A", "id": 3}}], ["'answer'", "an object of text, id"], Q_A),
    "a list of objects": ([{"question": "Q", "answer": [{"value": "A"}]}], ["'answer'", "a list of 1 object of value"], Q_A),
    "a number in a prompt": ([{"prompt": 3, "completion": "A"}], ["'prompt'", "a number (3)"], ["3", "A"]),
    "a question that is a list": ([{"question": ["Q"], "answer": "A"}], ["'question'", "a list of 1 strings"], Q_A),
    "a text that is a list": ([{"text": ["A", "B"]}], ["'text'", "a list of 2 strings"], ["A"]),
    "answers of reading comprehension": (
        [{"question": "Q", "answers": {"text": ["A"], "answer_start": [3]}, "context": "C"}],
        ["'answers'", "an object of text, answer_start"], ["user: Q\nC", "assistant: A"],
    ),
    "answers without a context": ([{"question": "Q", "answers": ["A", "B"]}], ["'answers'", "a list of 2 strings"], Q_A),
    "messages as text": ([{"messages": "user: Q\nassistant: A"}], ["'messages'", "a string", "list of objects"], None),
    "messages as Python prints them": ([{"messages": str([ASKED, SAID])}], ["'messages'", "Python", "single quotes"], Q_A),
    "messages as strings": ([{"messages": ["Q", "A"]}], ["'messages'", "a list of 2 strings"], None),
    "messages with keys of their own": (
        [{"conversation": [{"speaker": "user", "text": "Q"}, {"speaker": "assistant", "text": "A"}]}],
        ["'conversation'", "a list of 2 objects of speaker, text"], Q_A,
    ),
    "messages under names of their own": (
        [{
            "id": [1, 2],
            "chat": [{"said": text, "at": 3, "by": who, "mood": "ok"} for who, text in (("user", "Q"), ("assistant", "A"))] * 2,
        }],
        ["'chat'", "a list of 4 objects of said, at, by, mood"], Q_A * 2,
    ),
    "one message": ([{"messages": SAID}], ["'messages'", "one message"], ["assistant: A"]),
    "lists of messages": ([{"messages": [[ASKED, SAID]]}], ["'messages'", "a list of lists of messages"], None),
    "no messages": ([{"messages": []}], ["'messages'", "an empty list"], None),
    "ids as text": ([{"input_ids": "1 2 3"}], ["'input_ids'", "a string"], None),
    "ids in a list": ([{"input_ids": [[1, 2]]}], ["'input_ids'", "a list of 1 lists"], None),
    "inside an object": ([{"custom_id": "1", "body": {"messages": [ASKED, SAID]}}], ["inside an object", "'body'"], Q_A),
    "completions": ([{"prompt": "Q", "completions": ["A", "B"]}], ["'completions'", "a list of answers"], ["Q", "A"]),
    "chosen texts": ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], ["preference pairs"], ["Q", "A"]),
    "chosen texts of instructions": (
        [{"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}], ["preference pairs"], ["user: Q\nI", "assistant: A"]
    ),
    "chosen conversations": ([{"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}], ["preference pairs"], Q_A),
    "chosen answers in lists": ([{"prompt": [ASKED], "chosen": [SAID], "rejected": [SAID]}], ["preference pairs"], Q_A),
    "chosen objects beside a conversation": (
        [{"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER}], ["preference pairs"], Q_A
    ),
    "chosen objects beside a long conversation": (
        [{"conversations": [HUMAN, OTHER, HUMAN], "chosen": GPT, "rejected": OTHER}], ["preference pairs"],
        ["user: Q", "assistant: B", "user: Q", "assistant: A"],
    ),
    "chosen dialogues": (
        [{"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}], ["preference pairs"],
        ["\n\nHuman: Q\n\nAssistant: A"],
    ),
    "an answer under another name": ([{"question": "Q", "model_answer": "A", "context": "C"}], ["no answer column"], Q_A),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_is_named_and_the_fix_gives_what_is_meant(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, words, meant = ODD[kind]
    reason, fix = refusal(tmp_path, rows * 3)
    assert [word for word in words if word not in reason] == []
    assert "have the columns" not in reason
    if meant is None:
        assert "--" not in fix
    else:
        assert [said(row) for row in followed(fix, tmp_path, rows * 3, monkeypatch)] == [meant] * 3


def test_every_text_column_of_every_format_is_named_when_it_holds_something_else(tmp_path: Path) -> None:
    for entry in FORMATS.values():
        for column in entry.columns:
            if not column.required or entry.name in ("tokens", "lines"):
                continue
            row = {other.spellings[0]: "x" for other in entry.columns if other.required}
            if column.name == "messages":
                row = {}
            reason, _ = refusal(tmp_path, [row | {column.spellings[0]: 7}])
            assert f"the column {column.spellings[0]!r} of " in reason
            assert "a number (7)" in reason


def test_no_fix_takes_a_context_for_an_answer(tmp_path: Path) -> None:
    for other in ("context", "title", "rationale", "passage", "topic", "id"):
        _, fix = refusal(tmp_path, [{"question": "Q", other: "x"}])
        assert other not in fix


def test_a_format_that_is_named_says_what_is_odd_too(tmp_path: Path) -> None:
    reason, _ = refusal(tmp_path, [{"instruction": "Q", "output": 1}], format="alpaca")
    assert "'output'" in reason
    assert "a number (1)" in reason


# ------------------------------------------------------------------------------------------- answers that are judged


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"instruction": "Q", "output": "A"},
        {"question": "Q", "answer": "A"},
        {"messages": [ASKED, SAID]},
        {"conversations": [HUMAN, GPT]},
    ],
    ids=lambda row: "+".join(row),
)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_an_answer_that_is_not_wanted_is_never_trained(
    row: dict[str, Any], column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row, row | {column: None}, *(row | {column: number % 10 != 0} for number in range(28))]
    reason, fix = refusal(tmp_path, rows)
    assert f"the column {column!r} is false" in reason
    assert "3 of 30" in reason
    assert len(followed(fix, tmp_path, rows, monkeypatch)) == 27
    # Where the sample shows none, the rows themselves are refused.
    name = look(tmp_path, [one for one in rows if one.get(column)]).format
    look_again = "".join(json.dumps(one) + "\n" for one in rows)
    (tmp_path / "rows.jsonl").write_text(look_again, encoding="utf-8")
    assert [fault.code for _, fault in read(tmp_path, name).faults] == ["unwanted-answer"] * 3
    # Who names the format says that the label is about something else.
    assert look(tmp_path, rows, format=name).matched == 30
    assert not read(tmp_path, name, labels_judge=False).faults


@pytest.mark.parametrize("label", ["greeting", 0, 1, None, True, "false", []])
def test_a_label_that_judges_nothing_is_let_through(label: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "output": "A", "label": label}] * 3
    assert look(tmp_path, rows).format == "alpaca"
    assert len(read(tmp_path, "alpaca").rows) == 3


def test_a_label_beside_running_text_or_ids_judges_nothing(tmp_path: Path) -> None:
    assert look(tmp_path, [{"text": "A", "label": False}]).format == "text"
    assert len(read(tmp_path, "text").rows) == 1
    assert look(tmp_path, [{"input_ids": [1, 2], "label": False}]).format == "tokens"


def test_a_pair_whose_messages_hold_the_answer_is_trained_on_them(tmp_path: Path) -> None:
    row = {"prompt": "Q", "messages": [ASKED, SAID], "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}
    assert look(tmp_path, [row] * 3).format == "messages"


def test_turns_under_a_mapped_column_are_named_as_they_are_in_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"chat": [{"speaker": "user", "said": "Q"}, {"speaker": "assistant", "said": "A"}]}] * 3
    reason, fix = refusal(tmp_path, rows, columns={"messages": "chat"})
    assert "the column 'chat' of messages rows is a list of 2 objects of speaker, said" in reason
    assert fix.endswith("; and leave --map out")
    assert said(followed(fix, tmp_path, rows, monkeypatch)[0]) == Q_A


def test_what_is_wrong_in_the_rows_of_a_formatter_is_named_and_not_their_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "renames.py").write_text('def fix(row): return {"messages": row["chat"]}', encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    look(tmp_path, [{"chat": [ASKED, SAID | {"role": "zorp"}], "text": "T"}] * 3)
    assert {fault.code for _, fault in read(tmp_path, "text", formatter="renames:fix").faults} == {
        "unknown-role"
    }


# ------------------------------------------------------------------------------------------- names in any case

SPELT: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, SAID]},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
    "alpaca": {"instruction": "Q", "input": "I", "output": "A"},
    "dolly": {"instruction": "Q", "context": "C", "response": "A"},
    "question-answer": {"question": "Q", "answer": "A"},
    "query-response": {"query": "Q", "response": "A"},
    "text": {"text": "A"},
}


@pytest.mark.parametrize("spell", [str.title, str.upper, str.lower])
@pytest.mark.parametrize("name", SPELT)
def test_columns_are_known_in_any_case(name: str, spell: Any, tmp_path: Path) -> None:
    look(tmp_path, [SPELT[name]] * 3)
    meant = [said(row) for row in read(tmp_path, name).rows]
    rows = [{spell(column): value for column, value in SPELT[name].items()}] * 3
    assert look(tmp_path, rows).format == name
    found = read(tmp_path, name)
    assert [said(row) for row in found.rows] == meant
    assert not found.unused


def test_a_column_as_we_spell_it_goes_before_one_in_another_case(tmp_path: Path) -> None:
    rows = [{"question": "Q", "Question": "not asked", "answer": "A"}]
    look(tmp_path, rows)
    found = read(tmp_path, "question-answer")
    assert [said(row) for row in found.rows] == [Q_A]
    assert found.unused == {"Question": 1}


def test_two_columns_that_differ_in_case_alone_are_ambiguous(tmp_path: Path) -> None:
    reason, fix = refusal(tmp_path, [{"question": "Q", "ANSWER": "A", "Answer": "B"}])
    assert "2 readings fit" in reason
    assert (
        look(
            tmp_path, [{"question": "Q", "ANSWER": "A", "Answer": "B"}], columns={"answer": "Answer"}
        ).matched
        == 1
    )
    assert "--map answer=Answer" in fix


# ------------------------------------------------------------------------------------------- bare lists of messages


@pytest.mark.parametrize("layout", ["lines", "array", "wide array"])
def test_a_bare_list_of_messages_is_a_conversation(layout: str, tmp_path: Path) -> None:
    chats = [[ASKED, SAID], [HUMAN, GPT], [ASKED, SAID]]
    text = (
        "".join(json.dumps(chat) + "\n" for chat in chats)
        if layout == "lines"
        else json.dumps(chats, indent=1 if layout == "wide array" else None)
    )
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    plan = plan_source(open_source(str(tmp_path / "rows.jsonl")), 0, 32 << 20)
    assert detect([plan]).format == "messages"
    rows = [row for piece in plan.chunks for row in read_chunk(piece)[0].rows]
    close_streams()
    assert rows == [{"messages": chat} for chat in chats]


def test_lines_in_brackets_that_are_no_messages_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("[door opens]\n[music]\n[silence]\n", encoding="utf-8")
    assert open_source(str(tmp_path / "a.txt")).container == "text"


def test_one_array_of_messages_is_still_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([ASKED, SAID]), encoding="utf-8")
    with pytest.raises(UsageError, match="each row is one message of a conversation"):
        detect([plan_source(open_source(str(tmp_path / "rows.json")), 0, 32 << 20)])
    close_streams()
