"""The command line: parse, call one public function, print. Data goes to stdout, messages to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import getdoc
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code, as docs/cli.md lists them."""
    from sftdata.frame import run_app

    return run_app(build_app(), "sftdata", sys.argv[1:] if arguments is None else list(arguments))


def command() -> NoReturn:
    """Run the command of this process, then exit at once: freeing a tokenizer may outlast the command."""
    # Else every process of a run looks through all installed packages for pydantic plugins: 0.03 s each.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = main()
    except KeyboardInterrupt:  # while the commands are imported, before `run_app` could say it
        print("Interrupted; nothing was begun.", file=sys.stderr)
        code = 130
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
        with suppress(OSError):  # a full disk behind stdout is reported already
            stream.flush()
    os._exit(code)


def build_app() -> typer.Typer:
    """Assemble the commands, in the order a user meets them."""
    from sftdata.cli.rows import check, detect, init, prepare, preview, resolve, schema
    from sftdata.cli.runs import blame
    from sftdata.cli.sets import audit, browse, diff, env, explain, export, inspect, push, stats, verify, view
    from sftdata.frame import global_options

    app = _group("sftdata", "Turn SFT data into verified constant-length shards.\n\n"
                 "Example: sftdata preview chats.jsonl -t TOKENIZER")  # fmt: skip
    app.callback()(global_options)
    for command in (
        init,
        prepare,
        detect,
        preview,
        resolve,
        audit,
        inspect,
        browse,
        stats,
        view,
        diff,
        blame,
        verify,
        export,
        push,
        explain,
        env,
    ):
        _add(app, command, bare=command in (explain, env))
    config = _group("config", "Show the schema of settings, or check a settings file.")
    _add(config, schema, bare=True)
    _add(config, check)
    app.add_typer(config)
    return app


def _group(name: str, text: str) -> typer.Typer:
    import typer  # here: Ctrl-C while it is imported is one line, too

    return typer.Typer(
        name=name, help=with_example(text), add_completion=name == "sftdata", no_args_is_help=True,
        context_settings=CONTEXT, rich_markup_mode=None, pretty_exceptions_enable=False,
    )  # fmt: skip


def with_example(text: str) -> str:
    """Move the examples of a docstring before the options, on lines that are not wrapped."""
    about, _, examples = text.partition("\n\nExample: ")
    lines = [f"  {line.removeprefix('Example: ').strip()}" for line in examples.splitlines() if line.strip()]
    return (
        "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *lines, "", about])
        if lines
        else about
    )


def _add(app: typer.Typer, command: Callable[..., None], *, bare: bool = False) -> None:
    """Add a command; one that is not `bare` prints its help when it is called without arguments."""
    text = getdoc(command) or ""
    app.command(
        help=with_example(text), short_help=text.partition("\n\n")[0],
        no_args_is_help=not bare, context_settings=CONTEXT,
    )(command)  # fmt: skip
