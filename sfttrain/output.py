"""The folder of a run: what it may be, and that one run writes into it at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sftdata.errors import UsageError
from sftdata.set.manifest import MANIFEST_NAME
from sftdata.set.store import explained
from sfttrain.config import TrainConfig, adapter_base
from sfttrain.process import rank

RUN_NAME = "run.json"
SETTINGS_NAME = "settings.yaml"
_locks: set[int] = set()  # open locks; a forked reader of the data must not keep them beyond its run
_LOOKS_LIKE_A_PATH = ("/", "./", "../", "~")


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
            raise UsageError(
                f"{output}: is the folder of the {name}, which the run would write over.",
                "choose another -o.",
            )


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
            raise UsageError(
                f"{output}: another `sfttrain run` is writing here.", "wait for it, or choose another -o."
            ) from None
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
