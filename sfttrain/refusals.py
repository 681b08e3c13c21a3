"""What cannot work, refused before the model is loaded: one line each, with what to do instead.

The sets of a run are opened and checked here without torch: their bytes, their tokenizers, their vocabulary.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftdata.errors import DataError, IntegrityError, UsageError, did_you_mean
from sftdata.set.ledger import REJECTS_NAME
from sftdata.set.local import origin, url_of
from sftdata.set.opened import ShardSet, open_set
from sftdata.set.verify import damaged_bases, damaged_files, foreign_shards
from sftdata.vocabulary import read_added_tokens
from sfttrain.config import TrainConfig
from sfttrain.process import Say, rank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

# What from_pretrained took once, and where it is set here.
_MOVED = {
    "load_in_8bit": "--quantize int8 --lora r=16",
    "load_in_4bit": "--quantize nf4 --lora r=16",
    "use_flash_attention_2": "--attention flash_attention_2",
}
_LOADING = ("init_from_config", "revision", "dtype", "model_init_kwargs", "quantize", "trust_remote_code")
_TRAINER = ("torch", "transformers", "accelerate", "peft", "safetensors")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml")  # packages of the same name


def refuse_useless(
    config: TrainConfig,
    args: TrainingArguments,
    model: object,
    data: object,
    extras: Mapping[str, object],
    say: Say,
) -> None:
    """Refuse settings that cannot work together, before anything is read.

    Args:
        args: transformers' TrainingArguments.
        model, data: objects given instead of names, or None.
        extras: what transformers' Trainer takes as objects.

    Raises:
        UsageError: naming what to set instead.
    """
    _refuse_data(config, args, data)
    _refuse_loading(config, args)
    if model is not None:
        _refuse_object(config, model)
    _refuse_loss(config, args, extras)
    _refuse_evaluation(config, args, extras)
    if config.eval and args.eval_strategy == "no":
        say(
            f"evaluation: {' and '.join(config.eval)} is not evaluated while training; "
            "set eval_strategy=epoch or steps for that"
        )
    offload = isinstance(
        args.activation_checkpointing_kwargs, dict
    ) and args.activation_checkpointing_kwargs.get("offload")
    if offload and args.device.type == "cpu":
        what = "activation_checkpointing_kwargs.offload: activations lie in host memory already."
        raise UsageError(what, "leave it out.")
    if "bnb" in str(args.optim) or "8bit" in str(args.optim):
        require_package("bitsandbytes", f"optim={args.optim}", "quantize")
    for name in args.report_to or ():
        require_tracker(name)
    if config.push_to_hub:
        _refuse_push(config.push_to_hub)


def _refuse_data(config: TrainConfig, args: TrainingArguments, data: object) -> None:
    if not config.sets and data is None:
        raise UsageError("There is nothing to train on.", "name a folder that `sftdata prepare` wrote.")
    if data is not None and not hasattr(data, "__len__") and args.max_steps <= 0:
        raise UsageError("A stream has no end that is known.", "set max_steps.")
    if data is not None and config.log_documents:
        what = "log_documents: rows of a dataset have no file and line."
        raise UsageError(what, "train on sets, or leave it out.")
    sequential = args.train_sampling_strategy == "sequential"
    if config.window is not None and (data is not None or sequential):
        why = "rows are not shuffled, by train_sampling_strategy" if sequential else "a dataset has no shards"
        raise UsageError(f"window={config.window}: {why}.", "leave it out.")
    if data is not None and config.passes is not None:
        what = "passes: bounds how often a set is gone through; this is a dataset of rows."
        raise UsageError(what, "train on sets, or leave it out.")


def refuse_missing_launch(settings: Mapping[str, object]) -> None:
    """Refuse ways to spread a model over GPUs that lack their package or their launcher.

    Raises:
        UsageError: naming the command.
    """
    by_accelerate = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if settings.get("deepspeed") or by_accelerate:
        require_package("deepspeed", "DeepSpeed" if by_accelerate else "deepspeed")
    if settings.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        fix = "accelerate launch --config_file examples/accelerate/fsdp2.yaml -m sfttrain run ..."
        raise UsageError("fsdp: one process has nothing to shard over.", fix)


def refuse_architecture(
    config: TrainConfig, model_config: PreTrainedConfig, trains: bool = True, model: object = None
) -> None:
    """Refuse a model that a run cannot train, by its config.

    Args:
        trains: whether weights are trained, and not evaluated alone.
        model: the object, where one was given.

    Raises:
        UsageError: it answers from an encoder, or its weights are quantized and would all be trained.
    """
    name = config.model or config.init_from_config
    if getattr(model_config, "is_encoder_decoder", False):
        found = f"{name}: {model_config.model_type} is a sequence-to-sequence model; "
        found += "a run trains causal language models."
        fix = "sfttrain.IterativeTrainer(model).step(texts=..., texts_labels=...) trains it."
        raise UsageError(found, fix)
    quantized = getattr(model_config, "quantization_config", None) is not None
    if quantized and config.quantize:
        what = f"{name}: is quantized already; quantize={config.quantize} would do so twice."
        raise UsageError(what, "leave quantize out.")
    if quantized and trains and not config.adapted and not hasattr(model, "peft_config"):
        what = f"{name}: its weights are quantized and cannot be trained."
        raise UsageError(what, "train adapters on them, as --lora r=16.")


def refuse_too_long(sets: Sequence[ShardSet], model_config: PreTrainedConfig, say: Say) -> None:
    """Refuse documents longer than a model's table of positions; with rotary positions, only note them.

    Raises:
        UsageError: a document is longer than the table of positions.
    """
    text = model_config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return
    for opened in sets:
        length = opened.manifest.max_length
        if length is not None and length <= limit:
            continue
        longest = max((int(np.max(rows.seq_lengths)) for rows in opened.batches()), default=0)
        found = (
            f"{opened.folder}: a document has {longest:,} tokens; {text.model_type} was made for {limit:,}"
        )
        if longest > limit and getattr(text, "rope_parameters", None) is None:
            raise UsageError(f"{found} and has no positions beyond.", f"prepare with --max-length {limit}.")
        if longest > limit:
            say(found)


def _refuse_loading(config: TrainConfig, args: TrainingArguments) -> None:
    for name, instead in _MOVED.items():
        if config.model_init_kwargs.get(name):
            raise UsageError(f"model_init_kwargs.{name}: from_pretrained no longer takes it.", instead)
    if "device_map" in config.model_init_kwargs and args.world_size > 1:
        what = "model_init_kwargs.device_map: each process has a device of its own."
        raise UsageError(what, "leave it out.")


def _refuse_object(config: TrainConfig, model: object) -> None:
    """A model that is at hand is not loaded, so what says how to load it would be ignored."""
    fields = TrainConfig.model_fields
    given = [
        name
        for name in _LOADING
        if getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]
    if given:
        found = f"{', '.join(given)}: the model is an object, which is loaded already"
        raise UsageError(f"{found}.", "load it so, or name the model.")
    if config.adapted and hasattr(model, "peft_config"):
        what = "The model carries adapters already."
        raise UsageError(what, "leave lora and adapter out, or give the model without them.")


def _refuse_loss(config: TrainConfig, args: TrainingArguments, extras: Mapping[str, object]) -> None:
    if config.kernels == "liger" and args.device.type == "cpu":
        what = "kernels=liger: its kernels need a GPU, and the device is the CPU."
        raise UsageError(what, "set kernels=auto.")
    if config.kernels == "liger":
        require_package("liger_kernel", "kernels=liger", "gpu")
    if args.use_liger_kernel:
        found = "use_liger_kernel: would change transformers' classes, and bring a loss over all positions"
        raise UsageError(f"{found}.", "set kernels=liger.")
    if args.torch_compile:
        found = "torch_compile: the whole model is compiled anew for each number of documents"
        raise UsageError(f"{found}.", "set compile=layers.")
    if config.objective == "nll":
        return
    if config.loss == "plain":
        what = f"objective={config.objective} is computed by our loss, not by loss={config.loss}."
        raise UsageError(what, "set loss=auto.")
    if extras.get("compute_loss_func") is not None:
        what = f"objective={config.objective}: compute_loss_func decides on the loss."
        raise UsageError(what, "leave one of them out.")


def _refuse_evaluation(config: TrainConfig, args: TrainingArguments, extras: Mapping[str, object]) -> None:
    data = extras.get("eval_dataset")
    names = [*config.eval, *(data if isinstance(data, dict) else ["data"] if data is not None else [])]
    for rows in data.values() if isinstance(data, dict) else [data]:
        if rows is not None and not hasattr(rows, "__len__"):
            what = "eval_dataset: a stream has no end that is known."
            raise UsageError(what, "give rows with a length, or --eval NAME=FOLDER.")
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if strategy != "no" and not names:
        what = f"eval_strategy={strategy}: there is nothing to evaluate on."
        raise UsageError(what, "name a set, as --eval held=FOLDER.")
    metric = str(args.metric_for_best_model or "").removeprefix("eval_")
    if not metric or extras.get("compute_metrics") is not None or strategy == "no":
        return
    if not any(metric.startswith(f"{name}_loss") for name in names):
        found = f"metric_for_best_model={args.metric_for_best_model}: evaluation gives no such figure"
        raise UsageError(f"{found}.", f"set metric_for_best_model=eval_{names[0]}_loss.")


def _refuse_push(repository: str) -> None:
    """Refuse now what would otherwise fail only once the run is done."""
    from huggingface_hub import get_token

    if repository.count("/") != 1:
        raise UsageError(f"push_to_hub={repository}: is no repository of the Hub.", "name it as user/model.")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        what = f"push_to_hub={repository}: HF_HUB_OFFLINE is set."
        raise UsageError(what, "unset it, or leave push_to_hub out.")
    if get_token() is None:
        what = f"push_to_hub={repository}: no one is logged in to the Hub."
        raise UsageError(what, "hf auth login, or set HF_TOKEN.")


def require_trainer() -> None:
    """Refuse to train without the packages of the extra `train`.

    Raises:
        UsageError: naming the extra.
    """
    for package in _TRAINER:
        require_package(package, "sfttrain", "train")


def require_package(package: str, setting: str, extra: str = "", named: str = "") -> None:
    """Refuse a setting whose package is missing.

    Args:
        package: its name, as imported.
        setting: what needs it, as the user wrote it.
        extra, named: extra of this project that brings it along, or what to install in its place.

    Raises:
        UsageError: the package is not installed.
    """
    if find_spec(package) is None:
        source = f"'sftdata[{extra}]'" if extra else named or package
        raise UsageError(f"{setting} needs the package {package}.", f"pip install {source}")


def require_tracker(name: str) -> None:
    """Refuse a tracker that transformers does not know, or whose package is not installed.

    Raises:
        UsageError: the tracker cannot be used.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name in ("none", "all"):
        return
    if name not in INTEGRATION_TO_CALLBACK:
        choices = f"choose among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
        fix = did_you_mean(name, INTEGRATION_TO_CALLBACK, choices)
        raise UsageError(f"report_to={name}: there is no such tracker.", fix)
    if name in _TRACKERS:  # of the others, transformers knows what they need
        require_package(name, f"report_to={name}")


