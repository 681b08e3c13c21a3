"""Beside each shard: the tokens that its rows do not hold, and where the tokens of each document are.

    rest-00000.arrow    tokens that were cut or dropped, with all their labels, and why: a row a segment
    images-00000.arrow  pictures of the documents, see images.py; only in a set with pictures
    index-00000.arrow   a row a segment: those of the shard's rows, in order, then those of the rest

A segment is a stretch of one document inside one row. Segments of one example id, in the order of their
offsets, are the document, whole: every token that came in is in the set once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sftdata.batches import (
    IGNORE_INDEX,
    Bool,
    Columns,
    Float32,
    Int32,
    Int64,
    PackedRows,
    PackPlan,
    TokenBatch,
    count_between,
    offsets_of,
    positions_of,
)
from sftdata.errors import RESTORE, IntegrityError
from sftdata.pictures.loaded import PictureFolder
from sftdata.set.hashes import UInt64, hash_documents, hash_prompts
from sftdata.set.images import IMAGES, PictureColumns, SlicePictures, write_images
from sftdata.set.shards import (
    ShardInfo,
    as_arrow,
    as_numpy,
    batch_edges,
    list_items,
    list_offsets,
    list_rows,
    read_file,
    shard_name,
    write_file,
    write_shard,
)
from sftdata.set.store import SetFile
from sftdata.set.stores import Store, Target

if TYPE_CHECKING:
    import pyarrow as pa

INDEX, REST = "index", "rest"
HASH_BYTES = 16
_SLICE_FILE = re.compile(r"(?:shard|packs|index|rest|images)-([0-9]{5,9})\.arrow")


def slice_number(name: str) -> int | None:
    """Return the number in the name of a slice's file; None for any other file of a set.

    >>> slice_number("rest-00007.arrow"), slice_number("rejects.jsonl")
    (7, None)
    """
    found = _SLICE_FILE.fullmatch(name)
    return int(found[1]) if found else None


def beside_name(kind: str, number: int) -> str:
    """Return the name of the file of this kind that stands beside a shard.

    >>> beside_name(REST, 7)
    'rest-00007.arrow'
    """
    return f"{kind}-{number:05d}.arrow"


@dataclass(frozen=True, slots=True, eq=False)
class Segments(Columns):
    """The index of a slice: one entry a segment, those of the rows in order, then those of the rest.

    Indices that are joined keep the rows of each slice.

    Attributes:
        example_ids: int64[S], input row that the document comes from.
        row: int32[S], row of the shard; where `rest`, row of the rest.
        offset: int32[S], its first token, counted in the document.
        length: int32[S], tokens.
        trained: int32[S], tokens that have a label in the document, the first of the segment aside.
        first_trained: bool[S], whether the first has one too; in the shard's rows it is taken away.
        rest: bool[S], whether the segment is in the rest.
        whole: bool[S], whether the segment is all of its document.
        document_hash: uint64[S, 2], of the whole document: ids, labels, and weights where there are any.
        prompt_hash: uint64[S], of the ids before the first label of the whole document; 0 where it has none.
        first_weights: float32[S], weight of the first token, 0 where it has no label; None without weights.
    """

    example_ids: Int64
    row: Int32
    offset: Int32
    length: Int32
    trained: Int32
    first_trained: Bool
    rest: Bool
    whole: Bool
    document_hash: UInt64
    prompt_hash: UInt64
    first_weights: Float32 | None = None

    def __len__(self) -> int:
        return len(self.example_ids)

    def restore(self, path: Path, rows: Sequence[PackedRows], rest: Sequence[RestRows]) -> TokenBatch:
        """Return the tokens of each segment, an example each, with all labels and weights of their documents.

        Args:
            path: of the index, for the message.
            rows, rest: of the same slice.

        Raises:
            IntegrityError: these hold other segments than the index names.
        """
        tokens = TokenBatch.join([*map(_packed_segments, rows), *map(_rest_segments, rest)])
        packed = [np.diff(offsets_of(part.example_ids >= 0)[part.segment_offsets]) for part in rows]
        row = np.repeat(np.arange(sum(map(len, rows))), np.concatenate([np.empty(0, np.int64), *packed]))
        in_rest = np.arange(len(tokens)) >= len(row)
        row = np.append(row, np.arange(np.count_nonzero(in_rest)))
        _refuse_other(path, "example_id", self.example_ids, tokens.row)
        _refuse_other(path, "row", self.row, row)
        _refuse_other(path, "rest", self.rest, in_rest)
        _refuse_other(path, "length", self.length, tokens.lengths)
        begins, ends = tokens.offsets[:-1], tokens.offsets[1:]
        trained = count_between(np.flatnonzero(tokens.trained), begins + 1, ends)
        _refuse_other(path, "trained", self.trained, trained)
        first = np.append(tokens.trained, False)[begins] & (ends > begins)
        _refuse_other(path, "first_trained", self.first_trained[in_rest], first[in_rest])
        offset = np.concatenate([np.empty(0, np.int32), *(part.offset for part in rest)])
        _refuse_other(path, "offset", self.offset[in_rest], offset)
        lost = begins[self.first_trained]
        tokens.trained[lost] = True
        if tokens.loss_weights is None or self.first_weights is None:
            return tokens
        weights = tokens.loss_weights.copy()
        weights[lost] = self.first_weights[self.first_trained]
        return replace(tokens, loss_weights=weights)

    def starts(self, multiple: int = 1) -> Int64:
        """int64[S]: the first token of each segment, counted in its row. It is not stored.

        Args:
            multiple: `Manifest.pad_to_multiple_of`; where segments begin.
        """
        before = offsets_of(-(-self.length.astype(np.int64) // multiple) * multiple)[:-1]
        first = np.flatnonzero(np.diff(self.row, prepend=-1) | np.diff(self.rest, prepend=False))
        starts: Int64 = before - np.repeat(before[first], np.diff(np.append(first, len(self))))
        return starts


@dataclass(frozen=True, slots=True, eq=False)
class RestRows:
    """The rest of a slice: stretches of documents that no row holds.

    Attributes:
        input_ids: int32[T].
        labels: int32[T], -100 where not trained; unlike in a packed row, the first token keeps its label.
        row_offsets: int64[N + 1], of the stretches.
        example_ids: int64[N], input row that the document comes from.
        offset: int32[N], first token of the stretch, counted in the document.
        reasons: why it is in no row, one of `rows_dropped` or `tokens_cut` in the ledger.
        loss_weights: float32[T]; None without weights.
        images: int32[K], pictures of the stretches, end to end, as numbers in the sidecar.
        image_counts: int32[N], how many each stretch has; None, as `images`, without pictures.
    """

    input_ids: Int32
    labels: Int32
    row_offsets: Int64
    example_ids: Int64
    offset: Int32
    reasons: list[str]
    loss_weights: Float32 | None = None
    images: Int32 | None = None
    image_counts: Int32 | None = None

    def __len__(self) -> int:
        return len(self.example_ids)


def _packed_segments(rows: PackedRows) -> TokenBatch:
    """Return the documents of packed rows, with their example ids as `row`."""
    trained = rows.labels != IGNORE_INDEX
    segments = offsets_of(rows.seq_lengths)
    tokens = TokenBatch(rows.input_ids, trained, segments, rows.example_ids, rows.loss_weights)
    return tokens.select(rows.example_ids >= 0)


def _rest_segments(rest: RestRows) -> TokenBatch:
    trained = rest.labels != IGNORE_INDEX
    return TokenBatch(rest.input_ids, trained, rest.row_offsets, rest.example_ids, rest.loss_weights)


def _refuse_other(
    path: Path, name: str, said: npt.NDArray[np.generic], found: npt.NDArray[np.generic]
) -> None:
    if not np.array_equal(said, found):
        raise IntegrityError(f"{path}: {name} differs from what rows and rest hold.", RESTORE)


# -------------------------------------------------------------------------------------------------- making


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """The documents of a slice, and where each of their tokens goes.

    Attributes:
        documents: whole, as they came in.
        example_ids: int64[N], input row of each.
        packs: the shard's rows, in terms of `documents`; `pack.gather` lays them out.
        rest: what they do not hold, a row a stretch.
        reasons: why, one for each row of `rest`.
        pictures: of the documents; None in a set without pictures.
    """

    documents: TokenBatch
    example_ids: Int64
    packs: PackPlan
    rest: PackPlan
    reasons: Sequence[str]
    pictures: SlicePictures | None = None


def write_slice(
    folder: Path | Store, number: int, placed: Placed, rows: PackedRows, row_length: int | None,
    bos_id: int | None, embed: PictureFolder | None = None,
) -> tuple[tuple[ShardInfo, ...], tuple[SetFile, ...]]:  # fmt: skip
    """Write the shard of a slice and what stands beside it; return what the manifest says of these files.

    Args:
        folder: of the set.
        number: of the slice.
        placed: its documents.
        rows: the same, packed; without rows there is no shard.
        row_length: tokens of every row; None where rows keep their own length.
        bos_id: a document that has no more than this before its first label has no prompt.
        embed: where pictures are whose files go into the set; None to store their paths.
    """
    if placed.pictures is not None:
        rows = replace(rows, **placed.pictures.columns(rows.example_ids >= 0, placed.packs.example))
    shards = (write_shard(folder / shard_name(number), rows, row_length),) if len(rows) else ()
    weighted, files = rows.loss_weights is not None, []
    if len(placed.rest):
        files.append(write_rest(folder / beside_name(REST, number), rest_rows(placed, weighted)))
    if len(placed.documents):
        index = index_documents(placed, weighted, bos_id)
        files.append(write_index(folder / beside_name(INDEX, number), index))
    if placed.pictures is not None and placed.pictures.stored:
        files.append(write_images(folder / beside_name(IMAGES, number), placed.pictures, embed))
    return shards, tuple(files)


def rest_rows(placed: Placed, weighted: bool = False) -> RestRows:
    """Lay out the rest as the columns of its file."""
    documents, rest = placed.documents, placed.rest
    lengths = rest.stop - rest.start
    tokens = positions_of(documents.offsets[rest.example] + rest.start, lengths)
    ids = documents.input_ids[tokens]
    pictures, whole = placed.pictures, rest.start == 0
    return RestRows(
        input_ids=ids,
        labels=np.where(documents.trained[tokens], ids, np.int32(IGNORE_INDEX)),
        row_offsets=offsets_of(lengths),
        example_ids=placed.example_ids[rest.example],
        offset=rest.start.astype(np.int32),
        reasons=list(placed.reasons),
        loss_weights=documents.weights()[tokens] if weighted else None,
        **({} if pictures is None else pictures.columns(whole, rest.example[whole])),
    )


def index_documents(placed: Placed, weighted: bool = False, bos_id: int | None = None) -> Segments:
    """Return where each token of these documents is; `bos_id` as for `write_slice`."""
    documents, packs, rest = placed.documents, placed.packs, placed.rest
    document = np.concatenate([packs.example, rest.example])
    start, stop = np.concatenate([packs.start, rest.start]), np.concatenate([packs.stop, rest.stop])
    rows = [np.repeat(np.arange(len(plan)), np.diff(plan.offsets)) for plan in (packs, rest)]
    first, length = documents.offsets[document] + start, stop - start
    places = np.flatnonzero(documents.trained)
    labelled = np.append(documents.trained, False)[first] & (length > 0)
    weights = np.append(documents.weights(), np.float32(0))[first] * labelled if weighted else None
    pictures = None if placed.pictures is None else placed.pictures.hashes(documents)
    hashes = hash_documents(documents, weighted, pictures)
    return Segments(
        example_ids=placed.example_ids[document],
        row=np.concatenate(rows).astype(np.int32),
        offset=start.astype(np.int32),
        length=length.astype(np.int32),
        trained=count_between(places, first + 1, first + length).astype(np.int32),
        first_trained=labelled,
        rest=np.repeat([False, True], [len(packs.example), len(rest.example)]),
        whole=length == documents.lengths[document],
        document_hash=hashes[document],
        prompt_hash=hash_prompts(documents, bos_id, pictures)[document],
        first_weights=weights,
    )


# ------------------------------------------------------------------------------------------------ the files


def rest_schema(weighted: bool, pictured: bool = False) -> pa.Schema:
    """Return the schema of a rest file."""
    import pyarrow as pa

    lists = [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))]
    lists += [("loss_weights", pa.list_(pa.float32()))] if weighted else []
    plain = [("example_id", pa.int64()), ("offset", pa.int32()), ("reason", pa.utf8())]
    return pa.schema([*lists, *plain, *([("images", pa.list_(pa.int32()))] if pictured else [])])


@cache
def index_schema(weighted: bool) -> pa.Schema:
    """Return the schema of an index file."""
    import pyarrow as pa

    columns = [
        ("example_id", pa.int64()),
        *((name, pa.int32()) for name in ("row", "offset", "length", "trained")),
        *((name, pa.bool_()) for name in ("first_trained", "rest", "whole")),
        ("document_hash", pa.binary(HASH_BYTES)),
        ("prompt_hash", pa.uint64()),
    ]
    return pa.schema([*columns, ("first_weight", pa.float32())] if weighted else columns)


def write_rest(path: Path | Target, rows: RestRows) -> SetFile:
    """Write a rest file; return its description."""
    import pyarrow as pa

    schema = rest_schema(rows.loss_weights is not None, rows.images is not None)
    columns: list[Int32 | Float32] = [rows.input_ids, rows.labels]
    columns += [] if rows.loss_weights is None else [rows.loss_weights]
    batches = []
    for first, last in batch_edges(rows.row_offsets):
        lists = [list_rows(column, rows.row_offsets, first, last) for column in columns]
        plain = [as_arrow(rows.example_ids[first:last]), as_arrow(rows.offset[first:last])]
        columns_of = [*lists, *plain, as_strings(rows.reasons[first:last])]
        if rows.images is not None and rows.image_counts is not None:
            columns_of.append(list_rows(rows.images, offsets_of(rows.image_counts), first, last))
        batches.append(pa.RecordBatch.from_arrays(columns_of, schema=schema))
    return write_file(path, schema, batches)


def read_rest(path: Path, weighted: bool = False, pictured: bool = False) -> list[RestRows]:
    """Map a rest file and return its record batches as columns.

    Raises:
        IntegrityError: the file is no such file.
    """
    parts = []
    for batch in read_file(path, rest_schema(weighted, pictured)):
        lists = [batch.column(index) for index in range(2 + weighted)]
        offsets = [list_offsets(column) for column in lists]
        if any(not np.array_equal(offsets[0], other) for other in offsets[1:]):
            raise IntegrityError(f"{path}: its lists differ in length.", RESTORE)
        ids, labels, *weights = [as_numpy(list_items(column)) for column in lists]
        parts.append(
            RestRows(
                input_ids=ids,
                labels=labels,
                row_offsets=offsets[0],
                example_ids=as_numpy(batch["example_id"]),
                offset=as_numpy(batch["offset"]),
                reasons=batch["reason"].to_pylist(),
                loss_weights=weights[0] if weighted else None,
                **rest_pictures(batch, pictured),
            )
        )
    return parts


def rest_pictures(batch: pa.RecordBatch, pictured: bool) -> PictureColumns:
    """Return `images` and `image_counts` of a record batch of a rest; nothing without pictures."""
    if not pictured:
        return {}
    counts = np.diff(list_offsets(batch["images"])).astype(np.int32)
    return {"images": as_numpy(list_items(batch["images"])), "image_counts": counts}


def write_index(path: Path | Target, index: Segments) -> SetFile:
    """Write an index file; return its description."""
    import pyarrow as pa

    schema = index_schema(index.first_weights is not None)
    hashes = index.document_hash.astype("<u8")
    columns = [
        as_arrow(index.example_ids),
        *map(as_arrow, (index.row, index.offset, index.length, index.trained)),
        *map(_as_bits, (index.first_trained, index.rest, index.whole)),
        pa.Array.from_buffers(pa.binary(HASH_BYTES), len(index), [None, pa.py_buffer(hashes)]),
        as_arrow(index.prompt_hash),
        *([] if index.first_weights is None else [as_arrow(index.first_weights)]),
    ]
    return write_file(path, schema, [pa.RecordBatch.from_arrays(columns, schema=schema)])


def read_index(path: Path, weighted: bool = False, *, mapped: bool = True) -> Segments:
    """Map an index file, or read it; `mapped` as for `read_file`.

    Raises:
        IntegrityError: the file is no such file.
    """
    batches = read_file(path, index_schema(weighted), mapped=mapped)
    if len(batches) != 1:
        raise IntegrityError(f"{path}: {len(batches)} record batches; an index has one.", RESTORE)
    batch = batches[0]
    columns = batch.columns  # in the order of the schema; to look them up by name takes as long again
    ids, row, offset, length, trained = map(as_numpy, columns[:5])
    first_trained, rest, whole = map(_from_bits, columns[5:8])
    hashes = np.frombuffer(columns[8].buffers()[1] or b"", "<u8", 2 * len(batch)).reshape(-1, 2)
    document, weights = hashes.astype(np.uint64, copy=False), as_numpy(columns[10]) if weighted else None
    return Segments(
        ids, row, offset, length, trained, first_trained, rest, whole, document, as_numpy(columns[9]), weights
    )


def as_strings(texts: Sequence[str]) -> pa.Array:
    """Return ASCII texts as an array; pyarrow's own way imports pandas."""
    import pyarrow as pa

    offsets = offsets_of([len(text) for text in texts]).astype(np.int32)
    joined = pa.py_buffer("".join(texts).encode("ascii"))
    return pa.Array.from_buffers(pa.utf8(), len(texts), [None, pa.py_buffer(offsets), joined])


def _as_bits(flags: Bool) -> pa.Array:
    import pyarrow as pa

    bits = np.packbits(flags, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(flags), [None, pa.py_buffer(bits)])


def _from_bits(column: pa.Array) -> Bool:
    bits = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    return np.unpackbits(bits, count=len(column), bitorder="little").view(np.bool_)
