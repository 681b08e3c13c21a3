"""The site of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/, by Sphinx with MyST; `make docs` builds it in build/site.

The navigation is the table of docs/index.md, links are those that work on the pages as they are in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils.nodes import Node
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from sftdata.version import __version__

ROW = re.compile(r"^\| (?:\*\*(?P<section>.+)\*\*|\[.+?\]\((?P<page>\S+)\.md\)) \|", re.MULTILINE)

project = "sftdata"
release = __version__
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/RESULTS.md"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"sftdata {release}"


def navigation(index: str) -> str:
    """Return the hidden tables of contents that docs/index.md shows as one table."""
    found = ""
    for row in ROW.finditer(index):
        start = f":hidden:\n:caption: {row['section']}\n" if row["section"] else ":hidden:\n"
        if row["section"] or not found:
            found += f"{'```' if found else ''}\n\n```{{toctree}}\n{start}\n"
        if row["page"]:
            found += f"{row['page']}\n"
    return f"{found}```\n"


def setup(app: Sphinx) -> None:
    """Let the front page of the site be docs/index.md, with its table as the navigation."""

    def read(app: Sphinx, name: str, source: list[str]) -> None:
        if name == root_doc:
            source[0] += navigation(source[0])

    def lead(app: Sphinx, failure: Exception | None) -> None:
        (Path(app.outdir) / "index.html").write_text(
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n', encoding="utf-8"
        )

    def folder(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Node) -> Node | None:
        page = Path(env.doc2path(node["refdoc"]))
        return text if (page.parent / node["reftarget"]).is_dir() else None

    app.connect("source-read", read)
    app.connect("missing-reference", folder)  # links to folders of the repository have no page here
    app.connect("build-finished", lead)
