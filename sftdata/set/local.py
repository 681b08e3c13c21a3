"""The files of a set as this machine has them: its own, or copies of those that lie behind a URL.

A set behind a URL is read through its mirror, a folder like that of any set. Its manifest and its tokenizer
are copied when it is opened, every other file when it is first needed; all are held against their hashes.

    SFTDATA_CACHE/sets/<xxh3 of the manifest>/s3/bucket/chats/manifest.json

So the path of a mirror says where the set lies and which one it is; another set at the same URL has another
mirror. All processes of a machine share them: whoever needs a file first fetches it, the others wait. What
was used longest ago makes room, within a bound; who still has it mapped goes on reading.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import BinaryIO, cast

import msgspec
import xxhash

from sftdata.errors import RESTORE, IntegrityError, SftError, UsageError
from sftdata.output import StoreUrl
from sftdata.set.cache import cache_root, explained_cache, held_file, make_room
from sftdata.set.shards import ShardInfo
from sftdata.set.store import SetFile, digest_file, write_atomic
from sftdata.set.stores import MANIFEST_NAME, Found, Objects, standing
from sftdata.set.web import Web
from sftdata.sources.remote import EXTRAS

_AT_ONCE = 8
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # Path makes one slash of two
_INSIDE, _BEGUN = re.compile(rf"[^/]+/{MANIFEST_NAME}"), re.compile(r"builds/|push\.json|shard-")
_AS_NEEDED = (".arrow", ".jsonl")
_REMOVE_FIRST = "remove the object and push the set again, or restore it."  # a push goes by sizes
_stores: dict[Path, Objects | Web] = {}  # where the files of each mirror come from
_forked: list[bool] = []  # from a process that reads objects: not empty
_sound: dict[Path, int] = {}  # files that this process has held against their hashes, and their inodes


class _Listed(msgspec.Struct):
    """What a manifest says of files."""

    shards: tuple[ShardInfo, ...] = ()
    files: tuple[SetFile, ...] = ()


# ------------------------------------------------------------------------------------------------- folders


def path_of(place: object) -> str:
    """Return the path or URL of a set; an opened set has one.

    Raises:
        UsageError: it is neither.
    """
    try:
        return os.fspath(cast("str", place))
    except TypeError:
        what = f"found {type(place).__name__}; expected the folder of a finished set, or an opened one."
        raise UsageError(what, "name the folder that `sftdata prepare -o` wrote.") from None


def url_of(place: str | PathLike[str]) -> str | None:
    """Return the URL that names a set; None for a folder of this machine.

    Raises:
        UsageError: the scheme is unknown, the URL holds a login, or what is given names no set.

    >>> url_of(Path("s3://bucket/chats/")), url_of("chats")
    ('s3://bucket/chats', None)
    """
    if (found := _URL.fullmatch(path_of(place))) is None or found[1] == "file":
        return None
    scheme, rest = found[1].lower(), found[2].rstrip("/")
    if scheme not in EXTRAS:
        raise UsageError(
            f"{scheme}://{rest}: sets are not read from there.", f"use one of {', '.join(EXTRAS)}."
        )
    parts = rest.split("/")
    if "?" in rest or ("@" in parts[0] and not scheme.startswith("abfs")):
        raise UsageError(
            f"{scheme}://{rest}: a login or a query; a set is many files.",
            "give the login by the environment.",
        )
    if {"", ".", ".."}.intersection(parts):
        raise UsageError(f"{scheme}://{rest}: names no folder.", "leave out what is empty, `.` and `..`.")
    return f"{scheme}://{rest}"


def local_folder(place: str | PathLike[str]) -> Path:
    """Return the folder through which a set is read: its own, or the mirror of what lies behind a URL.

    Raises:
        SftError: there is no set behind the URL, or it cannot be reached.
    """
    if (url := url_of(place)) is None:
        found = _URL.fullmatch(os.fspath(place))
        return Path(place) if found is None else Path(f"/{found[2]}")
    return _mirrored(url, None)


def origin(folder: Path) -> str | None:
    """Return the URL of the set behind a mirror; None for any other folder."""
    if "/sets/" not in str(folder) or not folder.is_relative_to(cache_root()):
        return None
    _, scheme, *rest = folder.relative_to(cache_root()).parts
    return f"{scheme}://{'/'.join(rest)}"


def named(folder: Path) -> str:
    """Return how a set is called in messages: by its URL, or by its folder."""
    return origin(folder) or str(folder)


def beside(folder: Path, path: str) -> str:
    """Return where a set lies that another names: by its URL, or by the path from its own folder."""
    if url_of(path) is not None:
        return path
    if (url := origin(folder)) is None:
        return str((folder / path).resolve())
    scheme, rest = url.split("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, path))}"


def path_from(start: Path | StoreUrl, folder: Path) -> str:
    """Return how a set in `start` names another; one in a store has none of this machine but by name."""
    return origin(folder) or (os.path.relpath(folder, start) if isinstance(start, Path) else folder.name)


@contextmanager
def read_anew(place: str | PathLike[str]) -> Iterator[Path]:
    """Give the folder of a set; of one behind a URL, through a mirror of its own that holds nothing yet."""
    if (url := url_of(place)) is None:
        yield local_folder(place)
        return
    key = f"anew-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        yield _mirrored(url, key)
    finally:
        shutil.rmtree(cache_root() / key, ignore_errors=True)


def _mirrored(url: str, key: str | None) -> Path:
    """Return the mirror of the set behind a URL as it is now, with its small files in it."""
    found = standing(url, _look)
    if found is None:
        raise _not_a_set(url)
    folder = cache_root() / (key or xxhash.xxh3_128_hexdigest(found[0])) / url.replace("://", "/", 1)
    if not _is_filled(folder):
        try:
            _fill(folder, url, *found)
        except IntegrityError:
            now = standing(url, _look)
            if now is None or now == found:
                raise
            return _mirrored(url, key)  # replaced meanwhile
    return folder


def _is_filled(folder: Path) -> bool:
    """Say whether a mirror has its small files; of these, what is damaged is fetched again."""
    path = folder / MANIFEST_NAME
    try:
        fetch(folder, _small(_listed(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (msgspec.MsgspecError, UnicodeDecodeError):
        _say(f"{path}: damaged in the cache; fetched again.")
        return False
    return True


def _small(listed: Mapping[str, SetFile]) -> list[SetFile]:
    return [file for file in listed.values() if not file.name.endswith(_AS_NEEDED)]


def refilled(folder: Path) -> Path | None:
    """Return the mirror again, its manifest fetched anew; None of what is no mirror."""
    if (url := origin(folder)) is None:
        return None
    path = folder / MANIFEST_NAME
    _say(f"{path}: damaged in the cache; fetched again.")
    path.unlink(missing_ok=True)
    _listed.cache_clear()
    return local_folder(url)


def _fill(folder: Path, url: str, found: bytes, place: str) -> None:
    """Copy the small files of a set to its mirror, the manifest last."""
    _stores[folder], manifest = _followed(url, found, place)
    try:
        small = _small(listed_files(manifest))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{url}/{MANIFEST_NAME}: not a manifest: {error}.", RESTORE) from None
    with explained_cache():
        folder.mkdir(parents=True, exist_ok=True)
    fetch(folder, small)
    write_atomic(folder / MANIFEST_NAME, lambda sink: sink.write(manifest))


def _store_at(url: str) -> Objects | Web:
    return (Web if url.startswith(("http", "hf:")) or _forked else Objects)(url)


def _look(url: str) -> Found | None:
    return _store_at(url).find(MANIFEST_NAME)


def _after_fork() -> None:
    """Read through fsspec in a child: the client that its parent may have connected hangs there."""
    _forked.extend([True] * ("obstore" in sys.modules))
    _stores.clear()


os.register_at_fork(after_in_child=_after_fork)


def _followed(url: str, found: bytes, place: str) -> tuple[Objects | Web, bytes]:
    """Return where the files of a set are, and its manifest, by what `standing` found."""
    built = _store_at(place)
    if place == url:
        return built, found
    if (manifest := built.find(MANIFEST_NAME)) is None:
        raise IntegrityError(f"{built}/{MANIFEST_NAME}: missing.", "open the set again, or prepare it again.")
    return built, manifest.data


def _store_of(folder: Path) -> Objects | Web:
    """Return where the files of a mirror come from.

    Raises:
        IntegrityError: another set is there by now.
    """
    if folder not in _stores:
        _stores[folder] = _refuse_replaced(folder)
    return _stores[folder]


def _not_a_set(url: str) -> UsageError:
    store = _store_at(url)
    names = store.sizes()
    if inside := sorted(name.partition("/")[0] for name in names if _INSIDE.fullmatch(name)):
        listed = ", ".join(inside[:4]) + ", ..." * (len(inside) > 4)
        return UsageError(
            f"{store}: holds sets and is none itself: {listed}.", f"name one, as {store}/{inside[-1]}."
        )
    if any(map(_BEGUN.match, names)):
        found = f"not a finished set, as it has no {MANIFEST_NAME}: still being built, or stopped"
        return UsageError(f"{store}: {found}.", "wait, or run the command again that makes it.")
    found = f"no such set: there is no {MANIFEST_NAME}"
    return UsageError(f"{store}: {found}.", "name the URL of a finished set.")


# --------------------------------------------------------------------------------------------------- files


def plain_file(folder: Path, info: SetFile) -> Path:
    """Return the path of a file of the set after a look at what can be seen without reading it.

    Raises:
        IntegrityError: the file is missing, is reached through a link, or has another size; or it is not what
            the manifest says behind the URL that it is fetched from.
    """
    path = folder / info.name
    if origin(folder) is not None:
        _fetch(folder, info)
    if not path.is_file():
        raise IntegrityError(f"{path}: missing.", RESTORE)
    if any(part.is_symlink() for part in (path, *path.parents[: info.name.count("/")])):
        raise IntegrityError(
            f"{path}: reached through a link; a set holds its own files.", "copy the file in its place."
        )
    if path.stat().st_size != info.bytes:
        found = f"{path.stat().st_size} bytes; the manifest says {info.bytes}"
        raise IntegrityError(f"{path}: {found}.", RESTORE)
    return path


def seen_file(folder: Path, info: SetFile) -> bool:
    """Look at the size of a file, where it lies, and at the hash that the store keeps: nothing is fetched.

    Returns:
        Whether that tells as much of this file as of the others; False where it alone has no hash.

    Raises:
        IntegrityError: it is missing, or has another size or hash.
    """
    if (url := origin(folder)) is None:
        plain_file(folder, info)
        return True
    found, hashes = stored_sizes(folder).get(info.name), stored_hashes(folder)
    if found is None:
        raise IntegrityError(f"{url}/{info.name}: missing.", "push the set again, or restore the object.")
    if found != info.bytes:
        raise IntegrityError(
            f"{url}/{info.name}: {found} bytes; the manifest says {info.bytes}.",
            "push the set again, or restore the object.",
        )
    kept = hashes.get(info.name)
    if kept not in (None, info.xxh3, info.sha256):
        raise IntegrityError(
            f"{url}/{info.name}: other bytes, whose hash is {kept}; the manifest says {info.xxh3}.",
            _REMOVE_FIRST,
        )
    return kept is not None or not hashes


@lru_cache(maxsize=4)
def stored_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes that a store keeps of the files with tokens behind a mirror."""
    names = [] if origin(folder) is None else [name for name in _listed(folder) if name.endswith(".arrow")]
    return _store_of(folder).hashes(names) if names else {}


