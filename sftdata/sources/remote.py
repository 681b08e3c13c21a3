"""Objects behind URLs: listed, measured, fetched once, or read in exact ranges where they cannot be kept.

Planning reads every byte of its input. Of an object it leaves a local copy in the folder for temporary files,
and from then on the object is a file like any other, until the plan is gone. Where there is no room for the
copy, and on machines that did not plan, ranges of the object are read, never a byte ahead. A part of a
run copies no more than the ranges that it reads.

Credentials come from the environment, as each kind of store looks for them; nothing here takes any.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sftdata.errors import SftError, UsageError, changed
from sftdata.output import claim_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

RANGE_BYTES = 8 << 20  # of one request
HELD_BYTES = 64 << 10  # of a block that is kept or not
_AT_ONCE = 4  # requests for a copy
_WAITS = (0.5, 1.0, 2.0)  # seconds before each repetition of a request that may yet succeed
_turn = threading.Lock()  # of those that look for room, which small copies hardly take
_FOLDER = "sftdata-inputs-"
_THERE = ".there"
_ST_BLOCK = 512  # the unit of `st_blocks`
_TAGS = ("ETag", "etag", "generation", "blob_id", "Last-Modified", "LastModified", "last_modified", "created")
EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    **dict.fromkeys(("http", "https"), "http"),
    "hf": "hub",
}
_IDENTITY = {"headers": {"Accept-Encoding": "identity"}}  # the bytes that were stored, whose size is known
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (public: FSSPEC_S3_ANON=true)",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hub": "HF_TOKEN",
}
_PATIENT = ("gcs", "azure")  # their clients repeat requests by themselves, for half a minute or more
for _client in ("gcsfs", "google", "adlfs", "azure"):  # they raise what they log, where nobody listens
    logging.getLogger(_client).addHandler(logging.NullHandler())


class State(NamedTuple):
    """What tells one version of an object from another.

    Attributes:
        size: in bytes; None where the server does not say.
        tag: what the store says of its content; empty where it says nothing.
    """

    size: int | None
    tag: str


def is_url(path: str) -> bool:
    """Return True for `scheme://...`."""
    return "://" in path


def state_of(url: str) -> State:
    """Ask for the present state of an object.

    Raises:
        SftError: it cannot be reached, or is not there.
    """

    def ask(store: AbstractFileSystem, path: str) -> State:
        store.invalidate_cache()  # listings are remembered
        info = store.info(path)
        return State(info["size"], next((str(info[key]) for key in _TAGS if info.get(key)), ""))

    return _ask(url, ask)


def objects_below(url: str) -> list[str] | None:
    """Return the names of all objects below a URL, relative to it, in order; None where it is an object.

    Raises:
        SftError: the store cannot be listed.
    """

    def ask(store: AbstractFileSystem, path: str) -> list[str] | None:
        if not url.endswith("/") and not store.isdir(path):
            return None
        return [name[len(path) :].removeprefix("/") for name in store.find(path)]

    return _ask(url, ask)


def read_object(url: str) -> bytes | None:
    """Return an object; None where there is none.

    Raises:
        SftError: it cannot be read.
    """
    return _ask_of(url, lambda store, path: bytes(store.cat_file(path)))


def size_of(url: str) -> int | None:
    """Return the size of an object; None where there is none, or the server says none.

    Raises:
        SftError: it cannot be asked for.
    """
    return _ask_of(url, lambda store, path: store.info(path)["size"])


def sizes_below(url: str) -> dict[str, int]:
    """Return the objects below a URL, relative to it, with their sizes; none where the server lists none.

    Raises:
        SftError: the store cannot be listed.
    """
    return {name: info["size"] for name, info in _found_below(url).items()}


def hashes_below(url: str) -> dict[str, str]:
    """Return the sha256 of objects below a URL, by their name from there; the Hub tells it of large ones.

    Raises:
        SftError: the store cannot be listed.
    """
    return {name: info["lfs"]["sha256"] for name, info in _found_below(url).items() if info.get("lfs")}


def _found_below(url: str) -> dict[str, Any]:
    if url.startswith(("http://", "https://")):
        return {}

    def ask(store: AbstractFileSystem, path: str) -> dict[str, Any]:
        return {name[len(path) :].lstrip("/"): info for name, info in store.find(path, detail=True).items()}

    return _ask(url, ask)


def objects_like(pattern: str) -> dict[str, bool]:
    """Return the URLs of the objects that a pattern matches, in order, or that lie in folders it matches.

    Each with whether the pattern matches it itself.

    Raises:
        SftError: the store cannot be listed.
    """
    before = pattern.partition("*")[0].rpartition("/")[0]

    def ask(store: AbstractFileSystem, path: str) -> dict[str, bool]:
        known, found, inside = len(store._strip_protocol(before)), dict[str, bool](), "\0"
        for match, info in sorted(store.glob(path, detail=True).items()):
            if info["type"] != "directory":
                found[match] = True
            elif not match.startswith(inside):
                inside = f"{match}/"
                found = dict.fromkeys(store.find(match), False) | found
        return {before + match[known:]: found[match] for match in sorted(found)}

    return _ask(pattern, ask)


# ---------------------------------------------------------------------------------------------- local copies


class LocalCopy(str):
    """The path of a copy, which is removed with the last plan that names it; elsewhere a plain path.

    Attributes:
        state: of the object that it is a copy of.
    """

    state: State

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


def fetch(url: str) -> LocalCopy | None:
    """Copy an object to this machine, each byte once; return None where it would take half of the room.

    Raises:
        SftError: it cannot be read, or changed meanwhile.
    """
    before = state_of(url)
    with _turn:
        folder = _folder()
        if before.size is None or before.size > RANGE_BYTES:
            return _copied(url, before, folder)
    return _copied(url, before, folder)


def _copied(url: str, before: State, folder: str) -> LocalCopy | None:
    if (before.size or 0) > _room(folder):
        return None
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        with open(descriptor, "wb") as file:
            if before.size is None or url.startswith(("http://", "https://")):
                _download(url, file)
            else:
                _copy_ranges(url, before.size, file)
            size = file.tell()
        if state_of(url) != before or before.size not in (None, size):
            raise changed(url)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    copy = LocalCopy(name)
    copy.state = before
    weakref.finalize(copy, Path(name).unlink, missing_ok=True)
    return copy


def hold(url: str) -> LocalCopy | None:
    """Return where ranges that are read of an object are kept; None where its size is not known.

    That is a file of its size with holes, and beside it a byte for each `HELD_BYTES` that are there.
    """
    state = state_of(url)
    if state.size is None:
        return None
    with _turn:
        descriptor, name = tempfile.mkstemp(dir=_folder())
    os.truncate(descriptor, state.size)
    os.close(descriptor)
    Path(name + _THERE).touch()
    held = LocalCopy(name)
    held.state = state
    for path in (name, name + _THERE):
        weakref.finalize(held, Path(path).unlink, missing_ok=True)
    return held


def _room(folder: str) -> int:
    """Return how many bytes a copy may take."""
    return shutil.disk_usage(folder).free // 2


def _download(url: str, file: io.BufferedWriter) -> None:
    """Copy an object in one request: a server of the web may serve no ranges, or not say how long it is."""

    def ask(store: AbstractFileSystem, path: str) -> None:
        file.seek(0)
        file.truncate()
        store.get_file(path, file)

    _ask(url, ask)


def _copy_ranges(url: str, size: int, file: io.BufferedWriter) -> None:
    starts = range(0, size, RANGE_BYTES)
    for first in range(0, len(starts), _AT_ONCE):
        spans = [(start, min(start + RANGE_BYTES, size)) for start in starts[first : first + _AT_ONCE]]
        for span, part in zip(spans, _read_ranges(url, spans), strict=True):
            file.write(part if isinstance(part, bytes) else read_range_of(url, *span))


def _read_ranges(url: str, spans: list[tuple[int, int]]) -> list[bytes | Exception]:
    """Read several ranges at a time; of one that failed, return why."""

    def ask(store: AbstractFileSystem, path: str) -> list[bytes | Exception]:
        begins, ends = zip(*spans, strict=True)
        found = store.cat_ranges([path] * len(spans), list(begins), list(ends), on_error="return")
        return list(found)

    return _ask(url, ask)


def read_range_of(url: str, start: int, stop: int, held: str = "") -> bytes:
    """Read bytes `start:stop` of an object, and no more; those that are held are not fetched.

    Raises:
        SftError: they cannot be read, or the object has become shorter.
    """
    if held and os.path.exists(held):  # on the machine that planned
        return _read_held(url, start, stop, held)
    data = _ask(url, lambda store, path: bytes(store.cat_file(path, start=start, end=stop)))
    if len(data) > stop - start:
        what = f"{url}: the server sends the whole file for a range of it."
        raise UsageError(what, "set TMPDIR to a folder with room for twice its size.")
    if len(data) < stop - start:
        raise changed(url)
    return data


def _read_held(url: str, start: int, stop: int, held: str) -> bytes:
    """Read bytes of a file with holes, which are filled before; those who fill the same write the same."""
    first, last = start // HELD_BYTES, -(-stop // HELD_BYTES)
    with open(held, "r+b") as opened, open(held + _THERE, "r+b") as marks:
        file, there = opened.fileno(), marks.fileno()
        known = os.pread(there, last - first, first).ljust(last - first, b"\0")
        if (hole := known.find(b"\0")) < 0:
            return os.pread(file, stop - start, start)
        first, last = first + hole, first + known.rfind(b"\0") + 1
        begin, found = first * HELD_BYTES, os.fstat(file)
        data = read_range_of(url, begin, min(last * HELD_BYTES, found.st_size))
        room = found.st_blocks * _ST_BLOCK + len(data) <= shutil.disk_usage(os.path.dirname(held)).free
        with suppress(OSError):  # the disk is full
            if room and os.pwrite(file, data, begin) == len(data):
                os.pwrite(there, b"\1" * (last - first), first)
        before, after = max(begin - start, 0), max(stop - begin - len(data), 0)
        inside = data[max(start - begin, 0) : len(data) - max(begin + len(data) - stop, 0)]
        return os.pread(file, before, start) + inside + os.pread(file, after, stop - after)


@lru_cache(maxsize=1)
def _folder() -> str:
    """Return the folder of this process for copies, and remove those of processes that were killed."""
    folder = str(claim_folder(Path(tempfile.gettempdir()), _FOLDER)[0])  # until the process ends
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class RemoteFile(io.RawIOBase):
    """An object as a file: what is read from it is fetched, and no more."""

    def __init__(self, url: str, held: str = "") -> None:
        self.name, self._held = url, held
        size = state_of(url).size
        if size is None:
            raise UsageError(
                f"{url}: the server does not say its size.", "set TMPDIR to a folder with room for it."
            )
        self._size, self._at = size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position and return it."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill a buffer, as far as the object reaches; return how many bytes that took."""
        view = memoryview(buffer).cast("B")
        stop = min(self._at + min(len(view), RANGE_BYTES), self._size)
        if stop <= self._at:
            return 0
        data = read_range_of(self.name, self._at, stop, self._held)
        view[: len(data)] = data
        self._at = stop
        return len(data)


