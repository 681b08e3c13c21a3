"""`sftdata verify`: prove a set at rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished set.")],
    sha256: Annotated[
        bool,
        typer.Option("--sha256", help="Compare sha256 too: proof against forgery, several times slower."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check every byte of a set against its manifest, and count its ledger again from the shards.

    Example: sftdata verify shards
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.errors import IntegrityError
    from sftdata.shardset.verify import verify as run

    report = run(folder, sha256=sha256)
    if as_json:
        told = {"folder": str(folder), "ok": report.ok, "digest": report.digest, "problems": report.problems}
        print_json(told | {"files": report.files, "bytes": report.bytes, "rows": report.rows})
    else:
        for problem in report.problems:
            print_line(problem)
        digests = "xxh3-128 and sha256" if sha256 else "xxh3-128"
        found = "as the manifest says" if report.ok else f"{len(report.problems)} problems"
        print_line(
            f"{folder}: {found}: {report.files} files, {report.bytes:,} bytes by {digests}; {report.rows:,} rows counted again;"
            f" digest {report.digest[:12]}"
        )
    if not report.ok:
        raise IntegrityError(
            f"{folder}: {len(report.problems)} problem{'s' * (len(report.problems) > 1)}, listed above.",
            "restore the files or prepare the set again.",
        )
