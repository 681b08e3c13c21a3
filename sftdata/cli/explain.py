"""`sftdata explain`: what a code means."""

from __future__ import annotations

import shutil
import textwrap
from typing import Annotated

import typer


def _complete(start: str) -> list[str]:
    from sftdata.explain import read_codes

    return [code for code in read_codes() if code.startswith(start)]


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE", help="Of a reject, an audit finding or a counter.", autocompletion=_complete
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a code means and what to do about it; without one, list them all.

    Example: sftdata explain spans-unproven
    """
    from sftdata.cli.talk import print_json, print_line
    from sftdata.explain import explain as run
    from sftdata.explain import read_codes

    codes = read_codes()
    if code is not None:
        text = run(code)
        found = text.partition(" ")[0]
        if as_json:
            print_json({"code": found, "kind": codes[found][0], "text": codes[found][1]})
        else:
            width = min(shutil.get_terminal_size().columns, 100)
            print(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False))
    elif as_json:
        print_json({name: {"kind": kind, "text": text} for name, (kind, text) in codes.items()})
    else:
        for name, (kind, _) in codes.items():
            print_line(f"{name:<30}{kind.lower()}")
