"""Tasks as arrays: a set of a terabyte has a hundred thousand of them, made of a million chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import overload

import numpy as np

from sftdata.batches import Int64
from sftdata.sources.borders import content_borders
from sftdata.sources.chunks import Chunk, Chunks, Lazy, SourcePlan

EARLY = ((4 << 20, 1 << 20), (8 << 20, 2 << 20), (16 << 20, 4 << 20))
"""(place in the input, bytes of a slice before it): a small input gives work to several processes too."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What becomes one shard: consecutive chunks of the input, one batch each."""

    index: int
    chunks: tuple[Chunk, ...]


def by_source(task: ShardTask) -> list[list[Chunk]]:
    """Return the chunks of a task, source by source."""
    return [list(chunks) for _, chunks in groupby(task.chunks, key=lambda chunk: chunk.number)]


@dataclass(frozen=True, slots=True, eq=False)
class Tasks(Lazy[ShardTask]):
    """Tasks, made when they are asked for.

    Attributes:
        chunks: of all sources, end to end.
        ends: int64[S], number of chunks up to the end of each source.
        bounds: int64[T + 1], the first chunk of each task of the plan, and the number of chunks.
        numbers: int64[N], of these tasks in the plan.
        sizes: int64[N], bytes of the input of each, decompressed.
    """

    chunks: tuple[Chunks, ...]
    ends: Int64
    bounds: Int64
    numbers: Int64
    sizes: Int64

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> ShardTask: ...

    @overload
    def __getitem__(self, index: slice) -> Tasks: ...

    def __getitem__(self, index: int | slice) -> ShardTask | Tasks:
        if isinstance(index, slice):
            return self.pick(np.arange(len(self))[index])
        number = int(self.numbers[index])
        first, stop = self.bounds[number : number + 2].tolist()
        found = list[Chunk]()
        for source in range(int(np.searchsorted(self.ends, first, side="right")), len(self.ends)):
            begin = int(self.ends[source]) - len(self.chunks[source])
            if begin >= stop:
                break
            found += self.chunks[source][max(first - begin, 0) : stop - begin]
        return ShardTask(number, tuple(found))

    def pick(self, which: Int64) -> Tasks:
        """Return some of them, by their places here."""
        return replace(self, numbers=self.numbers[which], sizes=self.sizes[which])

    def without(self, numbers: Iterable[int]) -> Tasks:
        """Return all but those of these numbers."""
        return self.pick(np.flatnonzero(~np.isin(self.numbers, list(numbers))))

    def size_of(self, number: int) -> int:
        """Return the size of a task by its number; the numbers are in order."""
        return int(self.sizes[np.searchsorted(self.numbers, number)])

    def longest_first(self) -> Tasks:
        """Order them so that no process has a long one at the end; compressed input is read forward."""
        if any(chunks.source.compression != "none" for chunks in self.chunks):
            return self
        return self.pick(np.argsort(-self.sizes, kind="stable"))


def cut_tasks(sources: Sequence[SourcePlan], slice_bytes: int) -> Tasks:
    """Group chunks into tasks of about `slice_bytes`, the first ones smaller, at borders that content sets.

    Where they lie depends on what is around and on how much comes before it, never on what comes behind.
    """
    none = np.zeros(0, np.int64)
    ends = np.cumsum(np.concatenate([none, *map(_sizes, sources)]))
    starts = np.append(0, ends)[:-1]
    early = np.select([starts < place for place, _ in EARLY], [size for _, size in EARLY], slice_bytes)
    ranks = np.concatenate([none.astype(np.uint64), *(source.chunks.ranks for source in sources)])
    first = content_borders(starts, ranks, int(ends.max(initial=0)), np.minimum(early, slice_bytes))
    return Tasks(
        tuple(source.chunks for source in sources),
        np.cumsum([len(source.chunks) for source in sources], dtype=np.int64),
        np.append(first, len(ends)),
        np.arange(len(first)),
        np.diff(np.append(starts[first], ends[-1:] if len(ends) else none)),
    )


def _sizes(source: SourcePlan) -> Int64:
    """Return the bytes of each chunk; rows of a columnar source count by their share of the file."""
    if source.source.container in ("parquet", "arrow", "saved", "hub"):
        return source.chunks.sizes * max(source.raw_bytes, source.records) // max(source.records, 1)
    return source.chunks.sizes  # of the decompressed stream
