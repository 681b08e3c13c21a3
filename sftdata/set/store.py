"""The files of a set: written atomically, hashed on the way to the disk, and described by their digests."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import xxhash
from msgspec import Meta

from sftdata.errors import SftError, UsageError

TEMPORARY_SUFFIX = ".tmp"
_READ_BYTES = 1 << 20
# What the command asked for and cannot have: exit code 2. Any other failure is the machine's and may pass:
# exit code 1.
_REFUSALS = {
    errno.EROFS: "choose an output folder on a disk that can be written.",
    errno.EACCES: "choose an output folder that you may write to.",
    errno.EPERM: "choose an output folder that you may write to.",
    errno.ENOENT: "create the folder first.",
    errno.ENOTDIR: "choose an output folder whose path holds no file.",
    errno.ENAMETOOLONG: "choose a shorter name for the output folder.",
}
_AGAIN = "then run the same command again; what is finished is kept."
_FIXES = {
    errno.ENOSPC: f"free some space, {_AGAIN}",
    errno.EDQUOT: f"raise the quota or free some space, {_AGAIN}",
    errno.EFBIG: f"raise the file size limit (`ulimit -f`), {_AGAIN}",
}
_NO_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: see renameat2(2)

# ------------------------------------------------------------------------------------------- descriptions


# Types of fields read from files. These may come from anywhere, so each type says all that it may hold.
Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A number of things; 2**53 is the largest that every JSON reader keeps exact."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
RowLength = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Xxh3 = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
ShardName = Annotated[str, Meta(pattern=r"^(shard|packs)-[0-9]{5,9}\.arrow\Z")]

PlainPath = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z", max_length=1024)
]
"""A path inside the folder of the set: no part is hidden, `.` or `..`, or needs quoting in a shell."""


class FileDigest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file must be: its size, and in hex xxh3-128 (against damage) and sha256 (against forgery)."""

    bytes: Count
    xxh3: Xxh3
    sha256: Sha256


class SetFile(FileDigest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of a set, by its name in the folder."""

    name: PlainPath


def stands(folder: Path, file: SetFile) -> bool:
    """Say whether a committed file is on disk, whole."""
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.bytes


# ------------------------------------------------------------------------------------------------- writing


class Sink(Protocol):
    """What a writer sees of the file."""

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; return how many."""


class HashingSink:
    """Pass bytes on, and through both hashes; enough of a file object for pyarrow.

    Args:
        pass_on: takes all it is given.
    """

    closed = False

    def __init__(self, pass_on: Callable[[memoryview], object]) -> None:
        self._pass_on = pass_on
        self._size = 0
        self._xxh3 = xxhash.xxh3_128()
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Take bytes; return how many."""
        view = memoryview(data).cast("B")
        self._xxh3.update(view)
        self._sha256.update(view)
        self._size += len(view)
        self._pass_on(view)
        return len(view)

    def tell(self) -> int:
        """Return how many bytes were taken."""
        return self._size

    def writable(self) -> bool:
        """Return True."""
        return True

    def flush(self) -> None:
        """Do nothing: bytes are passed on at once, and fsync comes with the commit."""

    def digest(self) -> FileDigest:
        """Return size and digests of what was taken."""
        return FileDigest(bytes=self._size, xxh3=self._xxh3.hexdigest(), sha256=self._sha256.hexdigest())


def write_atomic(path: Path, writer: Callable[[Sink], object]) -> FileDigest:
    """Write a file so that a reader, or a machine that lost power, sees all of it or nothing of it.

    Args:
        path: where the file will stand; its folder exists.
        writer: writes the content, front to back.

    Returns:
        Size and digests of what was written, taken on the way to the disk.

    Raises:
        SftError: the disk is full or broken (a UsageError where the folder cannot be written); `path` is what
            it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}{TEMPORARY_SUFFIX}")
    with explained(path):
        try:
            digest = _write_synced(temporary, writer)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what counts
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return digest


def link_file(old: Path, new: Path) -> None:
    """Give a file another name, in place of what has it; where the file system cannot, copy it."""
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        with open(old, "rb") as file:
            write_atomic(new, partial(shutil.copyfileobj, file))


def remove_temporary(folder: Path) -> None:
    """Remove what killed writers left in a folder and below."""
    for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into one line that names it and the way out.

    Raises:
        UsageError: the command asked for what cannot be had: no such folder, no permission.
        SftError: the machine failed: no space left, a broken disk.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        name = errno.errorcode.get(code, "unknown error")
        what = f"{path}: cannot be written: {error.strerror or error} ({name})."
        if code in _REFUSALS:
            raise UsageError(what, _REFUSALS[code]) from error
        fix = _FIXES.get(code, f"check the disk, {_AGAIN}")
        raise SftError(what, fix) from error


def swap_folders(one: Path, other: Path) -> None:
    """Exchange two folders in one step: neither name is ever without its folder.

    Raises:
        OSError: the system or its file system cannot do this (ENOSYS, EINVAL), or refuses.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if swap is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def remove(path: Path) -> None:
    """Remove a folder, or a link that an older version left in its place; what cannot be removed stays."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path, *, sha256: bool = True) -> FileDigest:
    """Read a file once and return its digest; without `sha256`, which costs most, that field is empty."""
    xxh3, slow, size = xxhash.xxh3_128(), hashlib.sha256(), 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size += count
            xxh3.update(buffer[:count])
            if sha256:
                slow.update(buffer[:count])
    return FileDigest(bytes=size, xxh3=xxh3.hexdigest(), sha256=slow.hexdigest() if sha256 else "")


def _write_synced(path: Path, writer: Callable[[Sink], object]) -> FileDigest:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        sink = HashingSink(partial(_write_all, descriptor))
        writer(sink)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return sink.digest()


def _write_all(descriptor: int, rest: memoryview) -> None:
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def held_alone(folder: Path, doing: str) -> Iterator[None]:
    """Make a folder, and hold it for one process.

    Args:
        doing: what another process would be at, for the message.

    Raises:
        UsageError: another process holds it, or it cannot be made.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    try:
        if not _take(lock, folder):
            raise UsageError(f"{folder}: another command is {doing}.", "wait for it, or choose another -o.")
        yield
    finally:
        os.close(lock)


def _take(lock: int, folder: Path) -> bool:
    """Lock an open folder; False when another process has it, or has just renamed it to its place."""
    try:
        with explained(folder):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(lock), folder.stat())
    except SftError as error:
        if isinstance(error.__cause__, BlockingIOError | FileNotFoundError):
            return False
        raise
