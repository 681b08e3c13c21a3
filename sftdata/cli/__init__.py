"""The command line: parse, call one public function, print. stdout is data, stderr is talk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import getdoc
from typing import Any, NoReturn

import typer

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
SETTINGS: dict[str, Any] = {"no_args_is_help": True, "context_settings": CONTEXT}
LOOK: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 internal, 2 usage, 3 data, 4 integrity, 130 interrupted."""
    from sftdata.frame import run_app

    return run_app(build_app(), "sftdata", sys.argv[1:] if arguments is None else list(arguments))


def command() -> NoReturn:
    """Run the command of this process, and end it at once: taking tokenizers apart again takes longer than many a command."""
    # Every process of a run would look through all that is installed for plugins of pydantic: 0.03 s each.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
        with suppress(OSError):  # a full disk behind stdout was told of already
            stream.flush()
    os._exit(code)


def build_app() -> typer.Typer:
    """Assemble the commands, in the order a user meets them."""
    from sftdata.cli.rows import check, detect, init, prepare, preview, resolve, schema
    from sftdata.cli.sets import audit, env, explain, inspect, stats, verify
    from sftdata.frame import options_of_all

    about = "Turn SFT data into verified constant-length shards.\n\nExample: sftdata preview chats.jsonl -t TOKENIZER"
    app = typer.Typer(name="sftdata", help=with_example(about), add_completion=True, **LOOK, **SETTINGS)
    app.callback()(options_of_all)
    for command in (init, prepare, detect, preview, resolve, audit, inspect, stats, verify, explain, env):
        _add(app, command, no_args_is_help=command not in (explain, env))
    config = typer.Typer(
        name="config", help="Show the schema of settings, or check a settings file.", **LOOK, **SETTINGS
    )
    _add(config, schema, no_args_is_help=False)
    _add(config, check)
    app.add_typer(config)
    return app


def with_example(text: str) -> str:
    """Set the examples of a docstring apart, before the options, on lines that are not wrapped."""
    about, _, examples = text.partition("\n\nExample: ")
    lines = [f"  {line.removeprefix('Example: ').strip()}" for line in examples.splitlines() if line.strip()]
    return (
        "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *lines, "", about])
        if lines
        else about
    )


def _add(app: typer.Typer, command: Callable[..., None], *, no_args_is_help: bool = True) -> None:
    settings = SETTINGS | {"no_args_is_help": no_args_is_help}
    text = getdoc(command) or ""
    app.command(help=with_example(text), short_help=text.partition("\n\n")[0], **settings)(command)
