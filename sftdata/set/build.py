"""A set while it is being built: `DIR.partial`, one record a finished task, and one rename at the end.

    DIR.partial/
      plan.json             what is being built: another plan refuses to go on here
      shard-00000.arrow     written by its task, final from then on
      rest-00000.arrow, index-00000.arrow    beside it, the same
      slices/00000.json     written after the task's files and lists (00000.rejects.jsonl, ...): it is done
      manifest.json         written last; from then on the folder only waits to be renamed to DIR

A reader looks at DIR alone: it sees the old set, none, or the new one. Where a set is replaced, the folders
change names in one step; a system without it moves the old one to `DIR.partial.replaced` first, and a run
stopped there is ended by the next.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.set.ledger import LISTS, Ledger, write_parts
from sftdata.set.local import check_file, plain_file
from sftdata.set.manifest import (
    MANIFEST_NAME,
    Manifest,
    documents_folder,
    format_version,
    is_split,
    partial_folder,
    read_manifest,
    write_manifest,
)
from sftdata.set.shards import ShardInfo
from sftdata.set.slices import SLICES_NAME, SliceRecord, encode_slice
from sftdata.set.store import (
    SetFile,
    digest_file,
    explained,
    held_alone,
    remove,
    remove_temporary,
    stands,
    swap_folders,
    sync_folder,
    write_atomic,
)

PLAN, SLICES, _TOKENIZER = "plan.json", "slices", "tokenizer"
_NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)

CARD_NAME = "README.md"
CARD = b"""\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: shard-*.arrow
---

A set of tokenized, masked and packed rows for supervised fine-tuning, made by `sftdata COMMAND`.
`manifest.json` says what it was made from; `sftdata verify` checks every byte of it against that.

`load_dataset` reads its rows: `input_ids` and `labels` (-100 where not trained), `seq_lengths` of the
documents in a row, and `example_ids`, the input rows they come from. `tokenizer/` holds the tokenizer, chat
template included. `rest-*.arrow` hold the tokens that were cut or dropped, and `index-*.arrow` say where each
document is.
"""
INDEX_CARD = (
    CARD.partition(b"\n\n")[0]
    + b"""

A view by index: rows for supervised fine-tuning that lie in other sets, the `bases` of `manifest.json`.
`sftdata` and `sfttrain` read it like any set. It has no `shard-*.arrow`, so `load_dataset` and other trainers
cannot read it: the same `sftdata view` with `--write` makes a set that stands alone.
"""
)


class ShardResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished task gave.

    Attributes:
        index: its number in the plan.
        shards: its shards, none when it kept no row.
        files: what stands beside them, index and rest.
        ledger: what became of its rows and tokens.
        rejects: rows it rejected, also counted in the ledger.
        lists: bytes of its part of each list, by name; filled in when it is committed.
        reused: it was made for a set that this one replaces.
        sample, sample_xxh3: some of its texts, and `digest_ids` of what a fast engine made of them; empty for
            the reference engine.
    """

    index: int
    shards: tuple[ShardInfo, ...]
    files: tuple[SetFile, ...]
    ledger: Ledger
    rejects: int = 0
    lists: dict[str, int] = {}
    reused: bool = False
    sample: tuple[str, ...] = ()
    sample_xxh3: str = ""


def finished_set(folder: Path, *, overwrite: bool = False) -> Manifest | None:
    """Return the manifest of a finished set at `folder`; None where there is none, or none that must be kept.

    Its files are looked at, and read with `overwrite`: a damaged set is not taken for the one asked for.

    Raises:
        UsageError, IntegrityError: the folder holds other things or a damaged set, or cannot be renamed.
    """
    if (folder / MANIFEST_NAME).exists():
        try:
            manifest = read_manifest(folder)
            for file in (*manifest.shards, *manifest.files):
                check_file(folder, file) if overwrite else plain_file(folder, file)
            return manifest
        except IntegrityError as error:
            if overwrite:
                return None
            raise IntegrityError(
                error.message, "replace the set with --overwrite, or choose another -o."
            ) from None
    if folder.is_file():
        raise UsageError(f"{folder}: is a file; expected a folder to build the set in.", "choose another -o.")
    if is_split(folder):
        if overwrite:
            return None
        raise made_otherwise(folder, ["eval"])
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"{folder}: holds files, but is no set; nothing was touched.",
            "choose an empty or new folder for -o.",
        )
    if os.path.ismount(folder):
        raise UsageError(
            f"{folder}: is a mount point, which a finished set cannot replace.", f"-o {folder / 'set'}"
        )
    return None


