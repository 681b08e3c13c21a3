"""Pictures of documents as they are shown: a box with the size in the text, and a small picture on a page."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from sftdata.batches import IGNORE_INDEX, Int32, Int64, PackedRows, TokenBatch, offsets_of
from sftdata.pictures.loaded import Picture
from sftdata.pictures.thumbnails import thumbnail
from sftdata.set.hashes import UInt64, picture_hashes
from sftdata.set.images import StoredPictures, read_again
from sftdata.vision import Vision

CONTINUED = "[…]"
"""Stands for the further runs of a picture that is written in several."""


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """One picture of a document.

    Attributes:
        height, width: in pixels, as turned.
        tokens: image tokens that stand for it.
        path: from the folder of pictures; "" for one whose bytes are in the set.
        sha256: of its file.
        folder: of pictures.
        data: its bytes, where the set holds them.
    """

    height: int
    width: int
    tokens: int
    path: str
    sha256: bytes
    folder: Path
    data: bytes = b""

    @classmethod
    def of(cls, picture: Picture, vision: Vision) -> ShownPicture:
        """Return a picture that is in no set yet."""
        tokens, folder = vision.tokens_of(picture), vision.pictures.folder
        return cls(
            picture.height, picture.width, tokens, picture.path, picture.sha256, folder, bytes(picture.data)
        )

    @property
    def label(self) -> str:
        """What is shown in its place: `[image 640x480 cat.jpg]`."""
        name = PurePosixPath(self.path).name
        return f"[image {self.width}x{self.height}{name and ' '}{name}]"

    def thumbnail(self) -> str:
        """Return a small picture as a data URI; "" for one that is gone, or another by now."""
        data = self.data or read_again(self.path, self.folder)
        return thumbnail(data) if data and hashlib.sha256(data).digest() == self.sha256 else ""


def shown_pictures(stored: StoredPictures, numbers: Sequence[int], folder: Path) -> list[ShownPicture]:
    """Return pictures of a sidecar, by number, with the folder that their paths start from."""
    return [
        ShownPicture(
            int(stored.height[number]), int(stored.width[number]), int(stored.tokens[number]),
            stored.path[number], stored.sha256[number], folder, bytes(stored.data[number]),
        )
        for number in numbers
    ]  # fmt: skip


def picture_runs(input_ids: Int32, image_id: int, tokens: Sequence[int]) -> list[tuple[int, int, int, bool]]:
    """Cut ids where pictures begin and end.

    Args:
        input_ids: int32[T], of a document.
        image_id: of the token that stands for pieces of pictures.
        tokens: how many of them each picture has, in order.

    Returns:
        start, stop, number of the picture, -1 for what is none, and whether it begins there.

    >>> picture_runs(np.array([5, 9, 9, 9, 6]), 9, [1, 2])
    [(0, 1, -1, False), (1, 2, 0, True), (2, 4, 1, True), (4, 5, -1, False)]
    """
    places = np.flatnonzero(input_ids == image_id)
    owner = np.full(len(input_ids), -1)
    owner[places] = np.repeat(np.arange(len(tokens)), tokens)[: len(places)]
    edges = np.flatnonzero(np.diff(owner, prepend=-2, append=-2)).tolist()
    seen: set[int] = {-1}
    found = []
    for start, stop in pairwise(edges):
        number = int(owner[start])
        found.append((start, stop, number, number not in seen))
        seen.add(number)
    return found


def prompts_with_pictures(prompts: UInt64, rows: PackedRows, stored: StoredPictures, image_id: int) -> UInt64:
    """Return hashes of prompts that cover their pictures.

    Args:
        prompts: uint64[N], of the documents of these rows, by ids alone.
        rows: packed rows of one shard.
        stored: its pictures.
        image_id: of the token that stands for pieces of pictures.
    """
    if rows.images is None or rows.image_counts is None:
        return prompts
    edges, counts = offsets_of(rows.seq_lengths), rows.image_counts.astype(np.int64)
    trained = rows.labels != IGNORE_INDEX
    segments = TokenBatch(rows.input_ids, trained, edges, np.arange(len(counts)))
    hashes = picture_hashes(segments, image_id, stored.sha256, stored.tokens, rows.images, counts)
    found = prompts.copy()
    real: Int64 = np.flatnonzero(rows.example_ids >= 0)
    for place, segment in enumerate(real.tolist()):
        if hashes.prompt[segment]:
            found[place] ^= np.uint64(xxhash.xxh3_64_intdigest(hashes.prompt[segment]))
    return found
