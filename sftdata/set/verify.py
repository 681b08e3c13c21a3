"""Prove a set at rest: every byte as the manifest says, and the laws counted again from the shards."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

import numpy as np

from sftdata.batches import Int32, Int64, PackedRows, TokenBatch, offsets_of, positions_of
from sftdata.errors import ANEW, RESTORE, IntegrityError, UsageError
from sftdata.output import counted
from sftdata.pictures.stretch import count_image_tokens
from sftdata.set.extents import held_files
from sftdata.set.hashes import PictureHashes, hash_documents, hash_prompts, picture_hashes
from sftdata.set.held import are_hashed, open_token_files
from sftdata.set.images import (
    IMAGES,
    RESTORE_PICTURE,
    RESTORE_PICTURES,
    StoredPictures,
    join_pictures,
    pictures_folder,
    read_again,
)
from sftdata.set.index import (
    INDEX,
    RestRows,
    Segments,
    beside_name,
    read_index,
    slice_number,
)
from sftdata.set.laws import broken_laws
from sftdata.set.ledger import Ledger, distinct
from sftdata.set.local import (
    file_of,
    named,
    origin,
    plain_file,
    read_anew,
    seen_file,
    stored_sizes,
)
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.rows import SetFiles
from sftdata.set.shards import ShardInfo
from sftdata.set.slices import SLICES_NAME, read_slices
from sftdata.set.store import SetFile, digest_file

_COUNTED = ("rows_packed", "documents", "tokens_trained", "tokens_context", "tokens_padding")
_COUNTED_PER_SHARD = {
    "rows": "rows_packed",
    "documents": "documents",
    "tokens": "tokens",
    "tokens_trained": "tokens_trained",
}


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        folder: the set.
        digest: of its manifest.
        files: files read.
        bytes: bytes read.
        rows: packed rows counted.
        tokens_by: how the files that hold tokens were checked: by "reading", by the "hash" that a store
            keeps, or by "size".
        problems: one line each; empty for a set that holds.
    """

    folder: Path
    digest: str = ""
    files: int = 0
    bytes: int = 0
    rows: int = 0
    tokens_by: str = "reading"
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, info: SetFile | None, problem: str) -> None:
        """Add a file that was looked at, None where there was none, and what is wrong with it."""
        self.files += info is not None
        if problem:
            self.problems.append(problem)
        elif info is not None:
            self.bytes += info.bytes

    def raise_if_broken(self) -> None:
        """Refuse a set that does not hold.

        Raises:
            IntegrityError: naming the first problem and how many more there are.
        """
        if self.problems:
            more = f" {len(self.problems) - 1} more: see `sftdata verify`." if len(self.problems) > 1 else ""
            raise IntegrityError(self.problems[0] + more)


def verify(folder: str | PathLike[str], *, sha256: bool = False, quick: bool = False) -> VerifyReport:
    """Check that a set is what its manifest says, from the bytes of its files to the sums of its ledger.

    Of a view by index, the files of its bases are read as well, and its rows through the index.

    Args:
        folder: a finished set, or its URL: of that every object is read, whatever the cache holds.
        sha256: compare sha256 as well as xxh3-128; proof against forgery, several times slower.
        quick: read no tokens: of the files that hold them the size is looked at, and the hash where a store
            keeps one.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: the manifest itself is damaged, so that there is nothing to compare with.
    """
    with read_anew(folder) as place:
        report = _verify(place, sha256=sha256, quick=quick)
        report.problems = [line.replace(str(place), named(place)) for line in report.problems]
    return report


def _verify(folder: Path, *, sha256: bool, quick: bool) -> VerifyReport:
    """Check a set in a folder."""
    manifest = read_manifest(folder)
    report = VerifyReport(folder, digest=manifest.digest)
    count = _Recount(folder, manifest)
    if quick:
        report.tokens_by = "hash" if are_hashed(folder, manifest) else "size"
    for info, problem in damaged_files(folder, manifest, sha256=sha256, quick=quick):
        report.add(info, problem)
        if isinstance(info, ShardInfo) and not (problem or quick or manifest.by_index):
            report.problems += count.add(info)
    for file, problem in damaged_bases(folder, manifest, sha256=sha256, quick=quick):
        report.add(file, problem)
    if manifest.by_index and report.ok and not quick:
        for info in manifest.shards:
            report.problems += count.add(info)
    report.rows = count.ledger.rows_packed
    if report.ok and not quick:
        report.problems += count.compare()
    if report.ok and not quick and manifest.format_version > 1:
        report.problems += lost_tokens(folder, manifest)
    if report.ok:
        report.problems += lost_pictures(folder, manifest, quick=quick)
    report.problems += foreign_shards(folder, manifest)
    return report


