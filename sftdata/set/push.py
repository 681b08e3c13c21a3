"""Copy a finished set to an object store, or to a dataset of the Hub: its shards first, the manifest last.

What is there already with the same bytes is not sent again, so a push that was broken off goes on. The Hub
tells the hash of each file. In an object store `push.json` names the set whose files lie there, and each of
them is whole, since its put names its hash; so sizes tell which of them are still to come.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sftdata.errors import IntegrityError, SftError, UsageError, need
from sftdata.set.images import IN_THE_SET
from sftdata.set.local import check_file, local_folder, plain_file, url_of
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.store import SetFile, Sink
from sftdata.set.stores import MANIFEST_NAME, Objects, set_at
from sftdata.set.verify import verify

MARK = "push.json"
_AT_ONCE = 4  # objects, each in memory while it is sent
_COMMIT_FILES = 50  # of one commit of the Hub
OnSent = Callable[[int, int], object]
"""Called with the number of files that are there, and of all."""


class Pushed(msgspec.Struct, frozen=True, kw_only=True):
    """What a push did.

    Attributes:
        url: where the set is.
        digest: of the set.
        files, bytes: of the set.
        sent: files that were not there before.
    """

    url: str
    digest: str
    files: int
    bytes: int
    sent: int


class _Load(NamedTuple):
    """What is sent: a set, and its files but for the manifest, those with tokens first."""

    folder: Path
    manifest: bytes
    files: Sequence[SetFile]
    on_sent: OnSent


def push(place: str | PathLike[str], to: str, on_sent: OnSent | None = None) -> Pushed:
    """Copy a finished set to a URL.

    Args:
        place: the set.
        to: `hf://datasets/USER/NAME`, or the URL of a folder in an object store.
        on_sent: see `OnSent`.

    Raises:
        UsageError: the set would not be whole there, another one is there, or access is denied.
        IntegrityError: a file of the set is damaged, here or there.
        SftError: the store or the Hub cannot be reached; the same call goes on.
    """
    url = url_of(to)
    if url is None or url.startswith(("http://", "https://")):
        raise UsageError(
            f"{to}: a set is pushed to the Hub or to an object store.", "hf://datasets/USER/NAME"
        )
    folder = local_folder(place)
    manifest = read_manifest(folder)
    _refuse_parts(folder, manifest)
    files = sorted((*manifest.shards, *manifest.files), key=lambda file: not file.name.endswith(".arrow"))
    load = _Load(folder, (folder / MANIFEST_NAME).read_bytes(), files, on_sent or (lambda done, total: None))
    sent = (_to_hub if url.startswith("hf://") else _to_store)(load, url)
    verify(url, quick=True).raise_if_broken()
    whole = sum(file.bytes for file in files) + len(load.manifest)
    return Pushed(url=url, digest=manifest.digest, files=len(files) + 1, bytes=whole, sent=sent)


def _refuse_parts(folder: Path, manifest: Manifest) -> None:
    """Refuse a set that needs files of this machine beside its own."""
    if manifest.by_index and not all(url_of(base.path) for base in manifest.bases):
        raise UsageError(
            f"{folder}: a view by index, whose tokens lie in sets of this machine.",
            "make the view with --write, and push that.",
        )
    if manifest.vision is not None and manifest.vision.images != IN_THE_SET:
        raise UsageError(
            f"{folder}: names pictures in folders of this machine.", "prepare it with --embed-images."
        )


def _another(url: str, what: str) -> UsageError:
    return UsageError(f"{url}: {what}.", "choose another URL, or remove what is there.")


# ------------------------------------------------------------------------------------------- an object store


def _to_store(load: _Load, url: str) -> int:
    """Send what an object store lacks; return how many files."""
    store = Objects(url)
    there = store.find(MANIFEST_NAME)
    home = set_at(store) if there is None else None  # elsewhere: that of a side of a split
    if (there is not None and there.data != load.manifest) or (home is not None and home.url != url):
        raise _another(url, "another set is there")
    mark = hashlib.sha256(load.manifest).hexdigest().encode()
    if there is None and not store.create(MARK, mark) and (begun := store.find(MARK)) and begun.data != mark:
        raise _another(url, "the push of another set was broken off there")
    sizes = store.sizes()
    missing = [file for file in load.files if sizes.get(file.name) != file.bytes]
    done = len(load.files) - len(missing)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, _ in enumerate(pool.map(partial(_put, load.folder, store), missing), start=done + 1):
            load.on_sent(number, len(load.files) + 1)
    if there is None and not store.create(MANIFEST_NAME, load.manifest):
        return _to_store(load, url)  # another push has finished
    store.tidy([MARK])
    return len(missing) + (there is None)


def _put(folder: Path, store: Objects, info: SetFile) -> None:
    path = plain_file(folder, info)

    def write(sink: Sink) -> None:
        with open(path, "rb") as file:
            shutil.copyfileobj(file, sink)

    if store.put(info.name, write).xxh3 != info.xxh3:
        store.remove([info.name])
        check_file(folder, info)  # says what is wrong with it
        raise IntegrityError(f"{path}: changed while it was sent.", "push the set again.")


# ------------------------------------------------------------------------------------------------- the Hub


class _Dataset:
    """A dataset of the Hub, or a folder in one.

    Args:
        url: as `hf://datasets/USER/NAME`, with a revision as `NAME@main`.
    """

    def __init__(self, url: str) -> None:
        kind, *parts = url.removeprefix("hf://").split("/")
        if kind != "datasets" or len(parts) < 2:
            raise UsageError(f"{url}: names no dataset of the Hub.", "name it as hf://datasets/USER/NAME.")
        name, _, revision = parts[1].partition("@")
        self._library: Any = need("huggingface_hub", "hub", f"{url} is of the Hub")
        self._api = self._library.HfApi()
        self._name, self._below = f"{parts[0]}/{name}", "".join(f"{part}/" for part in parts[2:])
        self._at = {"repo_id": self._name, "repo_type": "dataset", "revision": revision or None}

    def create(self) -> None:
        """Make it, private, unless there is one."""
        self._api.create_repo(self._name, repo_type="dataset", private=True, exist_ok=True)

    def hashes(self) -> dict[str, str]:
        """Return the hash of each file: sha256 of a large one, that of Git of a small one."""
        try:
            path = self._below.rstrip("/") or None
            entries = [*self._api.list_repo_tree(path_in_repo=path, recursive=True, **self._at)]
        except self._library.errors.EntryNotFoundError:
            return {}
        files = [entry for entry in entries if hasattr(entry, "blob_id")]
        return {
            file.path[len(self._below) :]: file.lfs.sha256 if file.lfs else file.blob_id for file in files
        }

    def commit(self, content: Mapping[str, Path | bytes]) -> None:
        """Add files in one commit."""
        add = self._library.CommitOperationAdd
        operations = [add(self._below + name, data) for name, data in content.items()]
        if operations:
            self._api.create_commit(operations=operations, commit_message="Push a set of sftdata", **self._at)


def _to_hub(load: _Load, url: str) -> int:
    """Commit what a dataset lacks, some files at a time, the manifest with the last; return how many."""
    with _explained(url):
        dataset = _Dataset(url)
        dataset.create()
        there = dataset.hashes()
        whole = MANIFEST_NAME in there
        if whole and there[MANIFEST_NAME] not in _hashes(load.manifest):
            raise _another(url, "another set is there")
        missing = [file for file in load.files if there.get(file.name) not in _hashes_of(load.folder, file)]
        tokens = [file for file in missing if file.name.endswith(".arrow")]
        for first in range(0, len(tokens), _COMMIT_FILES):
            part = tokens[first : first + _COMMIT_FILES]
            dataset.commit({file.name: check_file(load.folder, file) for file in part})
            load.on_sent(len(load.files) - len(missing) + first + len(part), len(load.files) + 1)
        rest: dict[str, Path | bytes] = {
            file.name: check_file(load.folder, file) for file in missing if file not in tokens
        }
        dataset.commit(rest | ({} if whole else {MANIFEST_NAME: load.manifest}))
    return len(missing) + (not whole)


def _hashes_of(folder: Path, info: SetFile) -> tuple[str, ...]:
    """Return the hashes that the Hub may know a file by."""
    small = not info.name.endswith(".arrow")
    return _hashes(plain_file(folder, info).read_bytes()) if small else (info.sha256,)


def _hashes(data: bytes) -> tuple[str, ...]:
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha256(data).hexdigest(), hashlib.sha1(blob, usedforsecurity=False).hexdigest()


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what the client of the Hub raises into one line."""
    try:
        yield
    except SftError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "Offline" in type(error).__name__:
            raise UsageError(f"{url}: HF_HUB_OFFLINE is set.", "unset it, and push again.") from None
        if "Connect" in type(error).__name__:
            again = "connect this machine to the network, then run the same command again."
            raise SftError(f"{url}: cannot be reached ({said}).", again) from None
        if status in (401, 403) or "Token" in type(error).__name__:
            what = f"{url}: access is denied ({said})."
            raise UsageError(what, "hf auth login, or set HF_TOKEN to a token that may write.") from None
        again = "run the same command again; what is sent is kept."
        raise SftError(f"{url}: cannot be written ({said}).", again) from None
