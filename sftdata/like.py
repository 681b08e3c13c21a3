"""The settings that a finished set was made with, to be repeated on other inputs: all that decide its bytes.

The tokenizer is the set's own folder, chat template included. What a set keeps only a hash of, such as the
sets that were excluded, cannot be repeated: it is given again, or the set is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from sftdata.choosing import NEEDS, OF_ORDERS
from sftdata.config import OF_PICTURES
from sftdata.errors import IntegrityError, UsageError
from sftdata.formats.formatter import formatter_sha256
from sftdata.set.images import PROCESSOR
from sftdata.set.local import check_file, local_folder
from sftdata.set.manifest import Manifest, read_manifest
from sftdata.set.steps import stored_steps
from sftdata.set.store import SetFile
from sftdata.settings import flag_of
from sftdata.wording import shell_quote

_LAID_OUT = ("max_length", "overlong", "packing")
_OF_THE_INPUT = ("inputs", "tokenizer")
_KEPT_AS_HASHES = {
    "drop": "give the list again: --drop FILE.",
    "exclude": "name each set again: --exclude SET.",
}

_ACT_BESIDE = NEEDS | {"model": "steps_for"}
_OFF: tuple[object, ...] = (None, {}, (), [], "", "null", "{}", "[]")


def settings_like(folder: Path, names: Collection[str], given: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of a set, those of its inputs aside.

    Args:
        names: settings of the command; with `inputs` that of `prepare`, else of `view`.
        given: settings that are given beside, which need not be there to repeat; those of `--set` as text.

    Raises:
        UsageError: there is no set, or one of its settings cannot be repeated.
        IntegrityError: its manifest or its tokenizer is damaged.
    """
    folder = local_folder(folder)
    manifest = read_manifest(folder)
    prepares = "inputs" in names
    found = _prepared(folder, manifest, names, given) if prepares else _laid_out(manifest)
    found |= _chosen(folder, manifest, given)
    idle = {name for name, other in _ACT_BESIDE.items() if other in given and given[other] in _OFF}
    idle |= {name for name, orders in OF_ORDERS.items() if given.get("order", orders[0]) not in orders}
    return {name: value for name, value in found.items() if name not in given and name not in idle}


def _laid_out(manifest: Manifest) -> dict[str, object]:
    settings = manifest.settings
    found = {name: settings[name] for name in _LAID_OUT}
    if manifest.bases:  # a view
        found["write"] = not manifest.by_index
    return found | ({"pack_over": settings["view"].get("pack_over", "slice")} if "view" in settings else {})


def _prepared(
    folder: Path, manifest: Manifest, names: Collection[str], given: Collection[str]
) -> dict[str, object]:
    """Return how the set was prepared."""
    settings = manifest.settings
    if manifest.bases and "view" in settings:
        raise UsageError(
            f"--like {folder}: a view, made of a set that was prepared.",
            "prepare the inputs like that set, then:"
            f" sftdata view NEW_SET -o OUT --like {shell_quote(folder)}",
        )
    found = {name: settings[name] for name in names if name in settings and name not in _OF_THE_INPUT}
    if found.get("split") == "train":  # what is meant where nothing is said
        del found["split"]
    if settings.get("prompt_template_text") is not None:
        found["prompt_template"] = settings["prompt_template_text"]
    if "formatter" not in given and (spec := settings.get("formatter")) is not None:
        _refuse_other_code(folder, spec, settings.get("formatter_sha256"))
    if manifest.vision is not None:
        found |= {name: settings["vision"][name] for name in OF_PICTURES if name in settings["vision"]}
        found["processor"] = str(folder / PROCESSOR)
    found["tokenizer"] = str(folder / "tokenizer")
    for file in manifest.files:
        kind = file.name.partition("/")[0]
        if kind in ("tokenizer", PROCESSOR) and kind not in given:
            _check_file(folder, file, f"the {kind} with {flag_of(kind)}")
    return found


def _check_file(folder: Path, file: SetFile, other: str) -> None:
    """Refuse a tokenizer or a processor that is not what it was; `other` names another.

    Raises:
        IntegrityError: a file of it is missing or damaged.
    """
    try:
        check_file(folder, file)
    except IntegrityError as error:
        raise IntegrityError(f"--like {error.message}", f"restore the file, or name {other}.") from None


def _refuse_other_code(folder: Path, spec: str, sha256: str | None) -> None:
    """Refuse a formatter that is not what it was.

    Raises:
        UsageError: its code was known to the process that made the set alone, is gone, or is another now.
    """
    if "@" in spec:
        raise UsageError(
            f"--like {folder}: its formatter {spec.partition('@')[0]} was known to one process alone.",
            "write it to a file, and name it with --formatter module:function.",
        )
    if formatter_sha256(spec) != sha256:
        raise UsageError(
            f"--like {folder}: the code of its formatter {spec} has changed since.",
            f"--formatter {shell_quote(spec)} takes the code as it is now.",
        )


def _chosen(folder: Path, manifest: Manifest, given: Collection[str]) -> dict[str, object]:
    """Return how documents were chosen."""
    chosen = {
        name: value
        for name, value in manifest.settings.get("view", {}).items()
        if name not in ("bases", "side", "pack_over")
    }
    if chosen.pop("steps", None) is not None and (steps := stored_steps(manifest)) is not None:
        chosen |= {"steps_for": f"{steps.ranks}x{steps.rows}", "model": str(folder)}
    for name, fix in _KEPT_AS_HASHES.items():
        if chosen.pop(name, None) is not None and name not in given:
            raise UsageError(f"--like {folder}: keeps but a hash of what its {name!r} named.", fix)
    return chosen
