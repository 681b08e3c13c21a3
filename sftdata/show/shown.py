"""A set opened for people: rows and examples as views, in notebooks by themselves. What `sftdata.open` returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sftdata.errors import UsageError
from sftdata.shardset.lists import REJECTS_NAME
from sftdata.shardset.manifest import read_manifest
from sftdata.shardset.opened import PackedRow, ShardSet
from sftdata.show.charts import notebook_summary
from sftdata.show.view import View, view_row
from sftdata.tally import Reject
from sftdata.vocabulary import Vocabulary, read_vocabulary


@dataclass(frozen=True, slots=True, eq=False)
class ShownRow(PackedRow):
    """A packed row that knows its set.

    Attributes:
        shards: the set.
        number: of the row in it.
    """

    shards: ShownSet
    number: int

    def _repr_html_(self) -> str:
        return self.shards.view(self.number)._repr_html_()


class ShownSet(ShardSet):
    """A `ShardSet` whose rows, examples and sums can be looked at."""

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or a list of rows for a slice."""
        row = super().__getitem__(index)
        if isinstance(row, list):
            return row
        columns = (row.input_ids, row.labels, row.seq_lengths, row.examples, row.loss_weights)
        return ShownRow(*columns, self, range(len(self))[index])

    def view(self, number: int) -> View:
        """Return row `number` with its text laid over the stored ids and labels.

        Raises:
            UsageError: there is no such row.
        """
        if not -len(self) <= number < len(self):
            raise UsageError(
                f"{self.folder}: row {number}; the set has rows 0 to {len(self) - 1}.",
                "--row with one of these.",
            )
        row = super().__getitem__(number)
        columns = (row.input_ids, row.labels, row.seq_lengths, row.examples)
        return view_row(
            columns, self.vocabulary, self.place, f"row {range(len(self))[number]} of {self.folder}"
        )

    def view_example(self, example_id: int) -> View:
        """Return all stretches of one example, from whichever rows they lie in.

        Raises:
            UsageError: the set does not hold it; says why where that is known.
        """
        rows = self._rows_of(example_id)
        if not rows:
            raise UsageError(*self._why_absent(example_id))
        documents = [
            document
            for number in rows
            for document in self.view(number).documents
            if document.example_id == example_id
        ]
        where = f"row {', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}"
        return View(f"example {example_id} in {where} of {self.folder}", tuple(documents))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the set's own tokenizer."""
        found = read_vocabulary(self.folder / "tokenizer")
        self.refuse_replaced()
        eos = self.manifest.tokenizer.eos_id
        return found if eos is None else replace(found, stop_ids=found.stop_ids | {eos})

    def _rows_of(self, example_id: int) -> list[int]:
        rows, first = [], 0
        for batch in self.batches():
            found = np.flatnonzero(batch.example_ids == example_id)
            rows += (
                first + np.unique(np.searchsorted(batch.segment_offsets, found, side="right") - 1)
            ).tolist()
            first += len(batch)
        return rows

    def _why_absent(self, example_id: int) -> tuple[str, str]:
        try:
            origin, where = self.origin(example_id), self.place(example_id)
        except KeyError:
            last = max((source.first_id + source.rows for source in self.manifest.sources), default=0) - 1
            return (
                f"{self.folder}: example {example_id}; its sources hold examples 0 to {last}.",
                "--example with one of these.",
            )
        reject = next((found for found in self._rejects() if (found.file, found.record) == origin), None)
        if reject is not None:
            return f"{where}: rejected ({reject.code}): {reject.reason}.", reject.fix
        dropped = (
            ", ".join(sorted(self.manifest.ledger.rows_dropped | self.manifest.ledger.rows_filtered))
            or "blank"
        )
        return (
            f"{where}: read, but not in the set ({dropped}).",
            "`sftdata stats` counts the rows that were left out.",
        )

    def _rejects(self) -> list[Reject]:
        path = self.folder / REJECTS_NAME
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [msgspec.json.decode(line, type=Reject) for line in lines]

    def _repr_html_(self) -> str:
        return notebook_summary(str(self.folder), self.manifest)


def open_shown(folder: str | Path) -> ShownSet:
    """Open a finished set to look at it.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: its manifest is damaged.
    """
    folder = Path(folder)
    return ShownSet(folder, read_manifest(folder))