@lru_cache(maxsize=4)
def stored_sizes(folder: Path) -> dict[str, int]:
    """Return the objects behind a mirror, with their sizes."""
    store = _store_of(folder)
    sizes = store.sizes()
    return store.sizes_of(_listed(folder)) if isinstance(store, Web) and not sizes else sizes


def check_file(folder: Path, file: SetFile) -> Path:
    """Return the path of a file of a set that holds the bytes its manifest names.

    Raises:
        IntegrityError: it is missing or holds others.
    """
    path = plain_file(folder, file)
    found = digest_file(path, sha256=False).xxh3
    if found != file.xxh3:
        raise IntegrityError(f"{path}: xxh3-128 is {found}; the manifest says {file.xxh3}.", RESTORE)
    return path


def file_of(folder: Path, name: str) -> Path:
    """Return the path of a file that a set may have, by its name."""
    if origin(folder) is not None and (info := _listed(folder).get(name)) is not None:
        _fetch(folder, info)
    return folder / name


@lru_cache(maxsize=4)
def _listed(folder: Path) -> dict[str, SetFile]:
    """Return the files that the manifest of a mirror lists, by name."""
    return listed_files((folder / MANIFEST_NAME).read_bytes())


def listed_files(manifest: bytes) -> dict[str, SetFile]:
    """Return the files that a manifest lists, by name; none of a pointer.

    Raises:
        MsgspecError, UnicodeDecodeError: it is neither.
    """
    listed = msgspec.json.decode(manifest, type=_Listed)
    return {file.name: file for file in (*listed.shards, *listed.files)}


