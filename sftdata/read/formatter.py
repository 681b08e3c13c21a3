"""The user's own function from a row to a training row, named `module:function`, or given as it is."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sftdata.errors import UsageError

Formatter = Callable[[Any], Any]


_given: dict[str, Formatter] = {}  # by name; functions of this process alone


def name_formatter(formatter: str | Formatter | None) -> tuple[str | None, bool]:
    """Return the name of a formatter, and whether only this process knows it.

    A function that no import finds is named with a hash of its source, so that a set made with other code is not resumed;
    what the function refers to is not hashed.
    """
    if formatter is None or isinstance(formatter, str):
        return formatter, False
    module, name = getattr(formatter, "__module__", "") or "", getattr(formatter, "__qualname__", type(formatter).__qualname__)
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is formatter:
        return f"{module}:{name}", False
    try:
        source = inspect.getsource(formatter)
    except (OSError, TypeError):
        source = repr(getattr(getattr(formatter, "__code__", None), "co_code", name))
    spec = f"{module}:{name}@{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    _given[spec] = formatter
    load_formatter.cache_clear()
    return spec, True


@lru_cache(maxsize=8)
def load_formatter(spec: str) -> Formatter:
    """Return the function of that name; modules in the current directory are found too.

    Raises:
        UsageError: no such module or function, or the module fails to import.
    """
    function = _given.get(spec) or _import(spec)
    return _row_by_row(spec, function) if getattr(function, "takes_columns", False) else function


def _row_by_row(spec: str, function: Formatter) -> Formatter:
    """Call a function of columns with one row at a time, so that a bad row costs no other."""

    def formatter(row: Any) -> Any:
        made = list(function({name: [value] for name, value in row.items()} if isinstance(row, dict) else {"text": [row]}))
        if len(made) != 1:
            raise ValueError(f"{spec} made {len(made)} examples of one row; expected one for each")
        return made[0]

    return formatter


def _import(spec: str) -> Formatter:
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"--formatter {spec}: expected module:function.", "write it as --formatter my_rows:to_messages.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        what = f"--formatter {spec}: {module_name} cannot be imported ({type(error).__name__}: {error})."
        raise UsageError(what, f"run from the folder that holds {module_name}.py, or install it.") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"--formatter {spec}: {module_name} has no function {function_name!r}.", "check the name.")
    return function  # type: ignore[no-any-return]
