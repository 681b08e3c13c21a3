"""One tally from reading to the ledger: what the stages count of a batch, and the rows that leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from sftdata.batches import Int64, RowBatch
from sftdata.errors import Fault
from sftdata.places import place

EXAMPLES = 3  # rows that are shown of those behind a count
FILTERED = "formatter"
"""Why a row is left out for which the user's formatter returned None."""


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A row that cannot be used: where it is, why, and the fix; made where it fails, written as it is.

    Attributes:
        file: name of the source.
        line: 1-based line where it starts; None in a file that is not read by lines.
        record: its number in the file, from 1: of the line, the record of a CSV, the element of an array, the
            row of a table.
        byte_offset: where the row starts in the decompressed source; -1 where rows have no byte position.
        code: stable kebab-case name of the fault.
        reason: what was found and expected.
        fix: how to fix it.
        row: the row as parsed, or its text where it could not be parsed.
    """

    file: str
    line: int | None
    record: int
    byte_offset: int
    code: str
    reason: str
    fix: str
    row: Any

    @property
    def place(self) -> str:
        """Where the row is, in words."""
        if self.line is None:  # only the rows of a table have no byte position
            return place(self.file, self.record, "row" if self.byte_offset < 0 else "element")
        return place(self.file, self.record, "line" if self.line == self.record else "record", self.line)


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is not in the shards although nothing is wrong with it.

    Attributes:
        file, line, record: where it is, as in a `Reject`.
        reason: key of `rows_dropped` or `rows_filtered` in the ledger.
        tokens: how many it has; None where it was left out before it was tokenized.
    """

    file: str
    line: int | None
    record: int
    reason: str
    tokens: int | None


class Tally:
    """Counts by name with the rows behind them, and the rows that are rejected or dropped.

    Args:
        batch: the rows, which know where they are; none where all rows are known to be good.
        rejects: rows that could not be read.

    Attributes:
        counts: how many, by name of the counter.
        rows: indices into the batch of the rows behind a count.
        rejects, dropped: in the order in which the stages met them.
        tokens_cut: tokens cut from rows that stay.
        tokens_dropped: tokens of rows (with `--overlong split`, of parts of rows) that were dropped, by
            reason.
    """

    def __init__(self, batch: RowBatch | None = None, rejects: Iterable[Reject] = ()) -> None:
        self.batch = RowBatch([], *np.zeros((3, 0), np.int64)) if batch is None else batch
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.rejects = [*rejects]
        self.dropped: list[Dropped] = []
        self.tokens_cut = 0
        self.tokens_dropped: Counter[str] = Counter()

    def count(self, name: str, row: int, number: int = 1) -> None:
        """Add `number` for a row, which may be none."""
        if number:
            self.counts[name] += number
            self.rows.setdefault(name, []).append(row)

    def count_rows(self, name: str, rows: Int64) -> None:
        """Add one for each of these rows, int64[K]."""
        if len(rows):
            self.counts[name] += len(rows)
            self.rows.setdefault(name, []).extend(rows.tolist())

    def reject(self, row: int, fault: Fault) -> None:
        """Reject a row of the batch, as it was read."""
        self.rejects.append(
            Reject(
                file=self.batch.file,
                line=self.batch.line_of(row),
                record=self.batch.record_of(row),
                byte_offset=int(self.batch.byte_offsets[row]),
                code=fault.code,
                reason=fault.reason,
                fix=fault.fix,
                row=self.batch.rows[row],
            )
        )

    def drop(self, row: int, reason: str, tokens: int | None = None) -> None:
        """Leave out a row of the batch that has so many tokens."""
        batch = self.batch
        line, record = batch.line_of(row), batch.record_of(row)
        self.dropped.append(Dropped(file=batch.file, line=line, record=record, reason=reason, tokens=tokens))

    def left_out(self) -> Counter[str]:
        """Return how many rows were dropped, by reason."""
        return Counter(row.reason for row in self.dropped)
