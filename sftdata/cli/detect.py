"""`sftdata detect`: which format, with the evidence."""

from __future__ import annotations

from typing import Annotated

import typer

from sftdata.cli.settings import with_settings
from sftdata.config import PrepareConfig


@with_settings("format", "map", "split", "subset")
def detect(
    config: PrepareConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say which row format an input has, and why.

    Example: sftdata detect chats.jsonl
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.plan import plan_inputs
    from sftdata.read.detect import detect as run

    sources, left_out = plan_inputs(config)
    found = run(sources, format=config.format, columns=config.map)
    if as_json:
        print_json(found.to_json() | {"left_out": left_out})
        return
    print_line(found.format)
    for line in (*found.evidence, *left_out):
        print_line(f"  {line}")
