"""Where the files of a set are put: a folder, or a place in an object store. Each is whole or not there.

A folder writes under a name of its own, syncs and renames. An object store has no rename and needs none: a
put is one request, which names the sha256 of its bytes, so that the store refuses any others. What only one
of several writers may do is create-only, or compare-and-swap; there is no lock, lease or clock.
"""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from queue import Full, Queue
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple, Protocol

import msgspec

from sftdata.choosing import SIDES
from sftdata.errors import IntegrityError, SftError, UsageError, without_secrets
from sftdata.output import StoreUrl
from sftdata.set.clients import connect, explained_store, library
from sftdata.set.store import (
    FileDigest,
    HashingSink,
    PlainPath,
    Sha256,
    Sink,
    explained,
    sync_folder,
    write_atomic,
)

MANIFEST_NAME = "manifest.json"
_AT_ONCE = 16  # requests for small objects
_HASH = "xxh3"  # of an object, among what the store keeps beside it
_ONE_PUT = 256 << 20  # bytes; what is larger, as pictures are, is not held in memory but goes in parts
_PARTS = {"chunk_size": 16 << 20, "max_concurrency": 4}
_LOOK_SECONDS = 1.0  # between two looks at whether an upload goes on, while it takes no part


class Target(Protocol):
    """A file that is not written yet."""

    @property
    def name(self) -> str:
        """The last part of its name."""

    def put(self, writer: Callable[[Sink], object]) -> FileDigest:
        """Write it."""


