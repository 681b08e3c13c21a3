"""Collect every piece of advice in the source: each text that tells a user to give a flag, set a setting or run a command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(
    r"(?<![\w-])--[a-z][a-z-]*+(?!:)|(?<![\w-])-[to] |\b(?:sftdata|sfttrain) [a-z]|\bset \w+="
    r"|pip install|\bjq -c|\biconv -f|\btr '|\bhf [a-z]"
)
# How many of the arguments of each error say what is wrong; what follows is advice.
_REASONS = {"UsageError": 1, "DataError": 1, "IntegrityError": 1, "SftError": 1, "Fault": 2, "RowError": 2}
_DECLARED = {
    "Option",
    "Argument",
    "Field",
    "Typer",
    "compile",
    "command",
    "know",
}  # calls that declare a command line or a pattern
_SAID = {"what", "found", "problem", "reason", "flag", "wanted"}  # names of texts that say what is wrong


def collect(package: str) -> dict[str, str]:
    """Return advice -> the file that gives it; what is filled in is written {}."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        for text in _advice_of(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(text, path.relative_to(ROOT).as_posix())
    return found


def texts_of(tree: ast.Module) -> Iterator[str]:
    """Yield every text that may be said: all but docstrings, and what declares a command line or a pattern."""
    declared = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) in _DECLARED - {"Field"}
    )
    docstrings = (
        node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )
    return _texts(tree, {id(node) for node in (*declared, *docstrings)})


def _advice_of(tree: ast.Module) -> Iterator[str]:
    return (text for text in _texts(tree, set(_skipped(tree))) if COMMAND.search(text))


def _texts(tree: ast.Module, skipped: set[int]) -> Iterator[str]:
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr | ast.Constant):
            yield _text(node)
            if isinstance(node, ast.JoinedStr):
                stack += [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            continue
        stack += reversed(list(ast.iter_child_nodes(node)))


def _skipped(tree: ast.Module) -> Iterator[int]:
    """Yield the nodes whose texts are no advice: docstrings, declarations, and what says what is wrong."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield id(node)
        elif isinstance(node, ast.Call):
            name = _name(node)
            yield from map(id, node.args[: _REASONS.get(name, 0)])
            if name in _DECLARED:
                yield id(node)
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in _SAID
        ):
            yield id(node)


def _name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _text(node: ast.JoinedStr | ast.Constant) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
