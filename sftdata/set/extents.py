"""Rows by index: where their tokens lie in the files of other sets, instead of the tokens.

    packs-00000.arrow   a row a packed row: `seq_lengths` and `example_ids`, as a shard has them, and extents
    rest-00000.arrow    a row a stretch: `example_id`, `offset` and `reason`, as beside a shard, and extents

An extent is a run of tokens inside one row of one file. Laid end to end, the extents of a row are the row.

| column | type | |
|---|---|---|
| `file` | list<int32> | number of the file, see `held_files`; -1 for padding |
| `start` | list<int64> | its first token, counted from the beginning of the file |
| `length` | list<int32> | tokens |
| `first_label` | list<uint8> | of its first token: `AS_STORED`, `GIVEN` or `TAKEN` |
| `first_weight` | list<float32> | what that token weighs if its label is given; only in a set with weights |

With pictures packs have `images` and `image_counts`, and a rest has `images`, as shard and rest of a set do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from sftdata.batches import Float32, Int32, Int64, offsets_of
from sftdata.errors import ANEW, IntegrityError
from sftdata.set.images import IMAGES
from sftdata.set.index import REST, as_strings, rest_pictures, slice_number
from sftdata.set.shards import (
    PACKS,
    PICTURES,
    ShardInfo,
    as_arrow,
    as_numpy,
    batch_edges,
    check_pictures,
    list_items,
    list_offsets,
    list_rows,
    read_file,
    write_file,
)
from sftdata.set.store import SetFile
from sftdata.set.stores import Target

if TYPE_CHECKING:
    import pyarrow as pa

    from sftdata.set.manifest import Manifest

UInt8 = npt.NDArray[np.uint8]

PADDING_FILE = -1
AS_STORED, GIVEN, TAKEN = 0, 1, 2
"""The label of an extent's first token: that of its file, one that the file may lack, or none."""


def packs_name(number: int) -> str:
    """Return the file name of a slice's rows by index.

    >>> packs_name(7)
    'packs-00007.arrow'
    """
    return f"{PACKS}-{number:05d}.arrow"


def held_files(manifest: Manifest) -> list[SetFile]:
    """Return the files of a set that hold tokens and pictures: shards, rests and sidecars, each in order."""
    found: list[SetFile] = [*manifest.shards]
    for kind in (REST, IMAGES):
        own = [file for file in manifest.files if file.name.startswith(f"{kind}-")]
        found += sorted(own, key=lambda file: slice_number(file.name) or 0)
    return found


def rest_digest(manifest: Manifest) -> str:
    """Return a hash over the files of a set that hold what its rows do not."""
    beside = held_files(manifest)[len(manifest.shards) :]
    return xxhash.xxh3_128_hexdigest("".join(file.xxh3 for file in beside).encode())


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Runs of tokens in files, row after row.

    Attributes:
        row_offsets: int64[P + 1], into the extents.
        file: int32[E], number of the file; `PADDING_FILE` for padding.
        start: int64[E], first token, counted from the beginning of the file.
        length: int32[E], tokens.
        first_label: uint8[E], of the first token: `AS_STORED`, `GIVEN` or `TAKEN`.
        first_weights: float32[E], what that token weighs if its label is given; None without weights.
    """

    row_offsets: Int64
    file: Int32
    start: Int64
    length: Int32
    first_label: UInt8
    first_weights: Float32 | None = None

    def __len__(self) -> int:
        return len(self.file)

    def token_offsets(self) -> Int64:
        """int64[P + 1], tokens before each row."""
        offsets: Int64 = offsets_of(self.length)[self.row_offsets]
        return offsets


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Packed rows by index; their segments, and the pictures of these, as in `PackedRows`."""

    seq_lengths: Int32
    example_ids: Int64
    segment_offsets: Int64
    extents: Extents
    images: Int32 | None = None
    image_counts: Int32 | None = None

    def __len__(self) -> int:
        return len(self.segment_offsets) - 1


@dataclass(frozen=True, slots=True, eq=False)
class RestExtents:
    """The rest of a slice by index; its stretches, and the pictures of these, as in `RestRows`."""

    example_ids: Int64
    offset: Int32
    reasons: Sequence[str]
    extents: Extents
    images: Int32 | None = None
    image_counts: Int32 | None = None

    def __len__(self) -> int:
        return len(self.example_ids)


# ------------------------------------------------------------------------------------------------- writing


def write_packs(path: Path | Target, packs: Packs, tokens_trained: int) -> ShardInfo:
    """Write rows by index as one Arrow IPC file, cut into record batches where their shard would be.

    Args:
        path: where the file will stand.
        packs: the rows.
        tokens_trained: labels in these rows, for the manifest.
    """
    schema = _packs_schema(packs.extents.first_weights is not None, packs.images is not None)
    batches = []
    for first, last in batch_edges(packs.extents.token_offsets()):
        offsets = packs.segment_offsets
        columns = [list_rows(own, offsets, first, last) for own in (packs.seq_lengths, packs.example_ids)]
        if packs.images is not None and packs.image_counts is not None:
            edges = offsets_of(packs.image_counts)[offsets]
            columns.append(list_rows(packs.images, edges, first, last))
            columns.append(list_rows(packs.image_counts, offsets, first, last))
        batches.append(_record_batch(columns, packs.extents, first, last, schema))
    file = write_file(path, schema, batches)
    is_document = packs.example_ids >= 0
    return ShardInfo(
        rows=len(packs),
        documents=int(is_document.sum()),
        tokens=int(packs.seq_lengths[is_document].sum(dtype=np.int64)),
        tokens_trained=tokens_trained,
        **msgspec.structs.asdict(file),
    )


