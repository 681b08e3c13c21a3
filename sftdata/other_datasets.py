"""The datasets that a settings file of axolotl or LLaMA-Factory names, as inputs of `sftdata prepare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftdata.carried import (
    Carried,
    Dataset,
    OfAnotherKind,
    Said,
    Settings,
    listed,
    mapping,
    text,
)
from sftdata.errors import UsageError

_AX_KINDS = {"alpaca": "completion"}
_AX_SETTINGS = {"split": "split", "name": "subset", "field_messages": "map.messages", "field": "map.text"}
_AX_DEFAULTS = [
    ("message_property_mappings", {"role": "from", "content": "value"}), ("roles_to_train", ["assistant"]),
    ("message_property_mappings", {"role": "role", "content": "content"}), ("train_on_eos", "turn"),
    ("field_messages", "messages"), ("field_messages", "conversations"), ("field", "text"),
    ("type", "chat_template"), ("type", "completion"),
]  # fmt: skip
_AX_LOST = {
    "roles_to_train": "turns of the assistant are trained, or those of everyone: train_on: all, headers too.",
    "train_on_eos": "the token that ends a trained turn is trained, and no other: the model must write it.",
}


def axolotl_datasets(found: Carried, name: str, value: Any) -> None:
    """Carry the list of datasets over, each of its keys by itself."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise OfAnotherKind("a list of mappings, as - path: FILE")
    datasets: list[Dataset] = []
    texts = [entry.get("type") == "completion" for entry in value]
    if texts and all(texts):
        found.put("data", "overlong", "split", f"{name}: type: completion")  # long texts are cut into pieces
    elif any(texts):
        found.lost["(overlong)"] = (
            "of type completion, axolotl cuts long texts into pieces; here one rule holds for all."
        )
    for position, entry in enumerate(value, start=1):
        path, files = text(entry.get("path")), listed(entry.get("data_files") or [])
        paths: list[str | Path] = [f"hf://datasets/{path}/{file}" for file in files]
        paths = paths or [_here(path)]
        datasets.append(Dataset(path.rstrip("/").rpartition("/")[2], paths, {}))
        for key, setting in entry.items():
            if key not in ("path", "data_files"):
                _ax_dataset_key(found, datasets[-1].said, f"{name}[{position}].{key}", key, setting)
    found.put_datasets(name, datasets)


def _here(path: str) -> str | Path:
    """Return what is a file here as a path."""
    return Path(path) if Path(path).exists() else path


def _ax_dataset_key(found: Carried, said: Said, place: str, key: str, value: Any) -> None:
    if (key, value) in _AX_DEFAULTS:
        found.needless[place] = "it is found, or what happens by default."
    elif key in _AX_SETTINGS:
        said[_AX_SETTINGS[key]] = value, place
    elif key == "type" and str(value) in _AX_KINDS:
        said["kind"] = _AX_KINDS[str(value)], place
    elif key in _AX_LOST:
        found.lost[place] = f"{value!r}: {_AX_LOST[key]}"
    else:
        found.lost[place] = f"{value!r}: no dataset has such a setting of its own; see --format and --map."


def factory_datasets(found: Carried, name: str, value: Any) -> None:
    """Find each name in dataset_info.json; one that is not there stays an input, which is then missed."""
    folder, missing, datasets = str(found.given.get("dataset_dir") or "data"), list[str](), list[Dataset]()
    above = (found.folder, *found.folder.absolute().parents)
    path, known = _lf_info(Path(folder), *(one / folder for one in above), found.folder)
    for dataset in listed(value):
        place = f"{name}: {dataset}"
        if folder == "ONLINE":  # then names are those of the Hub
            one: Dataset | None = Dataset(dataset, [dataset], {})
        elif dataset in known:
            one = _lf_dataset(found, place, dataset, path.parent, known[dataset])
        else:
            one = None
            found.lost[place] = (
                f"no dataset_info.json in {folder}/, here or in a folder of the file, knows it:"
                " write its file or Hub id in inputs, or name it in a registry."
            )
        if one is None:
            missing.append(dataset)
        else:
            datasets.append(one)
    if datasets:
        found.put_datasets(name, datasets, apart=bool(found.given.get("max_samples")))
    if missing:
        unknown = f"{name}: {', '.join(missing)}, not known here"
        found.put("data", "inputs", [*found.data.get("inputs", ()), *missing], unknown)


