"""Logs of documents as a run writes them, without one: every document of some sets, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sftdata.blame.log import DocumentLosses, log_batch, log_path, log_schema, trained_set
from sftdata.set.opened import open_set

Loss = Callable[[int, str, int, int], float]  # of a trained token, by set, source, line and step


def write_log(
    run: Path,
    sets: list[Path],
    loss: Loss,
    *,
    epochs: int = 2,
    a_step: int = 8,
    seed: int = 0,
    behind: int = 0,
) -> None:
    """Log what training on the sets behind a step would: rows in random order, some documents a step."""
    opened, rng = [open_set(folder) for folder in sets], np.random.default_rng(seed)
    found: list[tuple[float, ...]] = []
    for _ in range(epochs):
        rows = [(number, row) for number, shards in enumerate(opened) for row in range(len(shards))]
        for place in rng.permutation(len(rows)).tolist():
            number, row = rows[place]
            for document in opened[number][row].documents():
                step = behind + len(found) // a_step + 1
                trained = int((document.labels[1:] != -100).sum())
                source, line = opened[number].origin(document.example_id)
                mean = loss(number, source, line, step) if trained else 0.0
                size = len(document.labels), trained, 0, trained
                found.append((step, number, row, document.example_id, *size, mean * trained))
    named = [trained_set(run, shards.folder, shards.manifest.digest) for shards in opened]
    schema = log_schema(named)
    kinds = (np.int32, np.int16, np.int64, np.int64, np.int32, np.int32, np.int32, np.float32, np.float32)
    columns = DocumentLosses(
        *(np.array(column, kind) for column, kind in zip(zip(*found, strict=True), kinds, strict=True))
    )
    path = log_path(run, behind, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(schema.serialize()) + bytes(log_batch(columns, schema).serialize()))
