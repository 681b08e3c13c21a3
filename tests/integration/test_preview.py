"""A preview writes nothing, shows what `prepare` would make of the same rows, and foretells the whole from a sample."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["preview", *arguments, "-t", TOKENIZER, "--max-length", "256", "--json"]) == 0
    seen: dict[str, Any] = json.loads(capsys.readouterr().out)
    return seen


def test_a_preview_of_a_small_input_is_what_prepare_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = told(capsys, str(EXAMPLES / "conversations.jsonl"), "-n", "40")
    assert list(tmp_path.iterdir()) == []
    manifest = sftdata.prepare(
        EXAMPLES / "conversations.jsonl", tokenizer=TOKENIZER, output="set", max_length=256
    )
    ledger = manifest.ledger
    assert seen["projected"]["rows"] == ledger.rows_in
    assert seen["projected"]["tokens"] == ledger.tokens
    assert seen["projected"]["packed_rows"] == ledger.rows_packed
    assert seen["projected"]["steps_per_epoch"] == -(-ledger.rows_packed // 8)
    stored = {document.example_id: document for row in sftdata.open("set") for document in row.documents()}
    assert len(seen["examples"]) == len(stored)
    for example in seen["examples"]:
        document = stored[example["line"] - 1]
        assert example["input_ids"] == document.input_ids.tolist()
        assert example["labels"][1:] == document.labels[1:].tolist()


def test_a_sample_foretells_a_large_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(0)
    words = (EXAMPLES / "text.txt").read_text(encoding="utf-8").split()
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(40_000)]
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    projected = told(capsys, str(path))["projected"]
    ledger = sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=256).ledger
    assert projected["rows"] == ledger.rows_in
    assert projected["tokens"] == pytest.approx(ledger.tokens, rel=0.03)
    assert projected["packed_rows"] == pytest.approx(ledger.rows_packed, rel=0.03)
    assert projected["bytes_on_disk"] == pytest.approx(
        sum(file.stat().st_size for file in (tmp_path / "set").glob("*.arrow")), rel=0.05
    )
    assert projected["seconds_at_most"] > 0


def test_a_large_input_is_not_sampled_more_than_a_small_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ({"text": f"{number:07d} " + "All the same words. " * 10} for number in range(200_000))
    lines = [(json.dumps(text) + "\n").encode() for text in texts]
    sampled = []
    for name, megabytes in (("large", 4), ("larger", 16)):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(lines[: megabytes * 1_000_000 // len(lines[0])]))
        seen = told(capsys, str(path))
        sampled.append(seen["ledger"]["tokens_in"])
        rows = path.read_bytes().count(b"\n")
        assert seen["projected"]["rows"] == rows
        assert seen["projected"]["tokens"] == pytest.approx(
            rows * len(seen["examples"][0]["input_ids"]), rel=0.01
        )
    assert sampled[1] < 1.2 * sampled[0]


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"question": "Why?", "answer": "So."}, "(question, answer)"),
        ({"prompt": "Why?", "response": "So."}, "(prompt, response as answer)"),
        ({"text": "So."}, "(text)"),
    ],
)
def test_a_preview_says_which_column_is_read_as_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], mapping: str
) -> None:
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 9)
    (note,) = (note for note in told(capsys, str(tmp_path / "rows.jsonl"))["notes"] if "sampled rows" in note)
    assert f" {mapping}, 9 of 9 sampled rows." in note
