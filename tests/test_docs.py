"""Docs are code: every command and snippet of the pages here and in docs/ runs, page by page, beside a copy of the examples.

A ```console block shows commands after `$ ` and what they print (`...` stands for anything; no output means any output).
A ```bash or ```python block has only to succeed. The blocks of a page share one folder and run in order.
A command that says `Ctrl-C ends it` is ended so.
`<!-- no-run: reason -->` on the line before a block leaves it out.
"""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?P<marker><!-- no-run:(?P<reason>[^\n]*?)-->\n)?"
    r"^```(?P<language>bash|console|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)#\s]+)[^)]*\)")
OUTPUT = doctest.OutputChecker()
ENDLESS = "Ctrl-C ends it."


@dataclass(frozen=True)
class Snippet:
    """One thing to run: a shell or Python text, the line it stands on, and what it should print (empty: anything)."""

    line: int
    language: str
    code: str
    expected: str = ""


def snippets(page: str) -> Iterator[Snippet]:
    """Yield what a page asks its reader to run, in order."""
    for block in BLOCK.finditer(page):
        if block["marker"]:
            continue
        line = page.count("\n", 0, block.start("body")) + 1
        if block["language"] == "console":
            yield from console_snippets(block["body"], line)
        else:
            yield Snippet(line, block["language"], block["body"])


def console_snippets(body: str, line: int) -> Iterator[Snippet]:
    """Cut a console block into commands, each with the output shown below it; a trailing backslash goes on."""
    for part in re.finditer(
        r"^\$ (?P<code>(?:[^\n]*\\\n)*[^\n]*\n)(?P<output>(?:(?!\$ )[^\n]*\n)*)", body, re.M
    ):
        yield Snippet(line + body.count("\n", 0, part.start()), "bash", part["code"], part["output"].strip())


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A new user's folder: the examples, and the two commands on the path."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "bin").mkdir()
    for name in ("sftdata", "sfttrain"):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {name} "$@"\n', encoding="utf-8")
        command.chmod(0o755)
    return tmp_path


def run(snippet: Snippet, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }
    command = ["bash", "-euo", "pipefail", "-c"] if snippet.language == "bash" else [sys.executable, "-c"]
    command.append(snippet.code)
    if ENDLESS in snippet.expected:
        return run_to_ctrl_c(command, folder, env | {"BROWSER": "true"})
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=HANGS, check=False
    )


def run_to_ctrl_c(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command that ends with Ctrl-C only, which is pressed when it has said so."""
    out, error = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=out, stderr=error, text=True, start_new_session=True
    ) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        os.killpg(running.pid, signal.SIGINT)
        return subprocess.CompletedProcess(command, running.wait(HANGS), said + running.stdout.read(), "")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_snippet_of_the_page_runs(page: Path, reader: Path) -> None:
    for snippet in snippets(page.read_text(encoding="utf-8")):
        result = run(snippet, reader)
        where = f"{page.relative_to(ROOT)}:{snippet.line}: {snippet.code.strip()}"
        printed = result.stdout + result.stderr
        assert result.returncode == 0, f"{where}\n{printed}"
        matches = OUTPUT.check_output(
            snippet.expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
        assert not snippet.expected or matches, (
            f"{where}\nthe page says:\n{snippet.expected}\nit prints:\n{printed}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_snippet_is_left_out_only_with_a_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reasons = [block["reason"] for block in BLOCK.finditer(text) if block["marker"]]
    assert all(len(reason.split()) >= 2 for reason in reasons)
    assert len(re.findall("^<!-- no-run", text, re.MULTILINE)) == len(reasons), (
        "a no-run comment stands right before a block"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    targets = [link["target"] for link in LINK.finditer(page.read_text(encoding="utf-8"))]
    assert not [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link["target"]).resolve() for link in LINK.finditer(index)}
    assert linked >= {page for page in PAGES if page.name != "index.md"}


TASK = re.compile(r"^\| [^|]+ \| `(?P<command>[^|]+)` \| \[[^]]+\]\((?P<page>[^)#]+)", re.MULTILINE)


def test_each_task_is_run_on_the_page_behind_it() -> None:
    tasks = list(TASK.finditer((ROOT / "docs/tasks.md").read_text(encoding="utf-8")))
    assert len(tasks) > 20
    for task in tasks:
        page = (ROOT / "docs" / task["page"]).read_text(encoding="utf-8")
        assert any(task["command"] in snippet.code for snippet in snippets(page)), task[0]


def test_pages_told_by_the_code_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    make_reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_reference)
    stale = [
        path.name for path, text in make_reference.pages().items() if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run `make docs`"


@pytest.mark.slow
def test_the_demo_ends_with_a_model_that_answers(reader: Path) -> None:
    result = run(Snippet(0, "bash", "examples/demo.sh demo"), reader)
    assert result.returncode == 0, result.stdout + result.stderr
    log = [
        json.loads(line)
        for line in (reader / "demo/model/train_log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert result.stdout.strip().endswith("Dry leaves stay healthier than wet ones.")


def test_a_page_is_read_as_its_reader_would() -> None:
    page = (
        "# Title\n```console\n$ echo a \\\n  b\na b\n$ true\n```\n"
        "<!-- no-run: needs luck -->\n```bash\nfalse\n```\n"
        "```python\nx = 1\n```\n"
    )
    assert list(snippets(page)) == [
        Snippet(3, "bash", "echo a \\\n  b\n", "a b"),
        Snippet(6, "bash", "true\n"),
        Snippet(13, "python", "x = 1\n"),
    ]
