"""The sets that a view is made of: opened, compared with each other, and read as one list of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from sftdata.batches import IGNORE_INDEX, PackedRows, TokenBatch, count_between, offsets_of, positions_of
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.index import (
    INDEX,
    REST,
    RestRows,
    Segments,
    beside_name,
    hash_documents,
    hash_prompts,
    read_index,
    read_rest,
    slice_number,
)
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.shards import read_shard, shard_name
from sftdata.set.store import SetFile, check_file
from sftdata.views.documents import Block, Documents, Located, join_segments


@dataclass(frozen=True, slots=True)
class Base:
    """A finished set that a view is made of.

    Attributes:
        folder: where it lies.
        manifest: what it is.
        first_id: example id in the view of its example 0.
        first_shard: number in the view of its slice 0.
    """

    folder: Path
    manifest: Manifest
    first_id: int
    first_shard: int

    @property
    def rows(self) -> int:
        """How many example ids its sources take."""
        return _rows(self.manifest)


def open_bases(folders: Sequence[str | Path]) -> tuple[Base, ...]:
    """Open the sets of a view; only their manifests are read.

    Raises:
        UsageError: a folder is no finished set, is there twice, or the sets have different tokenizers.
        IntegrityError: a manifest is damaged.
    """
    paths = [Path(folder) for folder in folders]
    manifests = [read_manifest(path) for path in paths]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise UsageError(
                f"{path}: named twice.", "name it once; --mix NAME=SHARE with --passes 2 repeats documents."
            )
    _refuse_different(paths, manifests)
    ids = accumulate((_rows(manifest) for manifest in manifests), initial=0)
    shards = accumulate((_slices(manifest) for manifest in manifests), initial=0)
    return tuple(map(Base, paths, manifests, ids, shards))


def _refuse_different(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Refuse sets of two tokenizers, or of two chat templates of one."""
    for path, manifest in zip(paths, manifests, strict=True):
        for what, one, other in (
            ("tokenizer", manifests[0].tokenizer.sha256, manifest.tokenizer.sha256),
            ("chat template", manifests[0].chat_template_sha256, manifest.chat_template_sha256),
        ):
            if one != other:
                found = f"{what} {str(other)[:12]}; {paths[0]} has {str(one)[:12]}"
                raise UsageError(
                    f"{path}: {found}.", "make a view of sets of one tokenizer, or prepare one of them again."
                )


def _rows(manifest: Manifest) -> int:
    return sum(source.rows for source in manifest.sources)


def _slices(manifest: Manifest) -> int:
    return max(map(_number, (*manifest.shards, *manifest.files)), default=-1) + 1


def _number(file: SetFile) -> int:
    """Return the number of the slice that a file belongs to; -1 for other files."""
    found = slice_number(file.name)
    return -1 if found is None else found


def read_documents(bases: Sequence[Base]) -> Documents:
    """Map the files of all bases, and find every document in them.

    Raises:
        UsageError: a base does not hold all that its documents had.
        IntegrityError: a file is missing or is not what its manifest says.
    """
    parts: list[Located] = []
    blocks: list[Block] = []
    for base in bases:
        for file in base.manifest.files:
            if (
                slice_number(file.name) is None
            ):  # lists and tokenizer; the files of slices are checked when read
                check_file(base.folder, file)
        for found, held in _find(base, len(blocks)):
            parts.append(found)
            blocks += held
    return join_segments(Located.join(parts), tuple(blocks), ", ".join(str(base.folder) for base in bases))


def _find(base: Base, first_block: int) -> Iterator[tuple[Located, list[Block]]]:
    """Yield the segments of a base, and the blocks that hold them, slice by slice."""
    if base.manifest.format_version > 1:
        yield from _look_up(base, first_block)
    else:
        refuse_inexact(base)
        yield from _derive(base, first_block)


def _look_up(base: Base, first_block: int) -> Iterator[tuple[Located, list[Block]]]:
    """Look the segments up in the index of each slice."""
    manifest = base.manifest
    files = {file.name: file for file in (*manifest.shards, *manifest.files)}
    weighted = manifest.weighted
    for name in sorted(name for name in files if name.startswith(f"{INDEX}-")):
        number = slice_number(name) or 0
        index = read_index(check_file(base.folder, files[name]), weighted)
        shard, beside = files.get(shard_name(number)), files.get(beside_name(REST, number))
        rows = read_shard(check_file(base.folder, shard), manifest.max_length, weighted) if shard else []
        rest = read_rest(check_file(base.folder, beside), weighted) if beside else []
        found = _located(index, (rows, rest), base, first_block, base.first_shard + number)
        parts: list[PackedRows | RestRows] = [*rows, *rest]
        blocks = [Block(part.input_ids, part.labels, part.loss_weights) for part in parts]
        yield found, blocks
        first_block += len(blocks)