# ------------------------------------------------------------------------------------------------ requests


def _ask(url: str, request: Callable[[AbstractFileSystem, str], Result]) -> Result:
    """Make a request of the store behind a URL, again where it may yet succeed.

    Raises:
        UsageError: as asked for, it cannot succeed.
        SftError: it failed several times.
    """
    with _explained(url):
        from fsspec.core import url_to_fs

        web = url.startswith(("http://", "https://"))
        store, path = url_to_fs(url, **({"client_kwargs": _IDENTITY} if web else {}))
        try:
            return _insist(partial(request, store, path), _waits(url))
        except Exception:
            # The fix may be another setting of the environment, which a client reads once.
            store.clear_instance_cache()
            raise


def _waits(url: str) -> tuple[float, ...]:
    return () if EXTRAS.get(url.partition("://")[0]) in _PATIENT else _WAITS


def _insist(request: Callable[[], Result], waits: tuple[float, ...]) -> Result:
    """Make a request, again after some seconds each, where it may yet succeed."""
    for wait in waits:
        try:
            return request()
        except Exception as error:
            if _is_final(error):
                raise
            time.sleep(wait)
    return request()


def _ask_of(url: str, request: Callable[[AbstractFileSystem, str], Result]) -> Result | None:
    """Make a request about one object; return None where there is none."""

    def ask(store: AbstractFileSystem, path: str) -> Result | None:
        try:
            return request(store, path)
        except FileNotFoundError as error:
            if _is_final(error) and _status(error) in (None, 404):
                return None
            raise

    return _ask(url, ask)


