"""`prepare` from files to a verified set: conservation, resume, refusals, and the same bytes however it was run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import sftdata
from sftdata.errors import DataError, UsageError
from sftdata.set.verify import verify
from tests.torture.runs import slices_done
from tests.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")
WORDS = (
    "quick brown fox jumps over a lazy dog",
    "seven bright stars look on",
    "and say nothing",
    "at all",
    "while it rains",
)


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 seeded chats, 3 MB: several slices."""
    rng = random.Random(7)
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with path.open("w") as lines:
        for _ in range(4000):
            turns = [
                {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(3, 120)))}
                for _ in range(rng.randint(1, 3))
                for role in ("user", "assistant")
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


def folder_digest(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sftdata", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


# ------------------------------------------------------------------------------------------- one run


def test_three_formats_become_one_verified_set(tmp_path: Path) -> None:
    inputs = [
        EXAMPLES / name
        for name in ("conversations.jsonl", "instructions.json", "text.txt")
        if (EXAMPLES / name).exists()
    ]
    manifest = sftdata.prepare(inputs, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=256)
    assert verify(tmp_path / "set").problems == []
    assert manifest.ledger.rows_in == manifest.ledger.rows_kept > 80
    assert len(manifest.ledger.sources) == len(inputs)
    assert (
        sum(source.tokens_trained for source in manifest.ledger.sources.values())
        == manifest.ledger.tokens_trained
    )


@pytest.mark.slow
def test_every_row_of_a_set_leads_back_to_its_line(tmp_path: Path, chats: Path) -> None:
    from transformers import AutoTokenizer

    sftdata.prepare(chats, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=512)
    shards = sftdata.open(tmp_path / "set")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lines = chats.read_text().splitlines()
    documents = [document for row in shards[:20] for document in row.documents()]
    assert len(documents) >= 20
    for document in documents:
        name, line = shards.origin(document.example_id)
        assert name == "chats.jsonl"
        expected = tokenizer.apply_chat_template(json.loads(lines[line - 1])["messages"], return_dict=False)
        assert document.input_ids.tolist() == expected[:512]


def test_labels_are_the_answers_and_their_end_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": f"answer {n}"},
            ]
        }
        for n in range(5)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    said = [
        tokenizer.decode(document.labels[document.labels != -100])
        for row in sftdata.open(tmp_path / "set")
        for document in row.documents()
    ]
    assert sorted(said) == [f"answer {n}{tokenizer.eos_token}" for n in range(5)]


@pytest.mark.parametrize(
    ("packing", "overlong"),
    [
        ("bfd", "split"),
        ("wrapped", "truncate"),
        *(
            pytest.param(packing, overlong, marks=pytest.mark.slow)
            for packing, overlong in product(["bfd", "none"], ["truncate", "truncate-left", "drop", "split"])
            if (packing, overlong) != ("bfd", "split")
        ),
    ],
)
def test_rows_and_tokens_are_conserved_under_every_policy(
    tmp_path: Path, chats: Path, packing: str, overlong: str
) -> None:
    manifest = sftdata.prepare(
        chats,
        tokenizer=TOKENIZER,
        output=tmp_path / "set",
        max_length=200,
        packing=packing,
        overlong=overlong,
    )
    manifest.ledger.check()
    assert verify(tmp_path / "set").problems == []
    assert manifest.ledger.rows_in == 4000


def test_overlong_error_names_the_line(tmp_path: Path, chats: Path) -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl:\d+: .*max_length is 100"):
        sftdata.prepare(chats, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=100, overlong="error")


# -------------------------------------------------------------------------------------------- bad rows


def test_bad_rows_are_rejected_one_by_one_and_the_file_runs_through_once_mended(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    bad_role = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good, "{broken", good, bad_role, good]) + "\n")
    manifest = sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_rejects="2")
    assert manifest.ledger.rows_kept == 3
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["code"]) for reject in rejects] == [
        (2, "invalid-json"),
        (4, "unknown-role"),
    ]
    assert rejects[1]["byte_offset"] == path.read_bytes().index(bad_role.encode())
    assert "--map-role bot=assistant" in rejects[1]["fix"]

    rejects[0]["row"] = good
    rejects[1]["row"]["messages"][1]["role"] = "assistant"
    mended = tmp_path / "mended.jsonl"
    mended.write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    assert sftdata.prepare(mended, tokenizer=TOKENIZER, output=tmp_path / "second").ledger.rows_kept == 2


def test_too_many_rejects_fail_with_exit_3_and_say_what_mends_them(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}] * 5
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    failed = command("prepare", path, "-t", TOKENIZER, "-o", tmp_path / "set")
    assert failed.returncode == 3
    assert failed.stderr.endswith("rejects.jsonl; sftdata explain unknown-role.\n")
    assert "--map-role bot=assistant" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "set").exists()
    mended = command(
        "prepare", path, "-t", TOKENIZER, "-o", tmp_path / "set", "--map-role", "bot=assistant", "--overwrite"
    )
    assert mended.returncode == 0, mended.stderr


def test_a_run_with_nothing_trainable_fails(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    message = {"role": "assistant", "content": "b", "weight": 0}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, message]}) + "\n")
    with pytest.raises(DataError, match="No token to train on"):
        sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set")


# ---------------------------------------------------------------------------------- same bytes, resume


