"""The sets that a view is made of: opened, compared with each other, and read as one list of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from sftdata.batches import (
    IGNORE_INDEX,
    Bool,
    Float32,
    Int32,
    Int64,
    PackedRows,
    TokenBatch,
    count_between,
    offsets_of,
    positions_of,
)
from sftdata.errors import ANEW, VERIFY, IntegrityError, UsageError
from sftdata.set.extents import (
    GIVEN,
    PADDING_FILE,
    Extents,
    Packs,
    RestExtents,
    held_files,
    packs_name,
    read_packs,
    read_rest_extents,
)
from sftdata.set.hashes import hash_documents, hash_prompts
from sftdata.set.held import Block, TokenFiles, open_token_files
from sftdata.set.images import IMAGES, HasPictures, StoredPictures, VisionInfo, join_pictures, read_images
from sftdata.set.index import (
    INDEX,
    REST,
    Segments,
    beside_name,
    read_index,
    slice_number,
)
from sftdata.set.local import check_file, local_folder, plain_file
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.shards import read_shard, shard_name
from sftdata.set.store import SetFile
from sftdata.views.documents import Documents, Located, join_segments
from sftdata.views.pictures import Collected, paths_from


@dataclass(frozen=True, slots=True)
class Base:
    """A finished set that a view is made of.

    Attributes:
        folder: where it lies.
        manifest: what it is.
        first_id: example id in the view of its example 0.
        first_shard: number in the view of its slice 0.
        before: comes in the view before the paths of its pictures.
    """

    folder: Path
    manifest: Manifest
    first_id: int
    first_shard: int
    before: str

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
    paths = [local_folder(folder) for folder in folders]
    manifests = [read_manifest(path) for path in paths]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            what = f"{path}: named twice."
            raise UsageError(what, "name it once; --mix NAME=SHARE with --passes 2 repeats documents.")
    _refuse_different(paths, manifests)
    ids = accumulate((_rows(manifest) for manifest in manifests), initial=0)
    shards = accumulate((_slices(manifest) for manifest in manifests), initial=0)
    before = paths_from(list(zip(paths, manifests, strict=True)))[1]
    return tuple(map(Base, paths, manifests, ids, shards, before))


def _refuse_different(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Refuse sets of two tokenizers, of two chat templates of one, or of two processors."""
    first, vision = manifests[0], vision_of(manifests)
    processor = None if vision is None else vision.processor_sha256
    for path, manifest in zip(paths, manifests, strict=True):
        if said := unlike(manifest, first.tokenizer.sha256, first.chat_template_sha256, processor):
            what, found, expected = said
            fix = f"make a view of sets of one {what}, or prepare one of them again."
            raise UsageError(f"{path}: {what} {found}; {paths[0]} has {expected}.", fix)


def vision_of(manifests: Sequence[Manifest]) -> VisionInfo | None:
    """Return what pictures of sets were read with; None where they have none."""
    return next((manifest.vision for manifest in manifests if manifest.vision is not None), None)


def unlike(
    manifest: Manifest, tokenizer: str, chat_template: str | None, processor: str | None
) -> tuple[str, str, str] | None:
    """Return what of a set is not that of this hash, and the beginnings of both hashes; None if nothing.

    Args:
        manifest: of the set.
        tokenizer, chat_template, processor: hashes; a set without pictures goes with any processor.
    """
    own = manifest.vision
    for what, found, expected in (
        ("tokenizer", manifest.tokenizer.sha256, tokenizer),
        ("chat template", manifest.chat_template_sha256, chat_template),
        ("processor", None if own is None or processor is None else own.processor_sha256, processor),
    ):
        if found != expected and (what, found) != ("processor", None):
            return what, str(found)[:12], str(expected)[:12]
    return None


def _rows(manifest: Manifest) -> int:
    return sum(source.rows for source in manifest.sources)


