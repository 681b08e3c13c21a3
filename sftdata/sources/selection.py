"""Which rows are read where `--split` names a part of a split, cut exactly as `datasets` cuts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sftdata.batches import Int64
from sftdata.errors import need
from sftdata.sources.chunks import Chunk, SourcePlan
from sftdata.sources.source import read_chunk
from sftdata.sources.splits import Chosen, wrong_split


def select_rows(name: str, chosen: Chosen, plans: dict[int, SourcePlan]) -> list[SourcePlan]:
    """Return the plans of the files that are read, in the order of `--split`, each cut down to the rows that are meant.

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

    def inside(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
        ends = [*(chunk.first_record for chunk in chunks[1:]), plan.records]
        kept = (
            chunk
            for chunk, end in zip(chunks, ends, strict=True)
            if chunk.first_record < stop and end > first
        )
        return tuple(replace(chunk, only=(first, stop)) for chunk in kept)

    return replace(plan, chunks=inside(plan.chunks), samples=inside(plan.samples))
