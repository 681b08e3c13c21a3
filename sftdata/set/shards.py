"""Shards: packed rows as Arrow IPC files, written without copies and mapped back as numpy views.

| column | type |
|---|---|
| `input_ids`, `labels` | fixed_size_list<int32>[max_length]; list<int32> where rows keep their own length |
| `seq_lengths` | list<int32>, document lengths, padding as segments of its own |
| `example_ids` | list<int64>, input row behind each document, -1 for padding |
| `loss_weights` | as `labels`, of float32: only in a set prepared with weights |
| `images` | list<int32>, pictures of the documents, in order, by number in the sidecar |
| `image_counts` | list<int32>, how many each document has; these two only in a set with pictures |
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from sftdata.batches import (
    IGNORE_INDEX,
    Float32,
    Int32,
    Int64,
    PackedRows,
    offsets_of,
)
from sftdata.errors import ANEW, IntegrityError, SftError
from sftdata.set.store import Count, SetFile, ShardName, Sink, write_atomic
from sftdata.set.stores import Target

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("input_ids", "labels", "seq_lengths", "example_ids")
WEIGHTS = "loss_weights"
PICTURES = ("images", "image_counts")
PACKS = "packs"
"""Begins the names of files that stand for shards where rows lie in other sets, see `extents`."""
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


def shard_schema(max_length: int | None, weighted: bool = False, pictured: bool = False) -> pa.Schema:
    """Return the schema of a shard; without `max_length` rows keep their own length."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32()) if max_length is None else pa.list_(pa.int32(), max_length)
    types = (tokens, tokens, pa.list_(pa.int32()), pa.list_(pa.int64()))
    columns = list(zip(COLUMNS, types, strict=True))
    if weighted:
        columns.append(
            (WEIGHTS, pa.list_(pa.float32()) if max_length is None else pa.list_(pa.float32(), max_length))
        )
    columns += [(name, pa.list_(pa.int32())) for name in PICTURES if pictured]
    return pa.schema(columns)


def write_shard(path: Path | Target, rows: PackedRows, max_length: int | None) -> ShardInfo:
    """Write packed rows as one Arrow IPC file, atomically; the same rows always give the same bytes.

    Args:
        path: where the shard will stand.
        rows: its columns; no token is copied on the way.
        max_length: tokens per row; None where rows keep their own length.

    Raises:
        UsageError: the file cannot be written.
    """
    schema = shard_schema(max_length, rows.loss_weights is not None, rows.images is not None)
    batches = (as_batch(rows, first, last, schema) for first, last in batch_edges(rows.row_offsets))
    file = write_file(path, schema, batches)
    is_document = rows.example_ids >= 0
    return ShardInfo(
        rows=len(rows),
        documents=int(is_document.sum()),
        tokens=int(rows.seq_lengths[is_document].sum(dtype=np.int64)),
        tokens_trained=int(np.count_nonzero(rows.labels != IGNORE_INDEX)),
        **msgspec.structs.asdict(file),
    )


def read_shard(
    path: Path, max_length: int | None, weighted: bool = False, pictured: bool = False
) -> list[PackedRows]:
    """Map a shard and return its record batches as columns; every column is a view of the mapped file.

    Args:
        path: an Arrow IPC file of the schema above.
        max_length: tokens per row that the manifest promises; None where rows keep their own length.
        weighted, pictured: whether the manifest promises weights, and pictures.

    Raises:
        IntegrityError: the file is no such shard.
    """
    batches = read_batches(path, max_length, weighted, pictured)
    return [_columns(path, batch, max_length) for batch in batches]


def read_batches(
    path: Path, max_length: int | None, weighted: bool = False, pictured: bool = False
) -> list[pa.RecordBatch]:
    """Map a shard and return its record batches.

    Raises:
        IntegrityError: the file is no such shard.
        SftError: the machine cannot map it.
    """
    return read_file(path, shard_schema(max_length, weighted, pictured))


def as_batch(rows: PackedRows, first: int, last: int, schema: pa.Schema) -> pa.RecordBatch:
    """Return some of the rows as a record batch of a shard; its columns are views of these."""
    import pyarrow as pa

    tokens, segments = rows.row_offsets, rows.segment_offsets
    columns: list[tuple[Int32 | Int64 | Float32, Int64]] = [
        (rows.input_ids, tokens), (rows.labels, tokens),
        (rows.seq_lengths, segments), (rows.example_ids, segments),
    ]  # fmt: skip
    if rows.loss_weights is not None:
        columns.append((rows.loss_weights, tokens))
    if rows.images is not None and rows.image_counts is not None:
        pictures = offsets_of(rows.image_counts)[segments]
        columns += [(rows.images, pictures), (rows.image_counts, segments)]
    arrays = []
    for field, (values, offsets) in zip(schema, columns, strict=True):
        if pa.types.is_fixed_size_list(field.type):
            own = as_arrow(values[offsets[first] : offsets[last]])
            arrays.append(pa.FixedSizeListArray.from_arrays(own, type=field.type))
        else:
            arrays.append(list_rows(values, offsets, first, last))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _columns(path: Path, batch: pa.RecordBatch, max_length: int | None) -> PackedRows:
    items = {name: as_numpy(list_items(batch[name])) for name in batch.schema.names}
    ragged = batch.schema.names if max_length is None else [*COLUMNS[2:], *PICTURES]
    offsets = {name: list_offsets(batch[name]) for name in ragged if name in items}
    for name, twin in _TWINS:
        if name in offsets and twin in offsets and not np.array_equal(offsets[name], offsets[twin]):
            raise IntegrityError(f"{path}: {name} and {twin} differ in length.", ANEW)
    row_offsets = offsets["input_ids"] if max_length is None else np.arange(len(batch) + 1) * max_length
    if "images" in items:
        check_pictures(path, items["image_counts"], offsets)
    return PackedRows(row_offsets=row_offsets, segment_offsets=offsets["seq_lengths"], **items)


