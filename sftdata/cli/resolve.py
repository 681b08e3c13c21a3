"""`sftdata resolve`: which token ids a response template really has in the data."""

from __future__ import annotations

from typing import Annotated

import typer

from sftdata.cli.settings import with_settings
from sftdata.config import PrepareConfig


@with_settings(
    "tokenizer", "response_template", "instruction_template", "format", "map", "map_role", "formatter", "kind", "prompt_template",
    "chat_template", "split", "subset", "revision",
)  # fmt: skip
def resolve(
    config: PrepareConfig,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to look at, evenly spaced.")] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show every token id sequence that a response template has in the texts, with an example of each.

    Example: sftdata resolve chats.txt -t TOKENIZER --response-template "### Assistant:"
    """
    from dataclasses import asdict

    from sftdata.cli.talk import print_json, print_line
    from sftdata.resolve import resolve_markers

    found = resolve_markers(config, rows)
    if as_json:
        print_json([asdict(resolution) for resolution in found])
        return
    for resolution in found:
        print_line(
            f"{resolution.marker!r}: in {resolution.texts_with_marker:,} of {resolution.texts:,} rows,"
            f" {resolution.occurrences:,} times"
        )
        print_line(f"  encoded alone: {list(resolution.alone)}, found {resolution.alone_count:,} times")
        for sequence in resolution.sequences:
            inside = (
                " (shares a token with its neighbour)"
                if sequence.starts_inside or sequence.ends_inside
                else ""
            )
            print_line(
                f"  {list(sequence.ids)}: {sequence.count:,} times{inside}, as in {sequence.before!r} _ {sequence.after!r}"
            )
