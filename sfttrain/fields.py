"""Fields of transformers' TrainingArguments as a run was given them: names known, types right, defaults told apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sftdata.errors import UsageError, did_you_mean
from sfttrain.config import RENAMED, TRAINING_DEFAULTS, TrainConfig


def training_fields() -> dict[str, str]:
    """Return the fields of TrainingArguments and their types, as text."""
    from transformers import TrainingArguments

    known = {field.name: str(field.type) for field in dataclasses.fields(TrainingArguments) if field.init}
    return {name: known[old] for old, name in RENAMED.items() if old in known} | known


def named_as_installed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of TrainingArguments by the names of the installed transformers, which may be older than ours."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    older = {name: old for old, name in RENAMED.items()}
    return {name if name in known else older.get(name, name): value for name, value in settings.items()}


def checked_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of TrainingArguments as it takes them.

    Raises:
        UsageError: it has no such field, or the value is no number where one is wanted.
    """
    known = training_fields()
    for key in given:
        if key not in known:
            fix = did_you_mean(key, [*TrainConfig.model_fields, *known], "see `sfttrain config`.")
            raise UsageError(f"Unknown setting {key!r}.", fix)
    return {key: _coerced(key, value, known[key]) for key, value in given.items()}


def given_training(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of TrainingArguments that were given and are not what they would be anyway."""
    defaults = {**training_defaults(), "learning_rate": config.learning_rate}
    given = {
        name: getattr(value, "value", value) for name, value in checked_training(config.training).items()
    }
    return {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}


def other_than_default(args: Any) -> dict[str, Any]:
    """Return the fields of TrainingArguments as it resolved them, without those that are what they would be anyway.

    The same comes out for settings as they were given and as a run recorded them: some are resolved from others, and what
    is not set has more than one form.
    """
    defaults = training_defaults()
    return {name: value for name, value in args.to_dict().items() if _set(value) != _set(defaults.get(name))}


def _set(value: Any) -> Any:
    """Return a value, None where it is one of the forms of not being set."""
    value = getattr(value, "value", value)
    return None if value is False or value in ("", "none", [], ["none"], {}) else value


def training_defaults() -> dict[str, Any]:
    """Return what the fields of TrainingArguments are when they are not set; `bf16` depends on the machine."""
    from transformers import TrainingArguments

    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init and field.name != "bf16"]
    ours = {**TRAINING_DEFAULTS, "disable_tqdm": True}
    return {
        field.name: ours.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        for field in fields
    }


def _coerced(key: str, value: Any, annotation: str) -> Any:
    """Undo what YAML does to `1e-5`, which it takes for text, and to `no`, which it takes for false.

    Raises:
        UsageError: no number where one is wanted, or settings inside what holds none.
    """
    if isinstance(value, dict) and "dict" not in annotation:
        raise UsageError(
            f"Setting {key!r}: found {value!r:.200}; nothing inside it can be set.", f"set {key} whole."
        )
    if isinstance(value, bool) and "bool" not in annotation:
        return "yes" if value else "no"
    wanted = next((kind for kind in (float, int) if kind.__name__ in annotation), None)
    if isinstance(value, str) and wanted is not None:
        try:
            return wanted(value)
        except ValueError:
            if "str" not in annotation:
                raise UsageError(
                    f"Setting {key!r}: expected a number; found {value!r}.", "write it as 2e-5 or 3."
                ) from None
    return value