def open_sets(config: TrainConfig) -> tuple[list[ShardSet], dict[str, ShardSet]]:
    """Open the sets to train and to evaluate on.

    Raises:
        SftError: a set is missing or empty, a view without its sets, or does not fit the others or the model.
    """
    sets = [open_set(folder) for folder in config.sets]
    evaluation = {name: open_set(folder) for name, folder in config.eval.items()}
    everything = [*sets, *evaluation.values()]
    for opened in everything:
        opened.require_bases()
    _refuse_pictures(config, any(opened.manifest.vision is not None for opened in everything))
    refuse_mixed_tokenizers(everything)
    known = _known_vocabulary(config)
    if known is not None:
        missing_embeddings(sets, known)
    for opened in everything:
        if not opened.manifest.ledger.tokens_trained:
            what = f"{opened.folder}: holds no trained token."
            raise DataError(what, "prepare it with a mask that trains something.")
    return sets, evaluation


def _refuse_pictures(config: TrainConfig, pictured: bool) -> None:
    """Refuse settings that cannot act on sets with pictures, or on sets without."""
    if not pictured and config.freeze != "auto":
        what = f"freeze={config.freeze}: the sets have no pictures, on which it acts."
        raise UsageError(what, "leave it out.")
    if pictured and config.sequence_parallel > 1:
        what = f"sequence_parallel={config.sequence_parallel}: a picture is not cut into slices."
        raise UsageError(what, "leave it out, or prepare with a smaller --max-length.")
    if pictured and config.sample is not None:
        what = f"--sample {config.sample}: asks in text alone, and the sets have pictures."
        raise UsageError(what, "leave --sample out; --eval NAME=FOLDER takes sets with pictures.")


