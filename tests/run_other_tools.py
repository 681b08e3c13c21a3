"""Prepare sets by the data code of LLaMA-Factory and of axolotl; a process of its own runs this file.

`python run_other_tools.py TOOL RESULT.json SETTINGS.yaml ...` writes, for each settings file, the documents of the
training set and of the held-out one, as pairs of ids and labels, and the day.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

STOOD_IN = {"torchaudio", "posthog"}  # imported by the tools, and not used here: sound, and reports of use


class _Absent(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        here = name.partition(".")[0] in STOOD_IN
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if here else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def factory(path: Path) -> dict[str, Iterable[Mapping[str, Any]]]:
    import trl

    trl.AutoModelForCausalLMWithValueHead = object  # gone from TRL 1.x; imported, and used for PPO alone
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model, data, training, *_ = get_train_args(yaml.safe_load(path.read_text("utf-8")))
    tokenizer = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
    made = get_dataset(template, model, data, training, stage="sft", **tokenizer)
    return {"train": made["train_dataset"], "eval": made.get("eval_dataset") or []}


def axolotl(path: Path) -> dict[str, Iterable[Mapping[str, Any]]]:
    from axolotl.cli.config import load_cfg
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.data import prepare_datasets

    settings = load_cfg(str(path))
    train, held, *_ = prepare_datasets(settings, load_tokenizer(settings))
    return {"train": train, "eval": held or []}


def _documents(rows: Iterable[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Return the documents of rows; of packed ones, those that a mask of whole numbers tells apart."""
    documents = []
    for row in rows:
        ids, labels, mask = list(row["input_ids"]), list(row["labels"]), list(row["attention_mask"])
        for number in sorted(set(mask) - {0}):
            kept = [place for place, at in enumerate(mask) if at == number]
            documents.append(([ids[place] for place in kept], [labels[place] for place in kept]))
    return documents


def main(tool: str, result: str, *settings: str) -> None:
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    sys.meta_path.append(_StandIn())
    run = {"LLaMA-Factory": factory, "axolotl": axolotl}[tool]
    made: dict[str, Any] = {"date": datetime.now().astimezone().date().isoformat()}
    for path in settings:
        made[path] = {part: _documents(rows) for part, rows in run(Path(path)).items()}
    Path(result).write_text(json.dumps(made), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
