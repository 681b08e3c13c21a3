"""Pictures of a slice: each once, in a sidecar beside its shard, and which of them each document has.

    images-00000.arrow    a row a picture; shard and rest name pictures by their numbers in it

| column | type | |
|---|---|---|
| `sha256` | fixed_size_binary[32] | of the file's bytes |
| `height`, `width` | int32 | in pixels, after the turn that EXIF asks for |
| `format` | utf8 | jpeg, png, webp or gif |
| `tokens` | int32 | image tokens that stand for it |
| `path` | utf8 | from the folder of pictures; "" for one whose bytes are in the row |
| `bytes` | binary | of the file, where the row has them or the set embeds pictures; else empty |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from sftdata.batches import Int32, Int64, PackedRows, TokenBatch, offsets_of, positions_of
from sftdata.errors import IntegrityError, RowError, changed
from sftdata.pictures.loaded import Picture, PictureFolder
from sftdata.pictures.references import Reference, load_picture
from sftdata.set.hashes import PictureHashes, picture_hashes
from sftdata.set.shards import as_arrow, as_numpy, read_file, write_file
from sftdata.set.store import SetFile, Sha256, TokenId, Xxh3

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = "images"
"""Begins the names of sidecars."""
_BATCH_BYTES = 32 << 20
_AGAIN = "restore the file, or repeat the command that made the set, with --overwrite."


class VisionInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a set with pictures was made with.

    Attributes:
        family: of the processor, by its name in `pictures.families`.
        image_id: of the token that stands for pieces of pictures.
        processor_sha256: over everything that decides a layout.
        image_settings, processor_settings: of the processor, with sizes resolved.
        images: the folder that paths of pictures start from, from the folder of the set; not part of the
            digest.
        sidecars: xxh3-128 over those of the sidecars, in order, which the digest does not cover otherwise.
    """

    family: str
    image_id: TokenId
    processor_sha256: Sha256
    image_settings: dict[str, Any]
    processor_settings: dict[str, Any]
    images: str
    sidecars: Xxh3


@dataclass(frozen=True, slots=True, eq=False)
class SlicePictures:
    """The pictures of the documents of a slice.

    Attributes:
        stored: each once, in the order in which documents have them.
        tokens: int32[P], image tokens that stand for each.
        images: int32[K], pictures of the documents, end to end, as numbers in `stored`.
        counts: int32[N], how many each document has.
        image_id: of the token that stands for pieces of pictures.
    """

    stored: Sequence[Picture]
    tokens: Int32
    images: Int32
    counts: Int32
    image_id: int

    @classmethod
    def of(
        cls,
        pictures: Mapping[int, Sequence[Picture]],
        example_ids: Int64,
        tokens_of: Callable[[Picture], int],
        image_id: int,
    ) -> SlicePictures:
        """Number the pictures of documents; files that are equal and have one path are one.

        Args:
            pictures: of each document, by example id.
            example_ids: int64[N], of the documents.
            tokens_of: how many image tokens stand for a picture.
            image_id: as above.
        """
        own = [pictures.get(example_id, ()) for example_id in example_ids.tolist()]
        numbers: dict[tuple[bytes, str], int] = {}
        stored: list[Picture] = []
        for picture in (picture for some in own for picture in some):
            if numbers.setdefault((picture.sha256, picture.path), len(stored)) == len(stored):
                stored.append(picture)
        images = [numbers[picture.sha256, picture.path] for some in own for picture in some]
        return cls(
            stored,
            np.array([tokens_of(picture) for picture in stored], np.int32),
            np.array(images, np.int32),
            np.array([len(some) for some in own], np.int32),
            image_id,
        )

    def select(self, documents: Int64) -> tuple[Int32, Int32]:
        """Return the pictures of these documents, int64[D], end to end, and int32[D], how many each has."""
        counts = self.counts[documents]
        starts = offsets_of(self.counts)[:-1][documents]
        return self.images[positions_of(starts, counts.astype(np.int64))], counts

    def hashes(self, documents: TokenBatch) -> PictureHashes:
        """Return what tells the documents apart by their pictures."""
        sha256, counts = [picture.sha256 for picture in self.stored], self.counts.astype(np.int64)
        return picture_hashes(documents, self.image_id, sha256, self.tokens, self.images, counts)


def images_schema() -> pa.Schema:
    """Return the schema of a sidecar."""
    import pyarrow as pa

    return pa.schema([
        ("sha256", pa.binary(32)), ("height", pa.int32()), ("width", pa.int32()), ("format", pa.utf8()),
        ("tokens", pa.int32()), ("path", pa.utf8()), ("bytes", pa.binary()),
    ])  # fmt: skip


def write_images(path: Path, pictures: SlicePictures, embed: PictureFolder | None) -> SetFile:
    """Write a sidecar; return its description.

    Args:
        path: of the sidecar.
        pictures: of the slice.
        embed: where pictures with a path are, to store their files; None to store the paths alone.

    Raises:
        InputChangedError: a picture is another by now.
    """
    return write_file(path, images_schema(), _batches(pictures, embed))


