"""Over-long examples, and examples with nothing to train: cut, dropped or refused, and always counted."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sftdata.batches import Bool, Int64, Tally, TokenBatch
from sftdata.errors import DataError
from sftdata.ragged import offsets_of, positions_of

Policy = Literal["truncate", "truncate-left", "drop", "split", "error"]

# Why a row is dropped: it had nothing to train to begin with; it is too long; cutting left nothing to train.
REASONS = ("nothing-trained", "over-long", "no-trained-tokens")
KEPT = 0


class OverlongError(DataError):
    """An example is longer than `max_length` and the policy is "error".

    Attributes:
        row: index into the RowBatch, for the caller to name file and line.
    """

    def __init__(self, row: int, length: int, max_length: int) -> None:
        super().__init__(
            f"row {row} has {length} tokens; max_length is {max_length}.",
            "--overlong truncate (or truncate-left, split, drop), or a larger --max-length.",
        )
        self.row = row


def limit_length(batch: TokenBatch, max_length: int | None, policy: Policy, tally: Tally) -> TokenBatch:
    """Bring every example to at most `max_length` tokens and drop those with nothing to train.

    The first token of a document has no label (pack.py), so it alone is nothing to train.

    Args:
        batch: examples.
        max_length: tokens; None for no limit.
        policy: keep the start ("truncate") or the end ("truncate-left"), "drop", "split" into pieces of the
            same row, or "error".
        tally: takes what goes: tokens in = tokens out + `tokens_cut` + `tokens_dropped`. Counts `rows_cut`,
            that stay without some of their tokens, and `rows_without_ending`, that stay without their last
            trained token.

    Raises:
        OverlongError: with "error", for the first over-long example.
    """
    limit = max_length if max_length is not None else int(batch.lengths.max(initial=1))
    overlong = batch.lengths > limit
    if policy == "error" and overlong.any():
        first = int(np.argmax(overlong))
        raise OverlongError(int(batch.row[first]), int(batch.lengths[first]), limit)
    example, start, stop = _pieces(batch, limit, policy)
    labelled = _Labelled(batch)
    trainable = labelled.any(batch.offsets[:-1], batch.offsets[1:])
    reason = np.select(
        [~trainable[example], overlong[example] & (policy == "drop"), ~labelled.any(start, stop)],
        [1, 2, 3],
        KEPT,
    )
    kept = reason == KEPT
    result = _gather(batch, example[kept], start[kept], stop[kept])
    tally.counts["rows_without_ending"] += labelled.endings_lost(example[kept], start[kept], stop[kept])
    _count(batch, example, stop - start, reason, tally)
    return result


def _pieces(batch: TokenBatch, limit: int, policy: Policy) -> tuple[Int64, Int64, Int64]:
    """Return example, start and stop of what may stay of each example (int64[K] each)."""
    begin, end = batch.offsets[:-1], batch.offsets[1:]
    example = np.arange(len(batch))
    if policy == "truncate":
        return example, begin, np.minimum(begin + limit, end)
    if policy == "truncate-left":
        return example, np.maximum(end - limit, begin), end
    if policy != "split":
        return example, begin, end
    pieces = np.maximum(-(-batch.lengths // limit), 1)
    example = np.repeat(example, pieces)
    number = np.arange(len(example)) - np.repeat(offsets_of(pieces)[:-1], pieces)
    start = begin[example] + number * limit
    return example, start, np.minimum(start + limit, end[example])


class _Labelled:
    """Query which stretches of a batch hold a token with a label."""

    def __init__(self, batch: TokenBatch) -> None:
        self._batch = batch
        self._trained = np.flatnonzero(batch.trained)

    def any(self, start: Int64, stop: Int64) -> Bool:
        """bool[K]: stretches with something to train."""
        found: Bool = self._before(stop) > self._before(np.minimum(start + 1, stop))
        return found

    def endings_lost(self, example: Int64, start: Int64, stop: Int64) -> int:
        """Count examples whose last trained token lies in none of the stretches."""
        last = np.append(self._trained, 0)[self._before(self._batch.offsets[example + 1]) - 1]
        holding = example[(start <= last) & (last < stop)]
        return len(np.unique(example)) - len(np.unique(holding))

    def _before(self, place: Int64) -> Int64:
        return np.searchsorted(self._trained, place)


def _gather(batch: TokenBatch, example: Int64, start: Int64, stop: Int64) -> TokenBatch:
    if np.array_equal(start, batch.offsets[:-1]) and np.array_equal(stop, batch.offsets[1:]):
        return batch
    lengths = stop - start
    return batch.at(positions_of(start, lengths), offsets_of(lengths), batch.row[example])


def _count(batch: TokenBatch, example: Int64, lengths: Int64, reason: Int64, tally: Tally) -> None:
    """Count by reason; what was cut from a row that is dropped belongs to the drop."""
    stays = np.zeros(len(batch), np.bool_)
    stays[example[reason == KEPT]] = True
    missing = batch.lengths - np.bincount(example, lengths, len(batch)).astype(np.int64)
    dropped: list[tuple[int, str, int]] = []
    for code, name in enumerate(REASONS, start=1):
        gone = np.unique(example[(reason == code) & ~stays[example]])
        tally.tokens_dropped[name] += int(lengths[reason == code].sum() + missing[gone].sum())
        sizes = batch.lengths[gone].tolist()
        dropped += [(row, name, size) for row, size in zip(batch.row[gone].tolist(), sizes, strict=True)]
    for row, name, size in sorted(dropped):
        tally.drop(row, name, size)
    cut = missing[stays]
    tally.tokens_cut += int(cut.sum())
    tally.counts["rows_cut"] += int((cut > 0).sum())
