"""Watch, break or end a process at any of its writes: patches `os`, so that the code under test knows nothing of it.

Only operations beneath one folder count: `open` for writing, `write`, `fsync`, `replace`, `rename`, `mkdir`, `unlink`, `rmdir`.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import shutil  # noqa: F401  it decides by `os` itself, when it is imported, how to remove trees
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PATCHED = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


@dataclass(frozen=True)
class Operation:
    """One operation on the disk, before it happens: its name, the paths it names, what it writes."""

    name: str
    paths: tuple[str, ...]
    data: bytes = b""


@dataclass(frozen=True)
class Fault:
    """What happens where: at the `nth` operation, or at the first one whose name and last path fit.

    `action` is "kill" (this process), "kill-group" (the workers as well), or the name of an errno. `after`: once it is done.
    """

    action: str
    nth: int = 0
    name: str = "*"
    path: str = "*"
    after: bool = False

    def fits(self, count: int, operation: Operation) -> bool:
        if self.nth:
            return count == self.nth
        return fnmatch.fnmatch(operation.name, self.name) and fnmatch.fnmatch(operation.paths[-1], self.path)


@dataclass
class Tap:
    """Sees every operation beneath `folder`; makes one of them fail where there is a fault."""

    folder: str
    fault: Fault | None = None
    record: bool = False
    count: int = 0
    fired: bool = False
    operations: list[Operation] = field(default_factory=list)

    def pass_through(self, operation: Operation, act: Callable[[], Any]) -> Any:
        if not any(path == self.folder or path.startswith(f"{self.folder}/") for path in operation.paths):
            return act()
        self.count += 1
        if self.record:
            self.operations.append(operation)
        fault = self.fault
        if fault is None or self.fired or not fault.fits(self.count, operation):
            return act()
        self.fired = True
        if fault.after:
            act()
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.action == "kill-group":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        number = getattr(errno, fault.action)
        raise OSError(number, os.strerror(number), operation.paths[-1])

    @contextmanager
    def installed(self) -> Iterator[Tap]:
        real = {name: getattr(os, name) for name in PATCHED}
        for name, function in real.items():
            setattr(os, name, self._wrapper(name, function))
        try:
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)

    def install(self) -> None:
        """Patch for as long as the process lives."""
        for name in PATCHED:
            setattr(os, name, self._wrapper(name, getattr(os, name)))

    def _wrapper(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*args, **kwargs)
            data = bytes(args[1]) if name == "write" and self.record else b""
            operation = Operation(name, _paths(name, args, kwargs), data)
            if name == "unlink" and not os.path.lexists(operation.paths[0]):
                return real(*args, **kwargs)  # what is not there cannot be removed: nothing happens
            return self.pass_through(operation, lambda: real(*args, **kwargs))

        return patched


def _paths(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    if name in ("write", "fsync"):
        return (os.readlink(f"/proc/self/fd/{args[0]}"),)
    paths = [os.fspath(path) for path in args[: 2 if name in ("replace", "rename") else 1]]
    paths = [os.fsdecode(path) for path in paths if not isinstance(path, int)]
    if kwargs.get("dir_fd") is not None:
        paths = [os.path.join(os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}"), path) for path in paths]
    return tuple(os.path.abspath(path) for path in paths) or ("",)