def damaged_files(
    folder: Path, manifest: Manifest, *, sha256: bool = False, quick: bool = False
) -> Iterator[tuple[SetFile, str]]:
    """Read every file of a set; yield it with what is wrong with its bytes, one line, empty if nothing is."""
    held = () if manifest.by_index else held_files(manifest)
    files = [*manifest.shards, *manifest.files]
    names = {info.xxh3: info.name for info in files}
    for info in files:
        yield info, _damage(folder, info, names, sha256, quick and info in held)


def damaged_bases(
    folder: Path, manifest: Manifest, *, sha256: bool = False, quick: bool = False
) -> Iterator[tuple[SetFile | None, str]]:
    """Read the files that hold the tokens of a view by index; None stands for a base that is no more."""
    try:
        sets = open_token_files(folder, manifest).sets if manifest.by_index else []
    except IntegrityError as error:
        yield None, str(error)
        return
    for base, of in sets:
        names = {info.xxh3: info.name for info in held_files(of)}
        for info in held_files(of):
            yield info, _damage(base, info, names, sha256, quick)


def _damage(folder: Path, info: SetFile, names: dict[str, str], sha256: bool, quick: bool) -> str:
    """Return what is wrong with the bytes of a file; empty when nothing is."""
    try:
        if quick and seen_file(folder, info):
            return ""
        path = plain_file(folder, info)
        found = digest_file(path, sha256=sha256)
    except IntegrityError as error:
        return str(error)
    except OSError as error:
        return f"{folder / info.name}: cannot be read: {error.strerror}. Fix: {RESTORE}"
    if found.xxh3 != info.xxh3:
        other = names.get(found.xxh3)
        what = (
            f"holds the bytes of {other}"
            if other
            else f"xxh3-128 is {found.xxh3}; the manifest says {info.xxh3}"
        )
        return f"{path}: {what}. Fix: {RESTORE}"
    if sha256 and found.sha256 != info.sha256:
        return f"{path}: sha256 is {found.sha256}; the manifest says {info.sha256}. Fix: {RESTORE}"
    return ""


class _Recount:
    """A second ledger, counted from the rows alone."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._files = SetFiles(folder, manifest)
        self.ledger = Ledger()
        self._examples = [np.empty(0, np.int64)]

    def add(self, info: ShardInfo) -> list[str]:
        """Count one shard; return its problems."""
        length, path = self.manifest.max_length, self.folder / info.name
        try:
            opened = self._files.rows(info)
        except IntegrityError as error:
            return [str(error)]
        problems, shard, first = [], Ledger(), 0
        for batch in opened.batches:
            for rows, what in broken_laws(batch, self.manifest):
                more = f" (and {counted(len(rows) - 1, 'more row')})" if len(rows) > 1 else ""
                problems.append(f"{path}: row {first + int(rows[0])}{more}: {what}. Fix: {ANEW}")
            shard.count_packed(batch, length)
            self._examples.append(distinct(batch.example_ids[batch.example_ids >= 0]))
            first += len(batch)
        self.ledger.merge(shard)
        pairs = [(name, getattr(info, name), getattr(shard, of)) for name, of in _COUNTED_PER_SHARD.items()]
        return problems + [_differs(path, name, said, found) for name, said, found in pairs if said != found]

    def compare(self) -> list[str]:
        """Compare the whole with the manifest's ledger."""
        said, found = self.manifest.ledger, self.ledger
        pairs = [(name, getattr(said, name), getattr(found, name)) for name in _COUNTED]
        pairs.append(("rows_kept", said.rows_kept, len(distinct(np.concatenate(self._examples)))))
        return [
            _differs(self.folder, name, expected, counted)
            for name, expected, counted in pairs
            if expected != counted
        ]


def _differs(path: Path, name: str, said: int, found: int) -> str:
    return f"{path}: {name} is {found} when counted; the manifest says {said}. Fix: {ANEW}"


