"""The command line: parse, call one public function, print. stdout is data, stderr is talk."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 internal, 2 usage, 3 data, 4 integrity, 130 interrupted."""
    from sftdata.cli.app import build_app
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
