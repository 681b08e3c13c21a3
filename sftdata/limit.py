"""Over-long examples, and examples with nothing to train: cut, dropped or refused, and always counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sftdata.batches import (
    Columns,
    Int8,
    Int32,
    Int64,
    PackPlan,
    Tally,
    TokenBatch,
    count_between,
    offsets_of,
    positions_of,
)
from sftdata.errors import DataError, UsageError

Policy = Literal["truncate", "truncate-left", "drop", "split", "error"]

# Why a row is dropped: it had nothing to train to begin with; it is too long; cutting left nothing to train;
# the cut would fall into one of its pictures, or before it.
REASONS = ("nothing-trained", "over-long", "no-trained-tokens", "overlong-picture")
KEPT = 0


class OverlongError(DataError):
    """An example is longer than `max_length` and the policy is "error".

    Attributes:
        row: index into the RowBatch, for the caller to name file and line.
        found: what is wrong, without the row.
    """

    def __init__(self, row: int, length: int, max_length: int, *, pictures: bool = False) -> None:
        self.found = f"{length:,} tokens; max_length is {max_length:,}."
        fix = "--overlong truncate (or truncate-left, split, drop), or a larger --max-length."
        if pictures:
            fix = "--overlong truncate (or drop), or a larger --max-length."
        super().__init__(f"row {row} has {self.found}", fix)
        self.row = row


def refuse_cutting(packing: str | None, overlong: str | None) -> None:
    """Refuse what would cut pictures.

    Raises:
        UsageError: naming the setting.
    """
    if packing == "wrapped":
        what = "--packing wrapped cuts rows anywhere, and a picture cannot be cut."
        raise UsageError(what, "--packing bfd")
    if overlong in ("split", "truncate-left"):
        what = f"--overlong {overlong} would cut pictures off the questions about them."
        raise UsageError(what, "--overlong truncate")


@dataclass(frozen=True, slots=True, eq=False)
class Pieces(Columns):
    """Stretches of the examples of a batch that may stay, in order; what no kept stretch holds is cut.

    Attributes:
        example: int64[K], index into the batch.
        start, stop: int64[K], tokens of that example, half-open.
        trained: integers[K], trained tokens, the first of the stretch aside: it has no label (pack.py).
        reason: int8[K], `KEPT`, or why the stretch goes: an index into `REASONS`, from 1.
    """

    example: Int64
    start: Int64
    stop: Int64
    trained: Int32 | Int64
    reason: Int8

    def __len__(self) -> int:
        return len(self.example)

    @property
    def lengths(self) -> Int64:
        """int64[K], tokens of each piece."""
        return self.stop - self.start

    def kept(self) -> Pieces:
        """Return the pieces that stay."""
        stays = self.reason == KEPT
        return self if stays.all() else self.take(stays)

    @classmethod
    def of_batches(cls, parts: Sequence[Pieces], sizes: Sequence[int]) -> Pieces:
        """Put pieces of batches end to end; `sizes` are the examples of each batch."""
        firsts = offsets_of(sizes).tolist()
        numbered = zip(parts, firsts, strict=False)
        return cls.join([replace(part, example=part.example + first) for part, first in numbered])


def limit_length(batch: TokenBatch, max_length: int | None, policy: Policy, tally: Tally) -> TokenBatch:
    """Bring every example to at most `max_length` tokens and drop those with nothing to train.

    Args:
        batch: examples.
        max_length: tokens; None for no limit.
        policy: as for `choose_pieces`.
        tally: takes what goes, as for `count_pieces`.

    Raises:
        OverlongError: with "error", for the first over-long example.
    """
    pieces = choose_pieces(batch, max_length, policy)
    count_pieces(batch, pieces, tally)
    return take_pieces(batch, pieces.kept())


def choose_pieces(
    batch: TokenBatch, max_length: int | None, policy: Policy, pictured: Int64 | None = None
) -> Pieces:
    """Choose what may stay of each example, and say of each piece whether it does.

    The first token of a document has no label (pack.py), so it alone is nothing to train.

    Args:
        batch: examples.
        max_length: tokens; None for no limit.
        policy: keep the start ("truncate") or the end ("truncate-left"), "drop", "split" into pieces of the
            same row, or "error".
        pictured: int64[N], tokens of each example up to the end of its last picture, where no cut may fall;
            None in a set without pictures.

    Raises:
        OverlongError: with "error", for the first over-long example.
    """
    limit = max_length if max_length is not None else int(batch.lengths.max(initial=1))
    overlong = batch.lengths > limit
    if policy == "error" and overlong.any():
        first = int(np.argmax(overlong))
        row, length = int(batch.row[first]), int(batch.lengths[first])
        raise OverlongError(row, length, limit, pictures=pictured is not None)
    example, start, stop = _cut(batch.lengths, limit, policy)
    places = np.flatnonzero(batch.trained)
    whole = count_between(places, batch.offsets[:-1] + 1, batch.offsets[1:])
    begin = batch.offsets[example]
    trained = count_between(places, begin + start + 1, begin + stop)
    into = np.zeros(len(batch), np.bool_) if pictured is None else pictured > limit
    reason = np.select(
        [whole[example] == 0, overlong[example] & (policy == "drop"), into[example], trained == 0],
        [1, 2, 4, 3],
        KEPT,
    )
    return Pieces(example, start, stop, trained, reason.astype(np.int8))


def take_pieces(batch: TokenBatch, pieces: Pieces) -> TokenBatch:
    """Return these pieces as examples of their own, of the same rows."""
    if np.array_equal(pieces.example, np.arange(len(batch))) and np.array_equal(
        pieces.stop - pieces.start, batch.lengths
    ):
        return batch
    lengths = pieces.stop - pieces.start
    tokens = positions_of(batch.offsets[pieces.example] + pieces.start, lengths)
    return batch.at(tokens, offsets_of(lengths), batch.row[pieces.example])


def left_over(lengths: Int64, pieces: Pieces, policy: Policy) -> tuple[PackPlan, list[str]]:
    """Return what no kept piece holds, a row a stretch, and why: of `REASONS`, or the policy that cut it.

    An example without a kept piece is left over whole, even where it has no tokens.

    Args:
        lengths: int64[N], of the examples.
        pieces: of the same examples, as `choose_pieces` returned them.
    """
    kept = pieces.kept()
    stays = np.bincount(kept.example, minlength=len(lengths)) > 0
    last = np.diff(kept.example, append=-1) != 0
    before = np.where(np.diff(kept.example, prepend=-1) != 0, 0, np.append(0, kept.stop[:-1])[: len(kept)])
    gone = np.flatnonzero(~stays)
    example = np.concatenate([kept.example, kept.example[last], gone])
    start = np.concatenate([before, kept.stop[last], np.zeros_like(gone)])
    stop = np.concatenate([kept.start, lengths[kept.example[last]], lengths[gone]])
    order = np.lexsort((start, example))
    order = order[(stop > start)[order] | ~stays[example[order]]]
    example = example[order]
    why = pieces.reason[np.searchsorted(pieces.example, example)]
    cut = REASONS[2] if policy == "split" else policy
    reasons = [cut if stays[of] else REASONS[code - 1] for of, code in zip(example, why, strict=True)]
    return PackPlan(np.arange(len(order) + 1), example, start[order], stop[order]), reasons


def count_pieces(batch: TokenBatch, pieces: Pieces, tally: Tally) -> None:
    """Count what goes: tokens in = tokens out + `tokens_cut` + `tokens_dropped`.

    What was cut from a row that is dropped belongs to the drop. Counts `rows_cut`, that stay without some of
    their tokens, and `rows_without_ending`, that stay without their last trained token.
    """
    kept, lengths = pieces.kept(), pieces.stop - pieces.start
    stays = np.zeros(len(batch), np.bool_)
    stays[kept.example] = True
    missing = batch.lengths - np.bincount(pieces.example, lengths, len(batch)).astype(np.int64)
    dropped: list[tuple[int, str, int]] = []
    for code, name in enumerate(REASONS, start=1):
        leaves = pieces.reason == code
        gone = np.unique(pieces.example[leaves & ~stays[pieces.example]])
        tally.tokens_dropped[name] += int(lengths[leaves].sum() + missing[gone].sum())
        sizes = batch.lengths[gone].tolist()
        dropped += [(row, name, size) for row, size in zip(batch.row[gone].tolist(), sizes, strict=True)]
    for row, name, size in sorted(dropped):
        tally.drop(row, name, size)
    cut = missing[stays]
    tally.tokens_cut += int(cut.sum())
    tally.counts["rows_cut"] += int((cut > 0).sum())
    tally.counts["rows_without_ending"] += len(without_ending(batch, kept))


def _cut(lengths: Int64, limit: int, policy: Policy) -> tuple[Int64, Int64, Int64]:
    """Return example, start and stop of what may stay of each example (int64[K] each)."""
    example, begin = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    if policy == "truncate":
        return example, begin, np.minimum(lengths, limit)
    if policy == "truncate-left":
        return example, np.maximum(lengths - limit, 0), lengths
    if policy != "split":
        return example, begin, lengths
    pieces = np.maximum(-(-lengths // limit), 1)
    example = np.repeat(example, pieces)
    start = (np.arange(len(example)) - np.repeat(offsets_of(pieces)[:-1], pieces)) * limit
    return example, start, np.minimum(start + limit, lengths[example])


def without_ending(batch: TokenBatch, kept: Pieces) -> Int64:
    """Return the examples, int64[N], whose last trained token lies in none of the pieces kept of them."""
    places = np.flatnonzero(batch.trained)
    last = np.append(places, 0)[np.searchsorted(places, batch.offsets[kept.example + 1]) - 1]
    last -= batch.offsets[kept.example]
    holding = kept.example[(kept.start <= last) & (last < kept.stop)]
    return np.setdiff1d(kept.example, holding)
