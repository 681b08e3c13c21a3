"""A finished set given to `prepare`: its rows are tokenized already, so the fix is the view of it.

A refusal, and not the view itself: where nothing is said, `prepare` cuts and packs as its own defaults have
it, and a view as the set has it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sftdata.choosing import CHOOSING
from sftdata.errors import UsageError
from sftdata.set.manifest import read_manifest
from sftdata.settings import flag_of
from sftdata.sources.inputs import set_in

_OF_VIEWS = ("max_length", "overlong", "packing", *CHOOSING, "overwrite")
_WITHOUT_EFFECT = (
    *("inputs", "output", "like", "workers", "engine"),
    *("max_rejects", "slice_bytes", "max_line_bytes"),
)


def refuse_sets(given: Mapping[str, object], assigned: Sequence[str] = ()) -> None:
    """Refuse finished sets among the inputs of `prepare`, with the commands that do what is meant.

    Args:
        given: settings, by flag, keyword or file.
        assigned: `key=value` of each `--set`.

    Raises:
        UsageError: naming the first set, and the settings that need its text.
    """
    inputs = given.get("inputs", ())
    named = inputs if isinstance(inputs, list | tuple) else (inputs,)
    names = [str(name) for name in named if isinstance(name, str | Path)]
    sets = [name for name in names if set_in(Path(name).expanduser()) == "a finished set"]
    for name in names:
        if _holds_sets_alone(Path(name).expanduser()):
            read_manifest(Path(name).expanduser())  # says what it holds
    if not sets:
        return
    if str(given.get("output")) == "(none)":  # of a command that makes nothing
        raise UsageError(f"{sets[0]}: a finished set, not rows.", f"sftdata inspect {shlex.quote(sets[0])}")
    others = [name for name in names if name not in sets]
    flags = {flag_of(name) for name in given if name not in _OF_VIEWS + _WITHOUT_EFFECT}
    flags |= {f"--set {_key(text)}" for text in assigned if _key(text) not in _OF_VIEWS + _WITHOUT_EFFECT}
    output = str(given.get("output", "OUT"))
    prepared = f"{output}-files"
    view = shlex.join(["sftdata", "view", *sets, *([prepared] if others else []), "-o", output, "--write"])
    view = " ".join([view, *map(shlex.quote, _flags(given, assigned))])
    problem = f"{sets[0]}: a finished set, whose rows are tokenized already"
    if others:
        first = shlex.join(["sftdata", "prepare", *others, "--like", sets[0], "-o", prepared])
        raise UsageError(f"{problem}, beside files.", f"{first} && {view}")
    if flags:
        raise UsageError(
            f"{problem}; {', '.join(sorted(flags))} would need their text.",
            f"name the files that it is made from; or do without: {view}",
        )
    raise UsageError(f"{problem}.", view)


def _holds_sets_alone(folder: Path) -> bool:
    """Whether a folder is the parent of sets, as of the two sides of a split."""
    found = False
    with suppress(OSError):  # what cannot be listed is refused as an input
        for entry in folder.iterdir():
            if set_in(entry) != "a finished set":
                return False
            found = True
    return found


def _key(text: str) -> str:
    return text.partition("=")[0].partition(".")[0].strip().replace("-", "_")


def _flags(given: Mapping[str, object], assigned: Sequence[str]) -> Iterator[str]:
    """Yield the settings that a view has too, as options."""
    for name in _OF_VIEWS:
        value = given.get(name)
        if value is None or value is False:
            continue
        if isinstance(value, Mapping):
            values = [f"{key}={item}" for key, item in value.items()]
        else:
            values = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
        for item in values:
            yield from (flag_of(name),) if value is True else (flag_of(name), item)
    for text in assigned:
        if _key(text) in _OF_VIEWS:
            yield from ("--set", text)
