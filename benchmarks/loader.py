"""How long steps on pictures wait for the loader, by its workers: stand-in steps sleep, and leave the processor to the workers.

    python -m benchmarks.loader [SECONDS_OF_A_STEP]

Waiting is counted from the second batch on: the first one has to start the workers.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from torch.utils.data import DataLoader

import sftdata
from sfttrain.data import Collator, TrainingRows
from sfttrain.pictures import inputs_of
from tests.made_pictures import make, saved
from tests.picture_sets import asked, write_rows
from tests.processors import write_processor
from tests.vision_models import SMALL

FAMILIES = ("qwen2.5-vl", "llava", "idefics3", "gemma3")
ROWS, HEIGHT, WIDTH = 48, 480, 640


def make_rows(folder: Path) -> Path:
    """Write rows of one picture each."""
    (folder / "pictures").mkdir(parents=True)
    for number in range(ROWS):
        (folder / "pictures" / f"{number}.jpg").write_bytes(saved(make(HEIGHT, WIDTH, seed=number), "JPEG"))
    return write_rows(folder, [asked("<image>?", "Red", images=[f"pictures/{n}.jpg"]) for n in range(ROWS)])


def waited(shards: Path, workers: int, step: float) -> tuple[float, float]:
    """Return the share of the time that steps wait, and pictures a second."""
    opened = sftdata.open(shards)
    rows = TrainingRows([opened], unpack=True)
    collate = Collator(False, pictures=inputs_of([opened]))
    batches = iter(DataLoader(rows, 1, collate_fn=collate, num_workers=workers))
    next(batches)
    began, waiting = time.perf_counter(), 0.0
    for _ in range(ROWS - 1):
        time.sleep(step)
        asked_at = time.perf_counter()
        next(batches)
        waiting += time.perf_counter() - asked_at
    whole = time.perf_counter() - began
    return waiting / whole, (ROWS - 1) / whole


def main() -> None:
    step = float(sys.argv[1]) if len(sys.argv) > 1 else 0.2
    with tempfile.TemporaryDirectory() as place:
        rows = make_rows(Path(place) / "rows")
        print(f"{ROWS} pictures of {WIDTH}x{HEIGHT}, a step of {step} s takes one\n")
        print("| family | workers | waiting | pictures/s |\n|---|---|---|---|")
        for name in FAMILIES:
            model = write_processor(Path(place) / name, name)
            (model / "chat_template.jinja").write_text(SMALL[name][1], "utf-8")
            shards = Path(place) / f"{name}-set"
            sftdata.prepare(str(rows), tokenizer=str(model), output=shards, max_length=4096, workers=1)
            for workers in (0, 1, 2):
                share, speed = waited(shards, workers, step)
                print(f"| {name} | {workers} | {share:.0%} | {speed:.1f} |", flush=True)


if __name__ == "__main__":
    main()