def _slices(manifest: Manifest) -> int:
    return max(map(_number, (*manifest.shards, *manifest.files)), default=-1) + 1


def _number(file: SetFile) -> int:
    """Return the number of the slice that a file belongs to; -1 for other files."""
    found = slice_number(file.name)
    return -1 if found is None else found


@dataclass(frozen=True, slots=True)
class Store:
    """The files in which the tokens of the bases lie: their own, or those of the sets that they are views of.

    Attributes:
        files: numbered through.
        numbers: int64[F] for each base, the numbers there of the files that it calls 0, 1, ...
    """

    files: TokenFiles
    numbers: tuple[Int64, ...]


def open_store(bases: Sequence[Base], *, whole: bool) -> Store:
    """Open the files of the bases, each set once; a view by index stands for the sets it is made of.

    Args:
        whole: hash each file before it is read, as long as it takes; else look at its size.

    Raises:
        IntegrityError: the base of a base is gone, or is another set by now.
    """
    sets: dict[Path, Manifest] = {}
    parts: list[list[Path]] = []
    for base in bases:
        own = [(base.folder.resolve(), base.manifest)]
        if base.manifest.by_index:
            own = open_token_files(base.folder, base.manifest).sets
        sets |= {folder: manifest for folder, manifest in own if folder not in sets}
        parts.append([folder for folder, _ in own])
    counts = [len(held_files(manifest)) for manifest in sets.values()]
    ranges = {
        folder: np.arange(first, first + count)
        for folder, first, count in zip(sets, accumulate(counts, initial=0), counts, strict=False)
    }
    numbers = tuple(np.concatenate([ranges[folder] for folder in folders]) for folders in parts)
    return Store(TokenFiles([*sets.items()], check=check_file if whole else plain_file), numbers)


def read_documents(bases: Sequence[Base], store: Store | None = None, only: Int64 | None = None) -> Documents:
    """Map the files of all bases, and find every document in them.

    Args:
        bases: the sets.
        store: their files; by default each is hashed before it is read.
        only: int64[K], find these documents only; their ids, ascending.

    Raises:
        UsageError: a base does not hold all that its documents had.
        IntegrityError: a file is missing or is not what its manifest says.
    """
    store = store or open_store(bases, whole=True)
    vision = vision_of([base.manifest for base in bases])
    pictures = None if vision is None else Collected.none()
    parts: list[Located] = []
    for base, numbers in zip(bases, store.numbers, strict=True):
        for file in base.manifest.files:
            if slice_number(file.name) is None:  # lists and tokenizer; those of slices are checked when read
                check_file(base.folder, file)
        found = _find(base, store.files, numbers, pictures if base.manifest.pictured else None)
        parts += found if only is None else (part.take(_which(part.example_id, only)) for part in found)
    where = ", ".join(str(base.folder) for base in bases)
    documents = join_segments(Located.drain(parts), store.files.blocks, where)
    if vision is not None and pictures is not None:
        documents = replace(documents, pictures=pictures.join(documents.ids, vision))
    if not any(base.manifest.weighted for base in bases):
        return documents
    return documents.weighing(found_of(documents, [base for base in bases if not base.manifest.weighted]))


def found_of(documents: Documents, bases: Sequence[Base]) -> Int64:
    """int64[K]: the documents, by their indices, that come from these bases."""
    edges = np.array([[base.first_id, base.first_id + base.rows] for base in bases], np.int64).reshape(-1, 2)
    first, last = np.searchsorted(documents.ids, edges).T
    return positions_of(first, last - first)


def _which(ids: Int64, few: Int64) -> Int64:
    """Return where ids are among a few, which ascend."""
    return np.flatnonzero(np.append(few, -1)[np.searchsorted(few, ids)] == ids)


