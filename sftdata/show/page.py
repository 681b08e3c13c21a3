"""The frame of every page we write: one file, no network, no script, light and dark, from phone to desk."""

from __future__ import annotations

from pathlib import Path

from sftdata.errors import UsageError
from sftdata.paths import local_output

# The policy holds even where escaping should ever fail: nothing is fetched, nothing runs.
_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def make_page(title: str, body: str, *styles: str) -> str:
    """Return a whole page.

    Args:
        title: escaped.
        body: HTML, its data escaped.
        styles: names of the sheets it needs besides the common one.
    """
    return _FRAME.format(title=title, body=body, css="".join(map(read_style, ("page", *styles))))


def read_style(name: str) -> str:
    """Return a style sheet of ours."""
    return (Path(__file__).with_name("styles") / f"{name}.css").read_text(encoding="utf-8")


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
        raise UsageError(
            f"{path}: cannot be written: {error.strerror}.", "name another file with --html."
        ) from None
