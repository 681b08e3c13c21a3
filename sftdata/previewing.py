"""Look before preparing: a few examples as they would be trained, what the whole would come to, and markers in context."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32
from sftdata.config import PrepareConfig
from sftdata.engine.local import usable_cores
from sftdata.errors import DataError
from sftdata.pack import plan_packs
from sftdata.pipeline import PreparedChunk, prepare_chunk
from sftdata.places import Unit, place
from sftdata.plan import Plan, make_plan
from sftdata.shardset.ledger import Ledger
from sftdata.sources.source import Chunk, read_chunk
from sftdata.stages import load_shared, load_stages

PART = 0.25  # of each stretch of a large input
IN_BYTES = ("jsonl", "text", "json", "csv")  # containers whose chunks are counted in bytes, not in rows


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One example as it would be trained.

    Attributes:
        file: where its row stands.
        record: 1-based number of the row there.
        unit: what is numbered so.
        input_ids, labels: int32[T].
    """

    file: str
    record: int
    unit: Unit
    input_ids: Int32
    labels: Int32

    @property
    def place(self) -> str:
        """Where its row stands, in words."""
        return place(self.file, self.record, self.unit)


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would give, judged by a sample.

    Attributes:
        examples: the first few of the sample.
        ledger: of the sampled rows.
        rejects: reasons of the sampled rows that would be rejected.
        share: sampled bytes over all bytes.
        records: rows of the whole input.
        seconds: what the sample took, by the reference engine in one process.
        workers: processes that `prepare` would use.
        fill: of packs made from the sample.
        max_length: tokens per packed row.
        notes: what was decided.
        tokenizer_folder: to decode with.
    """

    examples: list[Example]
    ledger: Ledger
    rejects: list[str]
    share: float
    records: int
    seconds: float
    workers: int
    fill: float
    max_length: int
    notes: tuple[str, ...]
    tokenizer_folder: Path

    def projected(self, batch_size: int) -> dict[str, int]:
        """Return estimates for the whole input; exact when all of it was sampled."""
        tokens = round(self.ledger_tokens / self.share)
        packs = -(-round(tokens / max(self.fill, 1e-9)) // self.max_length)
        return {
            "rows": self.ledger.rows_in if self.share == 1 else self.records,
            "tokens": tokens,
            "packed_rows": packs,
            "bytes_on_disk": packs * self.max_length * 8,
            "steps_per_epoch": -(-packs // batch_size),
            "seconds_at_most": math.ceil(self.seconds / self.share / self.workers),
        }

    @property
    def ledger_tokens(self) -> int:
        """Tokens of the sampled examples, after the over-long policy."""
        return (
            self.ledger.tokens_in - sum(self.ledger.tokens_cut.values()) - self.ledger.tokens_in_dropped_rows
        )

    def lines(self, batch_size: int) -> list[str]:
        """Return what to show above the examples."""
        projected = self.projected(batch_size)
        about = "" if self.share == 1 else "about "
        return [
            *self.notes,
            f"{projected['rows']:,} rows, {about}{projected['tokens']:,} tokens, {projected['packed_rows']:,} packed rows of"
            f" {self.max_length} ({self.fill:.1%} full), {projected['bytes_on_disk'] / 1e6:,.1f} MB,"
            f" {projected['steps_per_epoch']:,} steps an epoch at batch size {batch_size},"
            f" prepared in at most {projected['seconds_at_most']:,} s",
            *(f"would be rejected: {reason}" for reason in self.rejects[:3]),
        ]

    def to_json(self, batch_size: int) -> dict[str, Any]:
        """Return plain JSON data."""
        examples = [
            {
                "file": example.file,
                "line": example.record if example.unit == "line" else None,
                "record": example.record,
                "input_ids": example.input_ids.tolist(),
                "labels": example.labels.tolist(),
            }
            for example in self.examples
        ]
        return {
            "notes": list(self.notes),
            "projected": self.projected(batch_size),
            "ledger": self.ledger.to_json(),
            "rejects": self.rejects,
            "examples": examples,
        }


def preview(config: PrepareConfig, number: int) -> Preview:
    """Prepare a sample of the rows and show what comes out; nothing is written.

    Args:
        number: examples to keep.

    Raises:
        SftError: what would stop `prepare` from starting, or there are no rows.
    """
    plan = make_plan(config.model_copy(update={"engine": "tokenizers"}))
    load_shared(plan.job)  # takes as long for any input, so it is no part of the seconds
    stages, sample = load_stages(plan.job), sample_chunks(plan)
    began = time.monotonic()
    chunks = [prepare_chunk(stages, taken) for taken in sample]
    seconds = time.monotonic() - began
    ledger = Ledger()
    for chunk in chunks:
        ledger.merge(chunk.ledger)
    if not ledger.rows_in:
        raise DataError(f"{', '.join(config.inputs)}: no rows.", "give a file that holds rows.")
    lengths = np.concatenate([chunk.tokens.lengths for chunk in chunks]) if chunks else np.zeros(0, np.int64)
    packs = len(plan_packs(lengths, plan.job.max_length, plan.job.config.packing))
    slots = packs * plan.job.row_length if plan.job.row_length else int(lengths.sum())
    return Preview(
        examples=[example for chunk in chunks for example in _examples(plan, chunk)][
            :: _stride(chunks, number)
        ][:number],
        ledger=ledger,
        rejects=[f"{reject.place}: {reject.reason}" for chunk in chunks for reject in chunk.tally.rejects],
        share=_share(plan, sample),
        records=sum(source.records for source in plan.sources),
        seconds=seconds,
        workers=config.workers or usable_cores(),
        fill=float(lengths.sum()) / max(slots, 1),
        max_length=plan.job.max_length,
        notes=(*plan.notes, *(stages.token_notes() if ledger.counters.get("turns") else ())),
        tokenizer_folder=plan.job.tokenizer.folder,
    )


def sample_chunks(plan: Plan) -> list[Chunk]:
    """Return small stretches of every source, evenly spaced: all of a small input, the beginning of each of a large one."""
    found = [chunk for source in plan.sources for chunk in source.samples]
    if _share(plan, found) == 1:
        return found
    return [_beginning(chunk, plan.job.config.max_line_bytes) for chunk in found]


def _beginning(stretch: Chunk, max_line_bytes: int) -> Chunk:
    """Return a part of a stretch, cut between rows: many rows of one place tell little more than a few.

    The same part of each, so that no place counts for more than another.
    """
    wanted = stretch.start + max(1, round((stretch.stop - stretch.start) * PART))
    if stretch.source.container in IN_BYTES:
        starts = read_chunk(stretch, max_line_bytes)[0].byte_offsets
        wanted = next((start for start in starts.tolist() if start >= wanted), stretch.stop)
    return replace(stretch, stop=wanted, records=None)


def _share(plan: Plan, sample: list[Chunk]) -> float:
    def size(chunks: Iterable[Chunk]) -> int:
        return sum(chunk.stop - chunk.start for chunk in chunks)

    whole = sum(size(source.chunks) for source in plan.sources)
    return min(1.0, size(sample) / whole) if whole else 1.0


def _stride(chunks: list[PreparedChunk], number: int) -> int:
    return max(1, sum(len(chunk.tokens) for chunk in chunks) // number)


def _examples(plan: Plan, chunk: PreparedChunk) -> Iterator[Example]:
    tokens = chunk.tokens
    for index, example_id in enumerate(chunk.example_ids.tolist()):
        span = slice(int(tokens.offsets[index]), int(tokens.offsets[index + 1]))
        labels = np.where(tokens.trained[span], tokens.input_ids[span], IGNORE_INDEX).astype(np.int32)
        labels[:1] = IGNORE_INDEX
        yield Example(*plan.locate(example_id), tokens.input_ids[span], labels)
