"""What the user named -> the files, URLs and dataset ids to read, in a fixed order."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from sftdata.errors import UsageError

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".text", ".parquet", ".arrow", ".feather")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".xz", ".bz2")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def expand_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what to read, and one line for each file that was left out.

    Files keep the order given; globs and folders are sorted by name. Hidden files, and files in a folder that are not named as
    data, are left out.

    Raises:
        UsageError: a file or pattern that matches nothing.
    """
    paths: list[str] = []
    notes: list[str] = []
    for name in inputs:
        found = [name] if is_url(name) else _expand_local(name, notes)
        paths.extend(found)
    return paths, notes


def is_url(path: str) -> bool:
    """Return True for `scheme://...`."""
    return "://" in path


def is_saved_dataset(folder: Path) -> bool:
    """Return True for a folder written by `Dataset.save_to_disk`, of one split or several."""
    one_split = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one_split or (folder / "dataset_dict.json").is_file()


def is_hub_id(name: str) -> bool:
    """Return True for `owner/name` when that cannot be meant as a path here."""
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(DATA_SUFFIXES + COMPRESSED_SUFFIXES):
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def _expand_local(name: str, notes: list[str]) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _expand_folder(path, notes)
    if path.exists() or is_hub_id(name):
        return [str(path) if path.exists() else name]
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise UsageError(f"{name}: no file matches.", "check the pattern; quote it so that the shell leaves it alone.")
        return [found for match in matches for found in _expand_match(Path(match), notes)]
    raise UsageError(f"{name}: no such file or folder.", _nearest(path))


def _expand_match(path: Path, notes: list[str]) -> list[str]:
    return _expand_folder(path, notes) if path.is_dir() else [str(path)]


def _expand_folder(folder: Path, notes: list[str]) -> list[str]:
    if is_saved_dataset(folder):
        return [str(folder)]
    paths: list[str] = []
    for path in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if path.name.startswith("."):
            notes.append(f"{path}: left out (hidden).")
        elif path.is_dir():
            paths.extend(_expand_folder(path, notes) if any(path.iterdir()) else [])
        elif _named_as_data(path.name):
            paths.append(str(path))
        else:
            notes.append(f"{path}: left out (not named as data); name the file itself to read it.")
    if not paths:
        known = " ".join(DATA_SUFFIXES + COMPRESSED_SUFFIXES)
        raise UsageError(f"{folder}: no data file here; expected names that end in {known}.", "name the files themselves.")
    return paths


def plain_name(path: str) -> str:
    """Return a path or URL in lower case, without the suffix of its compression and what follows the name in a URL."""
    name = (re.split(r"[?#]", path)[0] if is_url(path) else path).lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), name)


def _named_as_data(name: str) -> bool:
    return plain_name(name).endswith(DATA_SUFFIXES)


def _nearest(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f"the nearest folder that exists is {folder}."
    near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=1)
    return f"did you mean {folder / near[0]}?" if near else "check the path; a Hub dataset is written owner/name."
