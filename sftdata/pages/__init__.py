"""HTML pages from templates: one file each, no network, no script, light and dark, for any width.

Values are escaped by default, control characters included (`output.visible`); only the result of a macro is
HTML already.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sftdata.errors import UsageError, read_codes
from sftdata.output import counted, local_output, visible

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).parent


def render(template: str | Path, **values: object) -> str:
    """Render a template: one of this folder by its name, another by its path."""
    path = _FOLDER / template
    return _environment(path.parent).get_template(path.name).render(values)


def macro(template: str, name: str) -> Callable[..., str]:
    """Return a macro of one of these templates; its result is HTML, which other templates do not escape."""
    function: Callable[..., str] = getattr(_environment(_FOLDER).get_template(template).module, name)
    return function


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        UsageError: the file cannot be written, or is not local.
    """
    local_output(path, "--html")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        problem = f"{path}: cannot be written: {error.strerror}."
        raise UsageError(problem, "name another file with --html.") from None


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
    environment.filters |= {
        "number": "{:,}".format,
        "counted": counted,
        "percent": "{:.1%}".format,
        "meaning": _meaning,
    }
    return environment


def _meaning(code: str) -> str:
    """Return the paragraph of docs/errors.md on a code; nothing for what is none."""
    return read_codes().get(code.partition(":")[0], ("", ""))[1]


def _shown(value: object) -> object:
    return value if hasattr(value, "__html__") else visible(str(value))
