"""Settings written as YAML: a file, with the line of each key, and the values of `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sftdata.errors import UsageError

_KINDS = {
    dict: "a mapping",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


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


def assign(settings: dict[str, Any], text: str) -> str:
    """Put one `key=value` of `--set` into the settings; dots reach inside. Return the setting it belongs to.

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