_TWINS = (
    ("input_ids", "labels"),
    ("seq_lengths", "example_ids"),
    ("input_ids", WEIGHTS),
    ("seq_lengths", "image_counts"),
)


def check_pictures(path: Path, counts: Int32, offsets: dict[str, Int64]) -> None:
    """Refuse rows whose documents do not share out their pictures.

    Raises:
        IntegrityError: naming the file.
    """
    if (counts < 0).any() or not np.array_equal(
        offsets_of(counts)[offsets["image_counts"]], offsets["images"]
    ):
        raise IntegrityError(f"{path}: image_counts do not sum to the images.", ANEW)


# ------------------------------------------------------------------------------------------ Arrow IPC files


def write_file(path: Path | Target, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> SetFile:
    """Write record batches as an Arrow IPC file, atomically, and describe it.

    Raises:
        UsageError: the file cannot be written.
    """
    import pyarrow as pa

    def write(sink: Sink) -> None:
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    digest = write_atomic(path, write) if isinstance(path, Path) else path.put(write)
    return SetFile(name=path.name, **msgspec.structs.asdict(digest))


def read_file(path: Path, expected: pa.Schema, *, mapped: bool = True) -> list[pa.RecordBatch]:
    """Map an Arrow IPC file and return its record batches, with their schema and their offsets checked.

    Args:
        mapped: else it is read, which is faster for a small file that is let go at once.

    Raises:
        IntegrityError: the file has other columns, holds nulls, or is damaged.
        SftError: the machine cannot map it: no memory, no descriptors, no permission.
    """
    import pyarrow as pa

    try:
        # The views keep the mapping alive; closing gives back the descriptor: 10,000 shards can be open.
        with (pa.memory_map if mapped else pa.OSFile)(str(path)) as file:
            # Nothing is decoded, so that threads would have nothing to do.
            whole = file if mapped else file.read_buffer()
            reader = pa.ipc.open_file(whole, options=pa.ipc.IpcReadOptions(use_threads=False))
            if not reader.schema.equals(expected):
                found = ", ".join(f"{f.name}: {f.type}" for f in reader.schema)
                wanted = ", ".join(f"{f.name}: {f.type}" for f in expected)
                raise IntegrityError(f"{path}: the columns are {found}; expected {wanted}.", ANEW)
            batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count or list_items(column).null_count for column in batch.columns):
                raise IntegrityError(f"{path}: holds nulls; a set has none.", ANEW)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: damaged column names
        # What the system says, not what the file holds.
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            what = f"{path}: cannot be read here: {getattr(error, 'strerror', None) or error}."
            fix = "free memory or raise the limit (`ulimit -a`); nothing says that the set is damaged."
            raise SftError(what, fix) from error
        raise IntegrityError(f"{path}: not a readable Arrow IPC file: {error}.", ANEW) from error
    return batches


def batch_edges(row_offsets: Int64) -> list[tuple[int, int]]:
    """Cut rows into record batches of about a million tokens, by content alone."""
    edges, first, count = [], 0, len(row_offsets) - 1
    while first < count:
        last = int(np.searchsorted(row_offsets, row_offsets[first] + _BATCH_TOKENS, side="right")) - 1
        last = min(max(last, first + 1), count)
        edges.append((first, last))
        first = last
    return edges


def list_array(values: npt.NDArray[np.generic], offsets: Int64) -> pa.ListArray:
    """Return lists of these values; `offsets`, int64[N + 1], may begin anywhere."""
    import pyarrow as pa

    rebased = offsets - offsets[0]
    if rebased[-1] > _LARGEST_OFFSET:
        raise ValueError(f"a row of {rebased[-1]} tokens is more than an Arrow list can hold")
    return pa.ListArray.from_arrays(as_arrow(rebased.astype(np.int32)), as_arrow(values))


def list_rows(values: npt.NDArray[np.generic], offsets: Int64, first: int, last: int) -> pa.ListArray:
    """Return the lists of some rows; `offsets`, int64[P + 1], say where those of each begin in the values."""
    return list_array(values[offsets[first] : offsets[last]], offsets[first : last + 1])


def list_items(column: pa.Array) -> pa.Array:
    """Return the items of the lists of a column without nulls, or the column itself where it has no lists.

    Its own `flatten` would import pyarrow.compute, 0.1 s.
    """
    import pyarrow as pa

    if not isinstance(column, pa.ListArray | pa.FixedSizeListArray):
        return column
    if isinstance(column, pa.FixedSizeListArray):
        return column.values.slice(column.offset * column.type.list_size, len(column) * column.type.list_size)
    first, last = (column.offsets[0].as_py(), column.offsets[len(column)].as_py()) if len(column) else (0, 0)
    return column.values.slice(first, last - first)


def list_offsets(column: pa.ListArray) -> Int64:
    """int64[N + 1], offsets into `list_items` of a column."""
    offsets: Int64 = as_numpy(column.offsets).astype(np.int64)
    offsets -= offsets[0]
    return offsets


# pyarrow's own ways to and from numpy import pandas where it is installed, which takes longer than most runs.


def as_arrow(values: npt.NDArray[np.generic]) -> pa.Array:
    """Return an array of numbers as a view of these."""
    import pyarrow as pa

    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )


def as_numpy(values: pa.Array) -> Any:
    """Return a read-only view of an array of numbers without nulls."""
    dtype, data = np.dtype(values.type.to_pandas_dtype()), values.buffers()[1]
    if not data:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(values), values.offset * dtype.itemsize)
