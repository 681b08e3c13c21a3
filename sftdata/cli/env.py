"""`sftdata env`: versions and machine, for reports of faults."""

from __future__ import annotations

from typing import Annotated

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Print versions, machine and the variables that change behaviour; no paths, no secrets.

    Example: sftdata env --json
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.environment import describe_environment

    found = describe_environment()
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if not isinstance(value, dict):
            print_line(f"{name:<24}{value}")
            continue
        for key, part in value.items():
            print_line(f"{name + ' ' + key:<40}{part if part is not None else 'not installed'}")
