"""The rules of the house, as tests: sizes, names, imports, docstrings, pins. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.mutants import FAULTS
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sftdata", "sfttrain")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINTERS = [
    ("ruff", "check", "--output-format=concise", "."),
    ("lint-imports", "--no-logo"),
    pytest.param(("mypy",), marks=pytest.mark.slow),  # half a minute where it has no cache
]
HEAVY = {"accelerate", "datasets", "pandas", "peft", "polars", "pyarrow", "torch", "transformers"}


def modules(*packages: str) -> Iterator[tuple[Path, str]]:
    """Yield (path inside the repository, source) of every Python file in these packages."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")


def run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS, check=False)


# ------------------------------------------------------------------------------------------------ size and names


def test_no_file_is_longer_than_480_lines() -> None:
    long = {
        str(path): lines for path, source in modules(*PACKAGES) if (lines := len(source.splitlines())) > 480
    }
    assert not long


def test_no_function_is_longer_than_60_lines() -> None:
    long = {}
    for path, source in modules(*PACKAGES):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long[f"{path}:{node.lineno} {node.name}"] = lines
    assert not long


def test_no_line_outside_the_packages_is_wider_than_130() -> None:
    """The packages keep to 110, which ruff checks; it has one width for all files."""
    wide = [
        f"{path}:{number}"
        for path, source in modules("tests", "benchmarks", "docs", "examples")
        for number, line in enumerate(source.splitlines(), 1)
        if len(line) > 130
    ]
    assert not wide


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"base", "common", "helper", "helpers", "misc", "util", "utils"}
    assert not [
        str(path) for path, _ in modules(*PACKAGES) if drawers & {path.stem.strip("_"), *path.parent.parts}
    ]


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path)
        for path, source in modules(*PACKAGES)
        if source.strip() and not ast.get_docstring(ast.parse(source))
    ]
    assert not silent


def test_what_a_word_may_have_meant_is_asked_in_one_place() -> None:
    assert [str(path) for path, source in modules(*PACKAGES) if "difflib" in source] == ["sftdata/errors.py"]


def test_html_is_written_by_templates_that_escape_by_default() -> None:
    """No string of HTML is put together by hand, and no template marks anything as safe."""
    by_hand = re.compile(r"</(?:div|span|p|b|td|tr|table|li|ul|h\d|svg|section)>|from html import|Markup\(")
    assert not [str(path) for path, source in modules(*PACKAGES) if by_hand.search(_without_docs(source))]
    templates = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.html.jinja"))]
    assert len(templates) > 4
    unsafe = re.compile(r"\|\s*safe\b|autoescape")
    assert not [path.name for path in templates if unsafe.search(path.read_text(encoding="utf-8"))]


def _without_docs(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_nothing_is_left_for_later() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "HA" + "CK", "raise " + "NotImplemented")))
    found = [
        f"{path}:{number}"
        for path, source in modules(*PACKAGES, "tests", "examples", "benchmarks")
        for number, line in enumerate(source.splitlines(), 1)
        if words.search(line)
    ]
    assert not found


def test_no_tracked_file_names_a_folder_of_one_machine() -> None:
    listing = run("git", "ls-files", "-z")
    assert listing.returncode == 0, listing.stderr
    machine = re.compile(r"(?<![\w.:/-])/(?:home|mnt|opt|root|Users|work)/\w")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
        found += [
            f"{name}:{number}: {line[:80]}"
            for number, line in enumerate(text.splitlines(), 1)
            if machine.search(line)
        ]
    assert not found


# --------------------------------------------------------------------------------------------------------- who imports whom


@pytest.mark.parametrize("command", LINTERS, ids=lambda command: command[0])
def test_the_linters_find_nothing(command: tuple[str, ...]) -> None:
    tool = Path(sys.executable).parent / command[0]
    result = run(str(tool), *command[1:])
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_page_on_the_architecture_shows_the_layers_that_are_checked() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listing = page.split("needs a place there.")[1].split("\n- ")[0]
    shown = re.findall(r"^    (\S+(?: \| \S+)*)(?:  |$)", listing, re.MULTILINE)
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    assert shown == [layer for layer in layers if layer != "__main__"]


