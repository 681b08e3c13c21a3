"""A bounded folder of copies that all processes of a machine share.

Whoever needs a file first makes it, under a lock, and the others wait; a file has its name once it is whole.
What was used longest ago makes room, whoever has it mapped: that process goes on reading.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sftdata.errors import SftError, UsageError
from sftdata.output import cache_folder
from sftdata.set.store import SetFile

BOUND = "SFTDATA_CACHE_GB"
_PART = ".part"
_TAKEN = ".taken"  # what all files take, in bytes: so that they need not be counted for each new one
_SHARE = 50  # at least this part of the bound is made free at a time


def cache_root() -> Path:
    """Return the folder."""
    return _resolved(str(cache_folder("sets")))


@lru_cache
def _resolved(path: str) -> Path:
    return Path(path).resolve()


@contextmanager
def held_file(path: Path) -> Iterator[BinaryIO]:
    """Open the file that becomes `path`, for one process; what a killed one left is written over."""
    part = path.with_name(f".{path.name}{_PART}")
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(part, "r+b", opener=_make)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                    break
        except BaseException:
            file.close()
            raise
        fcntl.flock(file, fcntl.LOCK_UN)
        file.close()  # it has its name by now, or is gone
    with file, _unlocked_at_end(file):
        yield file


@contextmanager
def _unlocked_at_end(file: BinaryIO) -> Iterator[None]:
    """Give up the lock on a file by name: a child that was forked meanwhile holds it, too."""
    try:
        yield
    finally:
        file.flush()
        fcntl.flock(file, fcntl.LOCK_UN)


def _make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def cache_bound() -> int:
    """Return how many bytes all mirrors may take: `SFTDATA_CACHE_GB`, or half of what is free and theirs.

    Raises:
        UsageError: the setting is no size.
    """
    text = os.environ.get(BOUND, "")
    if not text:
        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
        return (shutil.disk_usage(root).free + (_taken(root) or 0)) // 2
    try:
        bound = float(text) * 1e9
    except ValueError:
        bound = -1
    if not 0 < bound < 2**63:
        raise UsageError(f"{BOUND}={text}: expected gigabytes, as 200.", f"set {BOUND} to a number above 0.")
    return int(bound)


def make_room(info: SetFile, part: BinaryIO, evictable: tuple[str, ...]) -> None:
    """Take room for a file inside the bound; what was used longest ago goes first.

    Args:
        info: the file.
        part: in which it is made.
        evictable: how names end of what may go.

    Raises:
        UsageError: the bound is smaller than the file.
    """
    root, bound = cache_root(), cache_bound()
    with open(root / _TAKEN, "r+b", opener=_make) as lock, _unlocked_at_end(lock):
        fcntl.flock(lock, fcntl.LOCK_EX)
        part.seek(0)
        part.truncate(0)
        taken = _taken(root)
        if taken is None or taken + info.bytes > bound:
            taken = _evict(root, bound - max(info.bytes, bound // _SHARE), evictable)
        if taken + info.bytes > bound:
            raise UsageError(
                f"{info.name}: {info.bytes:,} bytes; the cache {root} is bound to {bound:,}.",
                f"raise {BOUND}, in gigabytes, or set SFTDATA_CACHE to a folder on a larger disk.",
            )
        part.truncate(info.bytes)  # so that whoever counts the files counts this one
        lock.truncate(0)
        lock.write(b"%d" % (taken + info.bytes))


def _taken(root: Path) -> int | None:
    """Return what the files take together, or somewhat more; None where nobody has counted them."""
    try:
        return int((root / _TAKEN).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _evict(root: Path, most: int, evictable: tuple[str, ...]) -> int:
    """Count the files, and remove some until they take no more than that; return what they take."""
    cached = sorted(_cached(root))
    taken = sum(size for _, size, _ in cached)
    for _, size, path in cached:
        left = path.name.endswith(_PART) and _abandoned(path)
        if left or (taken > most and path.name.endswith(evictable)):
            path.unlink(missing_ok=True)
            taken -= size
    return taken


def _cached(root: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield when each file of the cache was last used, its size and its path."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path


def _abandoned(path: Path) -> bool:
    """Say whether nobody writes a file any more."""
    with suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def explained_cache() -> Iterator[None]:
    """Turn what the system says against the cache into one line."""
    try:
        yield
    except OSError as error:
        fix = f"free some space, set {BOUND} to less, or SFTDATA_CACHE to a folder on another disk."
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            fix = "set SFTDATA_CACHE to a folder that you may write to."
        raise SftError(
            f"{cache_root()}: the cache cannot be written: {error.strerror or error}.", fix
        ) from None
