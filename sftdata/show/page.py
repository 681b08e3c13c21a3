"""The frame of every page we write: one file, no network, no script, light and dark, from phone to desk."""

from __future__ import annotations

from pathlib import Path

from sftdata.errors import UsageError

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

_CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f5; --card: #ffffff; --ink: #1d2421; --soft: #5d6963; --line: #e1e5e1; --rail: #eef0ed;
  --trained: #1f9d57; --context: #8aa3b8; --padding: #d5dad6; --lost: #d9822b; --bad: #c8403a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111513; --card: #191e1b; --ink: #e6ebe7; --soft: #98a59d; --line: #2a312d; --rail: #232a26;
  --trained: #35b870; --context: #64809a; --padding: #3a433e; --lost: #dd9244; --bad: #e2655f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 32px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 0 0 4px; letter-spacing: -.005em; }
p { margin: 0 0 14px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 22px 24px; margin-top: 18px; }
.soft, h2 + p { color: var(--soft); font-size: 13.5px; }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 560px) { body { padding: 18px 10px 40px; } section { padding: 16px 14px; border-radius: 11px; } h1 { font-size: 21px; } }
@media print { body { background: none; max-width: none; } section { break-inside: avoid; } }
"""


def make_page(title: str, body: str, css: str = "") -> str:
    """Return a whole page.

    Args:
        title: escaped.
        body: HTML, its data escaped.
        css: added to the common sheet.
    """
    return _FRAME.format(title=title, body=body, css=_CSS + css)


def write_page(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}.", "name another file with --html.") from None