def _find(base: Base, files: TokenFiles, numbers: Int64, pictures: Collected | None) -> Iterator[Located]:
    """Yield the segments of a base, slice by slice; note their pictures, in a base that has any."""
    if base.manifest.by_index:
        yield from _compose(base, files, numbers, pictures)
    elif base.manifest.format_version > 1:
        yield from _look_up(base, files, numbers, pictures)
    else:
        refuse_inexact(base)
        yield from _derive(base, files, numbers)


def _indexes(base: Base) -> Iterator[tuple[int, Segments]]:
    """Yield the number and the index of each slice."""
    for file in sorted(base.manifest.files, key=_number):
        if file.name.startswith(f"{INDEX}-"):
            yield _number(file), read_index(check_file(base.folder, file), base.manifest.weighted)


def _look_up(base: Base, files: TokenFiles, numbers: Int64, pictures: Collected | None) -> Iterator[Located]:
    """Look the segments of a set up in the index of each slice."""
    names = (file.name for file in held_files(base.manifest))
    places = dict(zip(names, numbers.tolist(), strict=True))
    for number, index in _indexes(base):
        held = [
            [] if place is None else files.open_blocks(place)
            for place in (places.get(name) for name in (shard_name(number), beside_name(REST, number)))
        ]
        if pictures is not None:
            sidecar = places.get(beside_name(IMAGES, number))
            stored = None if sidecar is None else files.pictures(sidecar)
            parts = [files.blocks[block] for block in held[0] + held[1]]
            _collect(pictures, base, index.example_ids, parts, stored, np.array([sidecar]))
        yield _located(index, held, files.blocks, base, number)


def _collect(
    pictures: Collected, base: Base, example_ids: Int64, parts: Sequence[HasPictures],
    stored: StoredPictures | None, files: Int64,
) -> None:  # fmt: skip
    """Note the pictures of a slice, its rows and rest; `files` as for `Gallery.add`."""
    counts, images = join_pictures(parts)
    count = 0 if stored is None else len(stored)
    if len(counts) != len(example_ids) or (len(images) and not 0 <= images.min() <= images.max() < count):
        what = f"{base.folder}: documents name pictures that are not in its sidecars."
        raise IntegrityError(what, VERIFY)
    first = 0 if stored is None else pictures.gallery.add(stored, base.before, files)
    pictures.add(example_ids + base.first_id, counts, images, first)


def _located(
    index: Segments, held: list[list[int]], blocks: Sequence[Block], base: Base, number: int
) -> Located:
    """Find the block of each segment of a slice, of its rows and of its rest, and its first token there."""
    parts = [blocks[block] for block in held[0] + held[1]]
    counts = [len(part.row_offsets) - 1 for part in parts]
    row = index.row + np.where(index.rest, sum(counts[: len(held[0])]), 0)
    if len(row) and row.max() >= sum(counts):
        what = f"{base.folder}: the index of slice {number} names rows that are not there."
        raise IntegrityError(what, VERIFY)
    begin = np.concatenate([np.empty(0, np.int64), *(part.row_offsets[:-1] for part in parts)])[row]
    return Located(
        example_id=index.example_ids + base.first_id,
        block=np.repeat(np.array(held[0] + held[1], np.int32), counts)[row],
        start=begin + index.starts(base.manifest.pad_to_multiple_of),
        length=index.length,
        offset=index.offset,
        trained=index.trained,
        first_label=index.first_trained,
        first_weight=_first_weights(index),
        shard=np.full(len(index), base.first_shard + number, np.int32),
        document=index.document_hash,
        prompt=index.prompt_hash,
    )


def _first_weights(index: Segments) -> Float32:
    return np.ones(len(index), np.float32) if index.first_weights is None else index.first_weights


# --------------------------------------------------------------------------------------- views by index


