"""The two sets of a comparison, document by document, as their indexes know them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sftdata.batches import Bool, Int32, Int64, TokenBatch, offsets_of, positions_of
from sftdata.errors import RESTORE
from sftdata.set.hashes import UInt64, hash_documents, hash_prompts
from sftdata.set.index import INDEX, Segments, read_index
from sftdata.set.ledger import DROPPED_NAME, REJECTS_NAME, read_lines
from sftdata.set.local import check_file, file_of, path_of
from sftdata.set.manifest import Manifest, SourceInfo
from sftdata.show.pictures import ShownPicture
from sftdata.views.bases import Base, open_bases, read_documents
from sftdata.views.documents import Documents, blocks_of
from sftdata.views.pictures import DocumentPictures
from sftdata.vocabulary import Vocabulary, read_vocabulary

_PLACE_BITS = 40  # of a place, for the row; the source is above them
_WHITE = (9, 10, 11, 12, 13, 32)


class Lost(msgspec.Struct):
    """What rejects.jsonl or dropped.jsonl says of a row.

    Attributes:
        code: of a rejected row; "" of another one, whose `reason` is what it counts as.
    """

    file: str
    record: int
    reason: str
    line: int | None = None
    code: str = ""
    fix: str = ""
    tokens: int | None = None
    row: msgspec.Raw = msgspec.Raw()

    @property
    def text(self) -> str:
        """The row as it stands; "" of one that was not rejected."""
        return bytes(self.row).decode(errors="replace")


def read_lost(folder: Path) -> Iterator[Lost]:
    """Yield the rows that a set lists as left out, the rejected ones first.

    Raises:
        IntegrityError: a list is damaged.
    """
    for name in (REJECTS_NAME, DROPPED_NAME):
        yield from read_lines(file_of(folder, name), Lost, RESTORE)


@dataclass(eq=False)
class Side:
    """One of two sets, document by document, in the order of their ids.

    Attributes:
        base: the set, opened.
        ids: int64[N], example ids, ascending.
        source: int64[N], index of the source of each.
        places: int64[N], source and row in one number, the same for the same place on both sides.
        lengths: int64[N], tokens of the whole document.
        tokens, trained: int64[N], those in the rows of the set; 0 where the document is only beside them.
        whole: bool[N], whether it lies in one row without a cut.
        document: uint64[N, 2], hash of ids and labels.
        prompt: uint64[N], hash of the ids before the first label; 0 where there are none.
        pieces: int64[P], offset and length of each stretch that is in a row, in one number.
        piece_offsets: int64[N + 1], of these.
        letters: what each id adds to a text; None where ids are compared.
    """

    base: Base
    ids: Int64
    source: Int64
    places: Int64
    lengths: Int64
    tokens: Int64
    trained: Int64
    whole: Bool
    document: UInt64
    prompt: UInt64
    pieces: Int64
    piece_offsets: Int64
    letters: Letters | None = None
    _found: Documents | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def folder(self) -> Path:
        """Where the set lies."""
        return self.base.folder

    @property
    def manifest(self) -> Manifest:
        """What the set is."""
        return self.base.manifest

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """Its sources, in the order of their ids."""
        return self.base.manifest.sources

    @property
    def held(self) -> Bool:
        """bool[N]: documents of which a token is in the rows."""
        held: Bool = self.tokens > 0
        return held

    def origin(self, index: int) -> tuple[str, int]:
        """Return the source of a document, and its row there, counted from 1."""
        source = self.sources[int(self.source[index])]
        return source.name, int(self.ids[index]) - source.first_id + 1

    @cached_property
    def lost(self) -> dict[tuple[str, int], str]:
        """Why rows that were read are not in the set, by source and row.

        Raises:
            IntegrityError: one of its lists is damaged.
        """
        return {
            (row.file, row.record): f"rejected: {row.code}" if row.code else f"dropped: {row.reason}"
            for row in read_lost(self.folder)
        }

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the set's tokenizer."""
        return read_vocabulary(self.folder / "tokenizer")

    def find(self, which: Int64) -> None:
        """Find where documents lie, int64[K], by their indices: all that is read next in one go."""
        ids = np.unique(self.ids[which])
        if len(ids) and not (self._found and np.isin(ids, self._found.ids, assume_unique=True).all()):
            self._found = read_documents((self.base,), only=ids)

    def read(self, which: Int64) -> TokenBatch:
        """Return whole documents, int64[K], by their indices, with all labels; `find` has found them."""
        self.find(which)
        assert self._found is not None
        return self._found.whole(np.searchsorted(self._found.ids, self.ids[which]))

    def _pictured(self, which: Int64) -> tuple[DocumentPictures, Int64] | None:
        """Return the pictures of all that was found, and the indices there of some; None without pictures."""
        self.find(which)
        assert self._found is not None
        own = self._found.pictures
        return None if own is None else (own, np.searchsorted(self._found.ids, self.ids[which]))

    def pictures_of(self, which: Int64) -> list[bytes]:
        """Return the hashes of the pictures of documents, int64[K], by their indices."""
        found = self._pictured(which)
        if found is None:
            return [b""] * len(which)
        return [b"".join(picture.sha256 for picture, _ in some) for some in found[0].each(found[1])]

    def shown_pictures(self, index: int) -> list[ShownPicture]:
        """Return the pictures of a document."""
        found = self._pictured(np.array([index]))
        if found is None:
            return []
        folder = self.folder / found[0].vision.images
        return [ShownPicture.of(one, tokens, folder) for one, tokens in found[0].each(found[1])[0]]

    @property
    def image_id(self) -> int:
        """Id of the token that stands for pieces of pictures; -1 in a set without."""
        return -1 if self.manifest.vision is None else self.manifest.vision.image_id

    def read_compared(self, which: Int64) -> TokenBatch:
        """Return them as they are compared: as tokens, or as the bytes of their text, one `input_id` each."""
        batch = self.read(which)
        return batch if self.letters is None else self.letters.spell(batch)

    def rehash(self, weighted: bool, *, first_labels: bool) -> None:
        """Hash documents and prompts anew, from their tokens, as the other side needs them.

        Args:
            weighted: include the weights of tokens.
            first_labels: include the label of each document's first token.
        """
        self.find(np.arange(len(self)))
        for part in self.blocks(np.arange(len(self))):
            batch, found = self.read(part), self._pictured(part)
            pictures = None if found is None else found[0].hashes(found[1], batch)
            batch = batch if self.letters is None else self.letters.spell(batch)
            batch = batch if first_labels else _without_first_labels(batch)
            self.document[part] = hash_documents(batch, weighted, pictures)
            self.prompt[part] = hash_prompts(batch, self.manifest.tokenizer.bos_id, pictures)

    def blocks(self, which: Int64) -> Iterator[Int64]:
        """Yield documents by their indices, int64[K], in blocks that fit into memory."""
        for part in blocks_of(self.lengths[which]):
            yield which[part]