def foreign_shards(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Name shards that are not in the manifest: other readers read every `.arrow` file of the folder."""
    listed = {info.name for info in (*manifest.shards, *manifest.files)}
    if origin(folder) is not None:
        for name in stored_sizes(folder):
            if name.endswith(".arrow") and "/" not in name and name not in listed:
                yield f"{origin(folder)}/{name}: not part of the set. Fix: remove the object."
        return
    sizes = {info.bytes for info in manifest.shards}
    by_digest = {info.xxh3: info.name for info in manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".arrow" and path.name not in listed:
            known = path.is_file() and path.stat().st_size in sizes
            twin = by_digest.get(digest_file(path, sha256=False).xxh3) if known else None
            what = f"a second copy of {twin}" if twin else "not part of the set"
            yield f"{path}: {what}. Fix: move it out of the folder."


# ------------------------------------------------------------------- every token is in the set, once


def lost_tokens(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Join every document from rows and rest, as the index says; yield what is missing, doubled or changed.

    A document may have its segments in several slices; those that are not whole in one are joined at the end.
    """
    count = _Conserved(folder, manifest)
    names = (file.name for file in (*manifest.shards, *manifest.files))
    for number in sorted({found for found in map(slice_number, names) if found is not None}):
        try:
            count.add(number)
        except IntegrityError as error:
            yield str(error)
            return
    for problem in count.problems():
        yield f"{folder}: {problem}. Fix: {RESTORE}"
    ledger, cut = manifest.ledger, sum(count.rest[policy] for policy in manifest.ledger.tokens_cut)
    pairs = [
        ("tokens_in", ledger.tokens_in - ledger.tokens_left_out, count.tokens),
        ("tokens_cut", sum(ledger.tokens_cut.values()), cut),
        ("tokens_in_dropped_rows", ledger.tokens_in_dropped_rows, count.rest.total() - cut),
        *((f"rows_dropped {name}", said, count.dropped[name]) for name, said in ledger.rows_dropped.items()),
    ]
    yield from (_differs(folder, name, said, found) for name, said, found in pairs if said != found)
    records = read_slices(folder)
    slices = Ledger()
    for record in records:
        slices.merge(Ledger.from_json(record.ledger))
    if records and slices.to_json() != ledger.to_json():
        yield f"{folder / SLICES_NAME}: its ledgers do not add up to the manifest's. Fix: {RESTORE}"


class _Conserved:
    """The documents of a set, as rows and rest hold them together.

    Attributes:
        tokens: in all segments.
        rest: tokens in the rest, by reason.
        dropped: documents that are in the rest whole, by reason.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest, self._files = folder, manifest, SetFiles(folder, manifest)
        self._shards = {slice_number(shard.name): shard for shard in manifest.shards}
        self._whole: list[Int64] = []
        self._left: list[tuple[Segments, TokenBatch]] = []
        self.tokens = 0
        self.rest: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def add(self, number: int) -> None:
        """Join the documents of a slice.

        Raises:
            IntegrityError: a file is not readable, or the index names other segments than rows and rest hold.
        """
        path = file_of(self._folder, beside_name(INDEX, number))
        index = read_index(path, self._manifest.weighted)
        shard = self._shards.get(number)
        rows = [] if shard is None else list(self._files.rows(shard).batches)
        rest = self._files.rest(number)
        tokens = index.restore(path, rows, rest)
        self.tokens += len(tokens.input_ids)
        reasons = (reason for part in rest for reason in part.reasons)
        stretches = index.length[index.rest].tolist(), index.whole[index.rest].tolist()
        for reason, length, whole in zip(reasons, *stretches, strict=True):
            self.rest[reason] += length
            self.dropped[reason] += whole
        pictures = self._pictures(number, rows, rest)
        left = self._join(index, tokens, pictures)
        if len(left):
            self._left.append((index.take(left), tokens.pick(left)))

    def problems(self) -> Iterator[str]:
        """Join what is left, now that all slices are there; yield what is wrong."""
        if self._left:
            index = Segments.join([index for index, _ in self._left])
            left = self._join(index, TokenBatch.join([tokens for _, tokens in self._left]))
            if len(left):
                yield f"rows and rest do not hold example {index.example_ids[left[0]]} as it came in"
        ids = np.sort(np.concatenate([np.empty(0, np.int64), *self._whole]))
        if (twice := ids[1:][np.diff(ids) == 0]).size:
            yield f"example {twice[0]} is in the set twice"

    def _pictures(
        self, number: int, rows: Sequence[PackedRows], rest: Sequence[RestRows]
    ) -> _SegmentPictures | None:
        """Return the pictures of the segments of a slice; None in a set without pictures."""
        if self._manifest.vision is None:
            return None
        stored = self._files.pictures(number)
        where, image_id = f"{self._folder}: slice {number}", self._manifest.vision.image_id
        return _SegmentPictures(where, stored, *join_pictures([*rows, *rest]), image_id)

    def _join(self, index: Segments, tokens: TokenBatch, pictures: _SegmentPictures | None = None) -> Int64:
        """Note the documents that are whole and as they were hashed; return the segments of all others."""
        order = np.lexsort((index.offset, index.example_ids))
        index, tokens = index.take(order), tokens.pick(order)
        begins = np.flatnonzero(np.diff(index.example_ids, prepend=-1))
        of = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(index))))
        offsets = np.append(tokens.offsets[begins], tokens.offsets[-1])
        documents = replace(tokens, offsets=offsets, row=np.arange(len(begins)))
        own = None if pictures is None else pictures.hashes(documents, order, of)
        hashes = hash_documents(documents, self._manifest.weighted, own)[of]
        prompts = hash_prompts(documents, self._manifest.tokenizer.bos_id, own)[of]
        right = (
            (index.offset == tokens.offsets[:-1] - offsets[of])
            & (index.whole == (index.length == documents.lengths[of]))
            & (index.document_hash == hashes).all(axis=1)
            & (index.prompt_hash == prompts)
        )
        wrong = np.bincount(of[~right], minlength=len(begins)) > 0
        self._whole.append(index.example_ids[begins][~wrong])
        return np.sort(order[wrong[of]])


@dataclass(frozen=True, slots=True, eq=False)
class _SegmentPictures:
    """The pictures of the segments of a slice, in the order of its index.

    Attributes:
        where: the slice, for messages.
        stored: of the slice; None where it has none.
        counts: int32[S], pictures of each segment.
        images: int32[K], these pictures, by number.
        image_id: of the token that stands for pieces of pictures.
    """

    where: str
    stored: StoredPictures | None
    counts: Int32
    images: Int32
    image_id: int

    def hashes(self, documents: TokenBatch, order: Int64, of: Int64) -> PictureHashes:
        """Return what tells documents apart by their pictures.

        Args:
            documents: each made of its segments.
            order: int64[S], the segments in the order of the documents.
            of: int64[S], the document of each of these.

        Raises:
            IntegrityError: a document has other image tokens than its pictures.
        """
        counts = np.bincount(of, self.counts[order], len(documents)).astype(np.int64)
        starts = offsets_of(self.counts)[:-1][order]
        images = self.images[positions_of(starts, self.counts[order].astype(np.int64))]
        sha256: Sequence[bytes] = [] if self.stored is None else self.stored.sha256
        tokens = np.empty(0, np.int32) if self.stored is None else self.stored.tokens
        if len(images) and not 0 <= images.min() <= images.max() < len(tokens):
            what = f"{self.where}: a document names a picture that is not among its {len(tokens)}."
            raise IntegrityError(what, RESTORE)
        named = np.bincount(np.repeat(np.arange(len(counts)), counts), tokens[images], len(counts))
        if (named != count_image_tokens(documents, self.image_id)).any():
            what = f"{self.where}: a document has other image tokens than its pictures stand for."
            raise IntegrityError(what, RESTORE)
        return picture_hashes(documents, self.image_id, sha256, tokens, images, counts)


# ------------------------------------------------------------------------------------------------ pictures


def lost_pictures(folder: Path, manifest: Manifest, *, quick: bool) -> Iterator[str]:
    """Yield what is wrong with the pictures that a set names by path, and with those whose bytes it holds.

    Args:
        quick: look only whether each is there.
    """
    try:
        images = folder if manifest.vision is None else pictures_folder(folder, manifest.vision)
    except UsageError as error:
        yield str(error)
        return
    sidecars, files = [file.name for file in manifest.files if file.name.startswith(f"{IMAGES}-")], None
    gone: dict[str, list[str]] = {}
    named = 0
    for name in sidecars:
        try:
            files = files or SetFiles(folder, manifest)
            stored = files.pictures(slice_number(name) or 0)
            assert stored is not None
            pictures = [*zip(stored.path, stored.sha256, stored.data, strict=True)]
        except IntegrityError as error:
            yield str(error)
            continue
        for path, sha256, held in pictures:
            if len(held):
                if not quick and hashlib.sha256(held).digest() != sha256:
                    yield f"{folder / name}: a picture: other bytes than its hash. Fix: {RESTORE_PICTURE}"
                continue
            named += 1
            data = b"" if quick and (images / path).is_file() else read_again(path, images)
            if data is None:
                gone.setdefault("not there", []).append(path)
            elif not quick and hashlib.sha256(data).digest() != sha256:
                gone.setdefault("another picture by now", []).append(path)
    for what, paths in gone.items():
        yield _lost(images, what, paths, named)


def _lost(images: Path, what: str, paths: Sequence[str], named: int) -> str:
    """Return the line on pictures that a set names by path, one for all: their folder may have moved."""
    if len(paths) == 1:
        return f"{images / paths[0]}: {what}. Fix: {RESTORE_PICTURE}"
    found = f"{os.path.abspath(images)}: {len(paths):,} of {named:,} pictures, as {paths[0]}: {what}"
    return f"{found}. Fix: {RESTORE_PICTURES}"
