"""The files around the code agree with it: workflows, forms, Dockerfiles, citation, changelog, decisions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sftdata
from sftdata.set.manifest import FORMAT_VERSION
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").iterdir())
RELEASE = re.compile(r"^## \[(?P<version>\d+\.\d+\.\d+)\] - (?P<date>\d{4}-\d{2}-\d{2})$", re.MULTILINE)
DECISION = re.compile(
    r"^- (?:\*\*(\d+)\*\* \((accepted|rejected|open|superseded by (\d+))\) )?", re.MULTILINE
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in load(path)["jobs"].items():
            yield f"{path.stem}:{name}", job


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


# ---------------------------------------------------------------------------------------------------- .github


def test_every_target_that_workflows_and_pages_name_is_one_of_make() -> None:
    runs = [step.get("run", "") for _, job in jobs() for step in job["steps"]]
    pages = [(ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join([*runs, *pages]), re.MULTILINE))
    assert all("\nmake test " in page and "\nmake test-all " in page for page in pages)
    assert named >= {"lint", "types", "test", "test-all", "docs", "wheel"}
    assert named <= make_targets()


def test_each_change_is_checked_on_every_python_that_the_classifiers_name() -> None:
    check = dict(jobs())["ci:check"]
    assert set(check["strategy"]["matrix"]["python"]) == PYTHONS
    assert [step["run"] for step in check["steps"] if "run" in step] == [
        "make lint",
        "make types",
        "make test",
    ]
    assert f">={min(PYTHONS, key=lambda version: int(version[2:]))}" == PROJECT["requires-python"]


@pytest.mark.parametrize(
    ("name", "job"), list(jobs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_job_is_bounded_and_uses_actions_by_their_hash(name: str, job: dict[str, Any]) -> None:
    assert job["timeout-minutes"] <= 120
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
        version = step.get("with", {}).get("python-version", "${{ matrix.python }}")
        assert version in PYTHONS or version == "${{ matrix.python }}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_only_and_publishing_asks_for_its_one_right(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})
    assert "secrets." not in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("tag", "taken"), [(f"v{sftdata.__version__}", True), ("v9.9.9", False), ("x", False)]
)
def test_only_the_tag_of_the_version_is_released(tag: str, taken: bool) -> None:
    found = dict(jobs())
    (script,) = [
        step["run"] for step in found["release:build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where `python` is
    environment = os.environ | {"GITHUB_REF_NAME": tag, "PATH": path}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, env=environment, timeout=HANGS, check=False)
    assert (done.returncode == 0) == taken
    assert found["release:publish"]["needs"] == "build"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one_that_is_shown(path: Path) -> None:
    form = load(path)
    if path.stem == "config":
        assert form["blank_issues_enabled"]
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names)
    assert any(field["validations"]["required"] for field in fields if "validations" in field)


def test_dependabot_looks_where_there_is_something() -> None:
    updates = {
        update["package-ecosystem"]: update["directory"]
        for update in load(ROOT / ".github/dependabot.yml")["updates"]
    }
    assert updates == {"pip": "/", "github-actions": "/", "docker": "/docker"}


# ----------------------------------------------------------------------------------------------------- docker


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_names_what_there_is(path: Path) -> None:
    text = path.read_text("utf-8")
    (python,) = re.findall(r"^FROM python:(\S+)-slim$", text, re.MULTILINE)
    assert python in PYTHONS
    (entry,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]$', text, re.MULTILINE)
    assert entry in PROJECT["scripts"]
    (extras,) = re.findall(r'"/tmp/sftdata\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert ("train" in extras.split(",")) == (entry == "sfttrain")
    assert f"docker build -f docker/{path.name} " in text
    assert set(re.findall(r"-c (\S+)", text)) == {"/tmp/sftdata/constraints.txt"}


def test_the_images_are_built_from_what_a_wheel_needs() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")
    }
    assert {
        PROJECT["readme"],
        *PROJECT["license-files"],
        "sftdata",
        "sfttrain",
        "pyproject.toml",
        "constraints.txt",
    } == kept
    assert all((ROOT / name).exists() for name in kept)


# ------------------------------------------------------------------------------------ changelog, decisions


def test_the_newest_version_of_the_changelog_is_that_of_the_packages_and_of_the_citation() -> None:
    releases = [
        (found["version"], found["date"])
        for found in RELEASE.finditer((ROOT / "CHANGELOG.md").read_text("utf-8"))
    ]
    citation = load(ROOT / "CITATION.cff")
    assert releases[0] == (sftdata.__version__, str(citation["date-released"]))
    assert releases == sorted(
        releases, key=lambda release: [int(part) for part in release[0].split(".")], reverse=True
    )
    assert citation["version"] == sftdata.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_changelog_has_the_sections_of_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"
    }  # fmt: skip
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [found[0][3:] for found in RELEASE.finditer(text)]


def test_decisions_are_numbered_and_their_status_is_known() -> None:
    entries = [found.groups() for found in DECISION.finditer((ROOT / "docs/decisions.md").read_text("utf-8"))]
    numbers = [int(number) if number else None for number, *_ in entries]
    assert None not in numbers, "an entry without number and status"
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    later = [(int(number), int(by)) for number, _, by in entries if by]
    assert all(number < by <= len(numbers) for number, by in later)


def test_the_page_on_versions_names_this_release_and_the_format_it_writes() -> None:
    table = (ROOT / "docs/versioning.md").read_text("utf-8").partition("| release | writes | reads |")[2]
    newest = re.findall(r"^\| (\d+\.\d+) \| (\d+) \| ([\d, ]+) \|$", table, re.MULTILINE)[0]
    assert newest[0] == sftdata.__version__.rpartition(".")[0]
    assert int(newest[1]) == FORMAT_VERSION
    assert newest[1] in newest[2].split(", ")
