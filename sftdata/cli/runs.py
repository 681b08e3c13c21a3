"""Commands on runs of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftdata.cli.flags import Json
from sftdata.output import local_output, print_json, print_line


def blame(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run of `sfttrain run --log-documents`.")
    ],
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="Name what raised the loss of this step instead.")
    ] = None,
    worst: Annotated[int, typer.Option("--worst", min=1, help="How many documents to name.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="LIST", help="Write them as a list for `sftdata view --drop`."
        ),
    ] = None,
    sets: Annotated[
        list[Path] | None,
        typer.Option("--sets", metavar="DIR", help="Where a set of the run lies now, if it was moved."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Name the documents that a run found hardest, by file and line, and those behind jumps of its loss.

    Example: sftdata blame out --worst 50 -o bad.txt
    Example: sftdata blame out --step 340
    """
    from sftdata.blame.named import LoggedRun
    from sftdata.show.blame import blame_json, blame_lines, write_list

    if output is not None:
        local_output(output)
    logged = LoggedRun(run, sets or ())
    at, spikes = None, []
    if step is None:
        documents, spikes = logged.worst(worst), list(logged.spikes())
    else:
        at = logged.step(step, worst)
        documents = at.documents
    if as_json:
        print_json(blame_json(logged, documents, at, spikes))
    else:
        for line in blame_lines(logged, documents, at, spikes):
            print_line(line)
    if output is not None:
        for line in write_list(logged, documents, output):
            print_line(line, err=True)