def write_rest_extents(path: Path | Target, rest: RestExtents) -> SetFile:
    """Write a rest by index; return its description."""
    schema = _rest_schema(rest.extents.first_weights is not None, rest.images is not None)
    batches = []
    for first, last in batch_edges(rest.extents.token_offsets()):
        plain = [as_arrow(rest.example_ids[first:last]), as_arrow(rest.offset[first:last])]
        columns = [*plain, as_strings(rest.reasons[first:last])]
        if rest.images is not None and rest.image_counts is not None:
            columns.append(list_rows(rest.images, offsets_of(rest.image_counts), first, last))
        batches.append(_record_batch(columns, rest.extents, first, last, schema))
    return write_file(path, schema, batches)


def _record_batch(
    columns: list[pa.Array], extents: Extents, first: int, last: int, schema: pa.Schema
) -> pa.RecordBatch:
    import pyarrow as pa

    values = (extents.file, extents.start, extents.length, extents.first_label, extents.first_weights)
    given = [column for column in values if column is not None]
    lists = [list_rows(column, extents.row_offsets, first, last) for column in given]
    return pa.RecordBatch.from_arrays([*columns, *lists], schema=schema)


def _packs_schema(weighted: bool, pictured: bool) -> pa.Schema:
    import pyarrow as pa

    columns = [("seq_lengths", pa.list_(pa.int32())), ("example_ids", pa.list_(pa.int64()))]
    columns += [(name, pa.list_(pa.int32())) for name in PICTURES if pictured]
    return pa.schema([*columns, *_extent_columns(weighted)])


def _rest_schema(weighted: bool, pictured: bool) -> pa.Schema:
    import pyarrow as pa

    columns = [("example_id", pa.int64()), ("offset", pa.int32()), ("reason", pa.utf8())]
    images = [("images", pa.list_(pa.int32()))] if pictured else []
    return pa.schema([*columns, *images, *_extent_columns(weighted)])


def _extent_columns(weighted: bool) -> list[tuple[str, pa.DataType]]:
    import pyarrow as pa

    items = {"file": pa.int32(), "start": pa.int64(), "length": pa.int32(), "first_label": pa.uint8()}
    items |= {"first_weight": pa.float32()} if weighted else {}
    return [(name, pa.list_(item)) for name, item in items.items()]


# ------------------------------------------------------------------------------------------------- reading


def read_packs(path: Path, weighted: bool = False, pictured: bool = False) -> list[Packs]:
    """Map a file of rows by index and return its record batches.

    Raises:
        IntegrityError: the file is no such file, or its extents do not make up its documents.
    """
    found = []
    segments = ("seq_lengths", "example_ids", *(PICTURES[1:] if pictured else ()))
    for batch in read_file(path, _packs_schema(weighted, pictured)):
        offsets = _shared_offsets(path, [batch[name] for name in segments])
        lengths, ids, *counts = (as_numpy(list_items(batch[name])) for name in segments)
        images = [as_numpy(list_items(batch["images"]))] if pictured else []
        if pictured:
            check_pictures(
                path, counts[0], {"images": list_offsets(batch["images"]), "image_counts": offsets}
            )
        packs = Packs(lengths, ids, offsets, _extents(path, batch, weighted), *images, *counts)
        _refuse_gaps(path, packs)
        found.append(packs)
    return found


def read_rest_extents(path: Path, weighted: bool = False, pictured: bool = False) -> list[RestExtents]:
    """Map a rest by index and return its record batches.

    Raises:
        IntegrityError: the file is no such file.
    """
    return [
        RestExtents(
            as_numpy(batch["example_id"]),
            as_numpy(batch["offset"]),
            batch["reason"].to_pylist(),
            _extents(path, batch, weighted),
            **rest_pictures(batch, pictured),
        )
        for batch in read_file(path, _rest_schema(weighted, pictured))
    ]


def _extents(path: Path, batch: pa.RecordBatch, weighted: bool) -> Extents:
    columns = [batch[name] for name, _ in _extent_columns(weighted)]
    offsets = _shared_offsets(path, columns)
    return Extents(offsets, *(as_numpy(list_items(column)) for column in columns))


def _shared_offsets(path: Path, columns: Sequence[pa.ListArray]) -> Int64:
    offsets = [list_offsets(column) for column in columns]
    if any(not np.array_equal(one, other) for one, other in pairwise(offsets)):
        raise IntegrityError(f"{path}: its lists differ in length.", ANEW)
    return offsets[0]


def _refuse_gaps(path: Path, packs: Packs) -> None:
    """Refuse extents that do not begin where each document and each row does."""
    extents, tokens = packs.extents, offsets_of(packs.seq_lengths)
    lawful = bool((extents.length > 0).all() and (packs.seq_lengths > 0).all())
    if lawful:
        begins = offsets_of(extents.length)
        rows = begins[extents.row_offsets], tokens[packs.segment_offsets]
        lawful = bool(np.isin(tokens, begins).all()) and np.array_equal(*rows)
    if not lawful:
        raise IntegrityError(f"{path}: its extents do not make up its documents.", ANEW)
