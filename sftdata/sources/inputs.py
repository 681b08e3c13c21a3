"""What the user named -> the files, URLs and dataset ids to read, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftdata.errors import UsageError, nearest
from sftdata.sources.folders import (
    COMPRESSED_SUFFIXES,
    DATA_SUFFIXES,
    REJECTS,
    LeftOut,
    data_files,
    is_metadata,
    is_saved_dataset,
    refuse_set,
    set_around,
    set_in,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LOCAL_URL = re.compile(r"(?:file|local)://")


@dataclass(frozen=True, slots=True)
class Input:
    """What belongs together as one dataset: the files of a folder or a pattern, or all files that were named one by one.

    Attributes:
        name: as the user gave it; the common folder of files named one by one.
        paths: files, URLs, a Hub id or a folder of a saved dataset, in order.
        base: what the names of splits are looked for behind; None for what has its own splits.
        listed: the user named each file.
    """

    name: str
    paths: tuple[str, ...]
    base: str | None = None
    listed: bool = False


def expand_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what to read, and one line for each kind of files that was left out.

    Files keep the order given; globs and folders are sorted by name. Left out are hidden files, and of a folder metadata, files
    that are not named as data and sets made earlier; of a pattern, the files of such sets.

    Raises:
        UsageError: a file or pattern that matches nothing, or a finished set.
    """
    found, notes = find_inputs(inputs)
    return [path for one in found for path in one.paths], notes


def find_inputs(inputs: Sequence[str]) -> tuple[list[Input], list[str]]:
    """Return the same, dataset by dataset.

    Raises:
        UsageError: as `expand_inputs`.
    """
    notes: list[str] = []
    return [_find(_LOCAL_URL.sub("", name, count=1), notes) for name in inputs], notes


def joined(found: Sequence[Input]) -> list[Input]:
    """Join the files that were named one by one to one dataset, in the place of the first."""
    listed = [path for one in found if one.listed for path in one.paths]
    if len(listed) < 2:
        return list(found)
    try:
        base = os.path.commonpath([os.path.dirname(path) for path in listed])
    except ValueError:  # absolute and relative paths, or URLs
        base = ""
    whole, seen, kept = Input(base or "the files", tuple(listed), base, listed=True), False, list[Input]()
    for one in found:
        if not one.listed:
            kept.append(one)
        elif not seen:
            kept.append(whole)
            seen = True
    return kept


def is_url(path: str) -> bool:
    """Return True for `scheme://...`."""
    return "://" in path


def is_hub_id(name: str) -> bool:
    """Return True for `owner/name` when that cannot be meant as a path here."""
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(DATA_SUFFIXES + COMPRESSED_SUFFIXES):
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def _find(name: str, notes: list[str]) -> Input:
    if is_url(name):
        return _find_remote(name)
    path = Path(name).expanduser()
    if path.is_dir():
        refuse_set(path)
        return _find_in_folder(path, name, notes)
    if path.exists():
        refuse_set(path)
        if path.name == REJECTS and set_in(path.parent):
            notes.append(f"{path}: read as rows, which {set_in(path.parent)} rejected.")
        return Input(name, (str(path),), str(path.parent), listed=True)
    if is_hub_id(name):
        return Input(name, (name,))
    if glob.has_magic(name):
        return _find_matches(path, name, notes)
    raise UsageError(f"{name}: no such file or folder.", _nearest(path))


def _find_in_folder(folder: Path, name: str, notes: list[str]) -> Input:
    left_out = LeftOut()
    paths = tuple(data_files(folder, left_out))
    notes.extend(left_out.notes(str(folder)))
    if not paths:
        known = " ".join(DATA_SUFFIXES + COMPRESSED_SUFFIXES)
        raise UsageError(
            f"{folder}: no data file here; expected names that end in {known}.", "name the files themselves."
        )
    return Input(name, paths, None if is_saved_dataset(folder) else str(folder))


def _find_matches(pattern: Path, name: str, notes: list[str]) -> Input:
    matches = [Path(found) for found in sorted(glob.glob(str(pattern), recursive=True))]
    if not matches:
        raise UsageError(
            f"{name}: no file matches.", "check the pattern; quote it so that the shell leaves it alone."
        )
    base = Path(*_before_magic(pattern))
    left_out, paths, known = LeftOut(), list[str](), dict[Path, str]()
    for match in matches:
        if around := set_around(match, base, known):
            left_out.add(match, f"of {around}")
        elif is_metadata(match):
            left_out.add(match, "metadata")
        elif match.is_dir():
            paths.extend(data_files(match, left_out))
        else:
            paths.append(str(match))
    notes.extend(left_out.notes(str(base)))
    if not paths:
        raise UsageError(
            f"{name}: matches no data; {' '.join(left_out.notes(str(base)))}", "name the files themselves."
        )
    return Input(name, tuple(dict.fromkeys(paths)), str(base))


def _before_magic(pattern: Path) -> list[str]:
    parts: list[str] = []
    for part in pattern.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def _find_remote(url: str) -> Input:
    """Return the files that a URL names; one with a pattern is listed where the store can list.

    Raises:
        UsageError: nothing matches, or the store cannot be listed.
    """
    if "*" not in url:
        return Input(url, (url,), url.rpartition("/")[0], listed=True)
    if url.startswith(("http://", "https://")):
        raise UsageError(
            f"{url}: files behind a web address cannot be listed by a pattern.", "name each file."
        )
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(url)
        found = tuple(str(store.unstrip_protocol(match)) for match in sorted(store.glob(path)))
    except ImportError as error:
        raise UsageError(f"{url}: {error}.", "install the package that serves this kind of URL.") from None
    except Exception as error:  # every fsspec backend has its own exceptions
        what = f"{url}: cannot be listed ({type(error).__name__}: {error})."
        raise UsageError(what, "check the URL and the credentials.") from None
    if not found:
        raise UsageError(f"{url}: no file matches.", "check the pattern.")
    return Input(url, found, url.partition("*")[0].rpartition("/")[0])


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"the nearest folder that exists is {folder}."
    near = nearest(path.name, (entry.name for entry in folder.iterdir()))
    return (
        f"did you mean {folder / near}?" if near else "check the path; a Hub dataset is written owner/name."
    )
