"""Prove a set at rest: every byte as the manifest says, and the laws counted again from the shards themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sftdata.errors import IntegrityError
from sftdata.shardset.atomic import digest_file
from sftdata.shardset.laws import broken_laws
from sftdata.shardset.ledger import Ledger, distinct
from sftdata.shardset.manifest import Manifest, SetFile, read_manifest
from sftdata.shardset.opened import plain_file
from sftdata.shardset.shards import ShardInfo, read_shard

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
    """Read every file of a set; yield it with what is wrong with its bytes, one line, empty when nothing is."""
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
    """Name the shards that other readers would take for part of the set, since they read every `.arrow` file."""
    listed = {info.name: info for info in manifest.shards}
    sizes = {info.bytes for info in manifest.shards}
    by_digest = {info.xxh3: info.name for info in manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".arrow" and path.name not in listed:
            known = path.is_file() and path.stat().st_size in sizes
            twin = by_digest.get(digest_file(path, sha256=False).xxh3) if known else None
            what = f"a second copy of {twin}" if twin else "not part of the set"
            yield f"{path}: {what}. Fix: move it out of the folder."
