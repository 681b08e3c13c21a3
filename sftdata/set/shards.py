"""Shards: packed rows as Arrow IPC files, written without copies and mapped back as numpy views.

| column | type |
|---|---|
| `input_ids`, `labels` | fixed_size_list<int32>[max_length]; list<int32> where rows keep their own length |
| `seq_lengths` | list<int32>, document lengths, padding as one last segment |
| `example_ids` | list<int64>, input row behind each document, -1 for padding |
| `loss_weights` | as `labels`, of float32: only in a set prepared with weights |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftdata.batches import IGNORE_INDEX, Float32, Int32, Int64, PackedRows
from sftdata.errors import IntegrityError, SftError
from sftdata.set.store import Count, SetFile, ShardName, Sink, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("input_ids", "labels", "seq_lengths", "example_ids")
WEIGHTS = "loss_weights"
_BATCH_TOKENS = 1 << 20  # 8 MiB of ids and labels: small enough to stream, large enough to cost nothing
_LARGEST_OFFSET = 2**31 - 1


class ShardInfo(SetFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the manifest knows of a shard.

    Attributes:
        rows: packed rows.
        documents: documents in them, padding aside.
        tokens: tokens of the documents.
        tokens_trained: those with a label.
    """

    name: ShardName
    rows: Count
    documents: Count
    tokens: Count
    tokens_trained: Count


def shard_name(index: int) -> str:
    """Return the file name of a shard.

    >>> shard_name(7)
    'shard-00007.arrow'
    """
    return f"shard-{index:05d}.arrow"