def _located(
    index: Segments, held: tuple[list[PackedRows], list[RestRows]], base: Base, first_block: int, shard: int
) -> Located:
    """Find the block of each segment of a slice, and the place of its first token there."""
    parts: list[PackedRows | RestRows] = [*held[0], *held[1]]
    first_row = np.array([0, sum(map(len, held[0]))])[index.rest.astype(np.int64)]
    row = index.row + first_row
    counts = [len(part) for part in parts]
    if len(row) and row.max() >= sum(counts):
        raise IntegrityError(
            f"{base.folder}: the index of slice {shard - base.first_shard} names rows that are not there.",
            "run `sftdata verify`, or prepare the set again with --overwrite.",
        )
    block = np.repeat(np.arange(len(parts)), counts)[row]
    begin = np.concatenate([np.empty(0, np.int64), *(part.row_offsets[:-1] for part in parts)])[row]
    weights = np.ones(len(index), np.float32) if index.first_weights is None else index.first_weights
    return Located(
        example_id=index.example_ids + base.first_id,
        block=(block + first_block).astype(np.int32),
        start=begin + index.starts(),
        length=index.length,
        offset=index.offset,
        trained=index.trained,
        first_label=index.first_trained,
        first_weight=weights,
        shard=np.full(len(index), shard, np.int32),
        document=index.document_hash,
        prompt=index.prompt_hash,
    )


# ------------------------------------------------------------------------------ sets without an index


def refuse_inexact(base: Base) -> None:
    """Refuse a set without an index that has lost a token, or a label between two pieces of a document.

    Raises:
        UsageError: naming what was lost, by which setting.
    """
    ledger = base.manifest.ledger
    lost = {f"{name} tokens": count for name, count in ledger.tokens_cut.items()}
    lost |= {f"{name} rows": count for name, count in ledger.rows_dropped.items()}
    if ledger.documents > ledger.rows_kept:
        lost["labels between pieces of documents"] = ledger.documents - ledger.rows_kept
    if lost:
        found = ", ".join(f"{count:,} {name}" for name, count in lost.items())
        raise UsageError(
            f"{base.folder}: made in format version {base.manifest.format_version}, without an index;"
            f" lost: {found}.",
            "prepare it again with this version, which keeps what it cuts.",
        )


def _derive(base: Base, first_block: int) -> Iterator[tuple[Located, list[Block]]]:
    """Find the documents in the rows themselves, each whole in one row."""
    manifest = base.manifest
    for shard in manifest.shards:
        path = check_file(base.folder, shard)
        for rows in read_shard(path, manifest.max_length, manifest.weighted):
            found = _derive_batch(rows, base, first_block, base.first_shard + _number(shard))
            yield found, [Block(rows.input_ids, rows.labels, rows.loss_weights)]
            first_block += 1


def _derive_batch(rows: PackedRows, base: Base, block: int, shard: int) -> Located:
    starts = offsets_of(rows.seq_lengths)
    here = np.flatnonzero(rows.example_ids >= 0)
    start, length = starts[:-1][here], rows.seq_lengths[here].astype(np.int64)
    tokens = positions_of(start, length)
    weights = None if rows.loss_weights is None else rows.loss_weights[tokens]
    trained = rows.labels[tokens] != IGNORE_INDEX
    documents = TokenBatch(rows.input_ids[tokens], trained, offsets_of(length), np.arange(len(here)), weights)
    places, first = np.flatnonzero(trained), documents.offsets[:-1]
    return Located(
        example_id=rows.example_ids[here] + base.first_id,
        block=np.full(len(here), block, np.int32),
        start=start,
        length=length.astype(np.int32),
        offset=np.zeros(len(here), np.int32),
        trained=count_between(places, first + 1, documents.offsets[1:]).astype(np.int32),
        first_label=trained[first],
        first_weight=documents.weights()[first],
        shard=np.full(len(here), shard, np.int32),
        document=hash_documents(documents, base.manifest.weighted),
        prompt=hash_prompts(documents, base.manifest.tokenizer.bos_id),
    )
