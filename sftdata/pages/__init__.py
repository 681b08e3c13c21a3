"""Pages in HTML, from templates: one file each, no network, no script, light and dark, from phone to desk.

Whatever is filled in is escaped by default, and what would act or hide is spelled out (`output.visible`); only what a
macro returns is HTML already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sftdata.errors import UsageError
from sftdata.output import local_output, visible

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).parent


def render(template: str | Path, **values: object) -> str:
    """Fill in a template: one of ours by its name, another by its path."""
    path = _FOLDER / template
    return _environment(path.parent).get_template(path.name).render(values)


def macro(template: str, name: str) -> Callable[..., str]:
    """Return a macro of a template of ours; what it returns is not escaped again when it is filled in elsewhere."""
    found: Callable[..., str] = getattr(_environment(_FOLDER).get_template(template).module, name)
    return found


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        UsageError: the file cannot be written, or is no local one.
    """
    local_output(path, "--html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        found = f"{path}: cannot be written: {error.strerror}."
        raise UsageError(found, "name another file with --html.") from None


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": "{:,}".format, "percent": "{:.1%}".format}
    return environment


def _shown(value: object) -> object:
    return value if hasattr(value, "__html__") else visible(str(value))
