"""What a user meets who brings something that cannot be used as it is: one true line, and a fix that works."""

from __future__ import annotations

import json
from pathlib import Path

import sftdata

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------- rows that are good


def test_an_empty_completion_still_trains_its_end_token(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", {"prompt": "Say nothing.", "completion": ""}, {"prompt": "One", "completion": " two"}
    )
    manifest = sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64)
    assert manifest.ledger.rows_kept == 2
    silent = next(document for row in sftdata.open(tmp_path / "set") for document in row.documents() if document.example_id == 0)
    assert silent.labels[silent.labels != -100].tolist() == [manifest.tokenizer.eos_id]


def test_tools_that_a_template_leaves_out_are_counted(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "Use weather!"}, {"role": "assistant", "content": "No."}]
    path = write_rows(tmp_path / "rows.jsonl", {"messages": turns, "tools": [tool]}, {"messages": turns})
    manifest = sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, chat_template="chatml")
    assert manifest.ledger.counters["rows_without_their_tools"] == 1