def _status(error: BaseException | None) -> int | None:
    """Return the status of HTTP that an error, or one behind it, came with."""
    while error is not None:
        for said in (error, getattr(error, "response", None)):
            for name in ("status", "code", "status_code"):
                if isinstance(status := getattr(said, name, None), int):
                    return status
        if str(error).startswith("Forbidden: "):  # gcsfs
            return 403
        error = error.__cause__
    return None


def _is_final(error: BaseException) -> bool:
    """Whether the same request cannot succeed."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, OSError):
        return _is_final(error.__cause__)  # whatever went wrong is told so
    refused = FileNotFoundError, NotADirectoryError, PermissionError
    final = (*refused, ImportError, NotImplementedError, ValueError)
    return isinstance(error, final) or "Credential" in type(error).__name__


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a store raises into one line; each has its own exceptions."""
    scheme = url.partition("://")[0]
    extra = EXTRAS.get(scheme, "")
    keys = KEYS.get(extra, "the credentials of the store")
    try:
        yield
    except SftError:
        raise
    except ImportError as error:
        fix = f"pip install 'sftdata[{extra}]'" if extra else f"install the package that serves {scheme}://."
        raise UsageError(f"{url}: {error}.", fix) from None
    except Exception as error:
        status = _status(error)
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
        if not _is_final(error):
            attempts = "several" if extra in _PATIENT else len(_WAITS) + 1
            what = f"{url}: cannot be read; {attempts} attempts failed ({said})."
            fix = "check region, endpoint and credentials, or run the same command again later."
            raise SftError(what, fix) from None
        if "Credential" in type(error).__name__:
            raise UsageError(f"{url}: no credentials ({said}).", f"set {keys}.") from None
        if isinstance(error, PermissionError) or status in (401, 403):
            what = f"{url}: access is denied ({said})."
            raise UsageError(what, f"check the rights of {keys}.") from None
        if isinstance(error, FileNotFoundError) or status == 404:
            what = f"{url}: not there ({said})."
            raise UsageError(what, "check the URL: the bucket or server, and the object.") from None
        raise UsageError(f"{url}: cannot be read ({said}).", "check the URL.") from None
