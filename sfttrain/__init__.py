"""Train on sets that `sftdata prepare` made.

>>> import sfttrain
>>> trainer = sfttrain.train("shards/", model="Qwen/Qwen2.5-0.5B", output="out/")  # doctest: +SKIP

What `__all__` names is the public interface; docs/versioning.md says what may change in it, and when.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from sftdata.version import __version__
from sftdata.wording import Keywords, keywords_of, know

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from sftdata.set.opened import ShardSet
    from sfttrain.chat import Chat
    from sfttrain.iterative import IterativeTrainer
    from sfttrain.trainer import SftTrainer

__all__ = ["Chat", "IterativeTrainer", "__version__", "open_chat", "train"]

_LOADED_LATER = {"Chat": "sfttrain.chat", "IterativeTrainer": "sfttrain.iterative"}  # they need torch

# What transformers' Trainer takes as objects; everything else is a setting.
_OBJECTS = (
    "callbacks", "compute_loss_func", "compute_metrics", "eval_dataset", "optimizers",
    "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics", "processing_class",
)  # fmt: skip


def train(
    data: str | Path | ShardSet | Sequence[str | Path | ShardSet] | Iterable[Mapping[str, object]], *,
    output: str | Path,
    model: str | Path | torch.nn.Module | None = None,
    on_note: Callable[[str], object] | None = None,
    # ---- settings of ours
    weights: Sequence[float] = (), mix: Mapping[str, float | str] = {},
    mix_by: Literal["rows", "tokens", "trained"] = "trained", passes: float | None = None,
    window: int | None = None,
    new_leg: bool = False, eval: Mapping[str, str | Path] = {},
    init_from_config: str | Path | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    model_init_kwargs: Mapping[str, object] = {},
    lora: str | Mapping[str, object] | None = None,
    adapter: str | Path | None = None,
    freeze: Literal["auto", "none", "vision", "vision+projector"] = "auto", resize_to_multiple_of: int = 1,
    quantize: Literal["nf4", "int8", "torchao-int8"] | None = None,
    trust_remote_code: bool = False,
    attention: str = "auto",
    loss: Literal["auto", "chunked", "torch", "plain"] = "auto",
    kernels: Literal["auto", "liger", "none"] = "auto",
    compile: Literal["auto", "layers", "loss", "none"] = "auto",
    objective: Literal["nll", "dft"] = "nll",
    packing: Literal["auto", "require", "unpack"] = "auto",
    sequence_parallel: int = 1, prove_again: bool = False, log_documents: bool = False,
    sample: str | Path | None = None, overwrite: bool = False, push_to_hub: str | None = None,
    # ---- objects of transformers' Trainer
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
    compute_loss_func: Callable[..., torch.Tensor] | None = None,
    compute_metrics: Callable[..., Mapping[str, object]] | None = None,
    eval_dataset: object = None,
    optimizers: tuple[torch.optim.Optimizer | None, LRScheduler | None] | None = None,
    optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], Mapping[str, object]] | None = None,
    preprocess_logits_for_metrics: Callable[..., object] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    **training: object,
) -> SftTrainer | None:  # fmt: skip
    """Train a model; the same function as `sfttrain run`, and the same call resumes a broken run.

    Args:
        data: folders of sets, opened sets, or a dataset of rows with token ids (`datasets.Dataset`,
            `IterableDataset`, a list of dicts).
        output: folder of the run.
        model: folder or Hub id, or a model object, which may carry adapters; None with `init_from_config` or
            `adapter`.
        on_note: called with each decision that was made for you, in one sentence. Default: a line on standard
            error.
        training: fields of transformers' TrainingArguments, as `learning_rate=1e-4`.

    The other arguments are those of `sfttrain config` and of transformers' Trainer, whose `callbacks` also
    see every step.

    Returns:
        The trainer; None where the output already holds this run, finished.

    Raises:
        sftdata.SftError: in one line, what is wrong and how to fix it.
    """
    return _train(**locals())


def open_chat(
    folder: str | Path, *, model: str | None = None, system: str | None = None, max_new_tokens: int = 512,
    temperature: float = 0.0, on_note: Callable[[str], object] | None = None,
) -> Chat:  # fmt: skip
    """Open a conversation, as `sfttrain chat` does: `open_chat("out").ask("Why?")` returns the answer.

    Args:
        folder: of a model, as `sfttrain run` and `merge` write it, or of adapters.
        model: base of adapters, where it is not the one that they name.
        system: first message of every conversation.
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        on_note: called with each decision that was made for you, in one sentence. Default: a line on standard
            error.

    Raises:
        sftdata.UsageError: the folder holds no model or no tokenizer, or a setting cannot be used.
    """
    from sfttrain.chat import open_chat as opened
    from sfttrain.process import notes_to, say

    with notes_to(on_note):
        return opened(
            Path(folder), model, say, system=system, max_new_tokens=max_new_tokens, temperature=temperature
        )


def _train(
    data: object,
    model: object,
    on_note: Callable[[str], object] | None,
    training: dict[str, object],
    **given: object,
) -> SftTrainer | None:
    """Sort what was given into settings and objects, and run."""
    from sfttrain.config import read_settings
    from sfttrain.process import notes_to
    from sfttrain.run import train as run

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks up when it is imported
    defaults = {name: keyword.default for name, keyword in inspect.signature(train).parameters.items()}
    given = {name: value for name, value in given.items() if value is not defaults[name]} | training
    objects = {name: given.pop(name) for name in _OBJECTS if name in given}
    named = model is None or isinstance(model, str | Path)
    if model is not None:
        given["model"] = str(model) if named else _name_of(model)
    data = _places(data)
    folders = isinstance(data, str | Path) or (
        isinstance(data, Sequence) and all(isinstance(part, str | Path) for part in data)
    )
    if folders:
        given["sets"] = data
    with notes_to(on_note):
        config = read_settings(None, [], given)
        return run(
            config,
            model=None if named else cast("PreTrainedModel", model),
            data=None if folders else data,
            **objects,
        )


def _places(data: object) -> object:
    """Return the folders or URLs of opened sets; everything else as it is.

    Raises:
        UsageError: neither places nor rows.
    """
    from sftdata.errors import UsageError
    from sftdata.set.local import named
    from sftdata.set.opened import ShardSet

    if isinstance(data, ShardSet):
        return named(data.folder)
    if isinstance(data, list | tuple) and any(isinstance(part, ShardSet) for part in data):
        return [_places(part) for part in data]
    if not isinstance(data, str | Path | Iterable) and not hasattr(data, "__getitem__"):
        what = f"data: found a {type(data).__name__}; expected folders of sets, or rows of token ids."
        raise UsageError(what, "name the folder that sftdata.prepare wrote: its output=.")
    return data


def _keywords() -> Iterable[Keywords]:
    from sfttrain.arguments import training_fields

    fields = training_fields() if find_spec("transformers") else {}  # or its lack could not be said
    return {**fields, **keywords_of(train)}, keywords_of(open_chat)


know(_keywords, {"--neftune-alpha": "neftune_noise_alpha"})


def _name_of(model: object) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def __dir__() -> list[str]:
    return __all__  # what is loaded later, too, and nothing else: for the completion of notebooks


if not TYPE_CHECKING:  # hidden, so that a type checker still refuses unknown names

    def __getattr__(name: str) -> object:
        if name in _LOADED_LATER:
            return getattr(import_module(_LOADED_LATER[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
