"""Open an input, plan it in one pass, and read its chunks: the face of `sftdata.sources` towards the pipeline.

names ── expand_inputs ──> paths ── open_source ──> Source ── plan_sources ──> SourcePlan ── read_chunk ──> RowBatch
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from sftdata.batches import Reject, RowBatch
from sftdata.config import DEFAULT_LINE_BYTES
from sftdata.sources.arrays import plan_array, read_array
from sftdata.sources.chunks import Chunk, Marks, Source, SourcePlan, make_plan
from sftdata.sources.delimited import plan_delimited, read_delimited
from sftdata.sources.folders import is_saved_dataset
from sftdata.sources.inputs import expand_inputs, is_hub_id, is_url
from sftdata.sources.lines import plan_lines, read_lines
from sftdata.sources.sniff import sniff
from sftdata.sources.streams import RawCount, read_all
from sftdata.sources.tables import plan_table, read_table

__all__ = [
    "Chunk",
    "Source",
    "SourcePlan",
    "expand_inputs",
    "open_source",
    "plan_source",
    "plan_sources",
    "read_chunk",
]


def open_source(path: str, *, split: str | None = None, subset: str | None = None) -> Source:
    """Recognise the container of one input (as `expand_inputs` returns them) from its content.

    Args:
        split, subset: of a Hub or saved dataset.

    Raises:
        UsageError: the file cannot be opened or holds no rows of a known container.
    """
    if not is_url(path):
        if Path(path).is_dir() and is_saved_dataset(Path(path)):
            return Source(path, "saved", split=split)
        if is_hub_id(path):
            return Source(path, "hub", split=split, subset=subset)
    return sniff(path)


def plan_source(
    source: Source, base_id: int, slice_bytes: int, max_line_bytes: int = DEFAULT_LINE_BYTES
) -> SourcePlan:
    """Read a source once: hash it, count its records, and cut it into chunks by size alone.

    Args:
        base_id: example id of its first record.
        slice_bytes: bytes of the decompressed stream (or of the file, for columnar sources) per chunk.
        max_line_bytes: a longer row is not held; the same as for `read_chunk`.

    Raises:
        IntegrityError: a damaged compressed stream.
    """
    match source.container:
        case "jsonl" | "text":
            marks = plan_lines(source, slice_bytes)
        case "json":
            marks = plan_array(source, slice_bytes, max_line_bytes)
        case "csv":
            marks = plan_delimited(source, slice_bytes)
        case "empty":
            marks = _plan_empty(source, slice_bytes)
        case _:
            marks = plan_table(source, slice_bytes)
    return make_plan(source, base_id, marks, max_line_bytes)


def plan_sources(
    sources: Iterable[Source], slice_bytes: int, max_line_bytes: int = DEFAULT_LINE_BYTES
) -> list[SourcePlan]:
    """Plan several sources, with numbers and example ids that run on from one to the next."""
    plans: list[SourcePlan] = []
    base_id = 0
    for number, source in enumerate(sources):
        plans.append(plan_source(source, base_id, slice_bytes, max_line_bytes).placed(number, base_id))
        base_id += plans[-1].records
    return plans


def read_chunk(chunk: Chunk, max_line_bytes: int = DEFAULT_LINE_BYTES) -> tuple[RowBatch, list[Reject]]:
    """Return the rows of a chunk, and the rows that could not be parsed.

    Raises:
        InputChangedError: the source holds other bytes than when it was planned.
    """
    found = _read_whole(chunk, max_line_bytes)
    return found if chunk.only is None else _only(chunk, *found)


def _read_whole(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    match chunk.source.container:
        case "jsonl" | "text":
            return read_lines(chunk, max_line_bytes)
        case "json":
            return read_array(chunk, max_line_bytes)
        case "csv":
            return read_delimited(chunk, max_line_bytes)
        case _:
            return read_table(chunk)


def _only(chunk: Chunk, batch: RowBatch, unreadable: list[Reject]) -> tuple[RowBatch, list[Reject]]:
    """Keep the rows of the records that are meant."""
    assert chunk.only is not None
    first, stop = (chunk.first_id - chunk.first_record + record for record in chunk.only)
    keep = np.flatnonzero((batch.example_ids >= first) & (batch.example_ids < stop))
    rows = [batch.rows[index] for index in keep.tolist()]
    columns = {name: getattr(batch, name)[keep] for name in ("example_ids", "lines", "byte_offsets")}
    kept = replace(batch, rows=rows, **columns)
    return kept, [row for row in unreadable if chunk.only[0] < row.record <= chunk.only[1]]


def _plan_empty(source: Source, slice_bytes: int) -> Marks:
    count = RawCount.start()
    for _block in read_all(source, count):
        pass
    none = np.zeros(0, np.int64)
    notes = (f"{source.path}: the file is empty.",)
    return Marks(
        none,
        none,
        0,
        0,
        slice_bytes,
        count.size,
        count.hasher.hexdigest(),
        notes=notes,
        seal=count.blocks.seal(),
    )
