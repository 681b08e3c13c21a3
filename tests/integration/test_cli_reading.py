"""The commands that read a finished set, as a user runs them: data on stdout, talk on stderr, one-line errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sftdata
from sftdata.errors import DataError
from tests.shown_sets import CHAT, TOKENIZER, write_set
from tests.waiting import HANGS


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sftdata", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=HANGS,
        check=False,
    )


def told(*arguments: object) -> dict[str, object]:
    """Run a command with --json and return what it says."""
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    data: dict[str, object] = json.loads(result.stdout)
    return data


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(
        tmp_path_factory.mktemp("sets") / "set",
        [CHAT.format(f"What is {i}?", f"Number {i}.") for i in range(9)],
    )


@pytest.fixture
def defective(tmp_path: Path) -> Path:
    return write_set(tmp_path / "defective", [CHAT.format("Hi", "Hello"), "<|im_start|>user\nHo⟦ no end⟧"])


# ------------------------------------------------------------------------------------------------- inspect


def test_inspect_brackets_what_is_trained_where_nothing_can_be_coloured(shards: Path) -> None:
    result = run("inspect", shards)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "⟦Number 0.<|im_end|>⟧↵" in result.stdout
    assert "data.jsonl:1 " in result.stdout


def test_inspect_json_round_trips_a_row(shards: Path) -> None:
    packed = sftdata.open(shards)[1]
    documents = told("inspect", shards, "--row", 1)["documents"]
    assert isinstance(documents, list)
    ids = [token for document in documents for token in document["input_ids"]]
    labels = [label for document in documents for label in document["labels"]]
    assert (ids, labels) == (packed.input_ids[: len(ids)].tolist(), packed.labels[: len(ids)].tolist())


def test_inspect_shows_one_example_and_its_ids(shards: Path) -> None:
    result = run("inspect", shards, "--example", 7, "--ids")
    assert "data.jsonl:8 · example 7" in result.stdout
    assert "example 6" not in result.stdout
    assert "<|im_start|>‹1›" in result.stdout


def test_inspect_writes_a_page(shards: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "row.html"
    result = run("inspect", shards, "--html", page)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", f"Wrote {page}.\n")
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--row", "99"), "row 99; the set has rows 0 to "),
        (("--example", "9"), "example 9; its sources hold examples 0 to 8."),
        (("--html", "/dev/null/x.html"), "cannot be written"),
        (("--html", "-"), "--html -: standard output; expected the name of a file or folder to be made."),
    ],
)
def test_inspect_refuses_in_one_line(shards: Path, options: tuple[str, ...], message: str) -> None:
    result = run("inspect", shards, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Fix: " in result.stderr


def test_inspect_says_why_a_rejected_row_is_not_there(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 8
    lines = [json.dumps(row) for row in rows]
    lines[2] = '{"messages": [{"role": "bot", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    sftdata.prepare(
        tmp_path / "chats.jsonl",
        tokenizer=str(TOKENIZER),
        output=tmp_path / "set",
        max_length=64,
        max_rejects="50%",
        workers=1,
    )
    result = run("inspect", tmp_path / "set", "--example", 2)
    assert result.returncode == 2
    assert "chats.jsonl:3: rejected (unknown-role): " in result.stderr
    assert "Fix: " in result.stderr


# --------------------------------------------------------------------------------------------------- stats


def test_stats_prints_the_ledger(shards: Path) -> None:
    result = run("stats", shards)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "rows in" in result.stdout
    assert "9  100.0%" in result.stdout


def test_stats_json_is_the_manifest_and_more(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    data = told("stats", shards)
    assert data["manifest"] == manifest
    assert data["stats"]["rows_packed"] == manifest["ledger"]["rows_packed"]  # type: ignore[index]


def test_stats_writes_a_report(shards: Path, tmp_path: Path) -> None:
    result = run("stats", shards, "--html", tmp_path / "report.html")
    assert result.returncode == 0, result.stderr
    assert "From rows to trained tokens" in (tmp_path / "report.html").read_text()


# -------------------------------------------------------------------------------------------------- verify


def test_verify_says_what_it_checked(shards: Path) -> None:
    result = run("verify", shards)
    assert result.returncode == 0
    assert "as the manifest says" in result.stdout
    assert told("verify", shards)["ok"] is True


def test_verify_lists_every_problem_and_exits_4(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [CHAT.format("Hi", "Hello")])
    shard = folder / "shard-00000.arrow"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    (folder / "shard-00007.arrow").write_bytes(b"stranger")
    result = run("verify", folder)
    assert result.returncode == 4
    problems = result.stdout.splitlines()
    assert sum("xxh3-128 is" in line for line in problems) == 1
    assert sum("not part of the set" in line for line in problems) == 1
    assert result.stderr.count("\n") == 1
    assert "2 problems" in result.stderr
    as_json = run("verify", folder, "--json")
    assert as_json.returncode == 4
    assert len(json.loads(as_json.stdout)["problems"]) == 2


# --------------------------------------------------------------------------------------------------- audit


def test_audit_finds_nothing_in_a_clean_set(shards: Path) -> None:
    result = run("audit", shards, "--strict")
    assert (result.returncode, result.stdout) == (0, f"{shards}: nothing found.\n")
    assert told("audit", shards) == {"folder": str(shards), "clean": True, "findings": []}


def test_audit_names_lines_and_fixes_and_fails_only_when_strict(defective: Path) -> None:
    result = run("audit", defective)
    assert result.returncode == 0
    assert "defect no-trained-end  1 example (50.0%)" in result.stdout
    assert "data.jsonl:2" in result.stdout
    assert "let the ids of these rows, and their labels, end in that of <|im_end|>" in result.stdout
    strict = run("audit", defective, "--strict")
    assert strict.returncode == DataError.exit_code
    assert strict.stdout == result.stdout
    note, refusal = strict.stderr.splitlines()
    assert note == "sftdata explain no-trained-end says more."
    assert "no-trained-end" in refusal


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "stats", "verify", "audit"])
def test_a_folder_that_is_no_set_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "not a finished set" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "stats", "audit"])
def test_a_damaged_manifest_exits_4(command: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [CHAT.format("Hi", "Hello")])
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"rows_in": 1', '"rows_in": 2'))
    result = run(command, folder)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr.count("\n") == 1
