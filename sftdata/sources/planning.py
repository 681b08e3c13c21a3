"""From what the user named to planned sources: the datasets, the split, every file read once."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np

from sftdata.batches import Int64
from sftdata.errors import UsageError, need
from sftdata.output import written
from sftdata.sources.chunks import Chunks, Source, SourcePlan
from sftdata.sources.inputs import (
    Input,
    find_inputs,
    is_hub_id,
    joined,
    refuse_doubles,
    several_splits,
    wrong_split,
)
from sftdata.sources.marks import Marks
from sftdata.sources.ranges import Sizes, Stretch, join, scan, stretches_of
from sftdata.sources.remote import is_url
from sftdata.sources.source import open_source, read_chunk

Item = TypeVar("Item")
Say = Callable[[str], object]
_AT_ONCE = 8  # objects
MANY = 20  # files that are still named one by one
SECONDS = 10.0  # between two lines on the progress


class Scanned(NamedTuple):
    """Who scans.

    Attributes:
        marks: returns the marks of stretches, in their order.
        whole: objects are copied whole before; else ranges of them are read, each once, where that can be.
    """

    marks: Callable[[Sizes, Sequence[Stretch]], Iterator[Marks]]
    whole: bool = True


def in_turn(sizes: Sizes, stretches: Sequence[Stretch]) -> Iterator[Marks]:
    """Scan stretches one after another, each when it is asked for."""
    return map(partial(scan, sizes), stretches)


IN_TURN = Scanned(in_turn)


def plan_inputs(
    inputs: Sequence[str],
    split: str | None,
    subset: str | None,
    sizes: Sizes,
    say: Say = lambda _: None,
    scanned: Scanned = IN_TURN,
) -> tuple[list[SourcePlan], list[str]]:
    """Open and read through every input.

    Args:
        split: as `--split` has it; None asks for one where there are several.
        subset: of a Hub dataset.
        say: takes a line on the progress, every few seconds.
        scanned: who scans what is to be read.

    Returns:
        plans, with ids that run on from one to the next, and what was left out.

    Raises:
        UsageError: an input cannot be read or is there twice, or it is not clear which split is meant.
    """
    found, notes = find_inputs(inputs)
    if subset and not any(one.base is None and is_hub_id(one.name) for one in found):
        raise UsageError(
            f"--subset {subset}: names a configuration of a Hub dataset, and no input is one.",
            "leave it out.",
        )
    refuse_doubles(found)
    groups = joined(found)
    chosen = [None if one.base is None else choose_files(one, split, notes) for one in groups]
    if split is None:
        paths = [path for one in found for path in one.paths]
        sources = _opened(paths, partial(open_source, subset=subset, whole=scanned.whole), say)
        return plan_sources(sources, sizes, say, scanned), notes
    plans: list[SourcePlan] = []
    for one, files in zip(groups, chosen, strict=True):
        if files is None:
            plans += plan_sources([open_source(one.paths[0], split=split, subset=subset)], sizes)
            continue
        indices = sorted({index for some in files.splits.values() for index in some})
        paths = [one.paths[index] for index in indices]
        sources = _opened(paths, partial(open_source, whole=scanned.whole), say)
        opened = plan_sources(sources, sizes, say, scanned)
        plans += select_rows(one.name, files, dict(zip(indices, opened, strict=True)))
    return numbered(plans), notes


def _opened(paths: Sequence[str], open_one: Callable[[str], Source], say: Say) -> list[Source]:
    """Open inputs; of objects several at a time, as each takes three requests, which small ones wait for."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        found = pool.map(open_one, paths) if any(map(is_url, paths)) else map(open_one, paths)
        return [next(found) for _ in with_progress(paths, say, "Opened")]
    finally:
        pool.shutdown(cancel_futures=True)


def plan_sources(
    sources: Sequence[Source], sizes: Sizes, say: Say = lambda _: None, scanned: Scanned = IN_TURN
) -> list[SourcePlan]:
    """Plan several sources, with numbers and example ids that run on from one to the next."""
    stretches = [stretches_of(source, sizes) for source in sources]
    marks = scanned.marks(sizes, list(chain.from_iterable(stretches)))
    return numbered(
        join(source, islice(marks, len(stretches[number])), sizes)
        for number, source in enumerate(with_progress(sources, say, "Read"))
    )


def numbered(plans: Iterable[SourcePlan]) -> list[SourcePlan]:
    """Return the plans with numbers and example ids that run on from one to the next."""
    found: list[SourcePlan] = []
    base_id = 0
    for number, plan in enumerate(plans):
        found.append(plan.placed(number, base_id))
        base_id += plan.records
    return found


def short_names(paths: Sequence[str]) -> list[str]:
    """Name each source by what tells it from the others, without the machine's folders.

    >>> short_names(["/data/a/train.jsonl", "/data/b/train.jsonl"])
    ['a/train.jsonl', 'b/train.jsonl']
    >>> short_names(["/data/a.jsonl", "/data/a.jsonl"])
    ['a.jsonl', 'a.jsonl#2']
    >>> short_names(["/data/a.jsonl", "/data/a.jsonl", "/data/a.jsonl#2"])
    ['a.jsonl', 'a.jsonl#3', 'a.jsonl#2']
    """
    return _told_apart(_without_folders(paths))


def source_names(sources: Sequence[SourcePlan], paths: Sequence[str]) -> list[str]:
    """Name each source by the registry, where it is of one of its entries, and by its path where not.

    An entry of several files gives its name to their folder: `web/a.jsonl`.
    """
    groups: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        groups.setdefault(source.entry, []).append(index)
    names = list(paths)
    for entry, indices in groups.items():
        short = _without_folders([paths[index] for index in indices])
        alone = entry and len(set(short)) == 1
        for index, name in zip(indices, short, strict=True):
            names[index] = entry if alone else f"{entry}/{name}" if entry else name
    return _told_apart(names)


