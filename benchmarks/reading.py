"""Read rows through an index against reading a written set, from the page cache: in random order, and by batches.

    python benchmarks/reading.py [--rounds 5] [--copies 1] [--json]

The base are the chats of prepare.py at 2,048 tokens. Each view is made both ways, and what is read must be equal. `rows` reads
rows in random order and sums their tokens and labels; `trainer` reads them so and makes batches of 8 of them, as training does;
`batches` reads record batches in order and sums these. Figures are the processor time of the written set by that of the index,
rounds by turns, the best of each; 0.7 is aimed at.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prepare import write_rows
from torch.utils.data import DataLoader

import sftdata
from sfttrain.data import Collator, TrainingRows

VIEWS: dict[str, dict[str, Any]] = {
    "1,024": {"max_length": 1024},
    "8,192, shuffled": {"max_length": 8192, "pack_over": "view", "order": "shuffled"},
    "wrapped at 4,096": {"max_length": 4096, "packing": "wrapped"},
    "a document a row": {"packing": "none", "max_length": 100_000},
}
Reader = Callable[[Any, np.ndarray], int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.copies, options.rounds)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{k:36}{v}" for k, v in found.items()))


def measure(folder: Path, copies: int, rounds: int) -> dict[str, Any]:
    """Measure every view, read in every way."""
    _, tokenizer = write_rows(folder / "chats.jsonl", copies)
    sftdata.prepare(folder / "chats.jsonl", tokenizer=tokenizer, output=folder / "base", max_length=2048)
    found: dict[str, Any] = {}
    for name, settings in VIEWS.items():
        opened = []
        for write in (False, True):
            sftdata.view(folder / "base", output=folder / f"{name}-{write}", write=write, **settings)
            opened.append(sftdata.open(folder / f"{name}-{write}"))
        size = sum(shard.bytes for shard in opened[0].manifest.shards)
        found[f"{name}: bytes a document"] = round(size / opened[0].manifest.ledger.documents, 1)
        ways = {"rows": read_rows, "trainer": read_batches, "batches": read_columns}
        for way, read in ways.items():
            index, written = compare(read, opened, rounds)
            found[f"{name}: {way}"] = f"{written / index:.2f} ({written:.3f} s / {index:.3f} s)"
    return found


def compare(read: Reader, opened: list[Any], rounds: int) -> tuple[float, float]:
    """Return the best processor time of the view by index, and of the written one."""
    order = np.random.default_rng(0).permutation(len(opened[0]))
    spent: list[list[float]] = [[], []]
    assert read(opened[0], order) == read(opened[1], order)
    for _ in range(rounds):
        for number, rows in enumerate(opened):
            begin = time.process_time()
            read(rows, order)
            spent[number].append(time.process_time() - begin)
    return min(spent[0]), min(spent[1])


def read_rows(rows: Any, order: np.ndarray) -> int:
    """Sum ids and labels of rows, one by one."""
    total = 0
    for number in order.tolist():
        row = rows[number]
        total += int(row.input_ids.sum()) + int(row.labels.sum())
    return total


def read_batches(rows: Any, order: np.ndarray) -> int:
    """Make batches of 8 rows, through the loader that training has."""
    batches = [order[first : first + 8].tolist() for first in range(0, len(order), 8)]
    loader = DataLoader(TrainingRows([rows]), batch_sampler=batches, collate_fn=Collator(flatten=True))
    return sum(int(batch["labels"].numpy().sum()) for batch in loader)  # torch would sum with threads


def read_columns(rows: Any, order: np.ndarray) -> int:
    """Sum ids and labels of record batches, in order."""
    return sum(int(batch.input_ids.sum()) + int(batch.labels.sum()) for batch in rows.batches())


if __name__ == "__main__":
    main()
