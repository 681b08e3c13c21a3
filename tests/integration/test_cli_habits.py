"""What a command line owes its user: examples, completion, near words, a settings file to start from, and versions to report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sfttrain.cli
from sftdata.cli import main
from sftdata.config import PrepareConfig
from tests.torture.runs import slices_done
from tests.waiting import HANGS, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CHATS, TOKENIZER = str(ROOT / "examples/conversations.jsonl"), str(ROOT / "examples/tokenizer")
COMMANDS = (
    "init", "prepare", "view", "detect", "preview", "resolve", "audit", "inspect", "browse", "stats", "diff", "blame", "verify",
    "export", "push", "explain", "env", "config schema", "config check",
)  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run a command; return what it says: stdout, or stderr when it fails."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    said = capsys.readouterr()
    return said.err if code else said.out


# ------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_an_example_that_can_be_copied(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    help_text = told(capsys, *command.split(), "--help")
    before, example = re.split(r"\n  Examples?:\n    ", help_text, maxsplit=1)
    assert example.startswith(f"sftdata {command} ")
    assert "Options:" not in before


def test_every_command_is_listed_with_its_first_sentence_whole(capsys: pytest.CaptureFixture[str]) -> None:
    listing = told(capsys, "--help").partition("Commands:")[2]
    assert set(re.findall(r"^  ([a-z]+) ", listing, re.MULTILINE)) == {
        command.split()[0] for command in COMMANDS
    }
    assert "..." not in listing


# ------------------------------------------------------------------------------------------------------- near words


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("prepar",), "prepare"),
        (("config", "chek"), "check"),
        (("prepare", "--max-lenght", "3"), "--max-length"),
        (("prepare", CHATS, "-t", TOKENIZER, "-o", "s", "--packing", "bdf"), "bfd"),
        (("prepare", CHATS, "-t", TOKENIZER, "-o", "s", "--set", "packing=bdf"), "bfd"),
        (("prepare", CHATS, "-t", TOKENIZER, "-o", "s", "--set", "packin=bfd"), "packing"),
        (("prepare", CHATS, "-t", TOKENIZER, "-o", "s", "--format", "mesages"), "messages"),
        (("prepare", CHATS, "-t", TOKENIZER, "-o", "s", "--chat-template", "chatm"), "chatml"),
        (("prepare", CHATS, "-t", TOKENIZER, "-o", "s", "--map", "complation=x"), "completion"),
        (("prepare", CHATS.replace("conv", "con"), "-t", TOKENIZER, "-o", "s"), CHATS),
        (("explain", "unknow-role"), "unknown-role"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_a_mistyped_word_is_answered_with_the_nearest(
    arguments: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = told(capsys, *arguments, code=2)
    assert re.search(rf"Fix: did you mean (--map )?'?{re.escape(meant)}", said)
    assert said.count("\n") == 1


def test_help_of_an_unknown_command_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "qqqqqq", code=2) == "No such command 'qqqqqq'. Fix: see `sftdata --help`.\n"


# ------------------------------------------------------------------------------------------------------- completion


def completed(line: str) -> set[str]:
    """Return what bash would offer for the last word of a line."""
    env = os.environ | {
        "_SFTDATA_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    command = [sys.executable, "-m", "sftdata"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS, check=False)
    return set(result.stdout.split())


def test_the_shell_completes_commands_options_and_codes() -> None:
    assert completed("sftdata pre") == {"prepare", "preview"}
    assert {"--packing"} == completed("sftdata prepare --pack")
    assert completed("sftdata prepare --packing ") == {"bfd", "wrapped", "none"}
    assert completed("sftdata explain no-c") == {"no-chat-template", "no-content"}


def test_completion_can_be_shown_for_the_shell() -> None:
    env = os.environ | {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "sftdata", "--show-completion", "bash"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS, check=False)
    assert "_SFTDATA_COMPLETE=complete_bash" in result.stdout


# ------------------------------------------------------------------------------------------------------- settings files


def test_init_writes_a_file_that_prepare_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["init", CHATS, "-t", TOKENIZER, "-o", "set", "--max-length", "256", "--map-role", "user=user"])
        == 0
    )
    text = Path("sft.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"^#? ?(\w+):", text, re.MULTILINE)) >= set(PrepareConfig.model_fields)
    assert "40 of 40 sampled rows" in text
    assert main(["prepare", "sft.yaml"]) == 0
    manifest = json.loads(Path("set/manifest.json").read_text(encoding="utf-8"))
    assert (manifest["settings"]["max_length"], manifest["settings"]["map_role"]) == (256, {"user": "user"})


def test_init_says_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "init", CHATS, "-t", TOKENIZER, "-f", "-")
    uncommented = re.sub(rf"^# (({'|'.join(PrepareConfig.model_fields)}): )", r"\1", text, flags=re.MULTILINE)
    settings = PrepareConfig(**yaml.safe_load(uncommented))
    assert settings == PrepareConfig(**yaml.safe_load(text))


def test_init_overwrites_nothing_and_plans_before_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sft.yaml").write_text("mine", encoding="utf-8")
    assert "exists already" in told(capsys, "init", CHATS, "-t", TOKENIZER, code=2)
    assert Path("sft.yaml").read_text(encoding="utf-8") == "mine"
    assert "no such file" in told(capsys, "init", "absent.jsonl", "-t", TOKENIZER, "-f", "new.yaml", code=2)
    assert not Path("new.yaml").exists()


def test_the_schema_names_every_setting_with_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(told(capsys, "config", "schema"))
    assert set(schema["properties"]) == set(PrepareConfig.model_fields)
    assert schema["properties"]["packing"]["enum"] == ["bfd", "wrapped", "none"]
    assert schema["additionalProperties"] is False
    assert all(entry.get("description") for entry in schema["properties"].values())


def test_config_check_prints_what_prepare_would_use(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sft.yaml").write_text("inputs: a.jsonl\ntokenizer: t\noutput: o\nmax-length: 8\n", encoding="utf-8")
    checked: dict[str, Any] = yaml.safe_load(
        told(capsys, "config", "check", "sft.yaml", "--set", "packing=none")
    )
    assert set(checked) == set(PrepareConfig.model_fields)
    assert (checked["inputs"], checked["max_length"], checked["packing"]) == (["a.jsonl"], 8, "none")
    assert (
        json.loads(told(capsys, "config", "check", "sft.yaml", "--set", "packing=none", "--json")) == checked
    )
    Path("sft.yaml").write_text("inputs: a.jsonl\ntokenizr: t\n", encoding="utf-8")
    assert "tokenizer" in told(capsys, "config", "check", "sft.yaml", code=2)


# ------------------------------------------------------------------------------------------------------- versions


def test_env_names_versions_and_no_paths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = told(capsys, "env", "--json")
    found = json.loads(text)
    assert found["packages"]["tokenizers"]
    assert found["cores"]["usable"] >= 1
    assert "hf_secret" not in text
    assert str(Path.home()) not in text
    assert f"python                  {found['python']}" in told(capsys, "env")


# ------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    line = json.dumps({"text": "The heron stands in the shallow water, and the gate creaks. " * 8}) + "\n"
    Path("big.jsonl").write_text(line * 12_000, encoding="utf-8")
    settings = [
        "-o",
        "set",
        "--max-length",
        "256",
        "--set",
        "slice_bytes=200000",
        "--workers",
        "2",
        "--engine",
        "tokenizers",
    ]
    command = [sys.executable, "-m", "sftdata", "prepare", "big.jsonl", "-t", TOKENIZER, *settings]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: slices_done(Path("set")) or running.poll() is not None)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the command and its workers
    _, said = running.communicate(timeout=HANGS)
    assert running.returncode == 130
    assert said.splitlines()[-1] == "Interrupted; what is finished is kept. Run the same command to go on."
    assert "Traceback" not in said
    assert not Path("set/manifest.json").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    assert re.search(r"Resuming: [1-9]\d*/\d+ slices complete; settings match\.", resumed.stderr)


def test_ctrl_c_in_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sfttrain.run.train", interrupted)
    config = str(ROOT / "examples/tiny-model/config.json")
    assert sfttrain.cli.main(["run", "set", "--init-from-config", config, "-o", "out"]) == 130
    assert (
        capsys.readouterr().err == "Interrupted; what is finished is kept. Run the same command to go on.\n"
    )


@pytest.mark.parametrize("name", ["tokenizr", "examples/tokeniser", "/{root}/examples/tokenizer2"])
def test_a_mistyped_tokenizer_folder_is_answered_with_the_near_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = Path("examples/tokenizer" if "/" in name else "tokenizer")
    wanted.mkdir(parents=True)
    name = name.replace("/{root}", str(Path.cwd()))
    fix = told(capsys, "preview", CHATS, "-t", name, code=2).rpartition("Fix: ")[2]
    near = wanted if not name.startswith("/") else wanted.resolve()
    assert fix.strip() == f"did you mean -t {near}?"


def test_training_takes_a_settings_file_as_prepare_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfttrain.config import TrainConfig

    monkeypatch.chdir(tmp_path)
    taken: list[TrainConfig] = []
    monkeypatch.setattr("sfttrain.run.train", taken.append)
    Path("run.yaml").write_text("sets: [set]\nmodel: m\noutput: out\n")
    assert sfttrain.cli.main(["run", "run.yaml", "--max-steps", "3"]) == 0
    assert sfttrain.cli.main(["run", "-c", "run.yaml", "--max-steps", "3"]) == 0
    assert taken[0] == taken[1]
    assert (taken[0].sets, taken[0].training["max_steps"]) == ((Path("set"),), 3)
