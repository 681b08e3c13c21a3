"""`sftdata init`: a settings file for an input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sftdata.cli.prepare import SETTINGS
from sftdata.cli.settings import with_settings
from sftdata.config import PrepareConfig


@with_settings(*(name for name in SETTINGS if name not in ("output", "overwrite")))
def init(
    config: PrepareConfig,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the set, for the file.")] = Path(
        "shards"
    ),
    file: Annotated[str, typer.Option("--file", "-f", help="File to write; - prints it.")] = "sft.yaml",
) -> None:
    """Write a commented settings file for an input, which `sftdata prepare` then runs.

    Example: sftdata init chats.jsonl -t Qwen/Qwen2.5-0.5B-Instruct -f sft.yaml
    """
    from sftdata.cli.talk import print_line
    from sftdata.errors import UsageError
    from sftdata.paths import local_output
    from sftdata.settings_file import settings_yaml

    local_output(file, "-f")
    local_output(output)
    if file != "-" and Path(file).exists():
        raise UsageError(f"{file}: is there already.", "name another file with -f, or - to print.")
    text = settings_yaml(config.model_copy(update={"output": output}))
    if file == "-":
        typer.echo(text, nl=False)
    else:
        Path(file).write_text(text, "utf-8")
        print_line(f"Wrote {file}. Look at it, then: sftdata prepare {file}", err=True)