class Build:
    """The unfinished set beside `output`, locked for this process.

    Attributes:
        output: where the finished set will stand.
        folder: where it is built.
        replaced: where an old set stands aside until it is removed.
    """

    def __init__(self, output: Path, folder: Path | None = None) -> None:
        self.output = output
        self.folder = folder or partial_folder(output)
        self.replaced = self.folder.with_name(f"{self.folder.name}.replaced")
        self._refused = self.folder / SLICES / "refused"

    @contextmanager
    def locked(self) -> Iterator[Build]:
        """Hold the folder for one process.

        Raises:
            UsageError: another process builds here, or the folder cannot be made.
        """
        with held_alone(self.folder, "building this set"):
            yield self

    @contextmanager
    def refusable(self) -> Iterator[None]:
        """Note when the run is refused: the same settings resume what it did, others may discard it."""
        self._refused.unlink(missing_ok=True)
        try:
            yield
        except (DataError, UsageError):
            with suppress(OSError):
                self._refused.touch()
            raise

    def start(
        self, plan: dict[str, object], *, overwrite: bool, moving: frozenset[str] = frozenset()
    ) -> dict[int, ShardResult]:
        """Begin or resume; return the tasks that are done.

        Args:
            plan: all that decides the bytes of the set, as plain JSON data, flat.
            moving: keys of it that may have changed since a run was stopped, which then begins anew.

        Raises:
            UsageError: an unfinished set of another plan stands here, which was not refused.
            IntegrityError: what stands here is damaged, and may not be overwritten.
        """
        try:
            return self._resume(plan, overwrite, moving)
        except IntegrityError:
            if not overwrite:
                raise
            self.clear()
            return self._resume(plan, overwrite, moving)

    def _resume(
        self, plan: dict[str, object], overwrite: bool, moving: frozenset[str]
    ) -> dict[int, ShardResult]:
        path = self.folder / PLAN
        plan = plan | {"format_version": format_version("vision" in plan)}
        before = self._begun()
        changed = (
            sorted(key for key in before.keys() | plan.keys() if before.get(key) != plan.get(key))
            if before
            else []
        )
        if not moving.issuperset(changed) and not overwrite and not self._refused.exists():
            differences = "; ".join(
                f"{key}: {_short(before.get(key))} -> {_short(plan.get(key))}" for key in changed
            )
            raise UsageError(
                f"{self.folder}: an unfinished set made with other settings ({differences}).",
                "run with the settings it was begun with, or start anew with --overwrite.",
            )
        if changed or not path.exists():
            self.clear()
            write_atomic(path, lambda sink: sink.write(msgspec.json.encode(plan, order="sorted")))
        with explained(self.folder):
            (self.folder / SLICES).mkdir(exist_ok=True)
            remove_temporary(self.folder)
        return self.finished()

    def finished(self) -> dict[int, ShardResult]:
        """Return the tasks that are done, by number."""
        done = [_read_result(found) for found in sorted((self.folder / SLICES).glob("[0-9]*[0-9].json"))]
        listed = [result for result in done if all(self.part(result.index, name).is_file() for name in LISTS)]
        return {
            result.index: result
            for result in listed
            if all(stands(self.folder, file) for file in (*result.shards, *result.files))
        }

    def _begun(self) -> dict[str, object]:
        """Return the plan this folder was begun with; empty when nothing in it is worth keeping."""
        if (self.folder / PLAN).exists():
            return _read_json(self.folder / PLAN)
        sealed = self.sealed()
        return (
            {key: value for key, value in sealed.settings.items() if key not in ("inputs", "tokenizer")}
            | {"format_version": sealed.format_version}
            if sealed
            else {}
        )

    def kept(self) -> dict[str, object]:
        """Return the plan of an unfinished set that no other command may discard; empty if there is none."""
        return {} if self._refused.exists() else self._begun()

    def sealed(self) -> Manifest | None:
        """Return the manifest of a set that only waits to be put in place: its run was stopped at the end.

        One without some of its files was being removed when its run was stopped, and is no set any more.
        """
        if not (self.folder / MANIFEST_NAME).exists():
            return None
        with suppress(IntegrityError):
            manifest = read_manifest(self.folder)
            for file in (*manifest.shards, *manifest.files):
                plain_file(self.folder, file)
            return manifest
        return None

    def sweep(self) -> None:
        """Remove what is left of a run stopped after its set was put in place; another run's work stays."""
        if not self.folder.exists() and not self.replaced.exists():
            return
        with suppress(SftError, OSError), self.locked():
            if not (self.folder / PLAN).exists():
                shutil.rmtree(self.folder)
            remove(self.replaced)

    def lend(self, tokenizer: Path) -> Path:
        """Copy a tokenizer, with what is known of it, to where workers on any machine find it."""
        copy = self.folder / SLICES / _TOKENIZER
        with explained(copy):
            shutil.copytree(tokenizer.parent, copy, dirs_exist_ok=True)
        return copy / tokenizer.name

    def clear(self) -> None:
        """Remove everything built so far, the plan first: what is left after a kill is worth nothing."""
        with explained(self.folder):
            (self.folder / PLAN).unlink(missing_ok=True)
            for entry in self.folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def commit(self, result: ShardResult, lists: Mapping[str, bytes]) -> ShardResult:
        """Record a finished task, its shards already in place; `lists` are its lines of each of `LISTS`."""
        result = _measured(result, lists)
        for name in LISTS:
            write_atomic(self.part(result.index, name), partial(write_parts, [lists[name]]))
        record = msgspec.json.encode(msgspec.to_builtins(result, str_keys=True), order="sorted")
        write_atomic(self.folder / SLICES / f"{result.index:05d}.json", lambda sink: sink.write(record))
        return result

    def keep(self, result: ShardResult, lists: Mapping[str, bytes]) -> ShardResult:
        """Put the lists of a reused task aside; no record, as taking it over again costs less than a sync."""
        for name in LISTS:
            with explained(self.part(result.index, name)):
                self.part(result.index, name).write_bytes(lists[name])
        return _measured(result, lists)

    def write_lists(self, slices: Sequence[SliceRecord]) -> None:
        """Write the records of the slices, and join the tasks' parts of the lists of rows, in order."""
        write_atomic(self.folder / SLICES_NAME, partial(write_parts, map(encode_slice, slices)))
        for name in LISTS:
            with explained(self.folder / name):
                parts = [self.part(record.number, name).read_bytes() for record in slices]
            write_atomic(self.folder / name, partial(write_parts, parts))

    def finish(self, manifest: Manifest, tokenizer: Path, others: Mapping[str, Path] = {}) -> Manifest:
        """Add the lists and the tokenizer's files, the manifest last, and put the set in place.

        Args:
            manifest: whose files are those of the slices.
            tokenizer, others: its folder, and more files to copy by their names in the set.

        Raises:
            SftError: the tokenizer was changed or is gone.
        """
        with explained(self.folder / _TOKENIZER):
            names = {f"{_TOKENIZER}/{path.relative_to(tokenizer)}": path for path in tokenizer.rglob("*")}
            copied = [*self._copy({**names, **others})]
            if manifest.tokenizer.sha256 not in (file.sha256 for file in copied):
                raise SftError(
                    f"{tokenizer}: emptied or changed while the set was made.", "run the same command again."
                )
            for folder in sorted({(self.folder / file.name).parent.parent for file in copied}):
                sync_folder(folder)
        card = INDEX_CARD if manifest.by_index else CARD
        card = card.replace(b"COMMAND", b"view" if manifest.bases else b"prepare")
        write_atomic(self.folder / CARD_NAME, partial(write_parts, [card]))
        files = [*manifest.files, *map(self._describe, (*LISTS, SLICES_NAME, CARD_NAME)), *copied]
        sealed = write_manifest(self.folder, msgspec.structs.replace(manifest, files=tuple(files)))
        self.put_in_place()
        return sealed

    def _describe(self, name: str) -> SetFile:
        return SetFile(name=name, **msgspec.structs.asdict(digest_file(self.folder / name)))

    def _copy(self, files: Mapping[str, Path]) -> Iterator[SetFile]:
        for name, path in sorted(item for item in files.items() if item[1].is_file()):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as original:
                write_atomic(self.folder / name, partial(shutil.copyfileobj, original))
            yield self._describe(name)

    def put_in_place(self) -> None:
        """Turn a folder with a manifest into the set: all that a run stopped before this has to do."""
        with explained(self.output):
            if (self.folder / SLICES).exists():
                shutil.rmtree(self.folder / SLICES)
            (self.folder / PLAN).unlink(missing_ok=True)
            sync_folder(self.folder)
            if self.output.exists() and any(self.output.iterdir()):
                self._replace()
            else:
                os.rename(self.folder, self.output)
            sync_folder(self.output.parent)
            remove(self.replaced)

    def put_back(self) -> None:
        """Let a finished set wait to be put in place: the same settings do so, others may discard it."""
        with suppress(SftError, OSError), self.locked():
            (self.output / SLICES).mkdir(exist_ok=True)
            (self.output / SLICES / self._refused.name).touch()  # first: stopped here, the set is still whole
            os.rename(self.output, self.folder)

    def put_away(self) -> None:
        """Put a finished set aside, to be swept up."""
        with suppress(SftError, OSError), self.locked():
            remove(self.replaced)
            os.rename(self.output, self.replaced)

    def _replace(self) -> None:
        """Let the folder and the old set change places, and put the old one aside."""
        remove(self.replaced)
        try:
            swap_folders(self.folder, self.output)
        except OSError as error:
            if error.errno not in _NO_SWAP:
                raise
            os.rename(self.output, self.replaced)
            os.rename(self.folder, self.output)
        else:
            sync_folder(self.output.parent)  # the old set must not be lost before its successor is safe
            os.rename(self.folder, self.replaced)

    def part(self, index: int, name: str) -> Path:
        """Return where the lines of a task for a list are kept until the lists are joined."""
        return self.folder / SLICES / f"{index:05d}.{name}"


