"""`sftdata stats`: what a set is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def stats(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished set.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a report instead: one page, with the audit."),
    ] = None,
) -> None:
    """Show what became of every row and token: ledger, lengths, fill, and what each source gave.

    Example: sftdata stats shards --html report.html
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.show.shown import open_shown
    from sftdata.show.stats import measure, stats_json

    shards = open_shown(folder)
    if html is not None:
        from sftdata.show.page import write_page
        from sftdata.show.report import make_report

        write_page(html, make_report(shards))
        print_line(f"Wrote {html}.", err=True)
    elif as_json:
        print_json(stats_json(shards.manifest))
    else:
        from sftdata.show.summary import print_stats
        from sftdata.show.terminal import make_console

        print_stats(measure(shards.manifest), str(folder), make_console())
