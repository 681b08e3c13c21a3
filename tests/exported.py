"""What an export holds, beside what the set holds, read token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sftdata

Document = tuple[list[int], list[int]]


def trained_documents(folder: Path) -> list[Document]:
    """Ids and labels of each document with a trained token, read token by token."""
    found = [
        (document.input_ids.tolist(), document.labels.tolist())
        for row in sftdata.open(folder)
        for document in row.documents()
    ]
    return [document for document in found if any(label != -100 for label in document[1])]


def json_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "sftdata-export.json").read_text(encoding="utf-8"))
    return loaded


def files_of(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    assert [path.name for path in files] == json_of(folder)["files"]
    return files
