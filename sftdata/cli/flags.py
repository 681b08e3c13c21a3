"""Flags from the settings models: each field is a flag of the same name, described there."""

from __future__ import annotations

import functools
import inspect
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin

import msgspec
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sftdata.config import PrepareConfig
from sftdata.errors import UsageError
from sftdata.reading import REGISTRY_NAME
from sftdata.settings import Layer, Model, load_settings, named_by_data, read_settings_file

if TYPE_CHECKING:
    from sftdata.show.foreign import Rows

_SHORT = {"tokenizer": "-t", "output": "-o"}
_YAML = (".yaml", ".yml")
Folder = Annotated[str, typer.Argument(metavar="DIR", help="A finished set, or its URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SetOrRows = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A finished set, or its URL; with -t, token rows of another tool."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", "-t", help="Folder or Hub id of the tokenizer that made the rows of ids."),
]
Split = Annotated[str | None, typer.Option("--split", help="Split of these rows.")]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="NAME=VALUE", help="Their columns: canonical column = column in the data."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting; a.b=c sets a nested one."),
]


def with_settings(
    *names: str, model: type[BaseModel] = PrepareConfig
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command INPUT..., `-c`, `--set` and the flags of these settings, as one object: `config`.

    Args:
        names: fields of the model, in the order of the help text; its first field is always there.
        model: holds every setting.
    """
    positional = next(iter(model.model_fields))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "config"
        ]

        @functools.wraps(command)
        def run(config_file: Path | None = None, assigned: list[str] | None = None, **flags: Any) -> None:
            inputs = flags.pop(positional) or []
            given = {option.name: flags.pop(option.name) for option in options}
            if given.get(_FROM) is not None:
                _refuse_beside(any([inputs, assigned, config_file, *flags.values()]))
                command(config=None, **given)
                return
            absent = {n: v for n, v in _PLACEHOLDERS.items() if n in model.model_fields and n not in names}
            command(config=load_config(inputs, config_file, assigned or [], absent | flags, model), **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        default = None if any(option.name == _FROM for option in options) else inspect.Parameter.empty
        parameters = [
            inspect.Parameter(positional, keyword, annotation=_POSITIONAL[positional], default=default)
        ]
        parameters += [_option(name, model.model_fields[name]) for name in names]
        parameters += [option.replace(kind=keyword) for option in options]
        parameters += [
            inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in _FILES.items()
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


_FROM = "source"  # an option in place of all settings


def _refuse_beside(given: bool) -> None:
    if given:
        raise UsageError(
            "--from takes all settings from the file.", "leave the others out, and edit what it writes."
        )


# For commands that need no tokenizer, or write nothing.
_PLACEHOLDERS: dict[str, object] = {"tokenizer": "(none)", "output": Path("(none)")}

_POSITIONAL = {
    "inputs": Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files, folders, globs, URLs, Hub dataset ids, names of a registry, or one YAML file.",
        ),
    ],
    "sets": Annotated[
        list[str],
        typer.Argument(metavar="SET...", help="Folders or URLs of finished sets, or one YAML settings file."),
    ],
}
_FILES = {
    "config_file": Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with settings.")],
    "assigned": Sets,
}


def load_config(
    inputs: list[str], config_file: Path | None, sets: list[str], flags: Mapping[str, object],
    model: type[Model] = PrepareConfig,  # type: ignore[assignment]
) -> Model:  # fmt: skip
    """Merge settings, file < `--set` < flag, and validate them.

    Raises:
        UsageError: a setting is unknown or wrong, or the file cannot be read.
    """
    files: list[Layer] = [read_settings_file(config_file)] if config_file else []
    if len(inputs) == 1 and inputs[0].endswith(_YAML):
        files.append(read_settings_file(Path(inputs[0])))
    elif inputs:
        files.append(({next(iter(model.model_fields)): inputs}, {}))
    given = {
        name: _value(name, value, model.model_fields[name])
        for name, value in flags.items()
        if value not in (None, [])
    }
    named = {name: "--" + name.replace("_", "-") for name in given}
    if "inputs" in model.model_fields:
        from sftdata.as_view import refuse_sets

        refuse_sets(ChainMap(given, *(dict(layer) for layer, _ in reversed(files))), sets)
    asked = any("registry" in layer for layer in (given, _assigned(sets), *(layer for layer, _ in files)))
    if "registry" in model.model_fields:
        settings_file = config_file or (
            Path(inputs[0]) if len(inputs) == 1 and inputs[0].endswith(_YAML) else None
        )
        files.insert(0, _registry(settings_file))
    files = [*_repeated(model, [*(layer for layer, _ in files), _assigned(sets), given]), *files]
    config = load_settings(model, "sftdata", files, sets, (given, named))
    if asked and isinstance(config, PrepareConfig):
        config.refuse_idle_registry()
    return config


def _registry(settings_file: Path | None) -> Layer:
    """Return the registry beside a settings file, or here where there is none."""
    path = (Path() if settings_file is None else settings_file.parent) / REGISTRY_NAME
    return ({"registry": path}, {}) if path.is_file() else ({}, {})


def _assigned(sets: list[str]) -> Mapping[str, object]:
    """Return the settings that `--set` sets whole, as text."""
    pairs = (text.partition("=") for text in sets)
    return {key.strip().replace("-", "_"): value for key, _, value in pairs if "." not in key}


def _repeated(model: type[BaseModel], given: list[Mapping[str, object]]) -> list[Layer]:
    """Return the settings of the set that `like` names, if any, as a layer beneath those given.

    Args:
        given: layer by layer, the last to win at the end.
    """
    named = [layer["like"] for layer in given if layer.get("like")]
    if not named or "like" not in model.model_fields:
        return []
    from sftdata.like import settings_like

    found = settings_like(Path(str(named[-1])), model.model_fields, ChainMap(*map(dict, reversed(given))))
    flag = f"--like {named[-1]}"
    return [(found, {name: f"{flag}: {name}" for name in found})]


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
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
    for choice in (annotation, *get_args(annotation)):
        if get_origin(choice) is Literal:
            return choice, None
    if get_origin(annotation) is dict:
        return list[str], "NAME=VALUE"
    if get_origin(annotation) is tuple:
        return list[str], "TEXT"
    kinds = set(get_args(annotation)) or {annotation}
    for kind in (bool, int, Path):
        if kind in kinds:
            return kind, None
    return str, "TEXT"


def rows_of(tokenizer: str | None, split: str | None, columns: list[str] | None) -> Rows | None:
    """Return how token rows are read that another tool prepared; None for a finished set."""
    from sftdata.show.foreign import choose_rows

    named = _value("map", columns or [], PrepareConfig.model_fields["map"])
    return choose_rows(tokenizer, split, cast("dict[str, str]", named))


def _value(name: str, value: object, field: FieldInfo) -> object:
    """Return a setting from the text, or texts, of its flag."""
    if isinstance(value, list) and get_origin(field.annotation) is dict:
        part = str.rpartition if named_by_data(field) else str.partition
        pairs = [part(text, "=") for text in value]
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
