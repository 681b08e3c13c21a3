"""A fast place for thousands of small writes, and the unbroken run that every broken one is held against."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.torture.runs import content, prepare, write_chats


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is such a disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Unbroken:
    """An input and the set that a run without faults makes of it."""

    data: Path
    files: dict[str, bytes]
    digest: str


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    """Three slices."""
    folder = tmp_path_factory.mktemp("small")
    data = write_chats(folder / "chats.jsonl", 34)
    digest = prepare(data, folder / "set").digest
    assert len(list((folder / "set").glob("*.arrow"))) == 3
    return Unbroken(data, content(folder / "set"), digest)
