"""Prove a set at rest: every byte as the manifest says, and the laws counted again from the shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int64, PackedRows, offsets_of, positions_of
from sftdata.errors import IntegrityError
from sftdata.set.ledger import Ledger, distinct
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.shards import ShardInfo, read_shard
from sftdata.set.store import SetFile, digest_file, plain_file

_COUNTED = ("rows_packed", "documents", "tokens_trained", "tokens_context", "tokens_padding")
_COUNTED_PER_SHARD = {
    "rows": "rows_packed",
    "documents": "documents",
    "tokens": "tokens",
    "tokens_trained": "tokens_trained",
}
_AGAIN = "restore the file or prepare the set again."


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        folder: the set.
        digest: of its manifest.
        files: files read.
        bytes: bytes read.
        rows: packed rows counted.
        problems: one line each; empty for a set that holds.
    """

    folder: Path
    digest: str = ""
    files: int = 0
    bytes: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def raise_if_broken(self) -> None:
        """Refuse a set that does not hold.

        Raises:
            IntegrityError: naming the first problem and how many more there are.
        """
        if self.problems:
            more = f" {len(self.problems) - 1} more: see `sftdata verify`." if len(self.problems) > 1 else ""
            raise IntegrityError(self.problems[0] + more)


def verify(folder: str | Path, *, sha256: bool = False) -> VerifyReport:
    """Check that a set is what its manifest says, from the bytes of its files to the sums of its ledger.

    Args:
        folder: a finished set.
        sha256: compare sha256 as well as xxh3-128; proof against forgery, several times slower.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: the manifest itself is damaged, so that there is nothing to compare with.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    report = VerifyReport(folder, digest=manifest.digest)
    count = _Recount(manifest)
    for info, problem in damaged_files(folder, manifest, sha256=sha256):
        report.files += 1
        if problem:
            report.problems.append(problem)
            continue
        report.bytes += info.bytes
        if isinstance(info, ShardInfo):
            report.problems += count.add(folder / info.name, info)
    report.rows = count.ledger.rows_packed
    if not report.problems:
        report.problems += count.compare(folder)
    report.problems += foreign_shards(folder, manifest)
    return report


def damaged_files(
    folder: Path, manifest: Manifest, *, sha256: bool = False
) -> Iterator[tuple[ShardInfo | SetFile, str]]:
    """Read every file of a set; yield it with what is wrong with its bytes, one line, empty if nothing is."""
    files: list[ShardInfo | SetFile] = [*manifest.shards, *manifest.files]
    names = {info.xxh3: info.name for info in files}
    for info in files:
        yield info, _damage(folder, info, names, sha256)


def _damage(folder: Path, info: ShardInfo | SetFile, names: dict[str, str], sha256: bool) -> str:
    """Return what is wrong with the bytes of a file; empty when nothing is."""
    try:
        path = plain_file(folder, info)
        found = digest_file(path, sha256=sha256)
    except IntegrityError as error:
        return str(error)
    except OSError as error:
        return f"{folder / info.name}: cannot be read: {error.strerror}. Fix: {_AGAIN}"
    if found.xxh3 != info.xxh3:
        other = names.get(found.xxh3)
        what = (
            f"holds the bytes of {other}"
            if other
            else f"xxh3-128 is {found.xxh3}; the manifest says {info.xxh3}"
        )
        return f"{path}: {what}. Fix: {_AGAIN}"
    if sha256 and found.sha256 != info.sha256:
        return f"{path}: sha256 is {found.sha256}; the manifest says {info.sha256}. Fix: {_AGAIN}"
    return ""


class _Recount:
    """A second ledger, counted from the shards alone."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.ledger = Ledger()
        self._examples = [np.empty(0, np.int64)]

    def add(self, path: Path, info: ShardInfo) -> list[str]:
        """Count one shard; return its problems."""
        length = self.manifest.max_length
        try:
            batches = read_shard(path, length, self.manifest.weighted)
        except IntegrityError as error:
            return [str(error)]
        problems, shard, first = [], Ledger(), 0
        for batch in batches:
            for rows, what in broken_laws(batch, self.manifest):
                more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
                problems.append(
                    f"{path}: row {first + int(rows[0])}{more}: {what}. Fix: prepare the set again."
                )
            shard.count_packed(batch, length)
            self._examples.append(distinct(batch.example_ids[batch.example_ids >= 0]))
            first += len(batch)
        self.ledger.merge(shard)
        pairs = [(name, getattr(info, name), getattr(shard, of)) for name, of in _COUNTED_PER_SHARD.items()]
        return problems + [_differs(path, name, said, found) for name, said, found in pairs if said != found]

    def compare(self, folder: Path) -> list[str]:
        """Compare the whole with the manifest's ledger."""
        said, found = self.manifest.ledger, self.ledger
        pairs = [(name, getattr(said, name), getattr(found, name)) for name in _COUNTED]
        pairs.append(("rows_kept", said.rows_kept, len(distinct(np.concatenate(self._examples)))))
        return [
            _differs(folder, name, expected, counted)
            for name, expected, counted in pairs
            if expected != counted
        ]


def _differs(path: Path, name: str, said: int, found: int) -> str:
    return f"{path}: {name} is {found} when counted; the manifest says {said}. Fix: prepare the set again."


