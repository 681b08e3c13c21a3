"""A set while it is being built: `DIR.partial`, one record a finished task, and one rename at the end.

    DIR.partial/
      plan.json             what is being built: another plan refuses to go on here
      shard-00000.arrow     written by its task, final from then on
      rest-00000.arrow, index-00000.arrow    beside it, the same
      slices/00000.json     written after the task's files and its lines of lists (00000.lists): it is done
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
from pathlib import Path

import msgspec

from sftdata.choosing import SIDES
from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.output import StoreUrl
from sftdata.set.images import PROCESSOR
from sftdata.set.index import slice_number
from sftdata.set.ledger import LISTS
from sftdata.set.local import check_file, plain_file
from sftdata.set.making import CARD_NAME, PLAN, SLICES, TOKENIZER, Making, ShardResult
from sftdata.set.manifest import (
    MANIFEST_NAME,
    Manifest,
    by_name,
    documents_folder,
    format_version,
    is_split,
    partial_folder,
    read_manifest,
)
from sftdata.set.slices import SLICES_NAME
from sftdata.set.store import (
    TEMPORARY_SUFFIX,
    explained,
    held_alone,
    remove,
    remove_temporary,
    stands,
    swap_folders,
    sync_folder,
    write_atomic,
)
from sftdata.set.stores import Folder, Objects

_SHOWN = 5  # files that are named
_NAMES = (*LISTS, SLICES_NAME, CARD_NAME, f"{TOKENIZER}/", f"{PROCESSOR}/")
_NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV)


def finished_set(folder: Path, *, overwrite: bool = False) -> Manifest | None:
    """Return the manifest of a finished set at `folder`; None where there is none, or none that must be kept.

    Its files are looked at, and read with `overwrite`: a damaged set is not taken for the one asked for.

    Raises:
        UsageError, IntegrityError: the folder holds other things or a damaged set, or cannot be renamed.
    """
    if (folder / MANIFEST_NAME).exists():
        return _whole_set(folder, overwrite=overwrite)
    refuse_inside_a_set(folder)
    if folder.is_file():
        raise UsageError(f"{folder}: is a file; expected a folder to build the set in.", "choose another -o.")
    if is_split(folder):
        if overwrite:
            refuse_foreign(folder)
            return None
        raise made_otherwise(folder, ["eval"])
    if folder.is_dir() and any(folder.iterdir()):
        what = f"{folder}: holds files, but is no set; nothing was touched."
        raise UsageError(what, "choose an empty or new folder for -o.")
    if os.path.ismount(folder):
        what = f"{folder}: is a mount point, which a finished set cannot replace."
        raise UsageError(what, f"-o {folder / 'set'}")
    return None


def _whole_set(folder: Path, *, overwrite: bool) -> Manifest | None:
    """Return the manifest of a set whose files are there; None where it is damaged, and may be replaced."""
    if overwrite:
        refuse_foreign(folder)
    try:
        manifest = read_manifest(folder)
        for file in (*manifest.shards, *manifest.files):
            check_file(folder, file) if overwrite else plain_file(folder, file)
    except IntegrityError as error:
        if overwrite:
            return None
        fix = "replace the set with --overwrite, or choose another -o."
        raise IntegrityError(error.message, fix) from None
    return manifest


def refuse_foreign(folder: Path | StoreUrl) -> None:
    """Refuse to replace the set in a folder, or both sides of a split, while other files lie there, too.

    In an object store those would stay: what is removed there are the objects of the set alone.

    Raises:
        UsageError: naming them.
    """
    if not isinstance(folder, Path):
        return
    homes = [folder] if (folder / MANIFEST_NAME).exists() else [folder / side for side in SIDES]
    own = {path for home in homes for path in _files_of(home)}
    kept = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = [str(path.relative_to(folder)) for path in kept if path not in own and not _is_litter(path)]
    if foreign:
        more = f" and {len(foreign) - _SHOWN:,} more" if len(foreign) > _SHOWN else ""
        found = f"holds files that the set was not made with: {', '.join(foreign[:_SHOWN])}{more}"
        what = f"{folder}: {found}; replacing it would delete them."
        raise UsageError(what, f"move them out of {folder}, or choose another -o.")


def _files_of(folder: Path) -> set[Path]:
    """Return the files of the set in a folder; by their names where its manifest is damaged."""
    if not (folder / MANIFEST_NAME).is_file():
        return set()
    try:
        manifest = read_manifest(folder)
    except IntegrityError:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        own = [name for name in names if slice_number(name) is not None or name.startswith(_NAMES)]
    else:
        listed = (*manifest.shards, *manifest.files)
        # Who has written into the card wants to keep that; a card that is damaged has its size.
        own = [file.name for file in listed if file.name != CARD_NAME or stands(folder, file)]
    return {folder / name for name in (*own, MANIFEST_NAME)}


def _is_litter(path: Path) -> bool:
    """Say whether a file is what a killed writer left, or Finder, which makes one wherever it looks."""
    return path.name == ".DS_Store" or path.match(f".*{TEMPORARY_SUFFIX}")


def refuse_inside_a_set(output: Path) -> None:
    """Refuse an output inside a finished set: replacing that set would delete it.

    Raises:
        UsageError: naming both.
    """
    for around in output.resolve().parents:
        if (around / MANIFEST_NAME).is_file() and (around / SLICES_NAME).is_file():
            raise UsageError(f"{output}: lies in the set {around}.", "choose another -o.")


class Build(Making):
    """The unfinished set beside `output`, locked for this process.

    Attributes:
        output: where the finished set will stand.
        folder: where it is built.
        replaced: where an old set stands aside until it is removed.
    """

    def __init__(self, output: Path, folder: Path | None = None) -> None:
        self.output = output
        self.folder = folder or partial_folder(output)
        super().__init__(Folder(self.folder))
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
        before, now = by_name(self._begun(), "vision"), by_name(plan, "vision")
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        changed = changed if before else []
        if not moving.issuperset(changed) and not overwrite and not self._refused.exists():
            differences = "; ".join(
                f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}" for key in changed
            )
            what = f"{self.folder}: an unfinished set made with other settings ({differences})."
            raise UsageError(what, "run with the settings it was begun with, or start anew with --overwrite.")
        if changed or not path.exists():
            self.clear()
            write_atomic(path, lambda sink: sink.write(msgspec.json.encode(plan, order="sorted")))
        with explained(self.folder):
            (self.folder / SLICES).mkdir(exist_ok=True)
            remove_temporary(self.folder)
        return self.finished()

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

    def clear(self) -> None:
        """Remove everything built so far, the plan first: what is left after a kill is worth nothing."""
        with explained(self.folder):
            (self.folder / PLAN).unlink(missing_ok=True)
            for entry in self.folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def finish(self, manifest: Manifest, tokenizer: Path, others: Mapping[str, Path] = {}) -> Manifest:
        """Write what the slices add up to, as `complete` does, and put the set in place."""
        sealed = self.complete(manifest, tokenizer, others)
        self.put_in_place()
        return sealed

    def put_in_place(self) -> None:
        """Turn a folder with a manifest into the set: all that a run stopped before this has to do."""
        with explained(self.output):
            if self._replaces():
                refuse_foreign(self.output)
            if (self.folder / SLICES).exists():
                shutil.rmtree(self.folder / SLICES)
            (self.folder / PLAN).unlink(missing_ok=True)
            sync_folder(self.folder)
            if self._replaces():
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

    def _replaces(self) -> bool:
        return self.output.exists() and any(self.output.iterdir())

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


def making_at(output: Path | StoreUrl) -> Making:
    """Return the files of a set that is made: beside its folder, or at a place in an object store."""
    return Build(output) if isinstance(output, Path) else Making(Objects(output))


def unfinished(folder: Path, what: str) -> UsageError:
    """Return the refusal to discard what another command began."""
    fix = "finish it with the command it was begun with, or start anew with --overwrite."
    return UsageError(f"{folder}: {what}.", fix)


def made_otherwise(output: Path | StoreUrl, changed: Sequence[str]) -> UsageError:
    """Return the refusal to replace a finished set that differs in these settings."""
    what = f"{output}: holds a finished set made otherwise ({', '.join(changed)} differ)."
    return UsageError(what, "choose another -o, or replace the set with --overwrite.")


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


def _read_json(path: Path) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{path}: damaged: {error}.", "start anew with --overwrite.") from None


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
