"""Write the settings of a run as a commented YAML file that `sftdata prepare` runs."""

from __future__ import annotations

from typing import Any

import yaml

from sftdata.config import PrepareConfig
from sftdata.plan import make_plan

_GROUPS = {
    "inputs": "what is read",
    "tokenizer": "what is rendered and trained",
    "output": "how it is cut, packed and stored",
    "workers": "how the work is done; never changes a byte of the set",
}


def settings_yaml(config: PrepareConfig) -> str:
    """Return every setting with its meaning: those that matter here as they are, the others as comments with their defaults.

    What planning the run decides (format, length, chat template) is said at the top; nothing else is read, nothing written.

    Raises:
        SftError: the run cannot be planned.
    """
    plan = make_plan(config)
    config = config.model_copy(update={"max_length": plan.job.max_length})
    lines = [
        "Settings of a set. Look: sftdata preview THIS_FILE; build: sftdata prepare THIS_FILE.",
        *plan.notes,
    ]
    text = "".join(f"# {line}\n" for line in lines)
    values = config.model_dump(mode="json")
    for name, field in PrepareConfig.model_fields.items():
        if name in _GROUPS:
            text += f"\n# ---- {_GROUPS[name]}\n"
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        chosen = field.is_required() or getattr(config, name) != default
        text += f"\n# {field.description}\n" + _entry(name, values[name], comment="" if chosen else "# ")
    return text


def _entry(name: str, value: Any, comment: str) -> str:
    lines = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).splitlines()
    return "".join(f"{comment}{line}\n" for line in lines)
