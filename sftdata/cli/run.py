"""Run a Typer app so that every failure is one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer
from typer.exceptions import Abort, TyperException

from sftdata.errors import SftError


def run_app(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run `app`; `--debug` anywhere shows the traceback as well."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except SftError as error:
        return _fail(str(error), error.exit_code, debug)
    except TyperException as error:
        text = " ".join(error.format_message().split())
        return _fail(f"{text} Fix: see `{name} {_command(arguments)}--help`.", 2, debug)
    except (KeyboardInterrupt, Abort):
        return _fail("Interrupted; what is finished is kept. Run the same command to go on.", 130, debug)
    except BrokenPipeError:
        # Whoever read stdout has seen enough; Python must not complain about it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"Internal error: {type(error).__name__}: {error} ({where.name}, line {where.lineno}).".split())
        return _fail(f"{text} Fix: run again with --debug and report it.", 1, debug)
    return code if isinstance(code, int) else 0


def _fail(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return code


def _command(arguments: Sequence[str]) -> str:
    return f"{arguments[0]} " if arguments and not arguments[0].startswith("-") else ""