def unfinished(folder: Path, what: str) -> UsageError:
    """Return the refusal to discard what another command began."""
    return UsageError(
        f"{folder}: {what}.", "finish it with the command it was begun with, or start anew with --overwrite."
    )


def made_otherwise(output: Path, changed: Sequence[str]) -> UsageError:
    """Return the refusal to replace a finished set that differs in these settings."""
    return UsageError(
        f"{output}: holds a finished set made otherwise ({', '.join(changed)} differ).",
        "choose another -o, or replace the set with --overwrite.",
    )


def refuse_choice(output: Path) -> None:
    """Refuse to leave the documents of an unfinished choice beside the set of all.

    Raises:
        UsageError: naming them.
    """
    documents = Build(documents_folder(output))
    if documents.output.exists() or documents.kept():
        raise unfinished(documents.output, "of an unfinished run that chooses among the documents")


def sweep_choice(output: Path, *, discard: bool) -> None:
    """Remove the documents of a refused choice, with `discard` also those of a stopped one."""
    documents = Build(documents_folder(output))
    if documents.folder.exists() and (discard or not documents.kept()):
        with suppress(SftError, OSError), documents.locked():
            documents.clear()
    if discard and documents.output.exists():
        documents.put_away()
    documents.sweep()


def _measured(result: ShardResult, lists: Mapping[str, bytes]) -> ShardResult:
    return msgspec.structs.replace(result, lists={name: len(lists[name]) for name in LISTS})


def _read_json(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{path}: damaged: {error}.", "start anew with --overwrite.") from None


def _read_result(path: Path) -> ShardResult:
    try:
        return msgspec.convert(_read_json(path), ShardResult, str_keys=True)
    except msgspec.ValidationError as error:
        raise IntegrityError(f"{path}: damaged: {error}.", "start anew with --overwrite.") from None


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
