"""Train on sets that `sftdata prepare` made.

>>> import sfttrain
>>> trainer = sfttrain.train("shards/", model="Qwen/Qwen2.5-0.5B", output="out/", lora="r=16")  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfttrain.iterative import IterativeTrainer
    from sfttrain.trainer import SftTrainer

__all__ = ["IterativeTrainer", "train"]

# What transformers' Trainer takes as objects; everything else is a setting.
_OBJECTS = (
    "callbacks", "compute_loss_func", "compute_metrics", "eval_dataset", "optimizers", "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics", "processing_class",
)  # fmt: skip


def train(data: Any, *, model: Any, output: str | Path, **settings: Any) -> SftTrainer | None:
    """Train a model; the same function as `sfttrain run`.

    Args:
        data: folders of sets, or a dataset of rows with token ids (`datasets.Dataset`, `IterableDataset`, a list of dicts).
        model: folder or Hub id, or a model object, which may carry adapters.
        output: folder of the run.
        settings: any setting of `sfttrain run` or of transformers' TrainingArguments, and what its Trainer takes as objects.

    Returns:
        The trainer; None where the output already holds this run, finished.

    Raises:
        sftdata.errors.SftError: in one line, what is wrong and what to do.
    """
    from sfttrain.config import read_settings
    from sfttrain.run import train as run

    objects = {name: settings.pop(name) for name in _OBJECTS if name in settings}
    named = isinstance(model, str | Path)
    settings |= {"model": str(model) if named else _name_of(model), "output": output}
    folders = isinstance(data, str | Path) or (
        isinstance(data, Sequence) and all(isinstance(part, str | Path) for part in data)
    )
    if folders:
        settings["sets"] = data
    config = read_settings(None, [], settings)
    return run(config, model=None if named else model, data=None if folders else data, **objects)


def _name_of(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def __getattr__(name: str) -> Any:
    if name == "IterativeTrainer":
        from sfttrain.iterative import IterativeTrainer

        return IterativeTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
