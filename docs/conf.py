"""The site of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/, by Sphinx with MyST: `make docs`.

The navigation is the table of docs/index.md; links are written as they work in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils.nodes import document
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

from sftdata.version import __version__

ROW = re.compile(r"^\| (?:\*\*(?P<section>.+)\*\*|\[.+?\]\((?P<page>\S+)\.md\)) \|", re.MULTILINE)

project = "sftdata"
release = __version__
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/course/*.md", "benchmarks/RESULTS.md"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"sftdata {release}"


def navigation(index: str) -> str:
    """Return the hidden tables of contents for the end of docs/index.md, which shows them as one table."""
    found = ""
    for row in ROW.finditer(index):
        if row["section"] or not found:
            caption = f":caption: {row['section']}\n" if row["section"] else ""
            found += f"{'```' if found else ''}\n\n```{{toctree}}\n:hidden:\n{caption}\n"
        if row["page"]:
            found += f"{row['page']}\n"
    return f"{found}```\n"


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Make docs/index.md the root of all pages."""
    if name == root_doc:
        source[0] += navigation(source[0])


def unlink_folders(app: Sphinx, page: document) -> None:
    """Leave the text of links to folders of the repository, which have no page here."""
    for link in list(page.findall(pending_xref)):
        if (Path(page["source"]).parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def lead_to_index(app: Sphinx, failure: Exception | None) -> None:
    """Let the folder of the site open at docs/index.html."""
    to_index = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
    (Path(app.outdir) / "index.html").write_text(to_index, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register what is done on the way."""
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", unlink_folders)
    app.connect("build-finished", lead_to_index)
