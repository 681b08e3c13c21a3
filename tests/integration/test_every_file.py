"""Every real file makes a set that verifies, or is refused with a fix that works.

All files with all tokenizers take minutes: docs/make_compatibility.py runs them and writes docs/compatibility.md. Here a handful
runs again, and the page is held against the folder of data.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
REPRESENTATIVE = (
    "dirty/instruction_null_field_5rows.json",
    "dirty/ruozhiba_emo_json_array_named.jsonl",
    "messages/lf_reason_tool_use_demo_50.jsonl",
    "prompt_completion/mlx_wwdc25_valid.jsonl",
    "sharegpt/fastchat_dummy_with_system.json",
    "text/multilingual.txt",
    "tools/bfcl_v4_live_simple_jsonl_named.json",
    "tools/gorilla_openfunctions_v1_test.json",
)


@pytest.fixture(scope="module")
def compatibility() -> ModuleType:
    """The script, under the name by which its formatter is imported."""
    spec = importlib.util.spec_from_file_location("make_compatibility", DOCS / "make_compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_compatibility"] = module
    spec.loader.exec_module(module)
    return module


def page_rows() -> dict[str, list[str]]:
    """The cells of the page's first table, by file."""
    table = (DOCS / "compatibility.md").read_text("utf-8").split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.parametrize("file", REPRESENTATIVE)
@pytest.mark.parametrize("tokenizer", ["mistral-7b-instruct", "gpt2"])
def test_a_file_makes_a_set_that_verifies_as_the_page_says(
    compatibility: ModuleType, shared_data: Path, file: str, tokenizer: str
) -> None:
    outcome = compatibility.run(shared_data, shared_data / "datasets" / file, tokenizer)
    assert outcome.problems == []
    cell = page_rows()[file][3 + compatibility.TOKENIZERS.index(tokenizer)]
    assert cell.partition(" [")[0] == compatibility.result(outcome)
    assert cell.count("[") == len(outcome.refusals)


def test_the_page_covers_every_file_with_every_tokenizer(
    compatibility: ModuleType, shared_data: Path
) -> None:
    rows = page_rows()
    files = [
        path.relative_to(shared_data / "datasets").as_posix()
        for path in compatibility.data_files(shared_data)
    ]
    assert list(rows) == files, "run docs/make_compatibility.py"
    assert all(len(row) == 3 + len(compatibility.TOKENIZERS) for row in rows.values())
    assert not [file for file, row in rows.items() if any("FAILS" in cell for cell in row)]
