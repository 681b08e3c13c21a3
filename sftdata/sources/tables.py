"""Columnar sources: Parquet, Arrow files and streams, saved and Hub datasets. A chunk is a range of rows."""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from sftdata.batches import Reject, RowBatch
from sftdata.errors import Fault, UsageError, changed, need
from sftdata.output import written
from sftdata.sources.borders import DIGEST_BYTES, grain_of
from sftdata.sources.chunks import SHOWN_BYTES, Chunk, RowCollector, Source
from sftdata.sources.inputs import several_splits, wrong_split
from sftdata.sources.marks import Marks
from sftdata.sources.remote import RANGE_BYTES, LocalCopy, RemoteFile, is_url
from sftdata.sources.seals import Stamp, states_of
from sftdata.sources.streams import BLOCK_BYTES, RawCount, open_raw, raw_blocks

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

_ATTEMPTS = 3
SHARD_COLUMNS = frozenset({"input_ids", "labels", "seq_lengths", "example_ids"})
_MEDIA_FEATURES = ("Image", "Audio", "Video", "Pdf")

Rows = list[dict[str, object]]
Convert = Callable[[Any], object]  # from what Arrow gives for the column's type


class _Table(NamedTuple):
    """An open source.

    Attributes:
        rows: how many.
        read: start, stop -> these rows.
        converters: by column, what turns its values into JSON data; only columns that need it.
    """

    rows: int
    read: Callable[[int, int], Rows]
    converters: dict[str, Convert]


def mark_table(source: Source, slice_bytes: int) -> Marks:
    """Count rows and hash the raw bytes; boundaries lie where rows of a grain would end, were all alike."""
    files = _raw_files(source)
    copy = source.copy
    states = ((source.path, copy.state),) if isinstance(copy, LocalCopy) else states_of(files)
    total = _open(source).rows
    count = _hashed([copy] if copy else files)
    digest = count.hasher.hexdigest()
    stamp = Stamp(states, digest)
    if not copy and not stamp.holds():
        raise changed(source.path)
    # All rows are taken to be of the same size: Parquet knows no more of them without reading.
    rows_per_byte = total / max(count.size, 1)
    grain = max(1, int(grain_of(slice_bytes) * rows_per_byte))
    positions = np.arange(0, total, grain, dtype=np.int64)
    parts = [
        xxhash.xxh3_128_digest(f"{digest} {position} {grain}".encode()) for position in positions.tolist()
    ]
    return Marks(
        0,
        total,
        positions,
        positions,
        np.zeros_like(positions),
        np.frombuffer(b"".join(parts), np.uint8).reshape(-1, DIGEST_BYTES),
        count.hasher.digest(),
        end=total,
        total=total,
        raw_bytes=count.size,
        step=max(1, int(slice_bytes * rows_per_byte)),
        stamp=stamp,
    )


def stamp_of(source: Source, marks: Marks) -> Marks:
    """Return the marks of a table with the state of its files on this machine; others as they are."""
    if source.container not in ("parquet", "arrow"):
        return marks
    return replace(marks, stamp=Stamp(states_of([source.path]), marks.digest.hex()))


def _hashed(files: Sequence[str]) -> RawCount:
    count = RawCount()
    for path in files:
        with open_raw(path) as stream:
            for _block in count.watch(raw_blocks(stream, RANGE_BYTES if is_url(path) else BLOCK_BYTES)):
                pass
    return count


def read_table(chunk: Chunk) -> tuple[RowBatch, list[Reject]]:
    """Return the rows of a chunk as dicts of JSON data.

    Raises:
        InputChangedError: the files hold other bytes than when they were planned.
    """
    found = RowCollector(chunk)
    rows, convert = _read_planned(chunk)
    for record, row in enumerate(rows, chunk.start):
        try:
            found.add(row | {name: to_json(row[name]) for name, to_json in convert.items()}, record, -1)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            what = f"a value of the type arrow.json is not JSON: {error}."
            fault = Fault("invalid-json", what, "write the column again.")
            found.reject(fault, repr(row).encode("utf-8", "backslashreplace")[:SHOWN_BYTES], record, -1)
    return found.finish()


def close_table() -> None:
    """Close the source kept open for the next chunk."""
    _open.cache_clear()


_stamps: dict[Stamp, Stamp] = {}  # as planned -> as the same bytes were last seen


def _read_planned(chunk: Chunk) -> tuple[Rows, dict[str, Convert]]:
    """Read rows while the files are those that were planned, before and after; return also the converters."""
    assert chunk.stamp is not None
    if chunk.source.file == chunk.source.copy:
        table = _open(chunk.source)
        return table.read(chunk.start, chunk.stop), table.converters
    for _ in range(_ATTEMPTS):
        stamp = _stamps.get(chunk.stamp, chunk.stamp)
        if stamp.holds():
            table = _open(chunk.source)
            rows = table.read(chunk.start, chunk.stop)
            if stamp.holds():
                return rows, table.converters
        _open.cache_clear()  # what it holds may be mapped from what is gone
        files = [name for name, _ in stamp.files]
        again = Stamp(states_of(files), _hashed(files).hasher.hexdigest())
        if again.xxh3_128 != stamp.xxh3_128:
            break
        _stamps[chunk.stamp] = again
    raise changed(chunk.source.path)


# ------------------------------------------------------------------------------------------------ opening


@lru_cache(maxsize=1)
def _open(source: Source) -> _Table:
    """Open a source; kept open between chunks.

    Raises:
        UsageError: the file or dataset cannot be opened, or is a shard of a finished set.
    """
    import pyarrow as pa

    try:
        if source.container == "parquet":
            return _open_parquet(source)
        if source.container == "arrow":
            return _open_arrow(source)
    except (pa.ArrowException, OSError) as error:
        what = f"{source.path}: damaged {source.container} file ({error})."
        raise UsageError(what, "write or fetch the file again.") from None
    dataset = load_dataset(source)

    def read(start: int, stop: int) -> Rows:
        rows: Rows = dataset[start:stop].to_pylist()
        return rows

    return _table(source, len(dataset), read, dataset.features.arrow_schema)