def _batches(pictures: SlicePictures, embed: PictureFolder | None) -> Iterator[pa.RecordBatch]:
    """Yield record batches of bounded size, in which no picture is read before it is written."""
    first, size = 0, 0
    for number, picture in enumerate(pictures.stored):
        more = picture.file_bytes if picture.data or embed is not None else 0
        if size and size + more > _BATCH_BYTES:
            yield _batch(pictures, first, number, embed)
            first, size = number, 0
        size += more
    yield _batch(pictures, first, len(pictures.stored), embed)


def _batch(pictures: SlicePictures, first: int, last: int, embed: PictureFolder | None) -> pa.RecordBatch:
    import pyarrow as pa

    some = pictures.stored[first:last]
    sha256 = pa.py_buffer(b"".join(picture.sha256 for picture in some))
    columns = [
        pa.Array.from_buffers(pa.binary(32), len(some), [None, sha256]),
        as_arrow(np.array([picture.height for picture in some], np.int32)),
        as_arrow(np.array([picture.width for picture in some], np.int32)),
        _values(pa.utf8(), (picture.format.encode() for picture in some)),
        as_arrow(pictures.tokens[first:last]),
        _values(pa.utf8(), (picture.path.encode() for picture in some)),
        _values(pa.binary(), (_bytes_of(picture, embed) for picture in some)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=images_schema())


def _bytes_of(picture: Picture, embed: PictureFolder | None) -> bytes:
    if picture.data or embed is None:
        return picture.data
    data = read_again(picture.path, embed.folder)
    if data is None or hashlib.sha256(data).digest() != picture.sha256:
        raise changed(str(embed.folder / picture.path))
    return data


def read_again(path: str, folder: Path) -> bytes | None:
    """Return the bytes of a picture that was read before; None where it is gone."""
    try:
        return load_picture(Reference(path, path), folder)
    except RowError:
        return None


def _values(kind: pa.DataType, values: Iterable[bytes]) -> pa.Array:
    """Return bytes as an array; pyarrow's own way imports pandas."""
    import pyarrow as pa

    given = list(values)
    offsets = pa.py_buffer(offsets_of([len(value) for value in given]).astype(np.int32))
    return pa.Array.from_buffers(kind, len(given), [None, offsets, pa.py_buffer(b"".join(given))])


@dataclass(frozen=True, slots=True, eq=False)
class StoredPictures:
    """The pictures of a sidecar, mapped.

    Attributes:
        sha256: of each file.
        height, width: int32[P], as turned.
        format: of each file.
        tokens: int32[P], image tokens that stand for each.
        path: of each from the folder of pictures; "" where the row had the bytes.
        data: the bytes of each that the set holds; empty where it has the path alone.
    """

    sha256: Sequence[bytes]
    height: Int32
    width: Int32
    format: Sequence[str]
    tokens: Int32
    path: Sequence[str]
    data: Sequence[pa.Buffer]

    def __len__(self) -> int:
        return len(self.sha256)

    @property
    def facts(self) -> tuple[Sequence[bytes], Int32]:
        """Hash of each picture, and the image tokens that stand for it."""
        return self.sha256, self.tokens


def read_images(path: Path) -> StoredPictures:
    """Map a sidecar.

    Raises:
        IntegrityError: the file is no such file.
    """
    batches = read_file(path, images_schema())
    if not batches:
        raise IntegrityError(f"{path}: holds no record batch.", _AGAIN)

    def numbers(name: str) -> Int32:
        joined: Int32 = np.concatenate([as_numpy(batch[name]) for batch in batches])
        return joined

    def values(name: str) -> Iterator[object]:
        for batch in batches:
            yield from batch[name].to_pylist()

    data = [batch["bytes"][row].as_buffer() for batch in batches for row in range(len(batch))]
    sha256, formats, paths = (list(values(name)) for name in ("sha256", "format", "path"))
    sizes = numbers("height"), numbers("width")
    return StoredPictures(sha256, *sizes, formats, numbers("tokens"), paths, data)  # type: ignore[arg-type]


def pictured(rows: PackedRows, pictures: SlicePictures, documents: Int64) -> PackedRows:
    """Return packed rows with the pictures of their segments.

    Args:
        rows: of a slice, in which no document is in two pieces.
        pictures: of the slice.
        documents: int64[D], the document behind each segment that is not padding.
    """
    images, own = pictures.select(documents)
    counts = np.zeros(len(rows.example_ids), np.int32)
    counts[rows.example_ids >= 0] = own
    return replace(rows, images=images, image_counts=counts)


def unchanged(sidecars: Iterable[Path], folder: Path) -> bool:
    """Say whether the pictures that sidecars name by path are in a folder as they were read.

    Raises:
        IntegrityError: a sidecar is damaged.
    """
    for stored in map(read_images, sidecars):
        for path, sha256 in zip(stored.path, stored.sha256, strict=True):
            if path:
                data = read_again(path, folder)
                if data is None or hashlib.sha256(data).digest() != sha256:
                    return False
    return True
