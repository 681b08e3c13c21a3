"""`sftdata config`: the settings themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def schema() -> None:
    """Print the JSON Schema of a settings file, for editors.

    Example: sftdata config schema > sftdata.schema.json
    """
    from sftdata.cli.talk import print_json
    from sftdata.config import PrepareConfig

    print_json(PrepareConfig.model_json_schema())


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with settings.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as for prepare.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the settings as JSON.")] = False,
) -> None:
    """Check a settings file, and print every setting as `prepare` would use it.

    Example: sftdata config check sft.yaml --set max_length=4096
    """
    from sftdata.cli.settings import load_config
    from sftdata.cli.talk import print_json

    settings = load_config([], file, sets or [], {}).model_dump(mode="json")
    if as_json:
        print_json(settings)
    else:
        import yaml

        typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), nl=False)
