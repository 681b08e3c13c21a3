"""The commands of `sftdata`, in the order a user meets them."""

from __future__ import annotations

import typer

from sftdata.cli.audit import audit
from sftdata.cli.detect import detect
from sftdata.cli.inspect import inspect
from sftdata.cli.prepare import prepare
from sftdata.cli.preview import preview
from sftdata.cli.resolve import resolve
from sftdata.cli.stats import stats
from sftdata.cli.verify import verify

SETTINGS = {"no_args_is_help": True, "context_settings": {"help_option_names": ["-h", "--help"]}}


def build_app() -> typer.Typer:
    """Put the commands together."""
    app = typer.Typer(
        name="sftdata",
        help="Turn SFT data into verified constant-length shards.",
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        **SETTINGS,  # type: ignore[arg-type]
    )
    for command in (prepare, detect, preview, resolve, audit, inspect, stats, verify):
        app.command(**SETTINGS)(command)  # type: ignore[arg-type]
    return app
