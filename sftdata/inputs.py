"""What the inputs of a run stand for: files, or sources of the registry with settings of their own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from sftdata.config import PrepareConfig
from sftdata.errors import UsageError, no_rows
from sftdata.sources import planning
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.inputs import named_twice
from sftdata.sources.planning import IN_TURN, Say, Scanned
from sftdata.sources.ranges import Sizes

CHUNK_BYTES = 1 << 20


def plan_inputs(
    config: PrepareConfig, note: Say = lambda _: None, scanned: Scanned = IN_TURN
) -> tuple[list[SourcePlan], list[str]]:
    """Open and read through every input; return their plans, and notes on what was left out.

    Raises:
        UsageError: an input cannot be read or is there twice, or the chosen part of a split holds no row.
        DataError: there is no row in all of them.
    """
    for name, times in Counter(config.inputs).items():
        if times > 1:
            raise named_twice(name)
    sizes = Sizes(min(CHUNK_BYTES, config.slice_bytes), config.max_line_bytes)
    found: list[SourcePlan] = []
    notes: list[str] = []
    for name, group in groupby(config.inputs, key=lambda given: given if config.entry(given) else ""):
        reading, inputs = config.reading(name), config.paths(group)
        sources, left_out = planning.plan_inputs(inputs, reading.split, reading.subset, sizes, note, scanned)
        if not sources:
            raise UsageError(f"--split {reading.split}: no row is in it.", "take a larger part.")
        found += [replace(source, entry=name) for source in sources] if name else sources
        notes += left_out
        if name and Path(name).exists():
            notes.append(
                f"{name}: the source of this name in the registry, not the file; ./{name} is the file."
            )
    if not any(source.records for source in found):
        raise no_rows(config.inputs)
    return planning.numbered(found), notes


def named_in(config: PrepareConfig) -> list[str]:
    """Return the sources of the registry that are among the inputs."""
    return [name for name in dict.fromkeys(config.inputs) if config.entry(name) is not None]
