"""Whether a run begins, goes on, or is finished already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from sftdata.errors import IntegrityError, UsageError
from sfttrain import checkpoint
from sfttrain.config import TrainConfig
from sfttrain.identity import LENGTH, check_unchanged, differences, may_change
from sfttrain.output import RUN_NAME
from sfttrain.progress import LOG_NAME
from sfttrain.talk import Say

# What would be taken for the new run's, or read together with it: adapters beside a model, for one.
_OF_A_RUN = (RUN_NAME, LOG_NAME, "*.safetensors", "*.safetensors.index.json", "adapter_config.json")
Point = tuple[Path, int]  # a checkpoint, and the steps behind it


def finished(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return what `run.json` says of a finished run that was asked for again; None where there is something to do.

    Raises:
        UsageError: the output holds a run with other settings, which are named.
    """
    if config.overwrite:
        return None
    done = read_run(config.output)
    if not done.get("finished") or not any(config.output.glob("*.safetensors")):
        begun = checkpoint.newest_sealed(config.output)
        if begun is not None:
            check_unchanged(begun[1].run, identity, begun[0])
        return None
    fix = "choose another output folder, or --overwrite to start anew."
    if "settings" not in done:
        found = f"{config.output}: holds a finished run of an earlier version, which recorded no settings to compare with"
        raise UsageError(f"{found}.", fix)
    changes = differences(done, identity)
    if not changes:
        return done
    if all(may_change(name) for name in changes) and any(name in changes for name in LENGTH):
        return None  # it is to go on
    found = f"{config.output}: holds a finished run with other settings: {'; '.join(changes.values())}"
    raise UsageError(f"{found}.", f"{fix[:-1]}; a higher max_steps trains it on.")


def read_run(output: Path) -> dict[str, Any]:
    """Return what `run.json` holds, nothing where there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    path = output / RUN_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{path}: damaged: {error}.", "start anew with --overwrite.") from None


def resume_point(config: TrainConfig, args: Any, run: dict[str, Any], steps: int, say: Say) -> Point | None:
    """Find the newest complete checkpoint; the main process alone looks and cleans, the others follow it.

    Args:
        run: the identity of this run.
        steps: how many it is to take.

    Raises:
        UsageError: the run changed, or has gone further already.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if args.process_index == 0:
        found = [_find(config, run, steps, say)]
    if args.world_size > 1:
        broadcast_object_list(found)
    point: Point | None = found[0]
    return point


def _find(config: TrainConfig, run: dict[str, Any], steps: int, say: Say) -> Point | None:
    output = config.output
    if config.overwrite:
        checkpoint.clear(output)
        for path in (path for pattern in _OF_A_RUN for path in output.glob(pattern)):
            path.unlink()
        return None
    newest = checkpoint.newest_complete(output)
    if newest is not None:
        check_unchanged(newest[1].run, run, newest[0])
    elif (output / RUN_NAME).exists():
        raise UsageError(
            f"{output}: holds a finished run without a checkpoint.",
            "choose another output folder, or --overwrite.",
        )
    step = newest[1].step if newest else 0
    if step > steps:
        found = f"{output}: the run has taken {step:,} steps; {' and '.join(LENGTH)} ask for {steps:,}"
        raise UsageError(
            f"{found}.", "set a higher max_steps, choose another output folder, or --overwrite to start anew."
        )
    for name in checkpoint.remove_after(output, step):
        say(f"{output / name}: incomplete, removed")
    if newest is None:
        return None
    say(f"resuming from {newest[0]} (step {step})")
    if "settings" not in newest[1].run:
        say(
            f"{newest[0]}: an earlier version wrote it without settings; they are taken to be the same as now"
        )
    return newest[0], step
