"""A fast place for thousands of small writes, and the unbroken run that every broken one is held against."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sftdata.set import build as build_module
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
    """A few slices."""
    folder = tmp_path_factory.mktemp("small")
    data = write_chats(folder / "chats.jsonl", 34)
    digest = prepare(data, folder / "set").digest
    assert 3 <= len(list((folder / "set").glob("shard-*.arrow"))) <= 5
    return Unbroken(data, content(folder / "set"), digest)


@pytest.fixture
def at_first_slice(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Let something happen once the first slice is committed."""

    def arrange(act: Callable[[], object]) -> None:
        real, waiting = build_module.Build.commit, [act]

        def commit(build: build_module.Build, result: object, rejects: bytes) -> object:
            committed = real(build, result, rejects)  # type: ignore[arg-type]
            if waiting:
                waiting.pop()()
            return committed

        monkeypatch.setattr(build_module.Build, "commit", commit)

    return arrange