def _without_first_labels(batch: TokenBatch) -> TokenBatch:
    """Return the same documents without the label of their first token."""
    first = batch.offsets[:-1][batch.lengths > 0]
    trained, weights = batch.trained.copy(), batch.weights().copy()
    trained[first], weights[first] = False, 0
    return replace(batch, trained=trained, loss_weights=weights)


@dataclass(frozen=True, slots=True, eq=False)
class Letters:
    """The bytes that each id of a tokenizer adds to a text, control tokens and white space left out.

    Attributes:
        text: uint8[B], of all ids, end to end.
        offsets: int64[V + 1], of each id.
    """

    text: npt.NDArray[np.uint8]
    offsets: Int64

    @classmethod
    def of(cls, vocabulary: Vocabulary, size: int) -> Letters:
        """Return those of a vocabulary of `size` ids."""
        silent, white = vocabulary.enders | vocabulary.special, bytes(_WHITE)
        spelled = [
            b"" if token in silent else vocabulary.bytes_of(token).translate(None, white)
            for token in range(size)
        ]
        return cls(np.frombuffer(b"".join(spelled), np.uint8), offsets_of(list(map(len, spelled))))

    def spell(self, batch: TokenBatch) -> TokenBatch:
        """Return the same documents with one byte in the place of each `input_id`."""
        size = np.diff(self.offsets)[batch.input_ids]
        places = positions_of(self.offsets[batch.input_ids], size)
        return TokenBatch(
            self.text[places].astype(np.int32),
            np.repeat(batch.trained, size),
            offsets_of(size)[batch.offsets],
            batch.row,
        )

    def token_at(self, input_ids: Int32, byte: int) -> int:
        """Return which of these ids, int32[T], spells a byte of their text."""
        ends = np.cumsum(np.diff(self.offsets)[input_ids])
        return int(np.searchsorted(ends, byte, side="right"))


