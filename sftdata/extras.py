"""Packages that are not always there: one line that says how to get them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from sftdata.errors import UsageError


def need(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional package.

    Args:
        extra: of sftdata, which holds it.
        why: what needs it, as a sentence without its end.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        found = (
            "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        )
        raise UsageError(
            f"{why}, and the package {missing} {found}.", f"pip install 'sftdata[{extra}]'"
        ) from None