def foreign_shards(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Name shards that are not in the manifest: other readers read every `.arrow` file of the folder."""
    listed = {info.name: info for info in manifest.shards}
    sizes = {info.bytes for info in manifest.shards}
    by_digest = {info.xxh3: info.name for info in manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".arrow" and path.name not in listed:
            known = path.is_file() and path.stat().st_size in sizes
            twin = by_digest.get(digest_file(path, sha256=False).xxh3) if known else None
            what = f"a second copy of {twin}" if twin else "not part of the set"
            yield f"{path}: {what}. Fix: move it out of the folder."


# -------------------------------------------------------------------------------- laws of the rows


def broken_laws(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    """Yield what is wrong with packed rows: int64[K], the rows concerned, and what is wrong with them.

    Where the documents do not add up to their rows nothing else is looked at, since nothing else has a place.
    """
    misshapen = False
    for where, what in _shape(rows, manifest):
        misshapen = True
        yield where, what
    if not misshapen:
        yield from _segments(rows, manifest)
        yield from _tokens(rows, manifest)


def _shape(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    summed = offsets_of(rows.seq_lengths)
    width = np.diff(rows.row_offsets)
    yield from _rows(rows.segment_offsets, rows.seq_lengths < 1, "a document has no tokens")
    yield from _finding(
        np.flatnonzero(np.diff(summed[rows.segment_offsets]) != width),
        "seq_lengths do not sum to the length of the row",
    )
    yield from _finding(np.flatnonzero(np.diff(rows.segment_offsets) < 1), "the row holds nothing")
    if manifest.max_length is not None:
        yield from _finding(
            np.flatnonzero(width != manifest.max_length), f"the row is not {manifest.max_length} tokens long"
        )


def refuse_unlawful(path: Path, batches: Sequence[PackedRows], manifest: Manifest) -> None:
    """Refuse a shard whose rows break a law, so that no reader meets an id, label or length that cannot be.

    Raises:
        IntegrityError: naming the first row and what is wrong with it.
    """
    first = 0
    for batch in batches:
        for rows, what in broken_laws(batch, manifest):
            raise IntegrityError(f"{path}: row {first + int(rows[0])}: {what}.", "prepare the set again.")
        first += len(batch)


def _segments(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    ids = rows.example_ids
    known = sum(
        source.rows for source in manifest.sources
    )  # read_manifest saw that they share out all ids from 0 on
    padding = ids == -1
    last = np.zeros(len(ids), np.bool_)
    last[rows.segment_offsets[1:] - 1] = True
    yield from _rows(rows.segment_offsets, (ids < -1) | (ids >= known), "an example id belongs to no source")
    yield from _rows(rows.segment_offsets, padding & ~last, "padding stands before a document")
    first = np.zeros(len(ids), np.bool_)
    first[rows.segment_offsets[:-1]] = True
    yield from _rows(rows.segment_offsets, padding & first, "the row is all padding")
    starts = offsets_of(rows.seq_lengths)
    if manifest.max_length is not None or manifest.format_version > 1:
        trained = rows.labels[starts[:-1]] != IGNORE_INDEX
        yield from _rows(rows.segment_offsets, trained, "the first token of a document is trained")
    if manifest.max_length is None:
        yield from _rows(rows.segment_offsets, padding, "padding in a row that keeps its own length")
        return
    inside = positions_of(starts[:-1][padding], rows.seq_lengths[padding].astype(np.int64))
    yield from _rows_of(rows.row_offsets, inside[rows.labels[inside] != IGNORE_INDEX], "padding is trained")
    pad_id = manifest.tokenizer.pad_id
    yield from _rows_of(
        rows.row_offsets, inside[rows.input_ids[inside] != pad_id], f"padding is not the pad id {pad_id}"
    )


def _tokens(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    # One unsigned comparison finds negative ids too.
    outside = rows.input_ids.view(np.uint32) >= manifest.tokenizer.vocab_size
    other = (rows.labels != IGNORE_INDEX) & (rows.labels != rows.input_ids)
    yield from _rows(
        rows.row_offsets, outside, f"a token id is outside the vocabulary of {manifest.tokenizer.vocab_size}"
    )
    yield from _rows(rows.row_offsets, other, "a label is neither -100 nor the id of its token")
    if rows.loss_weights is not None:
        # A weight that is no number is above nothing, and one without end is not finite.
        weighs = (rows.loss_weights > 0) & np.isfinite(rows.loss_weights)
        wrong = np.where(rows.labels != IGNORE_INDEX, ~weighs, rows.loss_weights != 0)
        yield from _rows(
            rows.row_offsets, wrong, "loss_weights are not above 0 and finite where trained, and 0 elsewhere"
        )


def _rows(offsets: Int64, wrong: Bool, what: str) -> Iterator[tuple[Int64, str]]:
    """Say in which rows the items lie that are wrong."""
    if wrong.any():
        yield from _rows_of(offsets, np.flatnonzero(wrong), what)


def _rows_of(offsets: Int64, wrong: Int64, what: str) -> Iterator[tuple[Int64, str]]:
    yield from _finding(np.unique(np.searchsorted(offsets, wrong, side="right") - 1), what)


def _finding(where: Int64, what: str) -> Iterator[tuple[Int64, str]]:
    if len(where):
        yield where, what
