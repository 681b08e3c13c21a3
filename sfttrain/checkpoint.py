"""The folder of a run: one run writes into it at a time, and its checkpoints are complete or absent.

A checkpoint counts only with its seal: a list of its files with sizes and hashes, written last, after
everything it lists has reached the disk. A run resumes from the newest sealed one whose files still match.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from sftdata.errors import IntegrityError, SftError, UsageError
from sftdata.set.manifest import MANIFEST_NAME
from sftdata.set.store import digest_file, explained, sync_folder, write_atomic
from sfttrain.config import TrainConfig, adapter_base
from sfttrain.process import rank, reason_of

RUN_NAME = "run.json"
SETTINGS_NAME = "settings.yaml"
_locks: set[int] = set()  # open locks; a forked reader of the data must not keep them beyond its run
_LOOKS_LIKE_A_PATH = ("/", "./", "../", "~")
SEAL = "complete.json"
PREFIX = "checkpoint-"
STATE = "trainer_state.json"
Identity = dict[str, object]  # what makes a run the same run, as plain JSON data


def refuse_places(config: TrainConfig, *, given: bool) -> None:
    """Refuse an output that holds something else than a run, and a model that is not there.

    Args:
        given: whether the model is an object, which needs no folder.

    Raises:
        UsageError: naming the place.
    """
    output = config.output
    if (output / MANIFEST_NAME).exists():
        raise UsageError(f"{output}: holds a set, which training would write into.", "choose another -o.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is a file; expected a folder for the run.", "choose another -o.")
    source = str(config.init_from_config or config.model)
    if not given and source.startswith(_LOOKS_LIKE_A_PATH) and not Path(source).exists():
        raise UsageError(f"{source}: no such folder.", "name a folder or Hub id of a causal language model.")
    if not given and config.init_from_config is None:
        refuse_weights(Path(source), none=True)
    if config.adapter is not None:
        adapter_base(config.adapter)
    for name in ("model", "adapter"):
        place = getattr(config, name)
        if place is not None and not given and output.exists() and Path(place).resolve() == output.resolve():
            what = f"{output}: is the folder of the {name}, which the run would write over."
            raise UsageError(what, "choose another -o.")


def refuse_weights(folder: Path, *, none: bool = False) -> None:
    """Refuse a folder without weights that are safe to load; `name/model` may be on the Hub.

    Args:
        folder: the model's.
        none: accept a config without weights, which may be refused for a better reason.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)
    )
    if none and not pickles and (folder / "config.json").exists():
        return
    found = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "no weights"
    fix = (
        "if you trust it, convert it with save_pretrained."
        if pickles
        else "name a folder with model.safetensors."
    )
    raise UsageError(f"{folder}: found {found}; expected safetensors.", fix)


@contextmanager
def take(output: Path) -> Iterator[None]:
    """Hold the folder of a run, made if need be, for this run alone: its main process locks it for all ranks.

    Raises:
        UsageError: another run has it, or it cannot be made.
    """
    if rank() != 0:
        yield
        return
    made = not output.exists()
    with explained(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output, os.O_RDONLY)
    _locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"{output}: another `sfttrain run` is writing here."
            raise UsageError(what, "wait for it, or choose another -o.") from None
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)
        if made:
            with suppress(OSError):  # it holds something
                output.rmdir()


def _close_locks() -> None:
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_close_locks)


class SealedFile(msgspec.Struct, frozen=True):
    """A file of a checkpoint: its path in the folder, bytes and xxh3-128."""

    name: str
    bytes: int
    xxh3: str


class Seal(msgspec.Struct, frozen=True):
    """What makes a folder a checkpoint.

    Attributes:
        step: optimizer steps behind it.
        run: what must not change between this run and one that resumes it, as plain JSON data.
        files: everything else in the folder.
    """

    step: int
    run: Identity
    files: list[SealedFile]


