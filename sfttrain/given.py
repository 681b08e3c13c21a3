"""Rows that a user gives -> rows as sets have them.

Rows of a `datasets` dataset, or of any sequence or iterable of rows with token ids, are taken as they are:

| columns | what is trained |
|---|---|
| `input_ids`, `labels` | where labels are not -100 |
| `input_ids` with `completion_mask`, `assistant_masks` or both | where each of them is 1 |
| `input_ids` | everything |

`loss_weights`, numbers from 0, say what the loss of each token weighs; 0 masks it.

`seq_lengths`, or `position_ids` that begin again, mark the documents of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import cast

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from sftdata.batches import IGNORE_INDEX, Float32, Int32
from sftdata.errors import DataError, UsageError
from sfttrain.data import Row, filler
from sfttrain.schedule import FILLER

_MASKS = ("completion_mask", "assistant_masks")
_WEIGHTS = "loss_weights"


class CustomRows(Dataset[Row]):
    """Rows by number; `FILLER` gives a fully masked row.

    Attributes:
        sizes: rows, as the one part of an order.
        sources: empty; only sets know where their rows come from.
        weighted: whether the first row says what its tokens weigh.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._rows = rows
        self.sizes = [len(rows)]
        self.sources: list[str] = []
        self.weighted = rows[0].get(_WEIGHTS) is not None

    def __len__(self) -> int:
        return self.sizes[0]

    def __getitem__(self, index: int) -> Row:
        return filler() if index == FILLER else make_row(self._rows[index], index)


class StreamRows(IterableDataset[Row]):
    """Rows of an iterable; with several ranks each takes its turn, so every rank reads and none repeats."""

    def __init__(self, rows: Iterable[Mapping[str, object]], rank: int, ranks: int) -> None:
        self._rows, self._rank, self._ranks = rows, rank, ranks
        self.weighted = False  # not known before the first row; then each batch says so

    def __iter__(self) -> Iterator[Row]:
        for index, row in zip(count(), self._rows, strict=False):
            if index % self._ranks == self._rank:
                yield make_row(row, index)


def custom_rows(data: object, rank: int = 0, ranks: int = 1) -> CustomRows | StreamRows:
    """Wrap a dataset: rows by number where it has a length, else a stream.

    Raises:
        UsageError: it holds no rows of token ids.
    """
    columns = getattr(data, "column_names", None)
    if columns is not None and "input_ids" not in columns:
        found = f"a dataset with the columns {', '.join(columns)}"
        raise UsageError(
            f"{found}; expected input_ids.", "prepare texts and chats with `sftdata prepare` first."
        )
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise DataError("The dataset has no rows.", "check how it was made.")
        return CustomRows(cast(Sequence[Mapping[str, object]], data))
    if isinstance(data, Iterable):
        return StreamRows(data, rank, ranks)
    raise UsageError(f"Found {type(data).__name__}; expected a dataset of rows with input_ids.")


def make_row(row: Mapping[str, object], index: int) -> Row:
    """Turn the columns of one row into what a batch is made of.

    Raises:
        DataError: columns are missing or differ in length.
    """
    if row.get("input_ids") is None:
        raise DataError(
            f"row {index}: columns {', '.join(map(str, row))}; expected input_ids.", "tokenize it first."
        )
    ids = _column(row, "input_ids", index)
    if not len(ids):
        raise DataError(f"row {index}: input_ids is empty.", "leave the row out.")
    labels = _column(row, "labels", index).copy() if row.get("labels") is not None else ids.copy()
    masks = [_column(row, name, index) for name in _MASKS if row.get(name) is not None]
    for name, column in zip(("labels", *_MASKS), (labels, *masks), strict=False):
        if len(column) != len(ids):
            raise DataError(
                f"row {index}: {len(ids)} input_ids, {len(column)} {name}.", "give one value per token."
            )
    for mask in masks:
        labels[mask == 0] = IGNORE_INDEX
    weights = _loss_weights(row, len(ids), index)
    if weights is not None:
        labels[weights == 0] = IGNORE_INDEX
    return Row(ids, labels, _lengths(row, ids, index), None, weights)


def _loss_weights(row: Mapping[str, object], count: int, index: int) -> Float32 | None:
    if row.get(_WEIGHTS) is None:
        return None
    try:
        weights = np.asarray(row[_WEIGHTS], np.float32)
    except (TypeError, ValueError):
        raise DataError(
            f"row {index}: loss_weights is no flat list of numbers.", "give one number per token."
        ) from None
    if weights.shape != (count,) or not np.all(np.isfinite(weights) & (weights >= 0)):
        found = f"row {index}: loss_weights are not {count} finite numbers from 0"
        raise DataError(f"{found}.", "give one such number per token.")
    return weights


def _lengths(row: Mapping[str, object], ids: Int32, index: int) -> Int32:
    if row.get("seq_lengths") is not None:
        lengths = _column(row, "seq_lengths", index)
        if lengths.sum() != len(ids):
            raise DataError(
                f"row {index}: seq_lengths sum to {lengths.sum()}, input_ids are {len(ids)}.",
                "fix the column.",
            )
        return lengths
    if row.get("position_ids") is not None:
        starts = np.flatnonzero(_column(row, "position_ids", index) == 0)
        return np.diff(np.append(starts, len(ids))).astype(np.int32)
    return np.array([len(ids)], np.int32)


def _column(row: Mapping[str, object], name: str, index: int) -> Int32:
    try:
        column = np.asarray(row[name], dtype=np.int64).astype(np.int32)
    except (TypeError, ValueError):
        raise DataError(f"row {index}: {name} is no flat list of integers.", "tokenize it first.") from None
    if column.ndim != 1:
        raise DataError(
            f"row {index}: {name} has {column.ndim} dimensions; expected a flat list.", "give single rows."
        )
    return column