def open_sides(a: str | PathLike[str], b: str | PathLike[str]) -> tuple[Side, Side]:
    """Open two sets to be compared: only their manifests and indexes are read, where these say enough.

    Raises:
        UsageError: a folder is no finished set, or one of format version 1 that has lost tokens.
        IntegrityError: a set is damaged.
    """
    numbers: dict[tuple[str, int], int] = {}
    left, right = (_open_side(folder, numbers) for folder in (a, b))
    one, other = left.manifest, right.manifest
    if one.tokenizer.sha256 != other.tokenizer.sha256:
        for side in (left, right):
            side.letters = Letters.of(side.vocabulary, side.manifest.tokenizer.vocab_size)
    indexed = one.format_version > 1 and other.format_version > 1
    if left.letters or one.weighted != other.weighted or not indexed:
        weighted = left.letters is None and (one.weighted or other.weighted)
        for side in (left, right):
            side.rehash(weighted, first_labels=indexed)
    return left, right


def _open_side(folder: str | PathLike[str], numbers: dict[tuple[str, int], int]) -> Side:
    """Open one side.

    Args:
        numbers: of the places' sources, by name and how often that name came before; grows.
    """
    (base,) = open_bases([path_of(folder)])
    if base.manifest.format_version == 1:
        return _without_index(base, numbers)
    files = [file for file in base.manifest.files if file.name.startswith(f"{INDEX}-")]
    weighted = base.manifest.weighted
    segments = Segments.join([read_index(check_file(base.folder, file), weighted) for file in files])
    order = np.lexsort((segments.offset, segments.example_ids))
    ids, rest, offset, length = (
        getattr(segments, name)[order] for name in ("example_ids", "rest", "offset", "length")
    )
    kept, first = ~rest, np.flatnonzero(np.diff(ids, prepend=-1))
    begins = order[first]
    return Side(
        base,
        ids[first],
        *_places(base, ids[first], numbers),
        lengths=_sums(length, first),
        tokens=_sums(length * kept, first),
        trained=_sums(segments.trained[order] * kept, first),
        whole=segments.whole[begins] & kept[first],
        document=segments.document_hash[begins],
        prompt=segments.prompt_hash[begins],
        pieces=offset[kept].astype(np.int64) << 32 | length[kept],
        piece_offsets=offsets_of(_sums(kept, first)),
    )


def _sums(values: Int32 | Bool, first: Int64) -> Int64:
    """Sum the values of each document's segments, int64[N]; most have one."""
    if len(first) == len(values):
        return values.astype(np.int64)
    sums: Int64 = np.add.reduceat(values, first, dtype=np.int64)
    return sums


def _without_index(base: Base, numbers: dict[tuple[str, int], int]) -> Side:
    """Open a set whose rows hold every document whole, and say so nowhere but in the rows."""
    documents = read_documents((base,))
    ids, lengths = documents.ids, documents.lengths
    return Side(
        base,
        ids,
        *_places(base, ids, numbers),
        lengths=lengths,
        tokens=lengths,
        trained=documents.trained.astype(np.int64),
        whole=np.ones(len(ids), np.bool_),
        document=documents.document.copy(),
        prompt=documents.prompt.copy(),
        pieces=lengths,  # the offset is 0
        piece_offsets=np.arange(len(ids) + 1),
    )


def source_keys(sources: Sequence[SourceInfo]) -> list[tuple[str, int]]:
    """Return what a source goes by on both sides: its name, and how often that came before."""
    seen: Counter[str] = Counter()
    keys = []
    for source in sources:
        keys.append((source.name, seen[source.name]))
        seen[source.name] += 1
    return keys


def _places(base: Base, ids: Int64, numbers: dict[tuple[str, int], int]) -> tuple[Int64, Int64]:
    """Return the source of each example id, and its place."""
    sources = base.manifest.sources
    number = [numbers.setdefault(key, len(numbers)) for key in source_keys(sources)]
    filled = np.flatnonzero([source.rows > 0 for source in sources])
    firsts = np.array([source.first_id for source in sources], np.int64)
    of = filled[np.searchsorted(firsts[filled], ids, side="right") - 1]
    return of, (np.array(number, np.int64)[of] << _PLACE_BITS) + ids - firsts[of]
