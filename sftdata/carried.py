"""What becomes of settings of another tool: carried over, needless here, or lost; rules that decide it."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sftdata.errors import UsageError

Settings = dict[str, Any]
Said = dict[str, tuple[object, str]]  # of one dataset: setting of `prepare` -> value, its place in the file


_NO_NAME, _NO_BEGINNING = re.compile(r"[^\w.-]+"), re.compile(r"^[^A-Za-z0-9]+")  # of the name of a source


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that a file names: files of this machine as paths, others as text, and how it is read."""

    name: str
    paths: Sequence[str | Path]
    said: Said


@dataclass(slots=True)
class Carried:
    """What became of a file.

    Attributes:
        tool: that it is of.
        folder: where it lies.
        given: its settings.
        places: where each of them stands, as `axolotl.yml:5`.
        data: settings of `sftdata prepare`.
        train: of `sfttrain run`, fields of TrainingArguments among them.
        origins: program and setting -> what it was in the file.
        needless: settings of the file that nothing has to be set for, and why.
        lost: those that have no counterpart, or ask for a decision, and why.
        sources: for a registry, where the inputs are names.
    """

    tool: str
    folder: Path
    given: Settings
    places: Mapping[str, str] = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    train: Settings = field(default_factory=dict)
    origins: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Settings] = field(default_factory=dict)

    @property
    def carried(self) -> set[str]:
        """Settings of the file that became settings of ours."""
        return {name for names in self.origins.values() for name in names if name in self.given}

    def place(self, name: str) -> str:
        """Return where a setting stands, with its name."""
        return f"{self.places[name]}: {name}" if name in self.places else name

    def put(self, program: str, setting: str, value: object, origin: str) -> None:
        """Set one of ours; of `lora` and other mappings a part."""
        settings, (name, _, part) = getattr(self, program), setting.partition(".")
        if part:
            settings.setdefault(name, {})[part] = value
        else:
            settings[name] = value
        names = self.origins.setdefault((program, name), [])
        names += [] if origin in names else [origin]

    def put_datasets(self, origin: str, datasets: Sequence[Dataset], *, apart: bool = False) -> None:
        """Carry datasets over: as inputs where they are read alike, else as sources of a registry by name.

        Args:
            apart: name them in any case.
        """
        read = [{setting: value for setting, (value, _) in one.said.items()} for one in datasets]
        if len(datasets) < 2 or not (apart or any(one != read[0] for one in read)):
            self.put("data", "inputs", [str(path) for one in datasets for path in one.paths], origin)
            for one in datasets:
                for setting, (value, place) in one.said.items():
                    self.put("data", setting, value, place)
            return
        for one in datasets:
            self.name_source(one)
        self.put("data", "inputs", list(self.sources), origin)
        self.origins["data", "inputs"] += [place for one in datasets for _, place in one.said.values()]

    def name_source(self, one: Dataset) -> None:
        """Make a dataset a source of a registry, by a name like its own that is free there."""
        name = _NO_BEGINNING.sub("", _NO_NAME.sub("-", one.name)) or "data"
        source: Settings = {"path": one.paths[0] if len(one.paths) == 1 else list(one.paths)}
        self.sources[next(free for free in _numbered(name) if free not in self.sources)] = source
        for setting, (value, _) in one.said.items():
            key, _, part = setting.partition(".")
            if part:
                source.setdefault(key, {})[part] = value
            else:
                source[key] = value


def registry_text(sources: Mapping[str, Settings], folder: Path, head: str, left: Mapping[str, str]) -> str:
    """Return a registry as commented YAML, with paths from the folder that it is to lie in.

    Args:
        left: what is not in it, and why.
    """
    text = f"# {head}\n"
    for name, source in sources.items():
        paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
        seen = [os.path.relpath(path, folder) if isinstance(path, Path) else path for path in paths]
        plain = source | {"path": seen if len(seen) > 1 else seen[0]}
        text += "\n" + yaml.safe_dump({name: plain}, sort_keys=False, allow_unicode=True)
    text += "\n# ---- Not carried over\n" if left else ""
    return text + "".join(f"# {name}: {' '.join(reason.split())}\n" for name, reason in left.items())


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))