class Reading:
    """The verification of sets, in a thread beside the import of torch and the loading of the model.

    Args:
        sets: to be read, by the main process.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self._sets, self._error = sets if rank() == 0 else (), list[Exception]()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Refuse what has been found so far.

        Raises:
            SftError: a set is damaged.
        """
        if self._error:
            raise self._error[0]

    @contextmanager
    def first(self) -> Iterator[None]:
        """Refuse damaged bytes before what they made someone say who looked into a set beside the reading.

        Raises:
            SftError: a set is damaged.
        """
        try:
            yield
        except IntegrityError:
            self.finish()
            raise

    def finish(self) -> None:
        """Wait until every byte is read.

        Raises:
            SftError: a set is damaged.
        """
        self._thread.join()
        self.check()

    def _read(self) -> None:
        try:
            verify_sets(self._sets)
        except Exception as error:  # raised again in the thread that waits
            self._error.append(error)


def verify_sets(sets: Sequence[ShardSet]) -> None:
    """Read every file that training uses, hold it against its manifest and the laws, and keep it mapped.

    rejects.jsonl may be under repair. What is put in the place of a set later does not reach the run.

    Raises:
        IntegrityError: a file is missing, its bytes differ or break a law, or the folder holds a shard that
            is none of the set's.
    """
    for opened in sets:
        if origin(opened.folder) is not None or any(url_of(base.path) for base in opened.manifest.bases):
            continue  # each file is held against its hash when it is fetched
        checked = damaged_files(opened.folder, opened.manifest)
        damage = (problem for info, problem in checked if problem and info.name != REJECTS_NAME)
        beneath = (problem for _, problem in damaged_bases(opened.folder, opened.manifest) if problem)
        for problem in chain(damage, beneath, foreign_shards(opened.folder, opened.manifest)):
            raise IntegrityError(problem)
        opened.hold()