def _without_folders(paths: Sequence[str]) -> list[str]:
    if len(set(paths)) == 1 or any(
        Path(path).is_absolute() != Path(paths[0]).is_absolute() for path in paths
    ):
        return [written(Path(path).name) for path in paths]
    common = os.path.commonpath(paths)  # once: it reads all paths
    return [written(os.path.relpath(path, common)) for path in paths]


def _told_apart(names: Sequence[str]) -> list[str]:
    """Number what comes again."""
    taken, seen, found = set(names), set[str](), list(names)
    places = {name: itertools.count(2) for name in taken}
    for index, name in enumerate(names):
        if name in seen:
            again = (f"{name}#{place}" for place in places[name])
            found[index] = next(free for free in again if free not in taken)
        seen.add(name)
    return found


def grouped(notes: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the notes on each file; one that many files share, once.

    Args:
        notes: path of each file, and the lines about it, which begin with its path.
    """
    lines = [(path, line) for path, about in notes for line in about]
    files: dict[str, list[str]] = {}
    for path, line in lines:
        files.setdefault(line.removeprefix(path), []).append(path)
    found: list[str] = []
    for rest, paths in files.items():
        if len(paths) > MANY:
            found.append(f"{paths[0]} and {len(paths) - 1:,} more files{rest}")
        else:
            found += [path + rest for path in paths]
    return found if len(lines) > MANY else [line for _, line in lines]


def with_progress(items: Sequence[Item], say: Say, done: str, seconds: float = SECONDS) -> Iterator[Item]:
    """Yield the items, and report every few seconds how many of them are done."""
    last = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - last >= seconds:
            say(f"{done} {number:,} of {len(items):,} inputs.")
            last = now
        yield item


# ---------------------------------------------------------------------------------- splits by names of files
#
# The Hub's rules are those of `datasets.data_files`: names as `train_sft-00000-of-00002.parquet`; else
# folders called by a split; else files called so. `--split` takes what `datasets` takes: `train`,
# `train+test`, `train[:95%]`, `train[10:20]+test`.

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"  # what may stand around a keyword
_SHARDED = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
_FILES = {
    split: re.compile(f"(?:.*{_SEPARATOR})?(?:{'|'.join(words)}){_SEPARATOR}.*")
    for split, words in KEYWORDS.items()
}
_FOLDERS = {
    split: re.compile(f"(?:.*{_SEPARATOR})?(?:{'|'.join(words)})(?:{_SEPARATOR}.*)?")
    for split, words in KEYWORDS.items()
}
_ADDED = re.compile(r"\s*\+\s*")
_NAME = re.compile(r"\w+(?:\.\w+)*")


def splits_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the splits that files belong to by their names, each with the indices of its files.

    Names are relative to the dataset.

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
    """Ask for a split where the files differ in theirs; files beside those of `train` are taken as train."""
    inside = {index for indices in splits.values() for index in indices}
    several = any(len(indices) < len(inside) for indices in splits.values())
    beside = len(inside) < len(found.paths) and bool(splits) and splits.keys() <= {"validation", "test"}
    if several or (beside and not found.listed):
        raise several_splits(found.name, splits, mixed=beside)


# -------------------------------------------------------------------------------- rows of a part of a split


def select_rows(name: str, chosen: Chosen, plans: dict[int, SourcePlan]) -> list[SourcePlan]:
    """Return the plans of the files that are read, in the order of `--split`, cut to the rows meant.

    Args:
        name: of the dataset.
        plans: of its files, by their index in the dataset; the base ids are the caller's to set.

    Raises:
        UsageError: `--split` is not in the language of `datasets`, or that is not installed.
    """
    if chosen.spec is None:
        return [plans[index] for indices in chosen.splits.values() for index in indices]
    datasets = need("datasets", "hub", f"--split {chosen.spec} is cut as the package datasets cuts it")
    rows = {index: _records_with_rows(plan) for index, plan in plans.items()}
    lengths = {split: sum(len(rows[index]) for index in indices) for split, indices in chosen.splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(chosen.spec).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise wrong_split(name, chosen.spec, chosen.splits, error) from None
    found: list[SourcePlan] = []
    for part in parts:
        first = 0
        for index in chosen.splits[part.splitname]:
            inside = rows[index][max(part.from_ - first, 0) : max(part.to - first, 0)]
            first += len(rows[index])
            if len(inside):
                found.append(_cut(plans[index], int(inside[0]), int(inside[-1]) + 1))
    return found


def _records_with_rows(plan: SourcePlan) -> Int64:
    """int64[N]: the records, from 0, that hold a row, readable or not; blank lines hold none."""
    found = [np.zeros(0, np.int64)]
    for chunk in plan.chunks:
        batch, bad = read_chunk(chunk, plan.max_line_bytes)
        unreadable = np.array([row.record - 1 for row in bad], np.int64)
        found.append(np.sort(np.concatenate([batch.example_ids - plan.base_id, unreadable])))
    return np.concatenate(found)


def _cut(plan: SourcePlan, first: int, stop: int) -> SourcePlan:
    """Return the plan with its records `first:stop` alone."""

    def inside(chunks: Chunks) -> Chunks:
        ends = np.append(chunks.records[1:], plan.records)
        kept = np.flatnonzero((chunks.records < stop) & (ends > first))
        return replace(chunks.select(kept), only=(first, stop))

    return replace(plan, chunks=inside(plan.chunks), samples=inside(plan.samples))
