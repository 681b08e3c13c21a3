"""What reaches a terminal acts on no terminal, wherever it came from; and a closed stream, or a signal, is no accident."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import typer

import sftdata
from sftdata.cli import main
from sftdata.frame import run_app
from sftdata.set.build import Build
from tests.torture.runs import ROOT, TOKENIZER, write_chats

pytestmark = pytest.mark.slow

EVIL = "\x1b]0;PWN\x07\x1b[31m\x9b1m\r\u202e"
ACTS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def said(arguments: Sequence[object], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command; return the characters of both its streams, undecodable bytes included."""
    capfd.readouterr()
    main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return out + err


def harmless(text: str) -> None:
    assert not ACTS.search(text), repr(text)
    assert "PWN" in text, "what was thrown in came out nowhere, so that this shows nothing"


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder named by escapes, with a set of sources, columns and texts that hold them."""
    folder = tmp_path_factory.mktemp("evil") / f"a{EVIL}\nb"
    folder.mkdir()
    message = {"role": "user", "content": f"Hi {EVIL}"}
    rows = [
        {"messages": [message, {"role": "assistant", "content": f"Yes {EVIL}"}], EVIL: 1} for _ in range(9)
    ]
    rows.append({"messages": [message | {"role": EVIL}], EVIL: 1})
    (folder / f"rows{EVIL}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / f"notes{EVIL}").touch()
    sftdata.prepare(
        folder, tokenizer=TOKENIZER, output=folder / "set", max_length=64, max_rejects="50%", workers=1
    )
    shutil.move(folder / "set", folder.parent / f"set{EVIL}")
    return folder


READING = {
    "detect": ["detect"],
    "detect-json": ["detect", "--json"],
    "preview": ["preview", "-t", TOKENIZER],
    "preview-json": ["preview", "-t", TOKENIZER, "--json"],
    "resolve": ["resolve", "-t", TOKENIZER, "--kind", "text", "--response-template", f"Yes {EVIL}"],
    "prepare": ["prepare", "-t", TOKENIZER, "--max-rejects", "50%", "--workers", "1"],
    "prepare-strict": ["prepare", "-t", TOKENIZER, "--max-rejects", "0", "--workers", "1"],
    "init": ["init", "-t", TOKENIZER, "-f", "-"],
}


SGR = re.compile(r"\x1b\[\d*m")


def test_messages_are_coloured_for_a_terminal_and_results_and_pipes_are_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chats(tmp_path / "chats.jsonl", 3)
    arguments = ["prepare", tmp_path / "chats.jsonl", "-t", TOKENIZER, "--max-rejects", "50%"]
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for variable, colours in (("TERM", False), ("NO_COLOR", False), ("FORCE_COLOR", True)):
        monkeypatch.setenv(variable, "1")
        assert bool(SGR.search(said([*arguments, "-o", tmp_path / variable], capfd))) == colours
        monkeypatch.delenv(variable)
    monkeypatch.setenv("FORCE_COLOR", "1")
    wrong = said([*arguments, "-o", tmp_path / "wrong", "--set", "max_lenght=3"], capfd)
    assert re.search(r"\x1b\[32mFix: .*max_length.*\x1b\[0m", wrong)
    main(["stats", str(tmp_path / "TERM"), "--json"])
    assert json.loads(capfd.readouterr().out)


def test_colour_lets_no_escape_of_the_data_through(
    evil: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in ("prepare", "prepare-strict"):
        text = said([*READING[name], evil, "-o", tmp_path / name], capfd)
        harmless(re.sub(r"\x1b\[(?:0|1|32|33|36|90|1;31|1;34)m", "", text))


@pytest.mark.parametrize("name", READING)
def test_no_command_that_reads_rows_lets_escapes_of_the_data_through(
    evil: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    command = [*READING[name], evil]
    harmless(said([*command, "-o", tmp_path / "set"] if "prepare" in name else command, capfd))


@pytest.mark.parametrize(
    "command",
    [["stats"], ["stats", "--json"], ["inspect"], ["inspect", "--ids"], ["inspect", "--json"], ["inspect", "--row", "999"],
     ["audit"], ["audit", "--json"], ["verify"], ["verify", "--json"], ["inspect", "--html"], ["stats", "--html"]],
    ids=" ".join,
)  # fmt: skip
def test_no_command_that_shows_a_set_lets_escapes_through(
    evil: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    page = [tmp_path / f"{EVIL}.html"] if "--html" in command else []
    harmless(said([*command, *page, evil.parent / f"set{EVIL}"], capfd))


ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
DATA = {
    "column": {EVIL: "a"},
    "role": {"messages": [{"role": EVIL, "content": "a"}, {"role": "assistant", "content": "b"}]},
    "key": {"messages": [{"role": "user", "content": "a", EVIL: 1}, {"role": "assistant", "content": "b"}]},
    "value": {"messages": EVIL},
    "from": {"conversations": [{"from": EVIL, "value": "a"}]},
    "near": {"messages": ROW["messages"], f"prompt{EVIL}": "a", "completion": "b"},
    "broken": EVIL,
}


@pytest.mark.parametrize("command", ["prepare", "detect", "preview"])
@pytest.mark.parametrize("channel", DATA)
def test_no_channel_of_a_row_lets_escapes_through(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], channel: str, command: str
) -> None:
    row = DATA[channel]
    (tmp_path / "rows.jsonl").write_text((row if isinstance(row, str) else json.dumps(row)) + "\n")
    more = ["-o", tmp_path / "set", "--workers", "1"] if command == "prepare" else []
    text = said(
        [command, tmp_path / "rows.jsonl", *(["-t", TOKENIZER] if command != "detect" else []), *more], capfd
    )
    assert not ACTS.search(text), repr(text)


ARGUMENTS = {
    "input": ["prepare", f"no{EVIL}.jsonl", "-t", TOKENIZER, "-o", "set"],
    "input-near": ["detect", f"{{folder}}/row{EVIL}.jsonl"],
    "glob": ["detect", f"no{EVIL}*"],
    "tokenizer": ["prepare", "{rows}", "-t", f"no/{EVIL}/x", "-o", "set"],
    "output": ["prepare", "{rows}", "-t", TOKENIZER, "-o", f"s3://{EVIL}/x"],
    "template": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--chat-template", f"no{EVIL}.jinja"],
    "formatter": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--formatter", f"no{EVIL}:x"],
    "format": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--format", EVIL],
    "map": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--map", f"prompt={EVIL}"],
    "map-name": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--map", f"{EVIL}=prompt"],
    "choice": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--packing", EVIL],
    "set": ["prepare", "{rows}", "-t", TOKENIZER, "-o", "set", "--set", f"{EVIL}=1"],
    "set-value": [
        "prepare",
        "{rows}",
        "-t",
        TOKENIZER,
        "-o",
        "set",
        "--set",
        f"max_rejects={json.dumps(EVIL)}",
    ],
    "settings": ["prepare", "{rows}", "-c", f"no{EVIL}.yaml"],
    "option": ["prepare", f"--no{EVIL}"],
    "command": [f"prepare{EVIL}"],
    "explain": ["explain", EVIL],
    "verify": ["verify", f"no{EVIL}"],
    "stats": ["stats", f"no{EVIL}"],
    "page": ["inspect", "{set}", "--html", f"/proc/no{EVIL}/x"],
    "init": ["init", "{rows}", "-t", TOKENIZER, "-f", f"https://{EVIL}"],
    "config": ["config", "check", f"no{EVIL}.yaml"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_no_argument_comes_back_as_an_escape(
    evil: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    debug: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_chats(tmp_path / "rows.jsonl", 9)
    places = {"{rows}": rows, "{set}": evil.parent / f"set{EVIL}", "{folder}": evil}
    arguments = []
    for argument in ARGUMENTS[name]:
        for slot, place in places.items():
            argument = argument.replace(slot, str(place))
        arguments.append(argument)
    harmless(said([*arguments, *["--debug"] * debug], capfd))


def test_a_name_with_a_newline_does_not_split_the_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_chats(tmp_path / "one\ntwo.jsonl", 9)
    text = said(
        ["prepare", rows, "-t", TOKENIZER, "-o", tmp_path / "set", "--workers", 1, "--max-rejects", "50%"],
        capfd,
    )
    assert "one␊two.jsonl: messages" in text
    assert not [line for line in text.splitlines() if line.startswith("two.jsonl")]


def test_what_a_library_prints_is_escaped_too(capfd: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def chatter() -> None:
        print(f"a {EVIL} PWN")
        sys.stderr.writelines([f"b {EVIL} PWN\n"])

    assert run_app(app, "sftdata", []) == 0
    out, err = capfd.readouterr()
    harmless(out)
    harmless(err)


def run(arguments: Sequence[object], shell: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a stream closed by the shell."""
    command = [sys.executable, "-m", "sftdata", *map(str, arguments)]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | path,
    )