def test_a_wrong_import_would_be_caught(tmp_path: Path) -> None:
    """The import rules are alive: a copy of the packages with one forbidden import each is refused."""
    for package in PACKAGES:
        for path, source in modules(package):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    seeded = {
        "sftdata/sources/seeded.py": ("import sftdata.encode", "layers"),
        "sftdata/stray.py": ("", "layers"),
        "sftdata/render/seeded.py": ("import torch", "core-light"),
        "sftdata/set/seeded.py": ("import transformers", "one-door-transformers"),
        "sfttrain/seeded.py": ("import sftdata.render", "trainer-view"),
    }
    lint = Path(sys.executable).parent / "lint-imports"
    for name, (line, contract) in seeded.items():
        (tmp_path / name).write_text(line + "\n", encoding="utf-8")
        result = run(str(lint), "--no-cache", "--no-logo", "--contract", contract, folder=tmp_path)
        (tmp_path / name).unlink()
        assert result.returncode == 1, f"{name}: {result.stdout}{result.stderr}"


def test_no_rule_has_an_exception() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    assert not [contract["id"] for contract in contracts if "ignore_imports" in contract]


def test_no_imports_go_round_in_a_circle() -> None:
    """Imports inside functions count, and so do those for type checkers alone."""
    imports = imports_inside(dict(modules(*PACKAGES)))
    assert not circles(imports)


def test_a_circle_would_be_found_wherever_it_is_closed() -> None:
    sources = {
        Path("a/__init__.py"): "from a import b",
        Path("a/b.py"): "def late():\n    from a.c import thing",
        Path("a/c.py"): "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a.d",
        Path("a/d.py"): "",
    }
    assert not circles(imports_inside(sources))
    assert circles(imports_inside(sources | {Path("a/d.py"): "async def late():\n    from a import b"})) == {
        "a.b", "a.c", "a.d",
    }  # fmt: skip


def imports_inside(sources: dict[Path, str]) -> dict[str, set[str]]:
    """Return the modules that each module imports, anywhere in it."""
    trees = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): ast.parse(source)
        for path, source in sources.items()
    }
    imports = {}
    for name, tree in trees.items():
        named = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (inside & trees.keys()) or {node.module}
        imports[name] = named & trees.keys()
    return imports


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules from which imports lead back to themselves."""
    found = set()
    for name in imports:
        reached: set[str] = set()
        waiting = [name]
        while waiting:
            more = imports[waiting.pop()] - reached
            reached |= more
            waiting += more
        if name in reached:
            found.add(name)
    return found


def test_every_outside_import_is_declared() -> None:
    project, extras = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]
    core = project["dependencies"]
    declared = {
        "sftdata": core + extras["hub"] + extras["notebooks"] + extras["vision"],
        "sfttrain": core + extras["train"] + extras["torchao"] + extras["gpu"] + extras["vision"],
    }
    distribution_of = importlib.metadata.packages_distributions()
    undeclared = []
    for package in PACKAGES:
        allowed = {canonicalize_name(Requirement(line).name) for line in declared[package]}
        for path, source in modules(package):
            standard = sys.stdlib_module_names | {"compression"}  # from 3.14 on
            outside = imported_names(source) - set(PACKAGES) - standard
            undeclared += [
                f"{path}: {name}"
                for name in sorted(outside)
                if not allowed & {canonicalize_name(dist) for dist in distribution_of.get(name, [name])}
            ]
    assert not undeclared


def imported_names(source: str) -> set[str]:
    """Return the top-level names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


# ------------------------------------------------------------------------------------------------------ lightness

