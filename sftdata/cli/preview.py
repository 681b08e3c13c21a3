"""`sftdata preview`: see what would be trained; nothing is written."""

from __future__ import annotations

from typing import Annotated

import typer

from sftdata.cli.prepare import SETTINGS
from sftdata.cli.settings import with_settings
from sftdata.config import PrepareConfig


@with_settings(*(name for name in SETTINGS if name not in ("output", "overwrite", "workers", "max_rejects")))
def preview(
    config: PrepareConfig,
    number: Annotated[int, typer.Option("-n", min=1, help="Examples to show.")] = 3,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Packed rows per step, for the estimate of steps.")
    ] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show rendered, tokenized and masked examples and what the whole would come to. Nothing is written.

    Example: sftdata preview chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -n 3
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.previewing import preview as run
    from sftdata.show.terminal import print_examples
    from sftdata.show.view import view_example
    from sftdata.show.vocabulary import read_vocabulary

    seen = run(config, number)
    if as_json:
        print_json(seen.to_json(batch_size))
        return
    for line in seen.lines(batch_size):
        print_line(line)
    vocabulary = read_vocabulary(seen.tokenizer_folder)
    print_examples(
        [
            view_example(example.input_ids, example.labels, vocabulary, example.place)
            for example in seen.examples
        ]
    )
