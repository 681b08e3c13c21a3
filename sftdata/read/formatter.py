"""The user's own function from a row to a training row, named `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sftdata.errors import UsageError

Formatter = Callable[[Any], Any]


@lru_cache(maxsize=8)
def load_formatter(spec: str) -> Formatter:
    """Import `module:function`; modules in the current directory are found too.

    Raises:
        UsageError: no such module or function, or the module fails to import.
    """
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
