"""Pictures of a slice: each once, in a sidecar beside its shard, and which of them each document has.

    images-00000.arrow    a row a picture; shard and rest name pictures by their numbers in it

| column | type | |
|---|---|---|
| `sha256` | fixed_size_binary[32] | of the file's bytes |
| `height`, `width` | int32 | in pixels, after the turn that EXIF asks for |
| `format` | utf8 | jpeg, png, webp or gif |
| `tokens` | int32 | image tokens that stand for it |
| `file_bytes` | int64 | size of its file |
| `path` | utf8 | from the folder of pictures; "" for one whose bytes are in the row |
| `bytes` | binary | of the file, where the row has them or the set embeds pictures; else empty |

A view by index has `file` and `row` (int32) in place of `bytes`: the sidecar of its bases that holds the
picture, numbered as in `extents.held_files`, and where.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import msgspec
import numpy as np
import xxhash

from sftdata.batches import Bool, Int32, Int64, TokenBatch, offsets_of, positions_of
from sftdata.errors import RESTORE, IntegrityError, RowError, UsageError, changed
from sftdata.pictures.loaded import Picture, PictureFolder
from sftdata.pictures.references import Reference, load_picture
from sftdata.set.hashes import PictureHashes, picture_hashes
from sftdata.set.local import origin
from sftdata.set.shards import as_arrow, as_numpy, read_file, write_file
from sftdata.set.store import SetFile, Sha256, TokenId, Xxh3
from sftdata.set.stores import Store, Target

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = "images"
"""Begins the names of sidecars."""
PROCESSOR = "processor"
"""The folder of a set that holds the processor's files."""
IN_THE_SET = "."
"""The folder of pictures of a set that holds all of its own."""
_BATCH_BYTES = 32 << 20
RESTORE_PICTURE = (
    "restore the picture, or prepare the set anew; with --embed-images a set holds its pictures."
)
RESTORE_PICTURES = (
    "put their folder back there, or prepare the set anew, with --images DIR where it is now; with"
    " --embed-images a set holds its pictures."
)


class VisionInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a set with pictures was made with.

    Attributes:
        family: of the processor, by its name in `pictures.families`.
        image_id: of the token that stands for pieces of pictures.
        closing: ids of tokens that, behind a picture, belong to it.
        processor_sha256: over everything that decides a layout.
        image_settings, processor_settings: of the processor, with sizes resolved.
        images: the folder that paths of pictures start from, from the folder of the set; not part of the
            digest.
        sidecars: xxh3-128 over those of the sidecars, in order, which the digest does not cover otherwise.
    """

    family: str
    image_id: TokenId
    closing: tuple[TokenId, ...]
    processor_sha256: Sha256
    image_settings: dict[str, Any]
    processor_settings: dict[str, Any]
    images: str
    sidecars: Xxh3


def pictures_folder(folder: Path, vision: VisionInfo) -> Path:
    """Return where the pictures are that a set names by path.

    Raises:
        UsageError: at a URL, from which single pictures are not fetched.
    """
    if vision.images != IN_THE_SET and (url := origin(folder)) is not None:
        what = f"{url}: names pictures in a folder beside it, and they are not fetched"
        raise UsageError(f"{what} from there.", "prepare it with --embed-images.")
    return folder / vision.images


def hash_sidecars(files: Iterable[SetFile]) -> Xxh3:
    """Return the hash over the sidecars among these files."""
    sidecars = "".join(file.xxh3 for file in files if file.name.startswith(f"{IMAGES}-"))
    return xxhash.xxh3_128_hexdigest(sidecars.encode())


def picture_ends(tokens: TokenBatch, image_id: int, closing: Sequence[int]) -> Int64:
    """int64[N]: tokens of each example up to the end of its last picture; 0 where it has none.

    Args:
        tokens: examples.
        image_id: of the token that stands for pieces of pictures.
        closing: tokens that, behind a picture, belong to it.
    """
    places = np.flatnonzero(tokens.input_ids == image_id)
    begins, stops = tokens.offsets[:-1], tokens.offsets[1:]
    ends = np.maximum(np.append(-1, places)[np.searchsorted(places, stops)] + 1, begins)
    opened = np.flatnonzero(ends > begins)
    while len(opened):
        opened = opened[ends[opened] < stops[opened]]
        opened = opened[np.isin(tokens.input_ids[ends[opened]], closing)]
        ends[opened] += 1
    found: Int64 = ends - begins
    return found


class PictureColumns(TypedDict, total=False):
    """Columns of segments that name their pictures; see `PackedRows`. Without pictures there are none."""

    images: Int32
    image_counts: Int32


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

    def columns(self, real: Bool, documents: Int64) -> PictureColumns:
        """Return `images` and `image_counts` of segments.

        Args:
            real: bool[S], those whose first token is that of their document: no cut falls before a picture,
                so that others, and padding, have none.
            documents: int64[D], the document behind each of these.
        """
        counts = np.zeros(len(real), np.int32)
        images, counts[real] = self.select(documents)
        return {"images": images, "image_counts": counts}

    def hashes(self, documents: TokenBatch) -> PictureHashes:
        """Return what tells the documents apart by their pictures."""
        sha256, counts = [picture.sha256 for picture in self.stored], self.counts.astype(np.int64)
        return picture_hashes(documents, self.image_id, sha256, self.tokens, self.images, counts)


def images_schema(by_index: bool = False) -> pa.Schema:
    """Return the schema of a sidecar."""
    import pyarrow as pa

    held = [("file", pa.int32()), ("row", pa.int32())] if by_index else [("bytes", pa.binary())]
    return pa.schema([
        ("sha256", pa.binary(32)), ("height", pa.int32()), ("width", pa.int32()), ("format", pa.utf8()),
        ("tokens", pa.int32()), ("file_bytes", pa.int64()), ("path", pa.utf8()), *held,
    ])  # fmt: skip


def write_images(path: Path | Target, pictures: SlicePictures, embed: PictureFolder | None) -> SetFile:
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
    data = _values(pa.binary(), (_bytes_of(picture, embed) for picture in some))
    columns = [*_facts(some, pictures.tokens[first:last]), data]
    return pa.RecordBatch.from_arrays(columns, schema=images_schema())


def write_images_by_index(path: Path | Target, pictures: SlicePictures, file: Int32, row: Int32) -> SetFile:
    """Write the sidecar of a view by index; return its description.

    Args:
        path: of the sidecar.
        pictures: of the slice.
        file, row: int32[P], where each is held, see above.
    """
    import pyarrow as pa

    schema = images_schema(by_index=True)
    columns = [*_facts(pictures.stored, pictures.tokens), as_arrow(file), as_arrow(row)]
    return write_file(path, schema, [pa.RecordBatch.from_arrays(columns, schema=schema)])


def _facts(some: Sequence[Picture], tokens: Int32) -> list[pa.Array]:
    """Return the columns of pictures that do not say where they are held."""
    import pyarrow as pa

    sha256 = pa.py_buffer(b"".join(picture.sha256 for picture in some))
    return [
        pa.Array.from_buffers(pa.binary(32), len(some), [None, sha256]),
        as_arrow(np.array([picture.height for picture in some], np.int32)),
        as_arrow(np.array([picture.width for picture in some], np.int32)),
        _values(pa.utf8(), (picture.format.encode() for picture in some)),
        as_arrow(tokens),
        as_arrow(np.array([picture.file_bytes for picture in some], np.int64)),
        _values(pa.utf8(), (picture.path.encode() for picture in some)),
    ]


def _bytes_of(picture: Picture, embed: PictureFolder | None) -> bytes | memoryview:
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


def _values(kind: pa.DataType, values: Iterable[bytes | memoryview]) -> pa.Array:
    """Return bytes as an array; pyarrow's own way imports pandas."""
    import pyarrow as pa

    given = list(values)
    offsets = pa.py_buffer(offsets_of([len(value) for value in given]).astype(np.int32))
    return pa.Array.from_buffers(kind, len(given), [None, offsets, pa.py_buffer(b"".join(given))])


