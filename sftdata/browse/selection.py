"""The documents that a query selects, and how they are spread over lengths, trained shares and sources."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sftdata.batches import Bool, Int64
from sftdata.browse.catalog import BESIDE, IN_ROWS, SHARES, Catalog, UInt8, blocks_of
from sftdata.browse.query import Query
from sftdata.views.select import within_bounds, within_sources

_BINS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Some documents of a set. Each histogram counts what the other filters leave, so that it shows its own.

    Attributes:
        mask: bool[N], by example id.
        before: int64[B + 1], how many are selected before each block of the mask.
        tokens, trained: of the selected documents.
        lengths: int64[256], by the bin of their length.
        shares: int64[16], by the part of them that is trained.
        sources: int64[S], by the source, in the order of the manifest.
    """

    mask: Bool
    before: Int64
    tokens: int
    trained: int
    lengths: Int64
    shares: Int64
    sources: Int64

    def __len__(self) -> int:
        return int(self.before[-1])

    def ids(self, first: int, count: int) -> list[int]:
        """Return the example ids of some selected documents, counted from 0."""
        found: list[int] = []
        blocks = list(blocks_of(len(self.mask)))
        number = int(np.searchsorted(self.before, first, side="right")) - 1
        while len(found) < count and number < len(blocks):
            skipped = max(first - int(self.before[number]), 0)
            here = np.flatnonzero(self.mask[blocks[number]])[skipped : skipped + count - len(found)]
            found += (here + blocks[number].start).tolist()
            number += 1
        return found

    def rank(self, example_id: int) -> int:
        """Return how many selected documents come before an example id."""
        if not len(self.mask):
            return 0
        blocks = list(blocks_of(len(self.mask)))
        number = min(example_id, len(self.mask) - 1) // (blocks[0].stop - blocks[0].start)
        inside = self.mask[blocks[number].start : example_id]
        return int(self.before[number]) + int(np.count_nonzero(inside))


def select(catalog: Catalog, query: Query, found: Int64 | None = None) -> Selection:
    """Find the documents of a query, but for its text.

    Args:
        found: example ids of its finding, if it has one.

    Raises:
        UsageError: a source that it names is not there.
    """
    sources, among = _sources(catalog, query), _among(catalog, found)
    count = len(catalog)
    mask = np.empty(count, np.bool_)
    elsewhere = mask if sources is None else np.empty(count, np.bool_)  # what the sources are counted in
    lengths, shares = np.zeros(_BINS, np.int64), np.zeros(SHARES, np.int64)
    tokens, trained, before = 0, 0, [0]
    for block in blocks_of(count):
        there = _in_state(catalog.state[block], query.state)
        if among is not None:
            there &= among[block]
        within = {"tokens": there.copy(), "trained": there.copy()}
        for bound, kept in within_bounds(query.recipe, catalog.length[block], catalog.trained[block]):
            within[bound.partition("-")[2]] &= kept
        elsewhere[block] = within["tokens"] & within["trained"]
        if sources is not None:
            for kept in within.values():
                kept &= sources[block]
        mask[block] = here = within["tokens"] & within["trained"]
        lengths += np.bincount(catalog.length_bin[block][within["trained"]], minlength=_BINS)
        shares += np.bincount(catalog.share_bin[block][within["tokens"]], minlength=SHARES)
        tokens += int(catalog.length[block].sum(dtype=np.int64, where=here))
        trained += int(catalog.trained[block].sum(dtype=np.int64, where=here))
        before.append(before[-1] + int(np.count_nonzero(here)))
    spread = np.zeros(len(catalog.shards.manifest.sources), np.int64)
    for first, last, index in catalog.sources:
        spread[index] = np.count_nonzero(elsewhere[first:last])
    return Selection(mask, np.array(before), tokens, trained, lengths, shares, spread)


def _in_state(state: UInt8, wanted: str) -> Bool:
    """bool[N]: documents that are there, in rows, cut or dropped."""
    exact = {"cut": IN_ROWS | BESIDE, "dropped": BESIDE}
    kept: Bool = state == exact[wanted] if wanted in exact else state & (IN_ROWS if wanted else 255) > 0
    return kept


def _sources(catalog: Catalog, query: Query) -> Bool | None:
    """bool[N]: documents of the sources that are asked for; None where all are."""
    names = [source.name for source in catalog.shards.manifest.sources]
    steps = [kept for _, kept in within_sources(query.recipe, names)]
    if not steps:
        return None
    kept, chosen = np.logical_and.reduce(steps), np.zeros(len(catalog), np.bool_)
    for first, last, index in catalog.sources:
        chosen[first:last] = kept[index]
    return chosen


def _among(catalog: Catalog, found: Int64 | None) -> Bool | None:
    if found is None:
        return None
    among = np.zeros(len(catalog), np.bool_)
    among[found] = True
    return among