Rule = Callable[[Carried, str, Any], None]
Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: how a file of it is told, its table, and what it does where a file says nothing.

    Attributes:
        lora: of adapters; without an alpha it is twice the rank.
        adapters: the setting that turns them on: those of LoRA do nothing without it.
        unsaid: settings that a file has without naming them.
        evaluates: on what is held out, unless its file says that it does not.
    """

    name: str
    marks: tuple[str, ...]
    rules: Mapping[str, Rule]
    data: Settings
    train: Settings
    lora: Settings
    adapters: str
    unsaid: Mapping[str, str] = field(default_factory=dict)
    evaluates: bool = False


class OfAnotherKind(ValueError):
    """A value is not of the kind that its setting has; the message names that kind."""


def refuse_kind(found: Carried, name: str, value: object, error: OfAnotherKind) -> UsageError:
    """Return the refusal of a value."""
    return UsageError(f"{found.place(name)}: found {value!r:.200}; expected {error}.", "correct the file.")


def to(program: str, setting: str, convert: Convert = lambda value: value) -> Rule:
    """Set one of ours, from the converted value; one that converts to None is lost."""

    def rule(found: Carried, name: str, value: Any) -> None:
        made = convert(value)
        if made is None:
            found.lost[name] = f"{value!r} has no counterpart."
        else:
            found.put(program, setting, made, name)

    return rule


def both(*rules: Rule) -> Rule:
    """Follow several rules."""

    def rule(found: Carried, name: str, value: Any) -> None:
        for one in rules:
            one(found, name, value)

    return rule


def needless(reason: str) -> Rule:
    """Set nothing: it happens anyway."""

    def rule(found: Carried, name: str, value: Any) -> None:
        found.needless[name] = reason

    return rule


def lost(reason: str) -> Rule:
    """Carry nothing over, and say why."""

    def rule(found: Carried, name: str, value: Any) -> None:
        found.lost[name] = reason

    return rule


def where(wanted: Any, then: Rule, otherwise: Rule) -> Rule:
    """Follow a rule where the value is the one wanted, else the other."""

    def rule(found: Carried, name: str, value: Any) -> None:
        (then if value == wanted else otherwise)(found, name, value)

    return rule


def number(value: Any) -> Any:
    """Return a number; YAML takes `2e-5` for a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise OfAnotherKind("a number")
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise OfAnotherKind("a number") from None


def whole(value: Any) -> int:
    """Return a whole number above 0."""
    try:
        made = number(value)
    except OfAnotherKind:
        made = 0
    if made != made or made < 1 or made == float("inf") or made != int(made):
        raise OfAnotherKind("a whole number above 0")
    return int(made)


def switch(value: Any) -> Any:
    """Return what a switch says; some know `auto`, too."""
    if not isinstance(value, bool) and value != "auto":
        raise OfAnotherKind("true or false")
    return value


def text(value: Any) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise OfAnotherKind("a text")
    return value


def mapping(value: Any) -> Settings:
    """Return a mapping; by texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise OfAnotherKind("a mapping")
    return value


def chosen(values: Mapping[Any, Any]) -> Convert:
    """Look a value up; None where it is not there."""
    return lambda value: next((made for given, made in values.items() if given == value), None)


def share(value: Any) -> str | None:
    """Return a share in percent; None for what is none."""
    part = number(value)
    return f"{part * 100:.10g}%" if isinstance(part, float) and 0 < part < 1 else None


def targets(value: Any) -> str:
    """Return names of modules as `--lora` joins them."""
    return "all-linear" if value in ("all", "all-linear") else "+".join(listed(value))


def listed(value: Any) -> list[str]:
    """Return the parts of a text with commas, or of a list."""
    if not isinstance(value, str | list):
        raise OfAnotherKind("names, as a list or with commas between them")
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else list(map(str, value))


def bits(value: object) -> str | None:
    """Return the quantization of so many bits."""
    return {4: "nf4", 8: "int8"}.get(int(str(value))) if str(value).isdigit() else None


def settings_text(found: Carried, program: str, head: str) -> str:
    """Return the settings of a program, `data` or `train`, as commented YAML, with what is not in it."""
    settings: Settings = getattr(found, program)
    text = f"# {head}\n"
    for name, value in settings.items():
        origin = ", ".join(found.origins.get((program, name), ())) or f"what {found.tool} does by itself"
        text += f"\n# {origin}\n" + yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True)
    for title, group in (("Not carried over", found.lost), ("Nothing to set for", found.needless)):
        text += f"\n# ---- {title}\n" if group else ""
        text += "".join(f"# {name}: {' '.join(reason.split())}\n" for name, reason in group.items())
    return text
