"""`sftdata inspect`: a packed row or an example, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished set.")],
    row: Annotated[int, typer.Option("--row", help="Packed row to show; -1 is the last.")] = 0,
    example: Annotated[
        int | None,
        typer.Option("--example", min=0, help="Show this input row instead, wherever it was packed."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
) -> None:
    """Show what is trained: trained tokens in green and underlined, with file and line of each document.

    Example: sftdata inspect shards --row 3
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.show.shown import open_shown

    shards = open_shown(folder)
    view = shards.view(row) if example is None else shards.view_example(example)
    if html is not None:
        from sftdata.show.html import view_page
        from sftdata.show.page import write_page

        write_page(html, view_page(view, ids=ids))
        print_line(f"Wrote {html}.", err=True)
    elif as_json:
        print_json(view.to_json())
    else:
        from sftdata.show.terminal import print_view

        print_view(view, ids=ids)
