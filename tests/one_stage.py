"""One stage at a time: each call with a tally of its own, and what it counted and rejected beside what it returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sftdata.batches import Int64, Row, RowBatch, Tally, TextBatch, TokenBatch, Tokens
from sftdata.encode.engine import Encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import Fault
from sftdata.formats import convert
from sftdata.formats.fields import FormatOptions
from sftdata.limit import Policy
from sftdata.limit import limit_length as _limit_length
from sftdata.masks import texts, tokens
from sftdata.masks.texts import Renderer

Faults = list[tuple[int, Fault]]


class Counts(Counter[str]):
    """Counters by name; 0 where nothing was counted."""

    def __getattr__(self, name: str) -> int:
        return self[name]


class Recorder(Tally):
    """A tally that keeps the row of each reject and drop, for stages that are tried without the rows as read."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: Faults = []
        self.drops: list[tuple[int, str, int | None]] = []

    def reject(self, row: int, fault: Fault) -> None:
        self.faults.append((row, fault))

    def drop(self, row: int, reason: str, tokens: int | None = None) -> None:
        self.drops.append((row, reason, tokens))


class Converted(NamedTuple):
    rows: list[Row]
    row: Int64
    faults: Faults
    filtered: Int64
    unused: dict[str, int]


def convert_rows(batch: RowBatch, format_name: str, options: FormatOptions) -> Converted:
    tally = Recorder()
    found = convert.convert_rows(batch, format_name, options, tally)
    unused = {name.removeprefix("column_unused:"): count for name, count in tally.counts.items()}
    return Converted(
        found.rows, found.row, tally.faults, np.array([row for row, _, _ in tally.drops], np.int64), unused
    )


class Rendered(NamedTuple):
    conversations: TextBatch | None
    raw: TextBatch | None
    faults: Faults
    tally: Tally


def render_rows(rows: Sequence[Row], row: Int64, renderer: Renderer) -> Rendered:
    tally = Recorder()
    found = texts.render_rows(rows, row, renderer, tally)
    return Rendered(found.conversations, found.raw, tally.faults, tally)


def encode_batch(
    batch: TextBatch, encoder: Encoder, *, boundary: Literal["split", "merge"] = "split"
) -> tuple[TokenBatch, Counts]:
    tally = Recorder()
    return tokens.encode_batch(batch, encoder, tally, boundary=boundary), Counts(tally.counts)


def read_given(rows: Sequence[Tokens], row: Int64, resolved: ResolvedTokenizer) -> tuple[TokenBatch, Faults]:
    tally = Recorder()
    return tokens.read_given(rows, row, resolved, tally), tally.faults


class LengthCounts(NamedTuple):
    tokens_cut: int
    tokens_in_dropped_rows: dict[str, int]
    rows_dropped: dict[str, int]
    rows_cut: int
    rows_without_ending: int
    dropped: list[tuple[int, str, int | None]]


def limit_length(
    batch: TokenBatch, max_length: int | None, policy: Policy
) -> tuple[TokenBatch, LengthCounts]:
    tally = Recorder()
    result = _limit_length(batch, max_length, policy, tally)
    counts: Any = tally.counts
    return result, LengthCounts(
        tally.tokens_cut,
        dict(+tally.tokens_dropped),
        dict(Counter(reason for _, reason, _ in tally.drops)),
        counts["rows_cut"],
        counts["rows_without_ending"],
        tally.drops,
    )
