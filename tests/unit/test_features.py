"""docs/features.md says what the tests prove, and no row is without a test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_features", ROOT / "docs" / "make_features.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tests_say() -> None:
    assert (ROOT / "docs" / "features.md").read_text("utf-8") == _generator().page()


def test_every_row_has_its_test() -> None:
    assert "no test" not in _generator().page()