def fetch(folder: Path, files: Iterable[SetFile]) -> None:
    """Have files of a set on this machine, several at a time; does nothing for a set that lies here.

    Raises:
        SftError: one cannot be had.
    """
    if origin(folder) is None:
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(partial(_fetch, folder), files))


def fetch_beside(folder: Path, files: Sequence[SetFile]) -> None:
    """Begin to fetch files of a mirror, in the background; what fails here fails again where it is needed."""

    def work() -> None:
        with suppress(SftError):
            for file in files:
                _fetch(folder, file)

    if files:
        threading.Thread(target=work, daemon=True).start()


def still_there(path: Path) -> bool:
    """Mark a file of a mirror as used; False where it has made room for others."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # of another user, or on a disk that is only read
        return path.exists()
    return True


def _fetch(folder: Path, info: SetFile) -> None:
    """Have a file of a mirror on this machine, whole.

    Raises:
        IntegrityError: the object is missing, or twice not what the manifest says.
        SftError: the store cannot be reached, or there is no room.
    """
    path = folder / info.name
    if _is_sound(path, info):
        return
    with explained_cache(), held_file(path) as part:
        if _is_sound(path, info):  # by another process
            Path(part.name).unlink()
            return
        try:
            _download(folder, info, part)
            os.replace(part.name, path)
        except BaseException as error:
            Path(part.name).unlink()
            if isinstance(error, IntegrityError) and (folder / MANIFEST_NAME).is_file():
                _refuse_replaced(folder)
            raise
        _sound[path] = os.fstat(part.fileno()).st_ino


def _download(folder: Path, info: SetFile, part: BinaryIO) -> None:
    """Copy an object, and once more if its bytes are others."""
    store = _store_of(folder)
    for last in (False, True):
        make_room(info, part, _AS_NEEDED)
        store.copy(info.name, part)
        part.flush()
        found = digest_file(Path(part.name), sha256=False)
        if (found.bytes, found.xxh3) == (info.bytes, info.xxh3):
            return
        said = f"{store}/{info.name}: xxh3-128 is {found.xxh3}; the manifest says {info.xxh3}"
        if last:
            raise IntegrityError(f"{said}, twice.", _REMOVE_FIRST)
        _say(f"{said}; fetched again.")


def _refuse_replaced(folder: Path) -> Objects | Web:
    """Refuse to go on where another set is by now; return where the files are.

    Raises:
        IntegrityError: naming the URL.
    """
    url = str(origin(folder))
    found = standing(url, _look)
    store, manifest = (None, b"") if found is None else _followed(url, *found)
    if store is None or manifest != (folder / MANIFEST_NAME).read_bytes():
        what = f"{url}: replaced while it was in use."
        raise IntegrityError(what, "open the set again, and write new sets beside those in use.")
    return store


def _is_sound(path: Path, info: SetFile) -> bool:
    """Say whether a file is here, and mark it as used; the first time it is read, to be sure of its bytes."""
    still_there(path)
    try:
        found = path.stat()
        if found.st_ino == _sound.get(path):
            return True
        sound = found.st_size == info.bytes and digest_file(path, sha256=False).xxh3 == info.xxh3
    except FileNotFoundError:
        return False
    if sound:
        _sound[path] = found.st_ino
    else:
        _say(f"{path}: damaged in the cache; fetched again.")
    return sound


def _say(line: str) -> None:
    logging.getLogger("sftdata").warning(line)