class Store(Protocol):
    """Files by names with slashes, below one place."""

    def __truediv__(self, name: str, /) -> Path | Target:
        """Return where a file goes."""

    def put(self, name: str, writer: Callable[[Sink], object]) -> FileDigest:
        """Write a file, whole or not at all, in place of any that is there; return size and digests."""

    def get(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the content of files, in order; one that is missing is an IntegrityError."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of each file below a folder, by its name from the store on."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no error."""

    def here(self, name: str, /) -> AbstractContextManager[Path]:
        """Give a file of this machine with the content of one; that is missing is an IntegrityError."""


def store_at(place: Path | StoreUrl) -> Folder | Objects:
    """Return the files of a place."""
    return Objects(place) if isinstance(place, StoreUrl) else Folder(place)


def put_bytes(store: Store, name: str, data: bytes) -> FileDigest:
    """Write bytes as a file."""
    return store.put(name, lambda sink: sink.write(data))


def _missing(where: object) -> IntegrityError:
    return IntegrityError(f"{where}: missing.", "run the same command again.")


# --------------------------------------------------------------------------------------------- a folder


class Folder(NamedTuple):
    """Files in a folder of a file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def put(self, name: str, writer: Callable[[Sink], object]) -> FileDigest:
        """Write a file; folders below the path are made, never the path: one that was removed stays so."""
        path = self.path / name
        with explained(path):
            for folder in reversed(path.relative_to(self.path).parents[:-1]):
                if not (self.path / folder).is_dir():
                    (self.path / folder).mkdir(exist_ok=True)
                    sync_folder((self.path / folder).parent)
        return write_atomic(path, writer)

    def get(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the content of files."""
        for name in names:
            try:
                yield (self.path / name).read_bytes()
            except FileNotFoundError:
                raise _missing(self.path / name) from None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of each file."""
        sizes = {}
        for path in (self.path / folder).rglob("[!.]*"):  # what is being written is hidden
            with suppress(FileNotFoundError):
                if stat.S_ISREG((found := path.stat()).st_mode):
                    sizes[path.relative_to(self.path).as_posix()] = found.st_size
        return sizes

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def here(self, name: str) -> AbstractContextManager[Path]:
        """Give a file."""
        if not (self.path / name).is_file():
            raise _missing(self.path / name)
        return nullcontext(self.path / name)


# --------------------------------------------------------------------------------------- an object store


class Found(NamedTuple):
    """An object, and what tells this version of it from others.

    Attributes:
        version: as `swap` takes it.
    """

    data: bytes
    version: dict[str, str]


class _Object(NamedTuple):
    """An object that is not there yet."""

    store: Objects
    name: str

    def put(self, writer: Callable[[Sink], object]) -> FileDigest:
        return self.store.put(self.name, writer)


class Objects:
    """Objects below a URL; one may be sent to other processes, each of which connects by itself.

    Args:
        url: as `s3://bucket/set`.

    Raises:
        SftError: by each method: the store cannot be reached, or refuses; several attempts were made where
            that may pass.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __truediv__(self, name: str) -> _Object:
        return _Object(self, name)

    def put(self, name: str, writer: Callable[[Sink], object]) -> FileDigest:
        """Write an object, in one request; a huge one in parts, which are the object once all are there."""
        data, parts, client = bytearray(), list[Callable[[bytes], object]](), library(self.url)

        def send(given: Iterator[bytes]) -> None:
            with explained_store(f"{self}/{name}"):
                client.put(self._connected, name, given, use_multipart=True, **_PARTS)

        def take(more: memoryview) -> None:
            data.extend(more)
            if len(data) > (_PARTS["chunk_size"] if parts else _ONE_PUT):
                if not parts:
                    parts.append(stack.enter_context(_in_parts(send)))
                parts[0](bytes(data))
                data.clear()

        sink = HashingSink(take)
        with ExitStack() as stack:
            writer(sink)
            if parts and data:
                parts[0](bytes(data))
        if not parts:
            with explained_store(f"{self}/{name}"):
                hashed = {_HASH: sink.digest().xxh3}
                client.put(self._connected, name, data, use_multipart=False, attributes=hashed)
        return sink.digest()

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one; say whether it was written."""
        return self._put_if(name, data, "create")

    def swap(self, name: str, data: bytes, version: dict[str, str]) -> bool:
        """Replace an object unless it has changed since; say whether it was replaced."""
        return self._put_if(name, data, version)

    def _put_if(self, name: str, data: bytes, mode: object) -> bool:
        client = library(self.url)
        passed = (client.exceptions.AlreadyExistsError, client.exceptions.PreconditionError)
        with explained_store(f"{self}/{name}"):
            try:
                client.put(self._connected, name, data, mode=mode, use_multipart=False)
            except (*passed, FileNotFoundError) as error:
                if isinstance(error, FileNotFoundError) and mode == "create":
                    raise  # no bucket
                return False
        return True

    def find(self, name: str) -> Found | None:
        """Return an object; None where there is none."""
        with explained_store(f"{self}/{name}"):
            if (found := self._got(name)) is None:
                return None
            data = bytes(found.bytes())
        version = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
        return Found(data, {key: value for key, value in version.items() if value is not None})

    def get(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the content of objects, of which several are asked for at a time."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, found in zip(names, pool.map(self.find, names), strict=True):
                if found is None:
                    raise _missing(f"{self}/{name}")
                yield found.data

    def copy(self, name: str, sink: Sink) -> None:
        """Write an object's content to a sink, piece by piece; one that is missing is an IntegrityError."""
        with explained_store(f"{self}/{name}"):
            if (found := self._got(name)) is None:
                raise IntegrityError(f"{self}/{name}: missing.", "push the set again, or restore the object.")
            for piece in found:
                sink.write(memoryview(piece))

    @contextmanager
    def here(self, name: str) -> Iterator[Path]:
        """Give a copy of an object, which is removed afterwards; what maps it keeps it."""
        with NamedTemporaryFile() as file:
            self.copy(name, file)
            file.flush()
            yield Path(file.name)

    def _got(self, name: str, **options: bool) -> Any:
        try:
            return library(self.url).get(self._connected, name, options=options)
        except FileNotFoundError as error:
            if re.search("NoSuchBucket|ContainerNotFound", str(error)):
                raise
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of each object."""
        with explained_store(f"{self}/{folder}"):
            pages = library(self.url).list(self._connected, folder or None)
            return {entry["path"]: entry["size"] for page in pages for entry in page}

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Return the xxh3-128 that objects were put with; what has replaced one has none, or its own."""

        def ask(name: str) -> str:
            with explained_store(f"{self}/{name}"):
                found = self._got(name, head=True)
            return "" if found is None else found.attributes.get(_HASH, "")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            asked = {name: pool.submit(ask, name) for name in names}
            return {name: found for name, one in asked.items() if (found := one.result())}

    def entries(self) -> set[str]:
        """Return the first part of the names of all objects."""
        with explained_store(str(self)):
            found = library(self.url).list_with_delimiter(self._connected)
        names = (*found["common_prefixes"], *(entry["path"] for entry in found["objects"]))
        return {name.rstrip("/").rpartition("/")[2] for name in names}

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; some stores do not take it well that one is gone already."""
        delete = partial(library(self.url).delete, self._connected)
        with explained_store(str(self)):
            if names := [*names]:
                try:
                    delete(names)
                except FileNotFoundError:
                    for name in names:
                        with suppress(FileNotFoundError):
                            delete([name])

    def tidy(self, names: Iterable[str]) -> None:
        """Remove objects that a finished set does not need; where that is refused they stay, aloud."""
        try:
            self.remove(names)
        except SftError as error:
            line = f"{self}: the set is whole; what it does not need stays: {error}"
            logging.getLogger("sftdata").warning(line)

    @property
    def _connected(self) -> object:
        return connect(self.url)


@contextmanager
def _in_parts(send: Callable[[Iterator[bytes]], object]) -> Iterator[Callable[[bytes], object]]:
    """Give what takes the parts of a huge object, for a thread that sends them.

    A client aborts the upload where it fails, or where taking the next part does: else all its parts would
    stay in the store, paid for, where nothing lists them.

    Raises:
        SftError: the store refuses, or cannot be reached.
    """
    parts: Queue[bytes | BaseException | None] = Queue(maxsize=1)

    def given() -> Iterator[bytes]:
        while (part := parts.get()) is not None:
            if isinstance(part, BaseException):
                raise part
            yield part

    def give(part: bytes | BaseException | None) -> None:
        while not sent.done():
            with suppress(Full):
                parts.put(part, timeout=_LOOK_SECONDS)
                return
        sent.result()

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, given())
        try:
            yield give
            give(None)
        except BaseException as error:
            give(error)
            raise
        sent.result()


class Pointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which build is the set, or holds both sides of a split, which so come and go as one.

    Attributes:
        digest: of the set, or of the first side.
        folder: where its files are, from the folder of the set; those of a side in a folder of its name.
        sides: of a split.
    """

    digest: Sha256
    folder: PlainPath
    sides: tuple[str, ...] = ()


def standing(url: str, look: Callable[[str], Found | None]) -> tuple[bytes, str] | None:
    """Return what says that there is a set, and where its files are; None where there is none.

    Args:
        url: of the set, which may be the side of a split.
        look: returns what is in the place of the manifest below a URL.

    Raises:
        UsageError: it is that of a split.
    """
    if (found := look(url)) is not None:
        if sides := sides_of(found.data):
            what = f"{url}: a split of {' and '.join(sides)}, and no set itself."
            raise UsageError(what, f"name one, as {url}/{sides[0]}.")
        return found.data, followed(url, found.data)
    split, _, side = url.rpartition("/")
    if side not in SIDES or split.count("/") < 3 or (found := look(split)) is None:
        return None
    return (found.data, f"{followed(split, found.data)}/{side}") if side in sides_of(found.data) else None


def set_at(root: Objects) -> Objects | None:
    """Return where the files of a finished set are; None where there is no set.

    Raises:
        UsageError: there is a split.
    """
    found = standing(root.url, lambda url: Objects(url).find(MANIFEST_NAME))
    return None if found is None else Objects(found[1])


def files_of(place: Path | StoreUrl) -> Store:
    """Return the files of a finished set.

    Raises:
        IntegrityError: it is gone.
    """
    if isinstance(place, Path):
        return Folder(place)
    if (found := set_at(Objects(place))) is None:
        raise _missing(f"{place}/{MANIFEST_NAME}")
    return found


def followed(url: str, manifest: bytes) -> str:
    """Return where the files of a set are, by what stands in the place of its manifest."""
    pointer = _pointer(manifest)
    return url if pointer is None else f"{url}/{pointer.folder}"


def sides_of(manifest: bytes) -> tuple[str, ...]:
    """Return the sides of the split that stands in the place of a manifest; none of a set."""
    pointer = _pointer(manifest)
    return () if pointer is None else pointer.sides


def _pointer(manifest: bytes) -> Pointer | None:
    try:
        return msgspec.json.decode(manifest, type=Pointer)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None  # a manifest, or what cannot be read as one
