"""What becomes of settings of another tool: carried over, needless here, or lost; rules that decide it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = dict[str, Any]


@dataclass(slots=True)
class Carried:
    """What became of a file.

    Attributes:
        tool: that it is of.
        folder: where it lies.
        given: names of its settings.
        data: settings of `sftdata prepare`.
        train: of `sfttrain run`, fields of TrainingArguments among them.
        origins: program and setting -> what it was in the file.
        needless: settings of the file that nothing has to be set for, and why.
        lost: those that have no counterpart, or ask for a decision, and why.
    """

    tool: str
    folder: Path
    given: frozenset[str]
    data: Settings = field(default_factory=dict)
    train: Settings = field(default_factory=dict)
    origins: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    needless: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def carried(self) -> set[str]:
        """Settings of the file that became settings of ours."""
        return {name for names in self.origins.values() for name in names if name in self.given}

    def put(self, program: str, setting: str, value: object, origin: str) -> None:
        """Set one of ours; of `lora` and other mappings a part."""
        settings, (name, _, part) = getattr(self, program), setting.partition(".")
        if part:
            settings.setdefault(name, {})[part] = value
        else:
            settings[name] = value
        names = self.origins.setdefault((program, name), [])
        names += [] if origin in names else [origin]


Rule = Callable[[Carried, str, Any], None]
Convert = Callable[[Any], Any]


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


def chosen(values: Mapping[Any, Any]) -> Convert:
    """Look a value up; None where it is not there."""
    return lambda value: values.get(value)