@pytest.mark.slow
def test_workers_hash_seeds_locale_and_clock_do_not_change_a_byte(tmp_path: Path, chats: Path) -> None:
    reference = None
    for number, (workers, environment) in enumerate(
        [
            (1, {"PYTHONHASHSEED": "1"}),
            (2, {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "Asia/Tokyo"}),
            (4, {"TZ": "America/Lima"}),
        ]
    ):
        folder = tmp_path / str(number) / "set"
        folder.parent.mkdir()
        done = command(
            "prepare",
            chats,
            "-t",
            TOKENIZER,
            "-o",
            folder,
            "--max-length",
            512,
            "--workers",
            workers,
            **environment,
        )
        assert done.returncode == 0, done.stderr
        reference = reference or folder_digest(folder)
        assert folder_digest(folder) == reference


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, chats: Path) -> None:
    arguments = [
        "prepare",
        str(chats),
        "-t",
        TOKENIZER,
        "--max-length",
        "512",
        "--set",
        "slice_bytes=300000",
        "--workers",
        "2",
    ]
    whole = command(*arguments, "-o", tmp_path / "whole/set")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed" / "set"
    folder.parent.mkdir()
    for slices in (1, 3, 5):
        run = subprocess.Popen(
            [sys.executable, "-m", "sftdata", *arguments, "-o", str(folder)], stderr=subprocess.DEVNULL
        )
        wait_until(lambda slices=slices: slices_done(folder) >= slices or run.poll() is not None)  # noqa: B023
        assert run.poll() is None, "it ended before it could be killed"
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not folder.exists()
    assert command(*arguments, "-o", folder).returncode == 0
    assert folder_digest(folder) == folder_digest(tmp_path / "whole/set")


def test_the_same_command_again_does_nothing_and_changed_settings_are_refused(tmp_path: Path) -> None:
    settings = {"tokenizer": TOKENIZER, "output": tmp_path / "set", "max_length": 128}
    first = sftdata.prepare(EXAMPLES / "conversations.jsonl", **settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    assert sftdata.prepare(EXAMPLES / "conversations.jsonl", **settings) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    with pytest.raises(UsageError, match="max_length"):
        sftdata.prepare(EXAMPLES / "conversations.jsonl", **settings | {"max_length": 64})
    replaced = sftdata.prepare(
        EXAMPLES / "conversations.jsonl", **settings | {"max_length": 64}, overwrite=True
    )
    assert replaced.max_length == 64
    assert verify(tmp_path / "set").problems == []


@pytest.mark.slow
def test_both_engines_give_the_same_bytes(tmp_path: Path, chats: Path) -> None:
    for engine in ("gigatoken", "tokenizers"):
        (tmp_path / engine).mkdir()
        sftdata.prepare(
            chats,
            tokenizer=TOKENIZER,
            output=tmp_path / engine / "set",
            max_length=512,
            engine=engine,
            workers=1,
        )
    assert folder_digest(tmp_path / "gigatoken/set") == folder_digest(tmp_path / "tokenizers/set")


# -------------------------------------------------------------------------------------------- refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.jsonl", "-t", TOKENIZER], 2, "missing.jsonl"),
        (
            [str(EXAMPLES / "conversations.jsonl"), "-t", "no/such/tokenizer/folder"],
            2,
            "no/such/tokenizer/folder",
        ),
        (
            [str(EXAMPLES / "conversations.jsonl"), "-t", TOKENIZER, "--set", "max_lenght=3"],
            2,
            "did you mean 'max_length'",
        ),
        ([str(EXAMPLES / "conversations.jsonl"), "-t", TOKENIZER, "--max-length", "0"], 2, "max_length"),
        ([str(EXAMPLES / "conversations.jsonl"), "-t", TOKENIZER, "--format", "alpca"], 2, "alpaca"),
        ([str(EXAMPLES / "conversations.jsonl"), "-t", TOKENIZER, "--chat-template", "chatmll"], 2, "chatml"),
        ([str(EXAMPLES / "conversations.jsonl")], 2, "-t"),
    ],
)
def test_a_wrong_command_is_one_line_with_the_fix(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    failed = command("prepare", *arguments, "-o", tmp_path / "set")
    assert failed.returncode == code
    (line,) = failed.stderr.splitlines()[-1:]
    assert said in line
    assert "Fix:" in line
    assert "Traceback" not in failed.stderr


def test_json_goes_to_stdout_alone(tmp_path: Path) -> None:
    done = command(
        "prepare", EXAMPLES / "conversations.jsonl", "-t", TOKENIZER, "-o", tmp_path / "set", "--json"
    )
    assert json.loads(done.stdout)["ledger"]["rows_in"] == 40
    assert np.array(json.loads(done.stdout)["shards"]).size


def test_the_summary_tells_what_the_audit_found_with_its_line_and_what_mends_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": "" if i == 3 else "Yes."} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (
        "prepare",
        tmp_path / "rows.jsonl",
        "-t",
        TOKENIZER,
        "--max-length",
        "64",
        "-o",
        tmp_path / "set",
    )
    said = command(*arguments).stderr
    assert "    defect empty-answer  1 example (11.1%)" in said
    assert "at    rows.jsonl:4\n" in said
    assert 'fix   leave the rows out, or switch the turn off: "train": false\n' in said
    again = command(*arguments).stderr
    assert f"  audit   `sftdata audit {tmp_path / 'set'}` looks for" in again
    told = json.loads(command(*arguments, "--json").stdout)["audit"]
    assert (told["documents"], told["documents_looked_at"]) == (9, 9)
    finding, note = told["findings"]
    assert (finding["code"], finding["count"], finding["examples"]) == ("empty-answer", 1, ["rows.jsonl:4"])
    assert (
        note["code"] == "raw-prompts"
    )  # the tokenizer has a chat template, and these rows are not asked for in chats


def test_two_runs_on_one_folder_the_second_refuses(tmp_path: Path) -> None:
    from sftdata.set.build import Build

    with Build(tmp_path / "set").locked():
        failed = command("prepare", EXAMPLES / "conversations.jsonl", "-t", TOKENIZER, "-o", tmp_path / "set")
    assert failed.returncode == 2
    assert "another command is building" in failed.stderr