def shard_schema(max_length: int | None, weighted: bool = False) -> pa.Schema:
    """Return the schema of a shard; without `max_length` rows keep their own length."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32()) if max_length is None else pa.list_(pa.int32(), max_length)
    types = (tokens, tokens, pa.list_(pa.int32()), pa.list_(pa.int64()))
    columns = list(zip(COLUMNS, types, strict=True))
    if weighted:
        columns.append(
            (WEIGHTS, pa.list_(pa.float32()) if max_length is None else pa.list_(pa.float32(), max_length))
        )
    return pa.schema(columns)


def write_shard(path: Path, rows: PackedRows, max_length: int | None) -> ShardInfo:
    """Write packed rows as one Arrow IPC file, atomically; the same rows always give the same bytes.

    Args:
        path: where the shard will stand.
        rows: its columns; no token is copied on the way.
        max_length: tokens per row; None where rows keep their own length.

    Raises:
        UsageError: the file cannot be written.
    """
    digest = write_atomic(path, lambda sink: _write_ipc(sink, rows, max_length))
    is_document = rows.example_ids >= 0
    return ShardInfo(
        name=path.name,
        rows=len(rows),
        documents=int(is_document.sum()),
        tokens=int(rows.seq_lengths[is_document].sum(dtype=np.int64)),
        tokens_trained=int(np.count_nonzero(rows.labels != IGNORE_INDEX)),
        bytes=digest.bytes,
        xxh3=digest.xxh3,
        sha256=digest.sha256,
    )


def read_shard(path: Path, max_length: int | None, weighted: bool = False) -> list[PackedRows]:
    """Map a shard and return its record batches as columns; every column is a view of the mapped file.

    Args:
        path: an Arrow IPC file of the schema above.
        max_length: tokens per row that the manifest promises; None where rows keep their own length.
        weighted: whether the manifest promises weights.

    Raises:
        IntegrityError: the file is no such shard.
    """
    return [_columns(path, batch, max_length) for batch in read_batches(path, max_length, weighted)]


def read_batches(path: Path, max_length: int | None, weighted: bool = False) -> list[pa.RecordBatch]:
    """Map a shard and return its record batches, with their schema and their offsets checked.

    Raises:
        IntegrityError: the file is no such shard.
        SftError: the machine cannot map it: no memory, no descriptors, no permission.
    """
    import pyarrow as pa

    expected = shard_schema(max_length, weighted)
    try:
        # The views keep the mapping alive; closing gives back the descriptor: 10,000 shards can be open.
        with pa.memory_map(str(path)) as file:
            # Nothing is decoded, so that threads would have nothing to do.
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))
            if not reader.schema.equals(expected):
                found = ", ".join(f"{f.name}: {f.type}" for f in reader.schema)
                raise IntegrityError(
                    f"{path}: the columns are {found};"
                    f" expected those of a shard with max_length {max_length}."
                )
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count or _items(column).null_count for column in batch.columns):
                raise IntegrityError(f"{path}: holds nulls; a shard has none.")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: damaged column names
        # What the system says, not what the file holds.
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            what = f"{path}: cannot be read here: {getattr(error, 'strerror', None) or error}."
            raise SftError(
                what, "free memory or raise the limit (`ulimit -a`); nothing says that the set is damaged."
            ) from error
        raise IntegrityError(
            f"{path}: not a readable Arrow IPC file: {error}.", "prepare the set again."
        ) from error
    return batches


def _write_ipc(sink: Sink, rows: PackedRows, max_length: int | None) -> None:
    import pyarrow as pa

    schema = shard_schema(max_length, rows.loss_weights is not None)
    with pa.ipc.new_file(sink, schema) as writer:
        for first, last in _batch_edges(rows.row_offsets):
            writer.write_batch(_batch(rows, first, last, schema))


def _batch_edges(row_offsets: Int64) -> list[tuple[int, int]]:
    """Cut rows into record batches of about a million tokens, by content alone."""
    edges, first, count = [], 0, len(row_offsets) - 1
    while first < count:
        last = int(np.searchsorted(row_offsets, row_offsets[first] + _BATCH_TOKENS, side="right")) - 1
        last = min(max(last, first + 1), count)
        edges.append((first, last))
        first = last
    return edges


def _batch(rows: PackedRows, first: int, last: int, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    tokens = slice(rows.row_offsets[first], rows.row_offsets[last])
    segments = slice(rows.segment_offsets[first], rows.segment_offsets[last])
    row_offsets = _rebased(rows.row_offsets, first, last)
    segment_offsets = _rebased(rows.segment_offsets, first, last)
    columns: list[tuple[Int32 | Int64 | Float32, Int32]] = [
        (rows.input_ids[tokens], row_offsets),
        (rows.labels[tokens], row_offsets),
        (rows.seq_lengths[segments], segment_offsets),
        (rows.example_ids[segments], segment_offsets),
    ]
    if rows.loss_weights is not None:
        columns.append((rows.loss_weights[tokens], row_offsets))
    arrays = []
    for field, (values, offsets) in zip(schema, columns, strict=True):
        flat = _as_arrow(values)
        if pa.types.is_fixed_size_list(field.type):
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
        else:
            arrays.append(pa.ListArray.from_arrays(_as_arrow(offsets), flat, type=field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _rebased(offsets: Int64, first: int, last: int) -> Int32:
    part = offsets[first : last + 1] - offsets[first]
    if part[-1] > _LARGEST_OFFSET:
        raise ValueError(f"a row of {part[-1]} tokens is more than an Arrow list can hold")
    rebased: Int32 = part.astype(np.int32)
    return rebased


def _columns(path: Path, batch: pa.RecordBatch, max_length: int | None) -> PackedRows:
    input_ids, labels, seq_lengths, example_ids, *weights = (
        _as_numpy(_items(column)) for column in batch.columns
    )
    ragged = batch.schema.names if max_length is None else COLUMNS[2:]
    offsets = {name: _list_offsets(batch[name]) for name in ragged}
    for name, twin in (("input_ids", "labels"), ("seq_lengths", "example_ids"), ("input_ids", WEIGHTS)):
        if name in offsets and twin in offsets and not np.array_equal(offsets[name], offsets[twin]):
            raise IntegrityError(f"{path}: {name} and {twin} differ in length.", "prepare the set again.")
    row_offsets = offsets["input_ids"] if max_length is None else np.arange(len(batch) + 1) * max_length
    return PackedRows(
        input_ids, labels, row_offsets, seq_lengths, example_ids, offsets["seq_lengths"], *weights
    )


def _items(column: pa.Array) -> pa.Array:
    """Return what the lists of a column without nulls hold; `flatten` would import pyarrow.compute, 0.1 s."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(column.type):
        return column.values.slice(column.offset * column.type.list_size, len(column) * column.type.list_size)
    first, last = (column.offsets[0].as_py(), column.offsets[len(column)].as_py()) if len(column) else (0, 0)
    return column.values.slice(first, last - first)


def _list_offsets(column: pa.ListArray) -> Int64:
    offsets: Int64 = _as_numpy(column.offsets).astype(np.int64)
    offsets -= offsets[0]
    return offsets


# pyarrow's own ways to and from numpy import pandas where it is installed, which takes longer than most runs.


def _as_arrow(values: Int32 | Int64 | Float32) -> pa.Array:
    import pyarrow as pa

    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )


def _as_numpy(values: pa.Array) -> Any:
    """Return a read-only view of an array of numbers without nulls."""
    dtype = np.dtype(values.type.to_pandas_dtype())
    return np.frombuffer(
        values.buffers()[1] or b"",
        dtype,
        len(values) if values.buffers()[1] else 0,
        values.offset * dtype.itemsize,
    )