class StoredPictures:
    """The pictures of a sidecar, mapped.

    Args:
        batches: of the sidecar; one or more.
        held: for one of a view by index, returns the sidecar of its bases that has a number.

    Attributes:
        height, width: int32[P], as turned.
        tokens: int32[P], image tokens that stand for each.
        file_bytes: int64[P], of each file.
        places: int32[P] twice, of a view by index: the sidecar of the bases that holds each, and its row.
    """

    def __init__(
        self, batches: Sequence[pa.RecordBatch], held: Callable[[int], StoredPictures] | None = None
    ) -> None:
        self._batches, self._held = batches, held
        self.height, self.width, self.tokens = map(self._numbers, ("height", "width", "tokens"))
        self.file_bytes: Int64 = self._numbers("file_bytes")
        self.places = None if held is None else (self._numbers("file"), self._numbers("row"))

    def __len__(self) -> int:
        return len(self.tokens)

    def _numbers(self, name: str) -> Any:
        return np.concatenate([as_numpy(batch[name]) for batch in self._batches])

    def _values(self, name: str) -> list[Any]:
        return [value for batch in self._batches for value in batch[name].to_pylist()]

    @cached_property
    def sha256(self) -> Sequence[bytes]:
        """Of each file."""
        return self._values("sha256")

    @cached_property
    def format(self) -> Sequence[str]:
        """Of each file."""
        return self._values("format")

    @cached_property
    def path(self) -> Sequence[str]:
        """Of each from the folder of pictures; "" where the row had the bytes."""
        return self._values("path")

    @cached_property
    def data(self) -> Sequence[pa.Buffer]:
        """The bytes of each that the set holds; empty where it has the path alone."""
        if self._held is not None and self.places is not None:
            places = zip(*(column.tolist() for column in self.places), strict=True)
            return [self._held(file).data[row] for file, row in places]
        return [batch["bytes"][row].as_buffer() for batch in self._batches for row in range(len(batch))]


def read_images(path: Path, held: Callable[[int], StoredPictures] | None = None) -> StoredPictures:
    """Map a sidecar; `held` as for `StoredPictures`.

    Raises:
        IntegrityError: the file is no such file.
    """
    batches = read_file(path, images_schema(by_index=held is not None))
    if not batches:
        raise IntegrityError(f"{path}: holds no record batch.", RESTORE)
    return StoredPictures(batches, held)


def picture_bytes(stored: StoredPictures, number: int, folder: Path) -> bytes:
    """Return the file of a picture, from the set or from the folder of pictures, held against its hash.

    Raises:
        IntegrityError: it is gone, or another by now.
    """
    path = stored.path[number]
    data = bytes(stored.data[number]) or read_again(path, folder)
    if data is None or hashlib.sha256(data).digest() != stored.sha256[number]:
        what = f"{folder / path}: {'not there' if data is None else 'another picture by now'}."
        raise IntegrityError(what, RESTORE_PICTURE)
    return data


class HasPictures(Protocol):
    """Segments or stretches of documents, with their pictures."""

    @property
    def example_ids(self) -> Int64:
        """int64[S], input row behind each; -1 for padding."""

    @property
    def images(self) -> Int32 | None:
        """int32[K], end to end, by number."""

    @property
    def image_counts(self) -> Int32 | None:
        """int32[S], how many each has; None, as `images`, without pictures."""


def join_pictures(parts: Iterable[HasPictures]) -> tuple[Int32, Int32]:
    """Return the pictures of segments, padding aside: int32[S], how many each has, and int32[K], these."""
    counts, images = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for part in parts:
        assert part.image_counts is not None
        assert part.images is not None
        counts.append(part.image_counts[part.example_ids >= 0])
        images.append(part.images)
    return np.concatenate(counts), np.concatenate(images)


def unchanged(store: Store, sidecars: Iterable[str], folder: Path) -> bool:
    """Say whether the pictures that sidecars name by path are in a folder as they were read.

    Args:
        store: where the sidecars are.
        sidecars: their names.

    Raises:
        IntegrityError: a sidecar is missing or damaged.
    """
    for name in sidecars:
        with store.here(name) as file:
            stored = read_images(file)
        for path, sha256 in zip(stored.path, stored.sha256, strict=True):
            if path:
                data = read_again(path, folder)
                if data is None or hashlib.sha256(data).digest() != sha256:
                    return False
    return True