MEASURE = """
import json, sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += 1
sys.setprofile(count)
{statement}
sys.setprofile(None)
print(json.dumps([calls, sorted(sys.modules)]), file=sys.stderr)
"""
RUN_HELP = """
from {package}.cli import main
main({arguments})
"""


def cost_of(statement: str) -> tuple[int, set[str]]:
    """Return (calls and returns of functions, heavy modules loaded) of a statement in a fresh interpreter."""
    result = run(sys.executable, "-c", MEASURE.format(statement=statement))
    assert result.returncode == 0, result.stderr
    calls, loaded = json.loads(result.stderr.splitlines()[-1])
    return calls, HEAVY & set(loaded)


@pytest.mark.parametrize(
    "statement",
    [
        "import sftdata",
        RUN_HELP.format(package="sftdata", arguments=["--help"]),
        RUN_HELP.format(package="sftdata", arguments=["prepare", "--help"]),
        RUN_HELP.format(package="sfttrain", arguments=["--help"]),
        RUN_HELP.format(package="sftdata", arguments=["--version"]),
        RUN_HELP.format(package="sfttrain", arguments=["--version"]),
    ],
    ids=[
        "import sftdata",
        "sftdata --help",
        "sftdata prepare --help",
        "sfttrain --help",
        "sftdata --version",
        "sfttrain --version",
    ],
)
def test_starting_is_light(statement: str) -> None:
    calls, heavy = cost_of(statement)
    assert not heavy
    assert calls <= 3 * cost_of("import typer, pydantic; pydantic.BaseModel")[0], "of the libraries beneath"


# ------------------------------------------------------------------------------------------------------ packaging


def requirements() -> list[Requirement]:
    """Return every requirement that pyproject.toml names, our own extras aside."""
    project = PYPROJECT["project"]
    lines = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    return [requirement for line in lines if (requirement := Requirement(line)).name != project["name"]]


def pins() -> dict[str, Requirement]:
    lines = (
        line.split("#")[0].strip()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    )
    return {canonicalize_name(pin.name): pin for line in lines if line for pin in [Requirement(line)]}


def test_constraints_pin_what_pyproject_names_and_nothing_else() -> None:
    assert set(pins()) == {canonicalize_name(requirement.name) for requirement in requirements()}


def test_every_pin_is_exact_and_allowed_by_pyproject() -> None:
    for requirement in requirements():
        (pin,) = pins()[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), (
            f"{requirement} does not allow the tested {pin.version}"
        )


def test_the_tested_versions_are_the_installed_ones() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    left_out = {
        canonicalize_name(Requirement(line).name)
        for extra in ("torchao", "fuzz", "docs", "gpu", "http", "s3", "gcs", "azure", "ray", "scale")
        for line in extras[extra]
    }  # not in dev
    installed = {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    assert set(pins()) - left_out <= set(installed)
    assert not {
        name: found
        for name, found in installed.items()
        if name in pins() and not pins()[name].specifier.contains(found)
    }


@pytest.mark.parametrize("script", ["sftdata", "sfttrain"])
def test_the_console_scripts_point_at_functions(script: str) -> None:
    module, _, function = PYPROJECT["project"]["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_ci_runs_every_test_and_the_readme_names_both_suites() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        assert re.findall(
            "^make test(?:-all)? ", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
        ) == [
            "make test ",
            "make test-all ",
        ]
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").rstrip().endswith("\nmake test-all")


def test_every_seeded_fault_is_one_line_of_the_product_and_names_its_tests() -> None:
    for fault in FAULTS:
        path, source = fault.place(ROOT)
        ast.parse(source.replace(fault.text, fault.instead), str(path))
        assert all((ROOT / "tests" / name).is_file() for name in fault.tests.split()), fault.what
    assert len({fault.text for fault in FAULTS}) == len(FAULTS) >= 30


def test_make_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony.split() == re.findall(r"^([\w-]+):.* ## \w", makefile, re.MULTILINE)
