"""Columnar sources: Parquet, Arrow files and streams, datasets saved to disk, Hub datasets. A slice is a range of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sftdata.batches import RowBatch
from sftdata.errors import UsageError
from sftdata.read.inputs import is_url
from sftdata.read.slices import GRAIN_BYTES, Gathered, Marks, Slice, Source, Unreadable
from sftdata.read.streams import BLOCK_BYTES, RawCount, open_raw, raw_blocks
from sftdata.read.unchanged import Stamp, changed, states_of

_ATTEMPTS = 3
Reader = Callable[[int, int], list[dict[str, Any]]]  # start, stop -> rows
MEDIA = ("Image", "Audio", "Video", "Pdf")


def plan_table(source: Source, slice_bytes: int) -> Marks:
    """Count rows and cut them in ranges that hold about `slice_bytes` of the raw bytes each."""
    files = _raw_files(source)
    local = not is_url(source.path)
    states = states_of(files) if local else ()
    total, _ = _open(source)
    count = _hashed(files)
    stamp = Stamp(states, count.hasher.hexdigest()) if local else None
    if stamp is not None and not stamp.holds():
        raise changed(source.path)
    rows_per_byte = total / max(count.size, 1)
    step = max(1, int(slice_bytes * rows_per_byte))
    grain = max(1, min(step, int(GRAIN_BYTES * rows_per_byte)))
    positions = np.arange(0, total, grain, dtype=np.int64)
    return Marks(positions, positions, total, total, step, count.size, count.hasher.hexdigest(), stamp=stamp)


def _hashed(files: Sequence[str]) -> RawCount:
    count = RawCount.start()
    for path in files:
        with open_raw(path) as stream:
            for _block in count.watch(raw_blocks(stream, BLOCK_BYTES)):
                pass
    return count


def read_table(piece: Slice) -> tuple[RowBatch, list[Unreadable]]:
    """Return the rows of a slice as dicts; the nulls that Arrow put into structs are left out.

    Raises:
        InputChangedError: the files hold other bytes than when they were planned.
    """
    found = Gathered(piece)
    for record, row in enumerate(_read_planned(piece), piece.start):
        found.add({key: _without_nulls(value) for key, value in row.items()}, record, -1)
    return found.finish()


_stamps: dict[Stamp, Stamp] = {}  # as planned -> as the same bytes were last seen


def _read_planned(piece: Slice) -> list[dict[str, Any]]:
    """Read rows while the files are, before and after, those that were planned."""
    if piece.stamp is None:
        return _open(piece.source)[1](piece.start, piece.stop)
    for _ in range(_ATTEMPTS):
        stamp = _stamps.get(piece.stamp, piece.stamp)
        if stamp.holds():
            rows = _open(piece.source)[1](piece.start, piece.stop)
            if stamp.holds():
                return rows
        _open.cache_clear()  # what it holds may be mapped from what is gone
        files = [name for name, _ in stamp.files]
        again = Stamp(states_of(files), _hashed(files).hasher.hexdigest())
        if again.xxh3_128 != stamp.xxh3_128:
            break
        _stamps[piece.stamp] = again
    raise changed(piece.source.path)


def _without_nulls(value: Any) -> Any:
    """Drop null struct fields at every depth.

    Arrow gives every struct of a column every field that any row has: a null there says only that another row had it.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [_without_nulls(item) for item in value]
    return value


@lru_cache(maxsize=1)
def _open(source: Source) -> tuple[int, Reader]:
    """Return the number of rows and a function that reads a range of them; kept open between slices.

    Raises:
        UsageError: the file or dataset cannot be opened.
    """
    import pyarrow as pa

    try:
        if source.container == "parquet":
            return _open_parquet(source)
        if source.container == "arrow":
            return _open_arrow(source)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{source.path}: damaged {source.container} file ({error}).", "write or fetch the file again.") from None
    dataset = _load_dataset(source)
    columns = dataset.column_names

    def read(start: int, stop: int) -> list[dict[str, Any]]:
        batch = dataset[start:stop]
        return [dict(zip(columns, values, strict=True)) for values in zip(*(batch[name] for name in columns), strict=True)]

    return len(dataset), read


def _open_parquet(source: Source) -> tuple[int, Reader]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(open_raw(source.path) if is_url(source.path) else source.path, memory_map=not is_url(source.path))
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    borders = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @lru_cache(maxsize=1)
    def row_group(index: int) -> Any:
        return file.read_row_group(index)

    def read(start: int, stop: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for index in range(len(sizes)):
            first, last = max(start, int(borders[index])), min(stop, int(borders[index + 1]))
            if first < last:
                rows += row_group(index).slice(first - int(borders[index]), last - first).to_pylist()
        return rows

    return file.metadata.num_rows, read


def _open_arrow(source: Source) -> tuple[int, Reader]:
    import pyarrow as pa

    data = pa.PythonFile(open_raw(source.path)) if is_url(source.path) else pa.memory_map(source.path)
    is_file = data.read(6) == b"ARROW1"
    data.seek(0)
    table = pa.ipc.open_file(data).read_all() if is_file else pa.ipc.open_stream(data).read_all()

    def read(start: int, stop: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = table.slice(start, stop - start).to_pylist()
        return rows

    return table.num_rows, read


def _raw_files(source: Source) -> list[str]:
    if source.container in ("parquet", "arrow"):
        return [source.path]
    return [str(entry["filename"]) for entry in _load_dataset(source).cache_files]


def _load_dataset(source: Source) -> Any:
    """Load a saved or Hub dataset, media columns left undecoded.

    Raises:
        UsageError: no such dataset or split.
    """
    import datasets

    try:
        if source.container == "saved":
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # the Hub client, datasets and the builders each have their own exceptions
        what = f"{source.path}: cannot be loaded as a dataset ({type(error).__name__}: {str(error)[:300]})."
        raise UsageError(what, "check the name, --set split=... and --set subset=..., or the connection.") from None
    if isinstance(loaded, dict):
        if source.split not in loaded:
            what = f"{source.path}: no split {source.split!r}; found {', '.join(sorted(loaded))}."
            raise UsageError(what, "choose one with --set split=NAME.")
        loaded = loaded[source.split]
    for name, feature in loaded.features.items():
        if type(feature).__name__ in MEDIA:
            loaded = loaded.cast_column(name, type(feature)(decode=False))
    return loaded.with_format(None)
