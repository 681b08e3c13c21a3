"""The command line: parse, call one public function, print. stdout is data, stderr is talk."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 internal, 2 usage, 3 data, 4 integrity, 130 interrupted."""
    from sftdata.cli.app import build_app
    from sftdata.cli.run import run_app

    return run_app(build_app(), "sftdata", sys.argv[1:] if arguments is None else list(arguments))
