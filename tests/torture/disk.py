"""A disk that loses power: replays recorded operations and tells what may be found afterwards.

What a disk has promised, after Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), taken at its weakest: the
bytes of a file are safe once the file was synced, the names in a folder once the folder was. Anything else may be there or not.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.faults import Operation

Names = dict[str, "File | Folder"]


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    """The names as every process sees them, and those that are safe."""

    names: Names = field(default_factory=dict)
    synced: Names = field(default_factory=dict)


class Disk:
    """The files beneath one folder, which itself is safe."""

    def __init__(self, root: str) -> None:
        self.root, self.top = root, Folder()
        self.changes: list[list[tuple[Folder, str, File | Folder | None]]] = []

    def apply(self, operation: Operation) -> None:
        """Do what the operation does for every process that is alive."""
        path, *more = operation.paths
        match operation.name:
            case "open":
                self._open(path)
            case "write":
                file = self._at(path)
                assert isinstance(file, File)
                file.data += operation.data
            case "fsync":
                self._sync(self._at(path))
            case "mkdir" if not self._exists(path):  # what is recorded may have failed
                self._change((*self._parent(path), Folder()))
            case "unlink" | "rmdir" if self._exists(path):
                self._change((*self._parent(path), None))
            case "replace" | "rename":
                self._change((*self._parent(path), None), (*self._parent(more[0]), self._at(path)))
            case "swap":
                one, other = self._at(path), self._at(more[0])
                self._change((*self._parent(path), other), (*self._parent(more[0]), one))

    def _open(self, path: str) -> None:
        folder, name = self._parent(path)
        file = folder.names.get(name)
        if isinstance(file, File):
            file.data = b""
        else:
            self._change((folder, name, File()))

    def _change(self, *steps: tuple[Folder, str, File | Folder | None]) -> None:
        """Change names, all or none of them; they are safe when one of the folders is synced."""
        self.changes.append(list(steps))
        for folder, name, what in steps:
            _set(folder.names, name, what)

    def _sync(self, what: File | Folder) -> None:
        if isinstance(what, File):
            what.synced = what.data
            return
        for change in [change for change in self.changes if any(folder is what for folder, _, _ in change)]:
            self.changes.remove(change)
            for folder, name, item in change:
                _set(folder.synced, name, item)

    def survivors(self, rng: random.Random) -> list[tuple[list[int], bool]]:
        """Return what may have reached the disk beyond what was promised: which pending changes, and whether all bytes."""
        every = list(range(len(self.changes)))
        chosen = [number for number in every if rng.random() < 0.5]
        return [(every, True), (every, False), ([], False), (chosen, False)]

    def write_out(self, target: Path, kept: Sequence[int], whole: bool) -> None:
        """Lay down the files as they are found after the power came back."""
        overlay: dict[int, Names] = {}
        for number in kept:
            for folder, name, what in self.changes[number]:
                _set(overlay.setdefault(id(folder), dict(folder.synced)), name, what)
        self._lay(self.top, target, overlay, whole)

    def _lay(self, folder: Folder, target: Path, overlay: dict[int, Names], whole: bool) -> None:
        target.mkdir(exist_ok=True)
        for name, what in overlay.get(id(folder), folder.synced).items():
            if isinstance(what, Folder):
                self._lay(what, target / name, overlay, whole)
            else:
                (target / name).write_bytes(what.data if whole else what.synced)

    def _parent(self, path: str) -> tuple[Folder, str]:
        folder = self._at(os.path.dirname(path))
        assert isinstance(folder, Folder)
        return folder, os.path.basename(path)

    def _exists(self, path: str) -> bool:
        folder, name = self._parent(path)
        return name in folder.names

    def _at(self, path: str) -> File | Folder:
        what: File | Folder = self.top
        for part in Path(path).relative_to(self.root).parts:
            assert isinstance(what, Folder)
            what = what.names[part]
        return what


def _set(names: Names, name: str, what: File | Folder | None) -> None:
    if what is None:
        names.pop(name, None)
    else:
        names[name] = what
