"""What in a folder is data, and what lies beside it: metadata, hidden files, sets made earlier. What is left out is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sftdata.errors import UsageError

DATA_SUFFIXES = (
    ".jsonl",
    ".json",
    ".ndjson",
    ".csv",
    ".tsv",
    ".txt",
    ".text",
    ".parquet",
    ".arrow",
    ".feather",
)
COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd", ".xz", ".bz2")

# Named as data, and none: what the Hub, datasets, transformers and trainers put beside it.
METADATA = frozenset(
    {
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"),
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
        ),
        *(
            "merges.txt",
            "chat_template.json",
            "config.json",
            "generation_config.json",
            "preprocessor_config.json",
        ),
        *(
            "processor_config.json",
            "adapter_config.json",
            "trainer_state.json",
            "package.json",
            "package-lock.json",
        ),
        *("readme.txt", "license.txt", "licence.txt", "notice.txt", "requirements.txt"),
    }
)
_INDEX = ".index.json"  # of the shards of a checkpoint
_SHOWN = 8  # names in a note
REJECTS = "rejects.jsonl"


def plain_name(path: str) -> str:
    """Return a path or URL in lower case, without the suffix of its compression and what follows the name in a URL."""
    name = (re.split(r"[?#]", path)[0] if "://" in path else path).lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), name)


def is_metadata(path: Path) -> bool:
    """Return True for a file that is named as data and says something about data or a model instead."""
    name = path.name.lower()
    return name in METADATA or name.endswith(_INDEX)


def is_saved_dataset(folder: Path) -> bool:
    """Return True for a folder written by `Dataset.save_to_disk`, of one split or several."""
    one_split = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one_split or (folder / "dataset_dict.json").is_file()


def set_in(folder: Path) -> str:
    """Return what a folder is that `prepare` wrote, "a finished set" or "an unfinished set"; else nothing."""
    if (folder / "manifest.json").is_file() and (
        (folder / REJECTS).is_file() or any(folder.glob("shard-*.arrow"))
    ):
        return "a finished set"
    return "an unfinished set" if (folder / "plan.json").is_file() and (folder / "slices").is_dir() else ""


def set_around(path: Path, within: Path, known: dict[Path, str]) -> str:
    """Return what set a file or folder belongs to that lies at or below `within`; nothing where there is none.

    Args:
        known: what was found out about folders so far.
    """
    for folder in (path, *path.parents):
        if folder not in known:
            known[folder] = set_in(folder)
        if known[folder] or folder == within:
            return known[folder]
    return ""


def refuse_set(path: Path) -> None:
    """Refuse a set, or a file of one; only its rejects are rows.

    Raises:
        UsageError: naming the set.
    """
    folder = path if path.is_dir() else path.parent
    found = set_in(folder)
    if found and path.name != REJECTS:
        what = f"{path}: " + (f"{found}, not rows." if path == folder else f"a file of {found}, not rows.")
        raise UsageError(
            what, "name the files that it is made from; what `prepare` has made is there to be trained on."
        )


class LeftOut:
    """What is left out of a folder or a pattern, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, list[Path]] = {}

    def add(self, path: Path, reason: str) -> None:
        """Leave a path out."""
        self._found.setdefault(reason, []).append(path)

    def notes(self, within: str) -> Iterator[str]:
        """Yield one line for each reason."""
        for reason, paths in self._found.items():
            if len(paths) == 1:
                yield f"{paths[0]}: left out ({reason})."
                continue
            names = [
                str(path.relative_to(within)) if path.is_relative_to(within) else str(path) for path in paths
            ]
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            yield f"{within}: left out ({reason}): {', '.join(names[:_SHOWN])}{more}."


def data_files(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield the data files of a folder and of those inside it, by name; a saved dataset is one of them.

    Args:
        left_out: is told of everything else.
    """
    if is_saved_dataset(folder):
        yield str(folder)
        return
    for path in sorted(folder.iterdir(), key=lambda entry: entry.name):
        reason = _beside(path)
        if reason:
            left_out.add(path, reason)
        elif path.is_dir():
            yield from data_files(path, left_out)
        else:
            yield str(path)


def _beside(path: Path) -> str:
    """Return why an entry of a folder is not data; nothing where it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return set_in(path)
    name = path.name.lower()
    if is_metadata(path):
        return "metadata"
    if not plain_name(name).endswith(DATA_SUFFIXES):
        return "not named as data; name a file itself to read it"
    return ""