def _table(source: Source, total: int, read: Callable[[int, int], Rows], schema: pa.Schema) -> _Table:
    if SHARD_COLUMNS.issubset(schema.names):
        several = "its rows hold several documents each, whose borders would be lost"
        what = f"{source.path}: a shard of a finished set; {several}."
        raise UsageError(what, "prepare the sources of the set, or train on the set itself.")
    return _Table(total, read, converters(schema))


def _open_file(path: str) -> pa.NativeFile:
    """Return a file as pyarrow reads it, mapped where it is on this machine."""
    import pyarrow as pa

    if is_url(path):
        return pa.PythonFile(io.BufferedReader(RemoteFile(path), 1))
    if written(path) == path:
        return pa.memory_map(path)
    with open(path, "rb") as file:  # pyarrow takes names in UTF-8 only
        return pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _open_parquet(source: Source) -> _Table:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(_open_file(source.file))
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]  # of each row group, and the end of the last

    @lru_cache(maxsize=1)
    def row_group(index: int) -> pa.Table:
        return file.read_row_group(index)

    def read(start: int, stop: int) -> Rows:
        rows: Rows = []
        for index, size in enumerate(sizes):
            first, last = max(start - starts[index], 0), min(stop - starts[index], size)
            if first < last:
                rows += row_group(index).slice(first, last - first).to_pylist()
        return rows

    return _table(source, file.metadata.num_rows, read, file.schema_arrow)


def _open_arrow(source: Source) -> _Table:
    import pyarrow as pa

    data = _open_file(source.file)
    is_file = data.read(6) == b"ARROW1"
    data.seek(0)
    table = pa.ipc.open_file(data).read_all() if is_file else pa.ipc.open_stream(data).read_all()

    def read(start: int, stop: int) -> Rows:
        rows: Rows = table.slice(start, stop - start).to_pylist()
        return rows

    return _table(source, table.num_rows, read, table.schema)


def _raw_files(source: Source) -> list[str]:
    if source.container in ("parquet", "arrow"):
        return [source.path]
    return [str(entry["filename"]) for entry in load_dataset(source).cache_files]


def load_dataset(source: Source) -> Dataset:
    """Load a saved or Hub dataset, media columns left undecoded.

    Raises:
        UsageError: no such dataset or split, several splits and none is chosen, or no package `datasets`.
    """
    datasets = need("datasets", "hub", f"{source.path} is a dataset")
    try:
        if source.container == "saved":
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # the Hub client, datasets and the builders each have their own exceptions
        what = f"{source.path}: cannot be loaded as a dataset ({type(error).__name__}: {str(error)[:300]})."
        raise UsageError(what, "check the name, --split and --subset, or the connection.") from None
    chosen = _choose_split(loaded, source, datasets)
    for name, feature in chosen.features.items():
        if type(feature).__name__ in _MEDIA_FEATURES:
            chosen = chosen.cast_column(name, type(feature)(decode=False))
    return chosen.with_format("arrow")


def _choose_split(loaded: Dataset | DatasetDict, source: Source, datasets: ModuleType) -> Dataset:
    """Return the rows that `split` names, as `datasets` cuts them."""
    if source.container == "hub" and not isinstance(loaded, dict):
        return loaded
    splits = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    if source.split is None:
        if len(splits) > 1:
            raise several_splits(source.path, splits)
        return next(iter(splits.values()))
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise wrong_split(source.path, source.split, splits, error) from None
    rows = [splits[part.splitname].select(range(part.from_, max(part.from_, part.to))) for part in parts]
    return rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)


# ------------------------------------------------------------------------------- Arrow's values as JSON data
#
# Arrow holds a JSON document as its text (the extension type arrow.json) and an object of any keys as a list
# of pairs (a map). It gives every struct of a column every field that any row has: a null there says only
# that another row had the field.

_decode = msgspec.json.Decoder().decode


def converters(schema: pa.Schema) -> dict[str, Convert]:
    """Return, for each column that needs it, what turns its values into JSON data.

    A converter raises msgspec.DecodeError for a document of the type arrow.json that is not JSON.
    """
    found = {field.name: _converter(field.type) for field in schema}
    return {name: convert for name, convert in found.items() if convert}


def _converter(kind: pa.DataType) -> Convert | None:
    import pyarrow as pa
    from pyarrow import types

    if isinstance(kind, pa.BaseExtensionType):
        return _or_null(_decode) if kind.extension_name == "arrow.json" else None
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_map(kind):
        return _of_map(_converter(kind.item_type))
    if types.is_struct(kind):
        return _of_struct({field.name: _converter(field.type) for field in kind})
    if hasattr(kind, "value_field"):  # every kind of list
        inner = _converter(kind.value_type)
        return inner and _or_null(lambda values: [inner(value) for value in values])
    return None


def _or_null(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _of_map(inner: Convert | None) -> Convert:
    def convert(pairs: Sequence[tuple[object, object]]) -> dict[str, object]:
        return {str(key): inner(value) if inner else value for key, value in pairs}

    return _or_null(convert)


def _of_struct(inner: Mapping[str, Convert | None]) -> Convert:
    """Leave null fields out."""

    def convert(struct: Mapping[str, object]) -> dict[str, object]:
        given = ((name, value, inner[name]) for name, value in struct.items() if value is not None)
        return {name: found(value) if found else value for name, value, found in given}

    return _or_null(convert)
