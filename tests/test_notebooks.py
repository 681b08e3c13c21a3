"""Notebooks use what a user has and carry no output; the pictures of the docs stay small. `make notebooks` runs the notebooks."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import sftdata
import sfttrain

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLIC = {"sftdata": set(sftdata.__all__), "sfttrain": set(sfttrain.__all__)}


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def code(path: Path) -> ast.Module:
    return ast.parse(
        "\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    )


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_public_face_only(path: Path) -> None:
    imported = set()
    for node in ast.walk(code(path)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(f"{node.module}.")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PUBLIC:
            assert node.attr in PUBLIC[node.value.id]
    ours = {name for name in imported if name.split(".")[0] in PUBLIC}
    assert "sftdata" in ours
    assert ours <= set(PUBLIC)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_carries_no_output(path: Path) -> None:
    run = [
        cell
        for cell in cells(path)
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])
    ]
    assert not run


def test_pictures_are_small_and_used() -> None:
    pages = "".join(
        page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    )
    pictures = sorted((ROOT / "docs/images").iterdir())
    assert [picture.name for picture in pictures if picture.stat().st_size > 300_000] == []
    assert [picture.name for picture in pictures if f"images/{picture.name}" not in pages] == []
