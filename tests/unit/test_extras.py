"""A package that is not there, and an object where a name is expected, are one line that says what to do."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.errors import UsageError, need

ROOT = Path(sftdata.__file__).parents[1]
# Packages by the names of their modules, where the two differ; huggingface_hub comes with transformers.
MODULES = {
    "pyyaml": "yaml", "backports.zstd": "backports", "pillow": "PIL", "google-auth": "google", "azure-identity": "azure",
}  # fmt: skip
WITH_OTHERS = {"huggingface_hub", "click", "jinja2"}
STANDARD = sys.stdlib_module_names | {"compression"}  # from 3.14


def imported(path: Path) -> Iterator[str]:
    """Yield the top of each module that a file imports at run time."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_what_is_not_always_installed_is_imported_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {name.split(";")[0].split(">")[0].split("=")[0].strip() for name in project["dependencies"]}
    core = {MODULES.get(name, name) for name in core} | WITH_OTHERS | {"sftdata"} | STANDARD
    strangers = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / "sftdata").rglob("*.py")
        for name in imported(path)
        if name not in core
    }
    assert strangers == set()


def test_extras_that_are_named_exist_and_hold_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [
        (node.args[0].value, node.args[1].value)
        for path in (ROOT / "sftdata").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need"
        if isinstance(node.args[0], ast.Constant) and isinstance(node.args[1], ast.Constant)
    ]
    assert len(asked) >= 3
    for module, extra in asked:
        packages = [str(package).split(">")[0] for package in extras[extra]]
        assert str(module).partition(".")[0] in [MODULES.get(package, package) for package in packages]
        monkeypatch.setitem(sys.modules, str(module), None)
        with pytest.raises(
            UsageError, match=rf"the rows.*{module} is not installed.*pip install 'sftdata\[{extra}\]'"
        ):
            need(str(module), str(extra), "the rows are a dataset")


class Dataset:
    """A stand-in: what counts is that it is no path."""


@pytest.mark.parametrize("inputs", [Dataset(), ["rows.jsonl", Dataset()], {"train": "a"}, 5, None])
def test_what_holds_no_rows_and_names_none_is_answered_with_what_does(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"inputs: found a \w+; expected paths.*or rows.*list of dicts"):
        sftdata.prepare(inputs, tokenizer="tok", output=tmp_path / "set")


def test_what_is_no_tokenizer_is_answered_with_what_is(tmp_path: Path) -> None:
    loaded: Any = Dataset()
    said = r"tokenizer: found a Dataset; expected a folder, a Hub id.*a tokenizer of transformers"
    with pytest.raises(UsageError, match=said):
        sftdata.stream([{"text": "a"}], tokenizer=loaded)
    with pytest.raises(UsageError, match=said):
        sftdata.prepare("rows.jsonl", tokenizer=loaded, output=tmp_path / "set")


def test_a_tokenizer_may_be_a_path(tmp_path: Path) -> None:
    from sftdata.config import make_config

    assert make_config(inputs="a", tokenizer=tmp_path, output="b").tokenizer == str(tmp_path)
