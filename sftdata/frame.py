"""Run a Typer app so that every failure is one line on stderr and an exit code."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import Abort, TyperException

from sftdata.errors import SftError, did_you_mean
from sftdata.output import StoppedError, guarded, one_line, stoppable
from sftdata.version import __version__
from sftdata.wording import in_a_shell

if TYPE_CHECKING:
    from sftdata.settings import Program

INTERRUPTED = 130


def _show_version(context: typer.Context, asked: bool) -> None:
    if asked:
        print(f"{context.info_name} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
]


def global_options(version: Version = False) -> None:
    """Take the options before a command; `--version` acts while it is parsed."""


def run_app(app: typer.Typer, name: str, arguments: Sequence[str], prefix: str = "") -> int:
    """Run `app`, with all terminal output escaped; `--debug` anywhere also prints the traceback of a failure.

    Args:
        prefix: written before each failure; names the process if there are several.
    """
    debug = "--debug" in arguments
    fail = functools.partial(_fail, prefix=prefix, debug=debug)
    with guarded(), stoppable(), in_a_shell():
        return _run(app, name, [argument for argument in arguments if argument != "--debug"], fail)


def _run(app: typer.Typer, name: str, arguments: Sequence[str], fail: Callable[[str, int], int]) -> int:
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
        if code == INTERRUPTED:  # Typer catches Ctrl-C itself, silently
            raise KeyboardInterrupt
        sys.stdout.flush()
    except SftError as error:
        return fail(str(error), error.exit_code)
    except TyperException as error:
        return _refuse_usage(app, name, arguments, error, fail)
    except (KeyboardInterrupt, Abort):
        return fail("Interrupted; what is finished is kept. Run the same command to go on.", INTERRUPTED)
    except StoppedError as stop:
        return fail(
            f"Stopped by {stop.name}; what is finished is kept. Run the same command to go on.",
            stop.exit_code,
        )
    except BrokenPipeError:
        # The reader of stdout is gone, as `head` is; Python must not complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        reason = one_line(f"Out of memory: {error}".rstrip(": ").rstrip("."))
        lower = "lower --max-length, --workers or slice_bytes, or " if arguments[:1] == ["prepare"] else ""
        return fail(f"{reason}. Fix: {lower}free memory, then run the same command again.", 1)
    except OSError as error:  # not handled where it arose: the machine failed, not the program
        reason = f"{error.filename or 'This machine'}: {error.strerror or error}."
        return fail(
            f"{reason} Fix: check the disk, then run the same command again; what is finished is kept.", 1
        )
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"Internal error: {type(error).__name__}: {error} ({frame.name}, line {frame.lineno})."
        return fail(f"{' '.join(text.split())} Fix: run again with --debug and report it.", 1)
    return code if isinstance(code, int) else 0


def _refuse_usage(
    app: typer.Typer,
    name: str,
    arguments: Sequence[str],
    error: TyperException,
    fail: Callable[[str, int], int],
) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # not public; its message is the help, in many lines
        print(message, file=sys.stderr)
        return 2
    program: Program = "sfttrain" if name == "sfttrain" else "sftdata"
    text, fix = explain_usage(" ".join(message.split()), program, arguments)
    return fail(f"{text} Fix: {fix or f'see `{name} {_command(app, arguments)}--help`.'}", 2)


def _fail(line: str, code: int, *, prefix: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(prefix + one_line(line), file=sys.stderr)
    return code


# Messages of the parser about a wrong command, option or choice; the words it knows are quoted or dashed.
_WRONG = (
    re.compile(r"(?P<text>No such command '(?P<wrong>[^']*)'\.) Did you mean (?P<known>.+)\?"),
    re.compile(
        r"(?P<text>No such option: (?P<wrong>\S+)) \((?:Possible options: |Did you mean )(?P<known>.+)\)"
    ),
    re.compile(r"(?P<text>.*: found '(?P<wrong>[^']*)'; expected one of (?P<known>.+))"),
)
_OPTION = re.compile(r"No such option: (--[\w-]+)")
_NUMBER = re.compile(
    r"Invalid value for '(?:.* / )?(?P<option>-[\w-]+)': Input should be (?P<wanted>[^,]+).*\.?"
)
_CHOICE = re.compile(r"Invalid value for '(?:.* / )?(-[\w-]+)': ('[^']*') is not one of (.+)")
_NUMBERS = {"a valid integer": "a whole number", "a valid number": "a number"}


def explain_usage(text: str, program: Program = "sftdata", arguments: Sequence[str] = ()) -> tuple[str, str]:
    """Return the message of a program's parser, and the fix; "" if none is near.

    >>> explain_usage("No such command 'prepar'. Did you mean 'prepare'?")
    ("No such command 'prepar'.", "did you mean 'prepare'?")
    """
    text = text.replace("Value error, ", "")
    if number := _NUMBER.fullmatch(text):
        return _explain_number(number["option"], number["wanted"].rstrip("."), arguments)
    option = _OPTION.match(text)
    if option:
        from sftdata.settings import (
            answer,  # here: it imports pydantic, which `sfttrain --help` can do without
        )

        if elsewhere := answer(option[1], program):
            return f"{option[0]}.", elsewhere
    text = _CHOICE.sub(r"\1: found \2; expected one of \3", text)
    for pattern in _WRONG:
        if match := pattern.fullmatch(text):
            known = re.findall(r"--?[\w-]+|(?<=')[^', ]+(?=')", match["known"])
            return match["text"].rstrip(".") + ".", did_you_mean(match["wrong"], known)
    return text.rstrip(".") + ".", ""


def _explain_number(option: str, wanted: str, arguments: Sequence[str]) -> tuple[str, str]:
    """Return what is wrong with the number of an option, with what was found, and the fix if one is near."""
    from sftdata.settings import in_digits

    given = [after for before, after in pairwise([*arguments, ""]) if before == option]
    given += [argument[len(option) :].lstrip("=") for argument in arguments if argument.startswith(option)]
    found = next(filter(None, given), "")
    wanted = _NUMBERS.get(wanted, wanted.replace("greater than or equal to", "at least"))
    return f"{option}: found {found!r}; expected {wanted}.", in_digits(found)


def _command(app: typer.Typer, arguments: Sequence[str]) -> str:
    known = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    known |= {group.typer_instance.info.name or "" for group in app.registered_groups if group.typer_instance}
    return f"{arguments[0]} " if arguments and arguments[0] in known else ""
