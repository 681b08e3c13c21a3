"""Pictures of documents as they are shown: a box with the size in the text, and a small picture on a page."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from sftdata.batches import IGNORE_INDEX, Int32, Int64, PackedRows, TokenBatch, offsets_of
from sftdata.errors import need
from sftdata.pictures.loaded import Picture
from sftdata.set.hashes import UInt64, picture_hashes
from sftdata.set.images import StoredPictures, read_again

CONTINUED = "[…]"
"""Stands for the further runs of a picture that is written in several."""
_SIDE = 160  # pixels of the longer side of a small picture


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
    def of(cls, one: Picture, tokens: int, folder: Path) -> ShownPicture:
        """Return a picture for which so many image tokens stand; paths start from the folder."""
        return cls(one.height, one.width, tokens, one.path, one.sha256, folder, bytes(one.data))

    @property
    def label(self) -> str:
        """What is shown in its place: `[image 640x480 cat.jpg]`."""
        name = PurePosixPath(self.path).name
        return f"[image {self.width}x{self.height}{name and ' '}{name}]"

    def thumbnail(self) -> str:
        """Return a small picture as a data URI; "" for one that is gone, or another by now."""
        data = self.data or read_again(self.path, self.folder)
        return _thumbnail(data) if data and hashlib.sha256(data).digest() == self.sha256 else ""


def _thumbnail(data: bytes) -> str:
    """Return a picture as a small JPEG in a data URI; "" for one that cannot be decoded here."""
    try:
        pillow = need("PIL.Image", "vision", "Pictures are shown with Pillow")
        turned = need("PIL.ImageOps", "vision", "Pictures are shown with Pillow").exif_transpose
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pillow.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF"))
            image.draft("RGB", (_SIDE, _SIDE))
            image = turned(image).convert("RGB")
            image.thumbnail((_SIDE, _SIDE))
            sink = io.BytesIO()
            image.save(sink, "JPEG", quality=70)
    except Exception:  # no Pillow; or it raises what it likes on a broken file
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(sink.getvalue()).decode()


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
    if not len(tokens):
        return [(0, len(input_ids), -1, False)] if len(input_ids) else []
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
