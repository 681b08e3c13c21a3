"""Settings of both programs: file < `--set key=value` < flag, merged, checked, and refused with their place.

The file is YAML and so is a value of `--set`; each key is known by the place where it was set, such as `sft.yaml:5`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from sftdata import other_tools
from sftdata.errors import UsageError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)
Layer = tuple[Mapping[str, Any], Mapping[str, str]]
"""Settings from one source, and the place of those that have one."""
Overlay = Callable[[dict[str, Any], Mapping[str, Any], Mapping[str, str]], None]
"""Puts the settings of one source, whose places are given, over those of the sources before it."""

_HELP = {"sftdata": "see `sftdata prepare --help`.", "sfttrain": "see `sfttrain run --help`."}
_KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def load_settings(
    model: type[Model],
    program: other_tools.Program,
    files: Sequence[Layer],
    sets: Sequence[str],
    flags: Layer,
    overlay: Overlay = lambda settings, more, places: settings.update(more),
) -> Model:
    """Merge the settings of a program, each source over those before it, and validate them.

    Args:
        model: holds every setting.
        sets: the `key=value` of each `--set`.
        overlay: how one source is put over the others; default: setting by setting.

    Raises:
        UsageError: a setting is unknown, missing or wrong, or a `--set` cannot be read.
    """
    settings: dict[str, Any] = {}
    places: dict[str, str] = {}
    for values, found_at in files:
        places |= found_at
        overlay(settings, values, places)
    assigned: dict[str, Any] = {}
    for text in sets:
        key = assign(assigned, text, settings)
        places[key] = f"--set {key}"
    overlay(settings, assigned, places)
    places |= flags[1]
    overlay(settings, flags[0], places)
    return check_settings(model, program, settings, places)


def check_settings(
    model: type[Model],
    program: other_tools.Program,
    settings: Mapping[str, Any],
    places: Mapping[str, str] | None = None,
) -> Model:
    """Validate settings, of which some are known by the place where they were set.

    Raises:
        UsageError: an unknown or a missing key, or a value outside its range, with its place.
    """
    places = places or {}
    for key in settings:
        if key not in model.model_fields:
            found = f"{places[key]}: unknown" if key in places else "Unknown"
            raise UsageError(f"{found} setting {key!r}.", _known(model, program, key))
    for key, field in model.model_fields.items():
        if field.is_required() and key not in settings:
            flag = other_tools.flag_of(key, program)
            raise UsageError(f"{key} is not given.", f"name it with {flag}, or in the YAML file as `{key}:`.")
    try:
        return model(**settings)
    except ValidationError as error:
        raise _refusal(model, program, error, places) from None


def _known(model: type[BaseModel], program: other_tools.Program, key: str) -> str:
    """Return what an unknown setting may have meant: ours of the same meaning, or of nearly the same name."""
    known = sorted(model.model_fields)
    meant = did_you_mean(key, known, f"known settings: {', '.join(known)}.")
    return other_tools.answer(key, program) or meant


def _refusal(
    model: type[BaseModel], program: other_tools.Program, error: ValidationError, places: Mapping[str, str]
) -> UsageError:
    """Return the first of the faults that pydantic found, as one line."""
    first = error.errors()[0]
    key, what = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if not key:  # several settings together
        return UsageError(f"Settings: {what}.", _HELP[program])
    field, place = model.model_fields.get(key.partition(".")[0]), places.get(key.partition(".")[0], "")
    name = place if place.startswith("--") else f"{place}: setting {key!r}" if place else f"Setting {key!r}"
    meaning = f"expected: {field.description}" if field and field.description else _HELP[program]
    fix = did_you_mean(str(first.get("input")), what.split("'")[1::2], meaning)
    return UsageError(f"{name}: found {first.get('input')!r:.200}; {what}.", fix)


def read_settings_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a settings file; return its settings, and where each stands, as `sft.yaml:5`.

    A hyphen in a key at the top counts as an underscore.

    Raises:
        UsageError: an unreadable file, no mapping, or a key that is there twice.
    """
    try:
        root, values = _parse(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.", "check the path.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8.", "save the file as UTF-8.") from None
    except _NotYaml as error:
        line = f":{error.line}" if error.line else ""
        raise UsageError(f"{path}{line}: {error}.", "correct the file.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: found {_kind(values)}; expected settings, one `key: value` a line.")
    _refuse_duplicates(path, root)
    places = {_key(node): f"{path}:{node.start_mark.line + 1}" for node, _ in root.value}
    return {str(key).replace("-", "_"): value for key, value in values.items()}, places


def assign(settings: dict[str, Any], text: str, beneath: Mapping[str, Any] | None = None) -> str:
    """Put one `key=value` of `--set` into the settings; dots reach inside. Return the setting it belongs to.

    Args:
        beneath: settings from elsewhere; a dot reaches into a copy of theirs.

    Raises:
        UsageError: no `key=value`, a value that is no YAML, or a dot after a setting that holds no others.
    """
    key, equals, value = text.partition("=")
    *parents, last = key.strip().replace("-", "_").split(".")
    if not equals or not all([*parents, last]):
        raise UsageError(f"--set {text:.80}: expected KEY=VALUE.", "--set max_length=2048")
    try:
        _, parsed = _parse(value)
    except _NotYaml as error:
        raise UsageError(
            f"--set {text:.80}: {error}.", "quote the value, as --set 'key=\"value\"'."
        ) from None
    if parents and beneath and parents[0] in beneath:
        settings.setdefault(parents[0], deepcopy(beneath[parents[0]]))
    at: Any = settings
    for depth, parent in enumerate(parents, start=1):
        at = at.setdefault(parent, {})
        if not isinstance(at, dict):
            whole = ".".join(parents[:depth])
            raise UsageError(
                f"--set {text:.80}: {whole} is {_kind(at)}; nothing inside it can be set.",
                f"set {whole} whole.",
            )
    at[last] = parsed
    return [*parents, last][0]


class _NotYaml(Exception):
    """What is wrong with a text, and its 1-based line where that is known."""

    def __init__(self, what: str, line: int = 0) -> None:
        super().__init__(what)
        self.line = line


def _parse(text: str) -> tuple[Any, Any]:
    """Return the nodes and the values of a text."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    except RecursionError:
        raise _NotYaml("nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that no calendar has is a ValueError
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise _NotYaml(f"not YAML: {problem:.200}", mark.line + 1 if mark else 0) from None


def _refuse_duplicates(path: Path, root: Any) -> None:
    """Walk every node once (an alias is the node that it names), and refuse a mapping that holds a key twice."""
    seen, nodes = set(), [root]
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = _key(key) if node is root else str(key.value), key.start_mark.line + 1
                if name in lines:
                    what = f"{path}:{line}: {name!r} is there twice, in lines {lines[name]} and {line}."
                    raise UsageError(what, "keep one of them.")
                lines[name] = line
                nodes.append(value)


def _key(node: Any) -> str:
    return str(node.value).replace("-", "_")


def _kind(value: Any) -> str:
    return "nothing" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")
