"""Splits: which files are train, validation and test, by their names as the Hub reads them, and which rows of them are meant.

The Hub's rules are those of `datasets.data_files`: names as `train_sft-00000-of-00002.parquet`; else folders called by a split;
else files called so. `--split` takes what `datasets` takes: `train`, `train+test`, `train[:95%]`, `train[10:20]+test`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sftdata.errors import UsageError
from sftdata.sources.inputs import Input

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_PARTED = "[-._ 0-9]"  # what may stand around a keyword
_SHARDED = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
_FILES = {
    split: re.compile(f"(?:.*{_PARTED})?(?:{'|'.join(words)}){_PARTED}.*")
    for split, words in KEYWORDS.items()
}
_FOLDERS = {
    split: re.compile(f"(?:.*{_PARTED})?(?:{'|'.join(words)})(?:{_PARTED}.*)?")
    for split, words in KEYWORDS.items()
}
_ADDED = re.compile(r"\s*\+\s*")
_NAME = re.compile(r"\w+(?:\.\w+)*")


def splits_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the splits that files belong to by their names, relative to the dataset, each with the indices of its files.

    >>> splits_of(["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "notes.jsonl"])
    {'train': [0], 'test': [1]}
    """
    paths = [PurePosixPath(name) for name in names]
    for rule in (_by_number, _by_folder, _by_name):
        found: dict[str, list[int]] = {}
        for index, path in enumerate(paths):
            for split in rule(path):
                found.setdefault(split, []).append(index)
        if found:
            order = {split: rank for rank, split in enumerate(KEYWORDS)}
            return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    return {}


def _by_number(path: PurePosixPath) -> Iterator[str]:
    if found := _SHARDED.fullmatch(path.name):
        yield found["split"]


def _by_folder(path: PurePosixPath) -> Iterator[str]:
    return (split for split, rule in _FOLDERS.items() if any(map(rule.fullmatch, path.parts[:-1])))


def _by_name(path: PurePosixPath) -> Iterator[str]:
    return (split for split, rule in _FILES.items() if rule.fullmatch(path.name))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of a dataset that `--split` means.

    Attributes:
        splits: of each split that it names, the indices of its files in the dataset, in order.
        spec: what it says, where that is more than names of splits.
    """

    splits: dict[str, list[int]]
    spec: str | None = None


def choose_files(found: Input, spec: str | None, notes: list[str]) -> Chosen:
    """Return the files of the splits that are meant; without `spec` all of them, where that leaves no doubt.

    Raises:
        UsageError: the files are of several splits and none is chosen, or there is no such split.
    """
    names = [_relative(path, found.base or "") for path in found.paths]
    splits = splits_of(names)
    if spec is None:
        _refuse_several(found, splits)
        return Chosen({"train": list(range(len(names)))})
    splits = splits or {"train": list(range(len(names)))}
    parts = [_NAME.match(part) for part in _ADDED.split(spec)]
    wanted = list(dict.fromkeys(part[0] if part else "" for part in parts))
    if unknown := [name for name in wanted if name not in splits]:
        raise wrong_split(
            found.name,
            spec,
            splits,
            f"no split {unknown[0]!r}." if unknown[0] else "not the name of a split.",
        )
    chosen = {name: splits[name] for name in wanted}
    others = sorted(set(range(len(names))) - {index for indices in chosen.values() for index in indices})
    if others:
        more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
        left = ", ".join(names[index] for index in others[:3])
        notes.append(f"{found.name}: --split {spec} leaves out {left}{more}.")
    return Chosen(chosen, None if all(_NAME.fullmatch(part) for part in _ADDED.split(spec)) else spec)


def _relative(path: str, base: str) -> str:
    return path.removeprefix(base).lstrip("/") if base else path


def _refuse_several(found: Input, splits: Mapping[str, Sequence[int]]) -> None:
    """Ask for a split where the files differ in theirs; files beside those of `train` are taken for more of the same."""
    inside = {index for indices in splits.values() for index in indices}
    several = any(len(indices) < len(inside) for indices in splits.values())
    beside = len(inside) < len(found.paths) and bool(splits) and splits.keys() <= {"validation", "test"}
    if several or (beside and not found.listed):
        raise several_splits(found.name, splits, mixed=beside)


def several_splits(name: str, splits: Collection[str], *, mixed: bool = False) -> UsageError:
    """Return the error that asks for one of several splits; `mixed` where some files are of none."""
    beside = " beside files of no split" if mixed else ""
    first = next((split for split in splits if split.startswith("train")), next(iter(splits)))
    fix = f"choose with --split, as --split {first}" + (
        f" or --split {'+'.join(splits)}" if len(splits) > 1 else ""
    )
    named = f"the splits {', '.join(splits)}" if len(splits) > 1 else f"the split {', '.join(splits)}"
    return UsageError(
        f"{name}: holds {named}{beside}.", f"{fix}{', or name the files themselves' if mixed else ''}."
    )


def wrong_split(name: str, spec: str, splits: Collection[str], why: object) -> UsageError:
    """Return the error of a `--split` that names nothing here."""
    said = str(why).rstrip(".")
    what = f"{name}: --split {spec}: {said}; found {', '.join(sorted(splits))}."
    return UsageError(
        what, f"as --split {sorted(splits)[0]}, or a part of it: --split '{sorted(splits)[0]}[:95%]'."
    )
