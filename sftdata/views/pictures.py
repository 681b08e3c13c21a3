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

import numpy as np

from sftdata.batches import Int32, Int64, TokenBatch, offsets_of, positions_of
from sftdata.pictures.loaded import Picture
from sftdata.set.hashes import PictureHashes
from sftdata.set.images import (
    IN_THE_SET,
    SlicePictures,
    StoredPictures,
    VisionInfo,
    picture_ends,
    pictures_folder,
)
from sftdata.set.manifest import Manifest


def paths_from(sets: Sequence[tuple[Path, Manifest]]) -> tuple[str | None, list[str]]:
    """Return where the paths of pictures of several sets start, and what comes before those of each.

    Returns:
        The folder of all, or the one in which their folders lie; None where no picture is named by path.
    """
    own = [
        os.path.normpath(pictures_folder(folder.resolve(), manifest.vision))
        if manifest.vision is not None and manifest.vision.images != IN_THE_SET
        else ""
        for folder, manifest in sets
    ]
    common = os.path.commonpath([*filter(None, own)]) if any(own) else None
    return common, [os.path.relpath(one, common) if one not in ("", common) else "" for one in own]


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
            files: int64[F], numbers in `TokenFiles` of the sidecars that hold its pictures, in its order.
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

    def add(self, example_ids: Int64, counts: Int32, images: Int32, first: int) -> None:
        """Add the segments of a slice.

        Args:
            example_ids: int64[S], of the segments, in the view.
            counts, images: of these, as `join_pictures` returns them.
            first: number of the first picture of their sidecar.
        """
        self.ids.append(example_ids[counts > 0])
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
