"""The files of other sets that hold what a view by index is made of: opened, watched, and gathered from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sftdata.batches import IGNORE_INDEX, Float32, Int32, Int64, PackedRows, offsets_of
from sftdata.errors import ANEW, IntegrityError, SftError, UsageError
from sftdata.set.cache import BOUND, cache_bound
from sftdata.set.extents import GIVEN, PADDING_FILE, Extents, held_files, rest_digest
from sftdata.set.images import HasPictures, StoredPictures, read_images
from sftdata.set.index import read_rest
from sftdata.set.local import beside, local_folder, origin, plain_file, stored_hashes
from sftdata.set.manifest import MANIFEST_NAME, BaseInfo, Manifest, read_manifest
from sftdata.set.shards import ShardInfo, read_shard
from sftdata.set.store import SetFile

Tokens = tuple[Int32, Int32, Float32 | None]
"""Ids, labels, and weights in a set that has them."""


class Watch:
    """A set in use: says so when another has taken its place.

    Args:
        folder: of the set.
        digest: of the set that is in use.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._folder, self._digest = folder, digest
        self._seen: tuple[int, ...] | None = None

    def refuse_replaced(self) -> None:
        """Refuse to go on where another set lies in the folder by now; call it after reading from there.

        Raises:
            IntegrityError: naming both digests.
        """
        path = self._folder / MANIFEST_NAME
        try:
            found = path.stat()
            state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
            if state == self._seen:
                return
            digest = read_manifest(self._folder).digest
        except (OSError, SftError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            what = f"{self._folder}: gone while it was in use: {reason}."
            raise IntegrityError(what, "open the set again.") from None
        if digest != self._digest:
            opened = self._digest[:12]
            what = f"{self._folder}: replaced while it was in use: opened as {opened}, now {digest[:12]}."
            raise IntegrityError(what, "open the set again, and write new sets beside those in use.")
        self._seen = state


# ------------------------------------------------------------------------------------- the files of bases


class Block(HasPictures, Protocol):
    """Tokens that lie end to end in one record batch of a file; every array is a view of it."""

    @property
    def input_ids(self) -> Int32:
        """int32[T]."""

    @property
    def labels(self) -> Int32:
        """int32[T], -100 where not trained."""

    @property
    def loss_weights(self) -> Float32 | None:
        """float32[T]; None in a set without weights."""

    @property
    def row_offsets(self) -> Int64:
        """int64[P + 1], where its rows begin."""


class TokenFiles:
    """The files of sets that hold tokens and pictures, numbered through; each is mapped when first needed.

    A block is a record batch of a file with tokens. Block 0 is padding.

    Args:
        sets: folder and manifest of each.
        padding: how long a stretch of padding may be, and the id it consists of.
        check: looks at a file before it is mapped.

    Attributes:
        sets: as given.
        blocks: those mapped so far.
    """

    def __init__(
        self, sets: Sequence[tuple[Path, Manifest]], padding: tuple[int, int] = (0, 0),
        check: Callable[[Path, SetFile], Path] = plain_file,
    ) -> None:  # fmt: skip
        self.sets = list(sets)
        self._check = check
        self._files = [
            (folder, manifest, file) for folder, manifest in self.sets for file in held_files(manifest)
        ]
        self._watches = {folder: Watch(folder, manifest.digest) for folder, manifest in self.sets}
        self._edges: dict[int, tuple[int, Int64]] = {}  # file -> its first block, and tokens before each
        self._pictures: dict[int, StoredPictures] = {}
        length, pad_id = padding
        none = np.zeros(2, np.int64)
        pad = PackedRows(
            np.full(length, pad_id, np.int32), np.full(length, IGNORE_INDEX, np.int32), none,
            np.zeros(0, np.int32), np.zeros(0, np.int64), none,
        )  # fmt: skip
        self.blocks: list[Block] = []
        self._held: tuple[list[memoryview], list[memoryview]] = [], []  # ids and labels of each block
        self._add([pad])
        self._edges[PADDING_FILE] = 0, np.array([0, length])

    def open(self, number: int) -> tuple[int, Int64]:
        """Map a file; return the number of its first block, and int64[B + 1], tokens before each block.

        Raises:
            IntegrityError: it is missing, is not what its manifest says, or its set was replaced.
        """
        if number not in self._edges:
            folder, manifest, file = self._files[number]
            path = self._check(folder, file)
            blocks: Sequence[Block]
            if isinstance(file, ShardInfo):
                blocks = read_shard(path, manifest.max_length, manifest.weighted, manifest.pictured)
            else:
                blocks = read_rest(path, manifest.weighted, manifest.pictured)
            self._watches[folder].refuse_replaced()
            self._edges[number] = len(self.blocks), offsets_of([len(block.input_ids) for block in blocks])
            self._add(blocks)
        return self._edges[number]

    def pictures(self, number: int) -> StoredPictures:
        """Map a sidecar.

        Raises:
            IntegrityError: it is missing, is not what its manifest says, or its set was replaced.
        """
        if number not in self._pictures:
            folder, _, file = self._files[number]
            self._pictures[number] = read_images(self._check(folder, file))
            self._watches[folder].refuse_replaced()
        return self._pictures[number]

    def _add(self, blocks: Sequence[Block]) -> None:
        self.blocks += blocks
        ids, labels = self._held
        ids += [block.input_ids.data for block in blocks]
        labels += [block.labels.data for block in blocks]

    def open_blocks(self, number: int) -> list[int]:
        """Map a file; return the numbers of its blocks."""
        first, edges = self.open(number)
        return [*range(first, first + len(edges) - 1)]

    def places(self) -> tuple[Int32, Int64]:
        """Return the file of each block mapped so far, int32[B], and the tokens before it there, int64[B]."""
        file, before = np.empty(len(self.blocks), np.int32), np.empty(len(self.blocks), np.int64)
        for number, (first, edges) in self._edges.items():
            here = slice(first, first + len(edges) - 1)
            file[here], before[here] = number, edges[:-1]
        return file, before

    def find(self, path: Path, extents: Extents) -> Int32:
        """Find extents in the blocks of their files; see `place`.

        Returns:
            int32[4, E]: number of the block, first token there, its end, and `Extents.first_label`.
        """
        block, start = self.place(path, extents.file, extents.start, extents.length)
        runs = np.empty((4, len(extents)), np.int32)  # a record batch has fewer than 2**31 tokens
        runs[:] = block, start, start + extents.length, extents.first_label
        return runs

    def place(self, path: Path, file: Int32, start: Int64, length: Int32) -> tuple[Int32, Int64]:
        """Return the block of each extent, int32[E], and its first token there, int64[E].

        Args:
            path: of the file that names them, for the message.
            file, start, length: as in `Extents`.

        Raises:
            IntegrityError: there are no such tokens.
        """
        block, start = np.zeros(len(file), np.int32), start.copy()
        order = np.argsort(file, kind="stable")
        numbers, firsts = np.unique(file[order], return_index=True)
        for number, here in zip(numbers.tolist(), np.split(order, firsts)[1:], strict=True):
            first, edges = self._edges_of(path, number)
            which = np.searchsorted(edges, start[here], side="right") - 1
            room = np.append(edges[1:], -1)[which] - start[here] - length[here]  # -1: behind the end
            if (room < 0).any() or (start[here] < 0).any() or (length[here] < 0).any():
                raise IntegrityError(f"{path}: names tokens that are not there.", ANEW)
            block[here] = first + which
            start[here] -= edges[which]
        return block, start

    def _edges_of(self, path: Path, number: int) -> tuple[int, Int64]:
        if not PADDING_FILE <= number < len(self._files):
            raise IntegrityError(f"{path}: names a file {number}; its bases have {len(self._files)}.", ANEW)
        return self.open(number)

    def gather(self, runs: Int32, first_weights: Float32 | None) -> Tokens:
        """Lay the tokens of extents end to end; read-only.

        They are joined as bytes, in half the time of joining arrays.

        Args:
            runs: as `find` returns them.
            first_weights: as in `Extents`.
        """
        where = list(zip(*runs[:3].tolist(), strict=True))
        ids, labels = (
            np.frombuffer(
                bytearray().join([held[block][start:stop] for block, start, stop in where]), np.int32
            )
            for held in self._held
        )
        weights = self._gather_weights(where) if first_weights is not None else None
        _mend(runs, first_weights, (ids, labels, weights))
        for column in (ids, labels, weights):
            if column is not None:
                column.flags.writeable = False
        return ids, labels, weights

    def _gather_weights(self, where: list[tuple[int, int, int]]) -> Float32:
        """Lay the weights of tokens end to end; a set without them gives each label 1."""
        weights = [np.empty(0, np.float32)]
        for number, start, stop in where:
            block = self.blocks[number]
            labelled = (block.labels[start:stop] != IGNORE_INDEX).astype(np.float32)
            weights.append(labelled if block.loss_weights is None else block.loss_weights[start:stop])
        return np.concatenate(weights)


def _mend(runs: Int32, first_weights: Float32 | None, tokens: Tokens) -> None:
    """Give and take the labels of first tokens that their files have otherwise."""
    ids, labels, weights = tokens
    (which,) = runs[3].nonzero()  # all but `AS_STORED`
    if len(which):
        lengths = runs[2] - runs[1]
        at, given = (lengths.cumsum() - lengths)[which], runs[3][which] == GIVEN
        labels[at] = np.where(given, ids[at], IGNORE_INDEX)
        if weights is not None and first_weights is not None:
            weights[at] = np.where(given, first_weights[which], 0)


def open_token_files(folder: Path, manifest: Manifest) -> TokenFiles:
    """Open the bases of a view by index; only their manifests are read.

    Raises:
        IntegrityError: a base is gone, or is not the set that the view was made of.
    """
    made_of = manifest.settings.get("view", {}).get("bases", ())
    nested = not {base.digest for base in manifest.bases}.issuperset(made_of)
    opened = [_read_base(folder, base, nested) for base in manifest.bases]
    _refuse_larger_than_cache(folder, opened)
    return TokenFiles(opened, (manifest.max_length or 0, manifest.tokenizer.pad_id or 0))


def _refuse_larger_than_cache(folder: Path, sets: Sequence[tuple[Path, Manifest]]) -> None:
    """Refuse bases behind URLs that the cache cannot hold: all of their files may be needed at once."""
    far = [file.bytes for path, base in sets if origin(path) is not None for file in held_files(base)]
    if far and sum(far) > (bound := cache_bound()):
        raise UsageError(
            f"{folder}: a view by index reads {sum(far):,} bytes of sets behind URLs;"
            f" the cache is bound to {bound:,}.",
            f"raise {BOUND}, in gigabytes, or make the view with --write where the sets lie.",
        )


def _read_base(folder: Path, base: BaseInfo, nested: bool) -> tuple[Path, Manifest]:
    """Find a base and read its manifest; `nested` if the view was made of a view, which comes first."""
    where = beside(folder, base.path)
    what = f"{folder}: a view by index of {where} (digest {base.digest[:12]})"
    again = "make the views between again, the lowest first, and this one last: for each, "
    try:
        path = local_folder(where)
        found = read_manifest(path)
    except SftError as error:
        fix = "run the same `sftdata view` with the path it has now."
        what = f"{what}, which cannot be read: {error.message}"
        raise IntegrityError(what, f"put that set back, or {again * nested}{fix}") from None
    if (found.digest, rest_digest(found)) != (base.digest, base.rest):
        other = f"digest {found.digest[:12]}" if found.digest != base.digest else "other rest files"
        fix = f"{again}the same `sftdata view` with --overwrite." if nested else ANEW
        raise IntegrityError(f"{what}, where a set with {other} is now.", f"put the old set back, or {fix}")
    return path, found


def are_hashed(folder: Path, manifest: Manifest) -> bool:
    """Say whether the stores know a hash of the files that hold the tokens of a set."""
    try:
        sets = open_token_files(folder, manifest).sets if manifest.by_index else [(folder, manifest)]
    except IntegrityError:
        return False
    return all(stored_hashes(base) for base, _ in sets)