def seal(folder: Path, step: int, run: Identity) -> None:
    """Bring every file of a checkpoint to the disk, then write the seal."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digest = digest_file(path, sha256=False)
        files.append(SealedFile(str(path.relative_to(folder)), digest.bytes, digest.xxh3))
    for named in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(named)
    text = msgspec.json.format(msgspec.json.encode(Seal(step, run, files)), indent=2)
    write_atomic(folder / SEAL, lambda sink: sink.write(text))
    sync_folder(folder.parent)


def newest_complete(output: Path) -> tuple[Path, Seal] | None:
    """Return the newest checkpoint whose seal holds, or None.

    Raises:
        IntegrityError: seal, state and folder name different steps, or it cannot be resumed from.
    """
    for folder in sorted(_folders(output), key=_step, reverse=True):
        found = read_seal(folder)
        if found is not None and all(_matches(folder, file) for file in found.files):
            _check_step(folder, found)
            return folder, found
    return None


def newest_sealed(output: Path) -> tuple[Path, Seal] | None:
    """Return the newest checkpoint with a seal, whose files may be damaged, or None."""
    sealed = ((folder, read_seal(folder)) for folder in sorted(_folders(output), key=_step, reverse=True))
    return next(((folder, found) for folder, found in sealed if found is not None), None)


def read_seal(folder: Path) -> Seal | None:
    """Return a folder's seal, None if it has none that can be read."""
    try:
        return msgspec.json.decode((folder / SEAL).read_bytes(), type=Seal)
    except (OSError, msgspec.MsgspecError):
        return None


def remove_after(output: Path, step: int) -> list[str]:
    """Remove checkpoints newer than `step`: they are not complete. Return their names."""
    newer = [folder for folder in _folders(output) if _step(folder) > step]
    for folder in newer:
        _remove(folder)
    return sorted(folder.name for folder in newer)


def clear(output: Path) -> None:
    """Remove the checkpoints of an earlier run."""
    for folder in _folders(output):
        _remove(folder)


def require_space(output: Path, bytes_needed: int) -> None:
    """Refuse to start where a checkpoint cannot be written.

    Raises:
        UsageError: too little room.
    """
    free = shutil.disk_usage(output).free
    if free < bytes_needed:
        raise UsageError(
            f"{output}: {free / 1e9:.1f} GB free; "
            f"a checkpoint beside the one before it needs {bytes_needed / 1e9:.1f} GB.",
            "free some space, choose another output, or set save_only_model=true or save_strategy=no.",
        )


def explain_failed_write(folder: Path, error: Exception) -> SftError:
    """Turn what a failed write raises into one line."""
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    what = f"{folder}: the checkpoint could not be written ({reason_of(error)}); {free / 1e9:.2f} GB free."
    fix = "free some space, then run the same command again: it resumes from the checkpoint before."
    return SftError(what, fix)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; of one that lies elsewhere, the link."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def _check_step(folder: Path, found: Seal) -> None:
    """Compare the step of a seal with the name of its folder and the state that would be resumed."""
    names = {file.name for file in found.files}
    if STATE not in names:
        return
    step = msgspec.json.decode((folder / STATE).read_bytes(), type=dict[str, object]).get("global_step")
    if len({found.step, _step(folder), step}) > 1:
        steps = f"{SEAL} is of step {found.step}, {STATE} of step {step}"
        what = f"{folder}: {steps}."
        raise IntegrityError(what, "remove the folder, then run again: it resumes from the one before.")
    if not any(part in name for name in names for part in ("optim", "scheduler", "global_step")):
        found_only = "holds weights alone (save_only_model=true), from which no run can go on"
        what = f"{folder}: {found_only}."
        raise UsageError(what, "start anew with --overwrite, or in another output folder.")


def _matches(folder: Path, file: SealedFile) -> bool:
    path = folder / file.name
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    return digest_file(path, sha256=False).xxh3 == file.xxh3


def _folders(output: Path) -> list[Path]:
    return [
        path
        for path in output.glob(f"{PREFIX}*")
        if path.is_dir() and path.name.removeprefix(PREFIX).isdigit()
    ]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))
