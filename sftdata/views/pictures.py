"""Pictures of the documents of finished sets: which each document has, and which sidecar of a base holds it.

Pictures are numbered through all sidecars, in the order of the bases. What decides a plan is in arrays;
names and bytes are looked up for a slice when it is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftdata.batches import Int32, Int64, TokenBatch, offsets_of, positions_of
from sftdata.errors import IntegrityError, UsageError
from sftdata.pictures.loaded import Picture
from sftdata.set.hashes import PictureHashes
from sftdata.set.images import (
    HasPictures,
    SlicePictures,
    StoredPictures,
    VisionInfo,
    join_pictures,
    picture_ends,
)

if TYPE_CHECKING:
    from sftdata.set.manifest import Manifest
    from sftdata.views.bases import Base
    from sftdata.views.select import Choice

IN_THE_SET = "."
"""The folder of pictures of a set that names none by path."""


def paths_from(sets: Sequence[tuple[Path, Manifest]]) -> tuple[str | None, list[str]]:
    """Return where the paths of pictures of several sets start, and what comes before those of each.

    Returns:
        The folder of all, or the one in which their folders lie; None where no picture is named by path.
    """
    own = [
        os.path.normpath(folder.resolve() / manifest.vision.images)
        if manifest.vision is not None and manifest.vision.images != IN_THE_SET
        else ""
        for folder, manifest in sets
    ]
    common = os.path.commonpath([*filter(None, own)]) if any(own) else None
    return common, [os.path.relpath(one, common) if one not in ("", common) else "" for one in own]


def refuse_stray(choice: Choice, bases: Sequence[Base]) -> None:
    """Refuse a chosen document that holds the token that stands for pieces of pictures, and no picture.

    Sets with pictures have none; others are looked through.

    Raises:
        UsageError: naming the document.
    """
    documents = choice.documents
    texts = [base for base in bases if not base.manifest.pictured]
    if documents.pictures is None or not texts:
        return
    image_id = documents.pictures.vision.image_id
    edges = np.array([[base.first_id, base.first_id + base.rows] for base in texts])
    first, last = np.searchsorted(documents.ids, edges).T
    own = positions_of(first, last - first)
    begin, end = (np.searchsorted(documents.starts, documents.offsets[own + more]) for more in (0, 1))
    segments = positions_of(begin, end - begin)
    blocks = [
        block
        for block in np.unique(documents.block[segments]).tolist()
        if (documents.blocks[block].input_ids == image_id).any()
    ]
    doubtful = np.repeat(own, end - begin)[np.isin(documents.block[segments], blocks)]
    for document in np.unique(doubtful[choice.stays[doubtful]]).tolist():
        if (documents.whole(np.array([document])).input_ids == image_id).any():
            what = (
                f"{choice.place(document)}: holds the token that stands for pictures, in a set without any."
            )
            raise UsageError(what, f"--drop FILE, with the line {documents.ids[document]} in it.")


class Gallery:
    """The pictures of all bases, numbered through their sidecars."""

    def __init__(self) -> None:
        self._sidecars: list[tuple[StoredPictures, str]] = []
        self._places: list[tuple[Int32, Int32]] = []
        self._firsts = [0]

    def add(self, stored: StoredPictures, before: str, files: Int64) -> int:
        """Add a sidecar; return the number of its first picture.

        Args:
            stored: its pictures.
            before: comes before their paths.
            files: int64[F], as for `Collected.add`.
        """
        own = np.zeros(len(stored), np.int32), np.arange(len(stored), dtype=np.int32)
        file, row = own if stored.places is None else stored.places
        self._sidecars.append((stored, before))
        self._places.append((files[file].astype(np.int32), row))
        self._firsts.append(self._firsts[-1] + len(stored))
        return self._firsts[-2]

    @cached_property
    def tokens(self) -> Int64:
        """int64[P], image tokens that stand for each."""
        return np.concatenate([np.empty(0, np.int64), *(stored.tokens for stored, _ in self._sidecars)])

    @cached_property
    def places(self) -> tuple[Int32, Int32]:
        """int32[P] twice: the sidecar that holds each, and its row there."""
        none = np.empty(0, np.int32)
        file, row = (np.concatenate([none, *(place[part] for place in self._places)]) for part in (0, 1))
        return file, row

    def picture(self, number: int) -> Picture:
        """Return a picture, with the bytes that its base holds."""
        sidecar = int(np.searchsorted(self._firsts, number, side="right")) - 1
        (stored, before), row = self._sidecars[sidecar], number - self._firsts[sidecar]
        path, data = stored.path[row], memoryview(stored.data[row])
        return Picture(
            int(stored.height[row]), int(stored.width[row]), stored.format[row], stored.sha256[row],
            int(stored.file_bytes[row]), os.path.join(before, path) if path else "", data,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class DocumentPictures:
    """The pictures of documents.

    Attributes:
        counts: int64[N], how many each document has.
        offsets: int64[N + 1], where those of each begin.
        numbers: int64[K], of the pictures, document after document.
        gallery: the pictures.
        vision: what they were read with.
    """

    counts: Int64
    offsets: Int64
    numbers: Int64
    gallery: Gallery
    vision: VisionInfo

    def of(self, documents: Int64) -> tuple[Int64, Int64]:
        """Return the pictures of documents, end to end, and how many each has."""
        counts = self.counts[documents]
        return self.numbers[positions_of(self.offsets[documents], counts)], counts

    def each(self, documents: Int64) -> list[list[tuple[Picture, int]]]:
        """Return the pictures of each of some documents, with the image tokens that stand for it."""
        numbers, counts = self.of(documents)
        tokens = self.gallery.tokens[numbers].tolist()
        found = [*zip(map(self.gallery.picture, numbers.tolist()), tokens, strict=True)]
        return [found[first:last] for first, last in pairwise(offsets_of(counts).tolist())]

    def ends(self, tokens: TokenBatch) -> Int64:
        """int64[K]: tokens of documents up to the end of the last picture of each; 0 where there is none."""
        return picture_ends(tokens, self.vision.image_id, self.vision.closing)

    def of_slice(self, documents: Int64, ids: Int64) -> tuple[SlicePictures, Int64]:
        """Return the pictures of a slice as they are stored, and the number of each of these.

        Args:
            documents: int64[D].
            ids: int64[D], their example ids in the view.
        """
        numbers, counts = self.of(documents)
        found = {number: self.gallery.picture(number) for number in np.unique(numbers).tolist()}
        own = np.split(numbers, np.cumsum(counts)[:-1])
        pictures = {
            example: [found[number] for number in some.tolist()]
            for example, some in zip(ids.tolist(), own, strict=True)
            if len(some)
        }
        first = {(found[number].sha256, found[number].path): number for number in numbers[::-1].tolist()}
        tokens = {found[number].sha256: int(self.gallery.tokens[number]) for number in found}
        made = SlicePictures.of(pictures, ids, lambda one: tokens[one.sha256], self.vision.image_id)
        return made, np.array([first[one.sha256, one.path] for one in made.stored], np.int64)

    def hashes(self, documents: Int64, tokens: TokenBatch) -> PictureHashes:
        """Return what tells documents apart by their pictures; `tokens` are these documents, whole."""
        return self.of_slice(documents, np.arange(len(documents)))[0].hashes(tokens)


@dataclass(slots=True)
class Collected:
    """The pictures of documents, as they are found slice by slice."""

    gallery: Gallery
    ids: list[Int64]
    counts: list[Int64]
    numbers: list[Int64]

    @classmethod
    def none(cls) -> Collected:
        """Begin."""
        return cls(Gallery(), [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)])

    def add(
        self, base: Base, example_ids: Int64, parts: Sequence[HasPictures], stored: StoredPictures | None,
        files: Int64,
    ) -> None:  # fmt: skip
        """Add the segments of a slice of a base.

        Args:
            base: which.
            example_ids: int64[S], of the segments, in its numbering.
            parts: the record batches of its rows and rest.
            stored: its sidecar, if it has one.
            files: int64[F], numbers in `TokenFiles` of the sidecars that hold its pictures, in its order.

        Raises:
            IntegrityError: these do not fit together.
        """
        counts, images = join_pictures(parts)
        count = 0 if stored is None else len(stored)
        if len(counts) != len(example_ids) or (len(images) and not 0 <= images.min() <= images.max() < count):
            what = f"{base.folder}: documents name pictures that are not in its sidecars."
            raise IntegrityError(
                what, "run `sftdata verify`, or repeat the command that made the set, with --overwrite."
            )
        first = 0 if stored is None else self.gallery.add(stored, base.before, files)
        self.ids.append(example_ids[counts > 0] + base.first_id)
        self.counts.append(counts[counts > 0].astype(np.int64))
        self.numbers.append(images.astype(np.int64) + first)

    def join(self, ids: Int64, vision: VisionInfo) -> DocumentPictures:
        """Return the pictures of the documents of these ids, int64[N], ascending."""
        own, counts, numbers = map(np.concatenate, (self.ids, self.counts, self.numbers))
        starts, order = offsets_of(counts)[:-1], np.argsort(own, kind="stable")
        order = order[np.isin(own[order], ids)]
        each = np.zeros(len(ids), np.int64)
        each[np.searchsorted(ids, own[order])] = counts[order]
        placed = numbers[positions_of(starts[order], counts[order])]
        return DocumentPictures(each, offsets_of(each), placed, self.gallery, vision)
