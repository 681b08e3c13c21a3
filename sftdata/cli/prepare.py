"""`sftdata prepare`: build a set."""

from __future__ import annotations

from typing import Annotated

import typer

from sftdata.cli.settings import with_settings
from sftdata.config import PrepareConfig

SETTINGS = (
    "tokenizer", "output", "max_length", "packing", "overlong", "chat_template", "train_on", "format", "map", "map_role",
    "formatter", "kind", "prompt_template", "response_template", "instruction_template", "mask_mode", "loss_weights", "boundary",
    "eos_token", "trust_control_tokens", "date", "split", "subset", "revision", "max_rejects", "workers", "engine", "overwrite",
)  # fmt: skip


@with_settings(*SETTINGS)
def prepare(
    config: PrepareConfig,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest and the audit as JSON.")
    ] = False,
) -> None:
    """Build a set of shards.

    Example: sftdata prepare chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -o shards --max-length 2048
    """
    from sftdata.launch import start_workers

    with start_workers(config) as workers:
        # Even what only the summary needs: the leader of the workers takes longer to get ready.
        from sftdata.cli.talk import Talk, print_json
        from sftdata.run import prepare as run
        from sftdata.show.audit import glance

        with Talk() as talk:
            manifest = run(config, workers, talk.progress, talk.say)
        if as_json:
            print_json(manifest.to_json() | {"audit": glance(config.output, manifest).to_json()})
        else:
            talk.summary(manifest, config.output)
