"""The user's own function from a row to a training row, named `module:function`, or given as it is."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sftdata.errors import DataError, UsageError
from sftdata.formats.code import code_sha256, read_code, run_code

Formatter = Callable[[Any], Any]


_given: dict[str, Formatter] = {}  # by name; functions of this process alone


def name_formatter(formatter: str | Formatter | None) -> tuple[str | None, bool]:
    """Return the name of a formatter, and whether only this process knows it.

    A function that no import finds is named with a hash of its source, so that a set made with other code is not resumed;
    what the function refers to is not hashed.
    """
    if formatter is None or isinstance(formatter, str):
        return formatter, False
    module, name = (
        getattr(formatter, "__module__", "") or "",
        getattr(formatter, "__qualname__", type(formatter).__qualname__),
    )
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


def formatter_sha256(spec: str) -> str | None:
    """Return the hash of a formatter's code as it lies on disk; None where it has no source, or its name holds the hash.

    Raises:
        UsageError: there is no such module, or a package on the way to it fails.
    """
    sources = {} if spec in _given else _read(spec)
    return code_sha256(sources) if sources else None


@lru_cache(maxsize=8)
def load_formatter(spec: str, sha256: str | None = None) -> Formatter:
    """Return the function of that name; modules in the current directory are found too.

    Args:
        sha256: of `formatter_sha256`, what the code must be.

    Raises:
        UsageError: no such module or function, or the module fails to import.
        DataError: the code is another.
    """
    function = _given.get(spec) or _import(spec, sha256)
    return _row_by_row(spec, function) if getattr(function, "takes_columns", False) else function


def _row_by_row(spec: str, function: Formatter) -> Formatter:
    """Call a function of columns with one row at a time, so that a bad row costs no other."""

    def formatter(row: Any) -> Any:
        made = list(
            function(
                {name: [value] for name, value in row.items()} if isinstance(row, dict) else {"text": [row]}
            )
        )
        if len(made) != 1:
            raise ValueError(f"{spec} made {len(made)} examples of one row; expected one for each")
        return made[0]

    return formatter


def _read(spec: str) -> dict[str, bytes]:
    """Return the sources of a formatter's module."""
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UsageError(
            f"--formatter {spec}: expected module:function.", "write it as --formatter my_rows:to_messages."
        )
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # it may have been written within the second
    with _told(spec):
        return read_code(module_name)


def _import(spec: str, sha256: str | None) -> Formatter:
    module_name, _, function_name = spec.partition(":")
    sources = _read(spec)
    with _told(spec):
        module = (
            run_code(module_name, sources) if module_name in sources else importlib.import_module(module_name)
        )
    if sha256 is not None and {code_sha256(sources), code_sha256(_read(spec))} != {sha256}:
        what = f"--formatter {spec}: its code changed while it was in use; no set is made with two versions."
        raise DataError(what, "run the same command again.")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(
            f"--formatter {spec}: {module_name} has no function {function_name!r}.", "check the name."
        )
    return function  # type: ignore[no-any-return]


@contextmanager
def _told(spec: str) -> Iterator[None]:
    """Turn whatever the user's module raises into one line."""
    module_name = spec.partition(":")[0]
    try:
        yield
    except Exception as error:
        what = f"--formatter {spec}: {module_name} cannot be imported ({type(error).__name__}: {error})."
        raise UsageError(what, f"run from the folder that holds {module_name}.py, or install it.") from None
