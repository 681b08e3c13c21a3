"""The datasets that a settings file of axolotl or LLaMA-Factory names, as inputs of `sftdata prepare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftdata.carried import Carried, OfAnotherKind, Said, Settings, listed, mapping, text
from sftdata.errors import UsageError

_AX_KINDS = {"chat_template": "conversation", "alpaca": "completion", "completion": "text"}
_AX_SETTINGS = {"split": "split", "name": "subset", "field_messages": "map.messages", "field": "map.text"}
_AX_DEFAULTS = [
    ("message_property_mappings", {"role": "from", "content": "value"}), ("roles_to_train", ["assistant"]),
    ("field_messages", "messages"), ("field_messages", "conversations"), ("field", "text"),
]  # fmt: skip


def axolotl_datasets(found: Carried, name: str, value: Any) -> None:
    """Carry the list of datasets over, each of its keys by itself."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise OfAnotherKind("a list of mappings, as - path: FILE")
    inputs: list[str] = []
    said: list[Said] = []
    for position, entry in enumerate(value, start=1):
        path, files = text(entry.get("path")), listed(entry.get("data_files") or [])
        inputs += [f"hf://datasets/{path}/{file}" for file in files] or [path]
        said.append({})
        for key, setting in entry.items():
            if key not in ("path", "data_files"):
                _ax_dataset_key(found, said[-1], f"{name}[{position}].{key}", key, setting)
    found.put_agreed(said)
    found.put("data", "inputs", inputs, name)


def _ax_dataset_key(found: Carried, said: Said, place: str, key: str, value: Any) -> None:
    if (key, value) in _AX_DEFAULTS:
        found.needless[place] = "it is found, or what happens by default."
    elif key in _AX_SETTINGS:
        said[_AX_SETTINGS[key]] = value, place
    elif key == "type" and str(value) in _AX_KINDS:
        said["kind"] = _AX_KINDS[str(value)], place
    else:
        found.lost[place] = f"{value!r}: no dataset has such a setting of its own; see --format and --map."


def factory_datasets(found: Carried, name: str, value: Any) -> None:
    """Find each name in dataset_info.json."""
    folder = str(found.given.get("dataset_dir") or "data")
    path, known = _lf_info(found.folder / folder, found.folder)
    inputs = []
    said: list[Said] = []
    for dataset in listed(value):
        if dataset not in known:
            reason = f"no dataset_info.json beside the file, or in its {folder}/, knows it."
            found.lost[f"{name}: {dataset}"] = reason
            continue
        entry = mapping(known[dataset])
        local = path.parent / entry["file_name"] if "file_name" in entry else entry.get("script_url")
        place = entry.get("hf_hub_url") or local
        if place is None:
            found.lost[f"{name}: {dataset}"] = (
                "only ModelScope has it: download it, and name its file in inputs."
            )
            continue
        inputs.append(str(place))
        said.append({})
        for key, setting in entry.items():
            _lf_entry(found, said[-1], f"{name}: {dataset}.{key}", key, setting)
    found.put_agreed(said)
    if inputs:
        found.put("data", "inputs", inputs, name)


def _lf_info(*folders: Path) -> tuple[Path, Mapping[str, Settings]]:
    """Return the dataset_info.json that is there, and what it holds; nothing where none is."""
    paths = [folder / "dataset_info.json" for folder in folders]
    path = next(filter(Path.is_file, paths), paths[0])
    try:
        return path, mapping(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (OSError, ValueError) as error:  # OfAnotherKind among them
        raise UsageError(f"{path}: cannot be read ({error}).", "correct it; it is JSON.") from None


_LF_NEEDLESS = {
    **dict.fromkeys(("ms_hub_url", "om_hub_url"), "the Hub has it."),
    **dict.fromkeys(("formatting", "tags"), "the format is found from the rows; sftdata detect shows it."),
}
_LF_COLUMNS = {
    "messages": "messages", "prompt": "instruction", "query": "input", "response": "output",
    "tools": "tools", "system": "system", "history": "history",
}  # fmt: skip


def _lf_entry(found: Carried, said: Said, place: str, key: str, value: Any) -> None:
    if key in _LF_NEEDLESS:
        found.needless[place] = _LF_NEEDLESS[key]
    elif key in ("subset", "split"):
        said[key] = value, place
    elif key == "columns" and set(mapping(value)) <= set(_LF_COLUMNS):
        named = {_LF_COLUMNS[name]: column for name, column in value.items()}
        others = {name: column for name, column in named.items() if column not in (name, "conversations")}
        said |= {f"map.{name}": (column, place) for name, column in others.items()}
        if not others:
            found.needless[place] = "the columns are found."
    elif key not in ("file_name", "hf_hub_url"):
        found.lost[place] = "no dataset has such a setting of its own."