@pytest.mark.parametrize("shell", ["1>&-", "2>&-", "1>&- 2>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_is_no_accident(tmp_path: Path, shell: str) -> None:
    rows = write_chats(tmp_path / "rows.jsonl", 30)
    done = run(
        ["prepare", rows, "-t", TOKENIZER, "-o", tmp_path / "set", "--max-rejects", "50%", "--workers", 2],
        shell,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert run(["stats", tmp_path / "set", "--json"], shell).returncode == 0
    refused = run(["stats", tmp_path / "no", "--json"], shell)
    assert refused.returncode == 2
    assert sftdata.open(tmp_path / "set")[0] is not None


def test_output_to_a_full_disk_is_one_line(tmp_path: Path) -> None:
    rows = write_chats(tmp_path / "rows.jsonl", 30)
    assert (
        run(["prepare", rows, "-t", TOKENIZER, "-o", tmp_path / "set", "--max-rejects", "50%"], "").returncode
        == 0
    )
    done = run(["stats", tmp_path / "set", "--json"], "> /dev/full")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "No space left" in done.stderr


@pytest.fixture(autouse=True)
def _signals_that_stop() -> Iterator[None]:
    """Signals as a terminal leaves them: what a shell starts in the background ignores some."""
    before = {
        number: signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


STOPS = {"SIGTERM": 143, "SIGHUP": 129, "SIGQUIT": 131, "SIGINT": 130}


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_is_one_line_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    rows = write_chats(tmp_path / "rows.jsonl", 60)
    command = [
        "prepare",
        rows,
        "-t",
        TOKENIZER,
        "-o",
        tmp_path / "set",
        "--max-rejects",
        "50%",
        "--workers",
        1,
    ]
    command += ["--set", "slice_bytes=4000", "--max-length", 64]
    commit: Callable[..., None] = Build.commit

    def commit_and_stop(build: Build, result: object, rejects: bytes) -> None:
        commit(build, result, rejects)
        os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(Build, "commit", commit_and_stop)
        capfd.readouterr()
        assert main([str(word) for word in command]) == STOPS[name]
        line = capfd.readouterr().err.splitlines()[-1]
    assert line.endswith("what is finished is kept. Run the same command to go on.")
    assert name in line or name == "SIGINT"
    assert "Resuming: 1/" in said(command, capfd)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_under_nohup_is_not_stopped_by_a_hangup(tmp_path: Path) -> None:
    script = "import os, signal, typer\nfrom sftdata.frame import run_app\napp = typer.Typer()\n"
    script += (
        "@app.command()\ndef hang() -> None:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('on')\n"
    )
    script += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nraise SystemExit(run_app(app, 'sftdata', []))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "on\n")


@pytest.mark.parametrize("entry", ["sftdata.cli", "sftdata.__main__", "sfttrain.__main__"])
def test_ctrl_c_while_the_commands_are_imported_is_one_line(entry: str) -> None:
    script = f"""
import sys
from {entry} import command

class Stop:
    def find_spec(name, *_):
        if name == "typer":  # which takes longest
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop)
sys.exit(command())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted; nothing was begun.\n")