def read_dataset_info(path: Path) -> Carried:
    """Read a dataset_info.json of LLaMA-Factory: each dataset that can be had becomes a source.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    found = Carried("LLaMA-Factory", path.parent, {})
    for dataset, entry in _lf_info(path.parent, name=path.name)[1].items():
        try:
            one = _lf_dataset(found, dataset, dataset, path.parent, entry)
        except OfAnotherKind as error:
            raise UsageError(
                f"{path}: {dataset}: found {entry!r:.200}; expected {error}.", "correct it."
            ) from None
        if one is not None:
            found.name_source(one)
    return found


def _lf_dataset(found: Carried, place: str, dataset: str, folder: Path, value: Any) -> Dataset | None:
    """Return a dataset of a dataset_info.json; None where it is nowhere that is read from."""
    entry = mapping(value)
    if hub := entry.get("hf_hub_url"):
        path: str | Path = text(hub)
    elif "file_name" in entry:
        path = folder / text(entry["file_name"])
    else:
        where = "a script loads it" if "script_url" in entry else "only ModelScope has it"
        found.lost[place] = f"{where}: download its rows, and name their file in inputs."
        return None
    said: Said = {}
    for key, setting in entry.items():
        _lf_entry(found, said, f"{place}.{key}", key, setting)
    return Dataset(dataset, [path], said)


def _lf_info(*folders: Path, name: str = "dataset_info.json") -> tuple[Path, Mapping[str, Settings]]:
    """Return the dataset_info.json that is there, and what it holds; nothing where none is."""
    paths = [folder / name for folder in folders]
    path = next(filter(Path.is_file, paths), paths[0])
    try:
        return path, mapping(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    except (OSError, ValueError) as error:  # OfAnotherKind among them
        raise UsageError(f"{path}: cannot be read ({error}).", "correct it; it is JSON.") from None


_LF_COLUMNS = {
    "messages": "messages", "prompt": "instruction", "query": "input", "response": "output",
    "tools": "tools", "system": "system", "history": "history",
}  # fmt: skip
# Of messages: the keys that hold role and text, and how roles are spelled; what is known without being told.
_LF_TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",), "system_tag": ("system",),
}  # fmt: skip
_LF_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
}


def _lf_entry(found: Carried, said: Said, place: str, key: str, value: Any) -> None:
    if key in ("subset", "split"):
        said[key] = value, place
    elif key == "columns":
        _lf_columns(found, said, place, mapping(value))
    elif key == "tags":
        for tag, spelling in mapping(value).items():
            if tag in _LF_ROLES and spelling not in _LF_TAGS[tag]:
                said[f"map_role.{spelling}"] = _LF_ROLES[tag], f"{place}.{tag}"
            elif spelling in _LF_TAGS.get(tag, ()):
                found.needless[f"{place}.{tag}"] = "it is read so."
            else:
                found.lost[f"{place}.{tag}"] = f"{spelling!r} is not read so; rename it, or use --formatter."
    elif key in ("formatting", "ms_hub_url", "om_hub_url"):
        found.needless[place] = (
            "the format is found from the rows." if key == "formatting" else "the Hub has it."
        )
    elif key == "num_samples":
        found.lost[place] = "cap: {NAME: 'N rows'} of a run says it."
    elif key not in ("file_name", "hf_hub_url"):
        found.lost[place] = "no dataset has such a setting of its own."


def _lf_columns(found: Carried, said: Said, place: str, columns: Settings) -> None:
    for name, column in columns.items():
        ours = _LF_COLUMNS.get(name)
        if ours is None:
            found.lost[f"{place}.{name}"] = "no column of such a meaning is read."
        elif column in (ours, "conversations"):
            found.needless[f"{place}.{name}"] = "the column is found."
        else:
            said[f"map.{ours}"] = column, f"{place}.{name}"
