"""`sftdata audit`: what a set would teach that nobody meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def audit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished set.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="Evaluation set that shares no prompts.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 when there is a defect.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Look for supervision that nobody meant: answers without an end, cut answers, doubled BOS, control tokens from data.

    Example: sftdata audit shards --strict
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.errors import DataError
    from sftdata.show.audit import audit as run

    findings = run(folder, against, every=as_json)
    defects = [finding for finding in findings if finding.severity == "defect"]
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "clean": not defects,
                "findings": [finding.to_json() for finding in findings],
            }
        )
    elif findings:
        from sftdata.show.summary import print_findings
        from sftdata.show.terminal import make_console

        print_findings(findings, make_console())
    else:
        print_line(f"{folder}: nothing found.")
    if strict and defects:
        names = ", ".join(finding.code for finding in defects)
        raise DataError(
            f"{folder}: {len(defects)} kinds of defects ({names}).", "see above, or audit without --strict."
        )
