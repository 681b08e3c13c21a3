"""From what the user named to planned sources: the datasets behind it, the split that is meant, every file read through once."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from sftdata.errors import UsageError
from sftdata.output import written
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.inputs import find_inputs, is_hub_id, joined
from sftdata.sources.selection import select_rows
from sftdata.sources.source import open_source, plan_source, plan_sources
from sftdata.sources.splits import choose_files

Item = TypeVar("Item")
Say = Callable[[str], object]
MANY = 20  # files that are still named one by one
SECONDS = 10.0  # between two lines on how far the work is


def plan_inputs(
    inputs: Sequence[str],
    split: str | None,
    subset: str | None,
    sizes: tuple[int, int],
    say: Say = lambda _: None,
) -> tuple[list[SourcePlan], list[str]]:
    """Open and read through every input.

    Args:
        split: as `--split` has it; None asks for one where there are several.
        subset: of a Hub dataset.
        sizes: slice_bytes and max_line_bytes, as for `plan_source`.
        say: told how far the work is, where that takes long.

    Returns:
        plans, with ids that run on from one to the next, and what was left out.

    Raises:
        UsageError: an input cannot be read, or it is not clear which split is meant.
    """
    found, notes = find_inputs(inputs)
    if subset and not any(one.base is None and is_hub_id(one.name) for one in found):
        raise UsageError(
            f"--subset {subset}: names a configuration of a Hub dataset, and no input is one.",
            "leave it out.",
        )
    groups = joined(found)
    chosen = [None if one.base is None else choose_files(one, split, notes) for one in groups]
    if split is None:
        paths = [path for one in found for path in one.paths]
        sources = [open_source(path, subset=subset) for path in told(paths, say, "Opened")]
        return plan_sources(told(sources, say, "Read"), *sizes), notes
    plans: list[SourcePlan] = []
    for one, files in zip(groups, chosen, strict=True):
        if files is None:
            plans.append(plan_source(open_source(one.paths[0], split=split, subset=subset), 0, *sizes))
            continue
        indices = sorted({index for some in files.splits.values() for index in some})
        opened = plan_sources(
            [open_source(one.paths[index]) for index in told(indices, say, "Opened")], *sizes
        )
        plans += select_rows(one.name, files, dict(zip(indices, opened, strict=True)))
    return numbered(plans), notes


def numbered(plans: Sequence[SourcePlan]) -> list[SourcePlan]:
    """Return the plans with numbers and example ids that run on from one to the next."""
    found: list[SourcePlan] = []
    base_id = 0
    for number, plan in enumerate(plans):
        found.append(plan.placed(number, base_id))
        base_id += plan.records
    return found


def short_names(paths: Sequence[str]) -> list[str]:
    """Name each source by what tells it from the others, free of the machine's folders.

    >>> short_names(["/data/a/train.jsonl", "/data/b/train.jsonl"]), short_names(["/data/a.jsonl", "/data/a.jsonl"])
    (['a/train.jsonl', 'b/train.jsonl'], ['a.jsonl', 'a.jsonl#2'])
    """
    if len(set(paths)) == 1 or any(
        Path(path).is_absolute() != Path(paths[0]).is_absolute() for path in paths
    ):
        names = [Path(path).name for path in paths]
    else:
        common = os.path.commonpath(paths)  # once: it reads all paths
        names = [os.path.relpath(path, common) for path in paths]
    seen: Counter[str] = Counter()
    for index, name in enumerate(map(written, names)):
        seen[name] += 1
        names[index] = f"{name}#{seen[name]}" if seen[name] > 1 else name
    return names


def grouped(said: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return what was said of each file; what is true of very many files, once, with the names of a few.

    Args:
        said: path of each file, and the lines about it, which begin with its path.
    """
    lines = [(path, line) for path, about in said for line in about]
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


def told(items: Sequence[Item], say: Say, done: str, seconds: float = SECONDS) -> Iterator[Item]:
    """Yield the items, and say every few seconds how many of them are done."""
    last = time.monotonic()
    for number, item in enumerate(items):
        now = time.monotonic()
        if now - last >= seconds:
            say(f"{done} {number:,} of {len(items):,} inputs.")
            last = now
        yield item
