"""Sources with names: what each is, how its rows are read and under which licence, in one YAML file.

    chats:
      path: data/chats.jsonl     # from the folder of this file; or a URL, a glob, a Hub id, a list of them
      map: {messages: talk}
      licence: CC-BY-4.0

An input of this name means the source. What the source says of its rows holds for them alone, and before what
the run says of all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from sftdata.choosing import Names
from sftdata.errors import UsageError
from sftdata.reading import REGISTRY_NAME, Reading
from sftdata.settings import check_settings, read_settings_file

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_DEFAULTS: dict[str, Any] = {"formatter": None, "format": None, "map": {}, "subset": None}


class _Place(BaseModel):
    path: Names = Field(min_length=1, description="File, folder, glob, URL or Hub id, or a list of them.")


class Entry(Reading, _Place):
    """A source with a name."""

    licence: str | None = Field(None, min_length=1, description="For the manifest and the card of the set.")

    def own(self) -> dict[str, Any]:
        """Return what it says of its rows, and what that takes the place of in the settings of a run."""
        said = {name: getattr(self, name) for name in self.model_fields_set - {"path", "licence"}}
        others = {"formatter": ("format", "map"), "format": ("formatter",), "map": ("formatter",)}
        replaced = {other for name in said for other in others.get(name, ())} | {"subset"}
        return {name: _DEFAULTS[name] for name in replaced} | said


def read_registry(value: object) -> dict[str, Entry]:
    """Return the sources of a registry, by their names.

    Args:
        value: path of the file, or the sources themselves, whose paths are then taken as they are.

    Raises:
        UsageError: the file cannot be read, or an entry is none, naming its line.
    """
    if isinstance(value, str | Path):
        found, lines = read_settings_file(Path(value), names=True)
        folder: Path | None = Path(value).parent
    elif isinstance(value, Mapping):
        found, lines, folder = dict(value), {}, None
    else:
        found_instead = f"registry: found {value!r:.200}; expected a YAML file"
        raise UsageError(f"{found_instead}.", f"name a file of sources, as {REGISTRY_NAME}.")
    return {name: _entry(name, entry, lines, folder) for name, entry in found.items()}


def _entry(name: str, value: object, lines: Mapping[str, str], folder: Path | None) -> Entry:
    place = f"{lines[name]}: {name}" if name in lines else f"registry: {name}"
    if isinstance(value, Entry):
        return value
    if not isinstance(name, str):  # YAML reads `no` as false, and 1.10 as 1.1
        raise UsageError(f"{place}: is no text.", "put the name in quotes.")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{place}: is no name; expected letters, digits, `.`, `_` and `-`.", "rename it.")
    said = {"path": value} if isinstance(value, str | list) else value
    if not isinstance(said, Mapping) or not said.get("path"):
        raise UsageError(f"{place}: names no path.", "add `path:` with a file, folder, glob, URL or Hub id.")
    said = {str(key): item for key, item in said.items()}
    made = check_settings(Entry, "sftdata", said, dict.fromkeys(said, place))
    if folder is None:
        return made
    here: dict[str, object] = {"path": tuple(_from(folder, path) for path in made.path)}
    if made.prompt_template is not None:
        here["prompt_template"] = _from(folder, made.prompt_template)
    return made.model_copy(update=here)


def _from(folder: Path, path: str) -> str:
    """Return a path of an entry as seen from here; what is no path of a file is left as it is."""
    there = folder / Path(path).expanduser()
    hub = _HUB_ID.fullmatch(path) and not there.exists() and not there.parent.exists()
    return path if "://" in path or hub else str(there)