def refuse_mixed_tokenizers(sets: Sequence[ShardSet]) -> None:
    """Refuse sets whose ids mean different tokens, by UsageError that names two of them."""
    for opened in sets[1:]:
        one, other = sets[0].manifest.tokenizer, opened.manifest.tokenizer
        added = sorted((one.tokens_added, other.tokens_added), key=len)
        grown = (
            added[0] != added[1] and added[1][: len(added[0])] == added[0]
        )  # one gained tokens for its template
        alike = grown and one.vocab_size - len(one.tokens_added) == other.vocab_size - len(other.tokens_added)
        if one.sha256 != other.sha256 and not alike:
            found = f"{sets[0].folder} was prepared with the tokenizer {one.name}, "
            found += f"{opened.folder} with {other.name}"
            what = f"{found}, whose ids are others."
            raise UsageError(what, "prepare both with the tokenizer of the model.")


def missing_embeddings(sets: Sequence[ShardSet], rows: int) -> int:
    """Return to how many rows the embeddings must grow; 0 if they are enough.

    They grow only for tokens that the tokenizer gained after its training: a set made with another model's
    tokenizer is an error.

    Raises:
        UsageError: the vocabulary of a set is not this model's.
    """
    needed = 0
    for opened in sets:
        tokenizer = opened.manifest.tokenizer
        if tokenizer.vocab_size <= rows:
            continue
        if tokenizer.vocab_size - rows > len(_added_ids(opened, rows)):
            found = f"its tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids"
            raise UsageError(
                f"{opened.folder}: {found}; the model has embeddings for {rows}.",
                "train the model that the tokenizer belongs to, "
                "or prepare the set with this model's tokenizer.",
            )
        needed = max(needed, tokenizer.vocab_size)
    return needed


def _added_ids(opened: ShardSet, rows: int) -> set[int]:
    """Ids from `rows` on that are known to be added tokens."""
    tokenizer = opened.manifest.tokenizer
    new = set(range(tokenizer.vocab_size - len(tokenizer.tokens_added), tokenizer.vocab_size))
    return {token for token in new | read_added_tokens(opened.folder / "tokenizer").keys() if token >= rows}


def _known_vocabulary(config: TrainConfig) -> int | None:
    """Return the vocabulary size in a local model's config; None where only loading it can show."""
    place = config.init_from_config or Path(config.model or "")
    try:
        fields: dict[str, Any] = json.loads(
            (place / "config.json" if place.is_dir() else place).read_text("utf-8")
        )
        size = fields.get("vocab_size", fields.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None
