"""What a set is made of, in numbers: the ledger, lengths, fill, and what each source gave."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from sftdata.shardset.ledger import Ledger
from sftdata.shardset.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Part:
    """A named share of a whole.

    Attributes:
        name: `trained`, `cut: truncate`, ...
        kind: what it is for the eye: kept, trained, context, padding, lost or bad.
        count: rows or tokens.
    """

    name: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Examples of `start` to `stop - 1` tokens, before any cut."""

    start: int
    stop: int
    examples: int


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What one source gave.

    Attributes:
        name: of the source.
        rows: kept rows.
        tokens, tokens_trained: of these in the set.
    """

    name: str
    rows: int
    tokens: int
    tokens_trained: int


@dataclass(frozen=True, slots=True)
class Reach:
    """Examples of at least `tokens` tokens: what a smaller max_length would cut."""

    tokens: int
    examples: int


@dataclass(frozen=True, slots=True)
class Stats:
    """The numbers of one set; every count is of the manifest, none is guessed.

    Attributes:
        digest: of the set.
        max_length: tokens per packed row; None where rows keep their own length.
        rows, tokens, slots: what became of rows in, of tokens in, and what fills the packed rows.
        rows_packed, documents, shards: counts.
        fill: tokens over slots.
        trained_share: trained tokens over tokens of the set.
        lengths: histogram, in order, without gaps.
        reach: examples at or above each power of two.
        sources: in the order of the manifest.
        counters: everything else that was counted.
        notes: what was defaulted or guessed.
    """

    digest: str
    max_length: int | None
    rows: tuple[Part, ...]
    tokens: tuple[Part, ...]
    slots: tuple[Part, ...]
    rows_packed: int
    documents: int
    shards: int
    fill: float
    trained_share: float
    lengths: tuple[LengthBin, ...]
    reach: tuple[Reach, ...]
    sources: tuple[SourceShare, ...]
    counters: dict[str, int]
    notes: tuple[str, ...]


def measure(manifest: Manifest) -> Stats:
    """Return the numbers of a set; no shard is opened."""
    ledger = manifest.ledger
    slots = _parts(
        ("trained", "trained", ledger.tokens_trained),
        ("context", "context", ledger.tokens_context),
        ("padding", "padding", ledger.tokens_padding),
    )
    bins = length_histogram(ledger.lengths)
    return Stats(
        digest=manifest.digest,
        max_length=manifest.max_length,
        rows=_rows(ledger),
        tokens=_tokens(ledger),
        slots=slots,
        rows_packed=ledger.rows_packed,
        documents=ledger.documents,
        shards=len(manifest.shards),
        fill=ledger.tokens / max(sum(part.count for part in slots), 1),
        trained_share=ledger.tokens_trained / max(ledger.tokens, 1),
        lengths=bins,
        reach=_reach(bins),
        sources=tuple(
            SourceShare(name, own.rows, own.tokens, own.tokens_trained)
            for name, own in ledger.sources.items()
        ),
        counters={name: count for name, count in sorted(ledger.counters.items()) if count},
        notes=manifest.notes,
    )


def stats_json(manifest: Manifest) -> dict[str, Any]:
    """Return the numbers and the manifest they come from, as plain JSON data."""
    return {"stats": msgspec.to_builtins(asdict(measure(manifest))), "manifest": manifest.to_json()}


def length_histogram(lengths: dict[int, int]) -> tuple[LengthBin, ...]:
    """Return the bins from the shortest to the longest example, empty ones included.

    >>> [(found.start, found.stop, found.examples) for found in length_histogram({15: 2, 18: 1})]
    [(15, 16, 2), (16, 18, 0), (18, 20, 1)]
    """
    if not lengths:
        return ()
    bins, start = [], min(lengths)
    while start <= max(lengths):
        stop = start + (1 << max(start.bit_length() - 4, 0))
        bins.append(LengthBin(start, stop, lengths.get(start, 0)))
        start = stop
    return tuple(bins)


def _rows(ledger: Ledger) -> tuple[Part, ...]:
    return _parts(
        ("kept", "kept", ledger.rows_kept),
        *((f"dropped: {reason}", "lost", count) for reason, count in sorted(ledger.rows_dropped.items())),
        *((f"filtered: {rule}", "padding", count) for rule, count in sorted(ledger.rows_filtered.items())),
        *((f"rejected: {code}", "bad", count) for code, count in sorted(ledger.rows_rejected.items())),
    )


def _tokens(ledger: Ledger) -> tuple[Part, ...]:
    return _parts(
        ("trained", "trained", ledger.tokens_trained),
        ("context", "context", ledger.tokens_context),
        *((f"cut: {policy}", "lost", count) for policy, count in sorted(ledger.tokens_cut.items())),
        ("in dropped rows", "bad", ledger.tokens_in_dropped_rows),
    )


def _parts(*parts: tuple[str, str, int]) -> tuple[Part, ...]:
    """Keep what is there; the first part stands even when it is nothing."""
    return tuple(Part(*part) for index, part in enumerate(parts) if part[2] or not index)


def _reach(bins: tuple[LengthBin, ...]) -> tuple[Reach, ...]:
    """Count by powers of two, which are edges of bins, so that the counts are exact."""
    if not bins:
        return ()
    longest = bins[-1].start
    powers = [1 << power for power in range(5, longest.bit_length())]
    counted = (
        Reach(power, sum(found.examples for found in bins if found.start >= power)) for power in powers
    )
    whole = sum(found.examples for found in bins)
    return tuple(found for found in counted if found.examples < whole)
