"""Slices of a finished set, taken over by the set that will replace it.

A slice is the same wherever it stands, but for its number, the ids of its examples, and the names and lines
of its rows in the lists. So one that was made of the same bytes in the same way is linked into the new set,
or written again with other ids; nothing is tokenized. Nothing is taken over that is not what the old
manifest says, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np

from sftdata.batches import Dropped, Int64, Reject
from sftdata.errors import IntegrityError
from sftdata.set.images import IMAGES
from sftdata.set.index import INDEX, REST, beside_name, index_schema, rest_schema
from sftdata.set.ledger import (
    COUNTED_NAME,
    DROPPED_NAME,
    LISTS,
    REJECTS_NAME,
    CountedRows,
    Ledger,
    encode_lines,
    encode_reject,
)
from sftdata.set.local import check_file
from sftdata.set.manifest import Manifest
from sftdata.set.shards import (
    ShardInfo,
    as_arrow,
    as_numpy,
    list_array,
    list_items,
    list_offsets,
    read_file,
    shard_name,
    shard_schema,
    write_file,
)
from sftdata.set.slices import SliceRecord, SliceSource, read_slices
from sftdata.set.store import SetFile, link_file
from sftdata.set.stores import Folder, Store

if TYPE_CHECKING:
    import pyarrow as pa

File = TypeVar("File", bound=SetFile)
Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class OldSlice:
    """A slice of a finished set.

    Attributes:
        folder: of the set.
        record: of the slice.
        files: its shard, rest and index, as the manifest describes them.
        parts: first and last byte of its part of each list, half-open.
        row_length: tokens of every row; None where rows keep their own length.
        weighted, pictured: whether its rows have weights, and pictures.
    """

    folder: Path
    record: SliceRecord
    files: tuple[SetFile, ...]
    parts: dict[str, tuple[int, int]]
    row_length: int | None
    weighted: bool
    pictured: bool


def key_of(made_with: str, sources: Sequence[SliceSource]) -> Key:
    """Return all that decides what a slice holds, its place aside."""
    return made_with, tuple(source.content for source in sources)


def old_slices(folder: Path, manifest: Manifest) -> dict[Key, OldSlice]:
    """Return the slices of a finished set by what decides them; none of a set without their records.

    Two of the same key hold the same, and the last of them stands for both.
    """
    try:
        records = read_slices(folder)
    except IntegrityError:
        return {}
    described: dict[str, SetFile] = {file.name: file for file in (*manifest.shards, *manifest.files)}
    ends = {
        name: list(accumulate((record.lists.get(name, 0) for record in records), initial=0)) for name in LISTS
    }
    return {
        key_of(record.made_with, record.sources): OldSlice(
            folder,
            record,
            tuple(described[name] for name in record.files),
            {name: (ends[name][place], ends[name][place + 1]) for name in LISTS},
            manifest.settings.get("max_length") if manifest.settings.get("packing") != "none" else None,
            manifest.weighted,
            manifest.pictured,
        )
        for place, record in enumerate(records)
        if all(name in described for name in record.files)
    }


@dataclass(frozen=True, slots=True)
class Taken:
    """What a slice has become in the new set.

    Attributes:
        shards, files: in the folder of the new set.
        ledger: of the slice.
        lists: its part of each list.
    """

    shards: tuple[ShardInfo, ...]
    files: tuple[SetFile, ...]
    ledger: Ledger
    lists: dict[str, bytes]


def moves(old: OldSlice, sources: Sequence[SliceSource]) -> bool:
    """Say whether the slice has other ids in the new set, so that its files are written again."""
    return _Move(old.record.sources, tuple(sources)).renumbers


def take_over(
    old: OldSlice,
    number: int,
    sources: Sequence[SliceSource],
    folder: Path,
    changed: Callable[[Store, Sequence[SetFile], Iterable[Reject]], bool],
) -> Taken | None:
    """Put an old slice into a folder, as it would be made anew; None if it is damaged or cannot be moved.

    Args:
        number: of the slice in the new set.
        sources: its stretches there.
        folder: of the new set, unfinished.
        changed: whether pictures are others by now, by a store, its files and its rejects.

    Raises:
        SftError: the folder cannot be written.
    """
    move = _Move(old.record.sources, tuple(sources))
    try:
        lists = {name: move.lines(name, _read_part(old, name)) for name in LISTS}
        for file in old.files:
            check_file(old.folder, file)
        rejects = (msgspec.json.decode(line, type=Reject) for line in lists[REJECTS_NAME].splitlines())
        if changed(Folder(old.folder), old.files, rejects):
            return None
    except (IntegrityError, OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    shards, files = list[ShardInfo](), list[SetFile]()
    for kind in ("shard", REST, INDEX, IMAGES):
        for file in old.files:
            if file.name.startswith(f"{kind}-"):
                moved = _put(old, file, kind, number, move, folder)
                shards.append(moved) if isinstance(moved, ShardInfo) else files.append(moved)
    return Taken(tuple(shards), tuple(files), move.ledger(Ledger.from_json(old.record.ledger)), lists)


def _read_part(old: OldSlice, name: str) -> bytes:
    first, last = old.parts[name]
    if first == last:
        return b""
    with open(old.folder / name, "rb") as file:
        file.seek(first)
        part = file.read(last - first)
    if len(part) < last - first or not part.endswith(b"\n"):
        raise IntegrityError(f"{old.folder / name}: shorter than the slices say.")
    return part


# ------------------------------------------------------------------------------------------------- one file


def _put(old: OldSlice, file: File, kind: str, number: int, move: _Move, folder: Path) -> File:
    """Link a file under its new name where nothing in it moves; else write it with its new ids."""
    name = shard_name(number) if kind == "shard" else beside_name(kind, number)
    path = folder / name
    if not move.renumbers or kind == IMAGES:
        link_file(old.folder / file.name, path)
        return msgspec.structs.replace(file, name=name)
    schema = {
        "shard": partial(shard_schema, old.row_length, old.weighted, old.pictured),
        REST: partial(rest_schema, old.weighted, old.pictured),
        INDEX: partial(index_schema, old.weighted),
    }[kind]()
    batches = read_file(old.folder / file.name, schema)
    written = write_file(path, schema, (_renumbered(batch, move) for batch in batches))
    return msgspec.structs.replace(file, **msgspec.structs.asdict(written))


def _renumbered(batch: pa.RecordBatch, move: _Move) -> pa.RecordBatch:
    import pyarrow as pa

    columns = batch.columns
    for index, name in enumerate(batch.schema.names):
        if name in ("example_id", "example_ids"):
            ids = as_numpy(list_items(columns[index]))
            moved = move.ids(ids)
            lists = name == "example_ids"
            columns[index] = list_array(moved, list_offsets(columns[index])) if lists else as_arrow(moved)
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


# ------------------------------------------------------------------------------------- what moves in a slice


class _Move:
    """What changes in a slice when its stretches stand elsewhere."""

    def __init__(self, old: tuple[SliceSource, ...], new: tuple[SliceSource, ...]) -> None:
        self._pairs = {before.name: (before, after) for before, after in zip(old, new, strict=True)}
        self._firsts = np.array([source.first_id for source in old], np.int64)
        self._steps = np.array(
            [after.first_id - before.first_id for before, after in zip(old, new, strict=True)], np.int64
        )
        self._same = all(_place(before) == _place(after) for before, after in zip(old, new, strict=True))

    @property
    def renumbers(self) -> bool:
        """Whether ids change."""
        return bool(self._steps.any())

    def ids(self, ids: Int64) -> Int64:
        """Return the new ids; -1, of padding, stays."""
        stretch = np.maximum(np.searchsorted(self._firsts, ids, side="right") - 1, 0)
        moved: Int64 = np.where(ids < 0, ids, ids + self._steps[stretch])
        return moved

    def ledger(self, ledger: Ledger) -> Ledger:
        """Return the ledger with the new names and ids."""
        sources = {self._pairs[name][1].name: counts for name, counts in ledger.sources.items()}
        examples = {name: self.ids(np.array(ids, np.int64)).tolist() for name, ids in ledger.examples.items()}
        return msgspec.structs.replace(ledger, sources=sources, examples=examples)

    def lines(self, name: str, part: bytes) -> bytes:
        """Return a part of a list with the new names, places and ids.

        Raises:
            IntegrityError: a line is not as it would be written now.
        """
        if self._same or not part:
            return part
        moved = {REJECTS_NAME: self._rejects, DROPPED_NAME: self._dropped, COUNTED_NAME: self._counted}[name]
        return b"".join(moved([line + b"\n" for line in part.split(b"\n")[:-1]]))

    def _rejects(self, lines: Sequence[bytes]) -> Iterator[bytes]:
        for line in lines:
            reject = msgspec.json.decode(line, type=Reject)
            if encode_reject(reject) != line:
                raise IntegrityError("a reject that reads otherwise than it was written")
            before, after = self._pairs[reject.file]
            offset = reject.byte_offset + (after.start - before.start) * (reject.byte_offset >= 0)
            yield encode_reject(msgspec.structs.replace(reject, byte_offset=offset, **self._where(reject)))

    def _dropped(self, lines: Sequence[bytes]) -> Iterator[bytes]:
        for line in lines:
            row = msgspec.json.decode(line, type=Dropped)
            yield encode_lines([msgspec.structs.replace(row, **self._where(row))])

    def _where(self, row: Reject | Dropped) -> dict[str, str | int | None]:
        before, after = self._pairs[row.file]
        line = None if row.line is None else row.line + after.first_line - before.first_line
        return {
            "file": after.name,
            "record": row.record + after.first_record - before.first_record,
            "line": line,
        }

    def _counted(self, lines: Sequence[bytes]) -> Iterator[bytes]:
        for line in lines:
            counted = msgspec.json.decode(line, type=CountedRows)
            edges = self.ids(np.array(counted.examples, np.int64).reshape(-1)).reshape(-1, 2)
            examples = [(first, last) for first, last in edges.tolist()]
            yield encode_lines([msgspec.structs.replace(counted, examples=examples)])


def _place(source: SliceSource) -> tuple[str, int, int, int, int]:
    return source.name, source.start, source.first_record, source.first_id, source.first_line