def _compose(base: Base, files: TokenFiles, numbers: Int64, pictures: Collected | None) -> Iterator[Located]:
    """Find the segments of a view by index in the files of its own bases."""
    manifest = base.manifest
    kept = {file.name: file for file in (*manifest.shards, *manifest.files)}
    for number, index in _indexes(base):
        parts: list[tuple[Path, Packs | RestExtents]] = []
        for name, read in (
            (packs_name(number), read_packs), (beside_name(REST, number), read_rest_extents)
        ):  # fmt: skip
            if name in kept:
                path = check_file(base.folder, kept[name])
                parts += [(path, part) for part in read(path, manifest.weighted, manifest.pictured)]
        if pictures is not None:
            stored, file = None, kept.get(beside_name(IMAGES, number))
            if file is not None:
                sidecar = check_file(base.folder, file)
                stored = read_images(sidecar, lambda held: files.pictures(int(numbers[held])))
            own = [part for _, part in parts]
            _collect(pictures, base, index.example_ids, own, stored, numbers)
        found = [_renumbered(path, part.extents, files, numbers) for path, part in parts]
        yield _composed(index, found, base, number)


Runs = tuple[Int32, Int64, Int32, Bool, Float32]
"""Of each extent but padding: block, first token there, length, whether that is labelled, what it weighs."""


def _renumbered(path: Path, extents: Extents, files: TokenFiles, numbers: Int64) -> Runs:
    real = extents.file != PADDING_FILE
    file, length = extents.file[real], extents.length[real]
    if len(file) and not 0 <= file.min() <= file.max() < len(numbers):
        raise IntegrityError(f"{path}: names files that are not there.", ANEW)
    block, start = files.place(path, numbers[file].astype(np.int32), extents.start[real], length)
    weights = np.ones(len(extents), np.float32) if extents.first_weights is None else extents.first_weights
    return block, start, length, extents.first_label[real] == GIVEN, weights[real]


def _composed(index: Segments, parts: Sequence[Runs], base: Base, number: int) -> Located:
    """Make segments of their own of the extents that make up each segment of a slice."""
    block, start, length, labelled, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    begins, edges = offsets_of(length), offsets_of(index.length)
    if not (np.isin(edges, begins).all() and begins[-1] == edges[-1]):
        what = f"{base.folder}: the index of slice {number} names other segments than its rows."
        raise IntegrityError(what, ANEW)
    of = np.searchsorted(edges, begins[:-1], side="right") - 1
    empty = np.flatnonzero(index.length == 0)  # documents without tokens
    of = np.append(of, empty)
    none = np.zeros(len(empty), np.int64)
    begins, length = np.append(begins[:-1], edges[empty]), np.append(length, none).astype(np.int32)
    first = begins == edges[of]
    labelled = np.where(first, index.first_trained[of], np.append(labelled, none != 0))
    later = np.bincount(of[~first], labelled[~first], len(index)).astype(np.int32)
    return Located(
        example_id=index.example_ids[of] + base.first_id,
        block=np.append(block, none).astype(np.int32),
        start=np.append(start, none),
        length=length,
        offset=(index.offset[of] + begins - edges[of]).astype(np.int32),
        # Only sums over documents count, so the first run may have the labels of the whole segment.
        trained=np.where(first, index.trained[of] - later[of], 0).astype(np.int32),
        first_label=labelled,
        first_weight=np.where(first, _first_weights(index)[of], np.append(weights, none)).astype(np.float32),
        shard=np.full(len(of), base.first_shard + number, np.int32),
        document=index.document_hash[of],
        prompt=index.prompt_hash[of],
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


def _derive(base: Base, files: TokenFiles, numbers: Int64) -> Iterator[Located]:
    """Find the documents in the rows themselves, each whole in one row."""
    manifest = base.manifest
    for shard, number in zip(manifest.shards, numbers.tolist(), strict=True):
        path = check_file(base.folder, shard)
        rows = read_shard(path, manifest.max_length, manifest.weighted)
        for part, block in zip(rows, files.open_blocks(number), strict=True):
            yield _derive_batch(part, base, block, base.first_shard + _number(shard))


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
