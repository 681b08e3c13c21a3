"""Flags from the settings model: each field of PrepareConfig is a flag of the same name, described there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import typer

from sftdata.config import PrepareConfig
from sftdata.errors import UsageError
from sftdata.settings import Layer, load_settings, read_settings_file

_SHORT = {"tokenizer": "-t", "output": "-o"}
_YAML = (".yaml", ".yml")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A finished set.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting; a.b=c sets a nested one."),
]


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command INPUT..., `-c`, `--set` and the flags of these settings, as a `PrepareConfig`: `config`.

    Args:
        names: fields of PrepareConfig, in the order of the help text; `inputs` is always there.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "config"
        ]

        @functools.wraps(command)
        def run(
            inputs: list[str], config_file: Path | None = None, sets: list[str] | None = None, **flags: object
        ) -> None:
            given = {option.name: flags.pop(option.name) for option in options}
            placeholders = {name: value for name, value in _PLACEHOLDERS.items() if name not in names}
            command(config=load_config(inputs, config_file, sets or [], placeholders | flags), **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("inputs", keyword, annotation=_INPUTS)]
        parameters += [_option(name) for name in names]
        parameters += [option.replace(kind=keyword) for option in options]
        parameters += [
            inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in _FILES.items()
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


# For commands that need no tokenizer, or write nothing.
_PLACEHOLDERS: dict[str, object] = {"tokenizer": "(none)", "output": Path("(none)")}

_INPUTS = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Files, folders, globs, URLs, Hub dataset ids, or one YAML settings file.",
    ),
]
_FILES = {
    "config_file": Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with settings.")],
    "sets": Sets,
}


def load_config(
    inputs: list[str], config_file: Path | None, sets: list[str], flags: Mapping[str, object]
) -> PrepareConfig:
    """Merge settings, file < `--set` < flag, and validate them.

    Raises:
        UsageError: a setting is unknown or wrong, or the file cannot be read.
    """
    files: list[Layer] = [read_settings_file(config_file)] if config_file else []
    if len(inputs) == 1 and inputs[0].endswith(_YAML):
        files.append(read_settings_file(Path(inputs[0])))
    elif inputs:
        files.append(({"inputs": inputs}, {}))
    given = {name: _value(name, value) for name, value in flags.items() if value not in (None, [])}
    named = {name: "--" + name.replace("_", "-") for name in given}
    return load_settings(PrepareConfig, "sftdata", files, sets, (given, named))


def _option(name: str) -> inspect.Parameter:
    field = PrepareConfig.model_fields[name]
    kind, metavar = _flag_type(field.annotation)
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    flags = [_SHORT[name], flag] if name in _SHORT else [flag]
    option = typer.Option(*flags, help=field.description, metavar=metavar, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag_type(annotation: Any) -> tuple[Any, str | None]:
    """Return the type a flag is parsed to, and the placeholder for its value in the help."""
    if get_origin(annotation) is Literal:
        return annotation, None
    if get_origin(annotation) is dict:
        return list[str], "NAME=VALUE"
    kinds = set(get_args(annotation)) or {annotation}
    for kind in (bool, int, Path):
        if kind in kinds:
            return kind, None
    return str, "TEXT"


def _value(name: str, value: object) -> object:
    """Return a setting from the text, or texts, of its flag."""
    if isinstance(value, list):
        pairs = [text.partition("=") for text in value]
        for text, (key, equals, _) in zip(value, pairs, strict=True):
            if not equals or not key:
                raise UsageError(
                    f"--{name.replace('_', '-')} {text}: expected NAME=VALUE.",
                    "write it with an equals sign.",
                )
        return {key: item for key, _, item in pairs}
    if name.endswith("_template") and isinstance(value, str) and value.startswith("["):
        with suppress(msgspec.MsgspecError):  # a marker that begins with a bracket, such as [/INST]
            return msgspec.json.decode(value, type=tuple[int, ...])
    return value
