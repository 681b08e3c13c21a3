"""Packing against TRL's packer on the same lengths: seconds, rows, fill.

    python benchmarks/pack.py [--json] [--lengths 10000000] [--trl-lengths 200000]

Two comparisons. *Plan*: ours decides where every example goes; TRL cannot decide without moving tokens, so it gets columns of one
byte a token, the least it can move. *Plan and tokens*: both move ids and labels of four bytes. TRL packs each 1,000 examples
apart, so its time is in proportion to their number; it is timed on the first part of the lengths and compared per length.
"Its function alone" is TRL's best fit on one Arrow table of that part, without `datasets` around it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sftdata.batches import Int64, TokenBatch
from sftdata.pack import gather, plan_packs

MAX_LENGTH = 2048
SEED = 0
SLICE_EXAMPLES = 40_000  # about ten million tokens, as a slice of `prepare` holds


def lognormal_lengths(count: int) -> Int64:
    """Return int64[count] lengths like those of chats: median 148 tokens, mean about 240, cut at MAX_LENGTH."""
    lengths = np.random.default_rng(SEED).lognormal(5, 1, count).astype(np.int64)
    return np.clip(lengths, 1, MAX_LENGTH)


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_ours(lengths: Int64, repeats: int) -> dict[str, float]:
    rows = len(plan_packs(lengths, MAX_LENGTH))
    seconds = median_seconds(lambda: plan_packs(lengths, MAX_LENGTH), repeats)
    return {
        "lengths": len(lengths),
        "seconds": seconds,
        "rows": rows,
        "fill": float(lengths.sum() / (rows * MAX_LENGTH)),
    }


def time_ours_with_tokens(lengths: Int64, repeats: int) -> dict[str, float]:
    slices = [random_tokens(part) for part in np.array_split(lengths, max(1, len(lengths) // SLICE_EXAMPLES))]

    def work() -> None:
        for tokens in slices:
            gather(tokens, tokens.row, plan_packs(tokens.lengths, MAX_LENGTH), MAX_LENGTH, pad_id=0)

    return {"lengths": len(lengths), "seconds": median_seconds(work, repeats)}


def random_tokens(lengths: Int64) -> TokenBatch:
    offsets = np.append(0, np.cumsum(lengths))
    ids = np.random.default_rng(SEED).integers(0, 50_000, offsets[-1]).astype(np.int32)
    return TokenBatch(ids, ids % 2 == 0, offsets, np.arange(len(lengths)))


def time_trl(
    lengths: Int64, columns: dict[str, type[np.generic]], repeats: int
) -> dict[str, dict[str, float]]:
    import pyarrow as pa
    from datasets import Dataset, disable_caching, disable_progress_bars
    from trl.data_utils import _pack_bfd, pack_dataset

    disable_caching()
    disable_progress_bars()
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
    total = int(lengths.sum())
    table = pa.table(
        {
            name: pa.ListArray.from_arrays(offsets, pa.array(np.zeros(total, kind)))
            for name, kind in columns.items()
        }
    )
    dataset = Dataset(table)
    ways: dict[str, Callable[[], Any]] = {
        "pack_dataset": lambda: pack_dataset(dataset, MAX_LENGTH, "bfd", map_kwargs={"keep_in_memory": True}),
        "its function alone": lambda: _pack_bfd(table, MAX_LENGTH),
    }
    found = {}
    for name, work in ways.items():
        rows = len(work())
        seconds = median_seconds(work, repeats)
        found[name] = {
            "lengths": len(lengths),
            "seconds": seconds,
            "rows": rows,
            "fill": total / (rows * MAX_LENGTH),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, default=10_000_000)
    parser.add_argument("--trl-lengths", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    lengths = lognormal_lengths(args.lengths)
    part = lengths[: args.trl_lengths]
    report: dict[str, Any] = {
        "plan": {
            "ours": time_ours(lengths, args.repeats),
            "trl": time_trl(part, {"input_ids": np.int8}, args.repeats),
        },
        "plan and tokens": {
            "ours": time_ours_with_tokens(part, args.repeats),
            "trl": time_trl(part, {"input_ids": np.int32, "labels": np.int32}, args.repeats),
        },
    }
    for figures in report.values():
        ours = figures["ours"]["seconds"] / figures["ours"]["lengths"]
        figures["ratio"] = {
            name: found["seconds"] / found["lengths"] / ours for name, found in figures["trl"].items()
        }
    print(json.dumps(report, indent=2) if args.json else as_text(report))


def as_text(report: dict[str, Any]) -> str:
    lines = [f"packing to {MAX_LENGTH} tokens, medians, lognormal lengths"]
    for name, figures in report.items():
        lines += [f"{name}:", f"  ours: {in_words(figures['ours'])}"]
        for way, found in figures["trl"].items():
            lines.append(
                f"  TRL, {way}: {in_words(found)}; TRL / ours per length: {figures['ratio'][way]:.0f}x"
            )
    return "\n".join(lines)


def in_words(found: dict[str, float]) -> str:
    fill = f", {found['rows']:,} rows, fill {found['fill']:.3%}" if "fill" in found else ""
    return f"{found['lengths']:,} examples in {found['seconds']:.2f} s{fill}"


if __name__ == "__main__":
    main()
