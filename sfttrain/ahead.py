"""Sets behind URLs in training: the window that moves through their shards, and shards fetched before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftdata.batches import offsets_of
from sftdata.errors import UsageError
from sftdata.set.cache import BOUND, cache_bound
from sftdata.set.local import named, origin
from sftdata.set.opened import ShardSet
from sfttrain.config import WINDOW, TrainConfig
from sfttrain.schedule import Order, Window

_AHEAD = 2  # shards that a set fetches before they are needed


def windows_of(
    config: TrainConfig, sets: Sequence[ShardSet], sizes: Sequence[int]
) -> tuple[Window | None, ...]:
    """Return in what window the rows of each set are shuffled; None for over the whole.

    Args:
        sizes: rows of each, as they are trained; documents that are trained alone have no window.

    Raises:
        UsageError: the cache is smaller than what the windows hold.
    """
    windows: list[Window | None] = []
    held = 0
    for opened, size in zip(sets, sizes, strict=True):
        shards, far = opened.manifest.shards, origin(opened.folder) is not None
        shown = config.window or (WINDOW if far else None)
        if shown is None or size != len(opened):
            windows.append(None)
            continue
        windows.append(Window(offsets_of([shard.rows for shard in shards]), shown))
        if far:
            held += min(shown + 1 + _AHEAD, len(shards)) * max(shard.bytes for shard in shards)
    if held > (bound := cache_bound() if held else 0):
        names = ", ".join(named(opened.folder) for opened in sets if origin(opened.folder) is not None)
        raise UsageError(
            f"{names}: windows of shards take {held:,} bytes; the cache is bound to {bound:,}.",
            f"raise {BOUND}, in gigabytes, or --set window=N for N shards.",
        )
    return tuple(windows)


class FetchAhead(TrainerCallback):
    """Tell sets behind URLs in which order their shards come in each epoch.

    Args:
        sets: of the run.
        order: of their rows.
    """

    def __init__(self, sets: Sequence[ShardSet], order: Order) -> None:
        self._sets, self._order = sets, order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Take the shards of the epoch in the order of their first rows."""
        rows = self._order.rows(state.global_step // self._order.steps_per_epoch)
        begin = 0
        for opened in self._sets:
            here = rows[(rows >= begin) & (rows < begin + len(opened))] - begin
            ends = offsets_of([shard.rows for shard in opened.manifest.shards])[1:]
            shards, first = np.unique(np.searchsorted(ends, here, side="right"), return_index=True)
            opened.expect(shards[np.argsort(first)].tolist(), _AHEAD)
            begin += len(opened)
