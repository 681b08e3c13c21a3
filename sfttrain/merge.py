"""Make a model from a finished one: merge adapters into their base, proven; quantize by GPTQ."""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sftdata.errors import IntegrityError, UsageError
from sftdata.output import local_output
from sftdata.set.opened import ShardSet, open_set
from sfttrain.adapters import continue_adapters
from sfttrain.config import adapter_base
from sfttrain.process import Say
from sfttrain.refusals import require_package
from sfttrain.vocabulary import embedding_rows, embedding_table, grow_embeddings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PROBE_TOKENS = 64
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json", "*.model", "vocab*",
    "merges.txt",
)  # fmt: skip
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit
CALIBRATION_ROWS = 256
GROUP_SIZES = (-1, 32, 64, 128)
BITS = (2, 3, 4, 8)


def merge(folder: Path, output: Path, model: str | None = None, say: Say = print) -> float:
    """Write base and adapters as one model, with its tokenizer; return how far its logits are from theirs.

    The sum is made in float32, and stored in the base's dtype.

    Args:
        folder: of the adapters.
        output: folder to be made.
        model: the base, where it is not the one that the adapters name.

    Raises:
        UsageError: the output exists, or the adapters do not fit.
        IntegrityError: the saved model does not answer as the adapted one.
    """
    if local_output(output).exists() and any(output.iterdir()):
        raise UsageError(f"{output}: exists and is not empty.", "choose another -o.")
    name = model or adapter_base(folder)
    base, dtype = _load(name)
    rows = _saved_rows(folder, base)
    if rows > embedding_rows(base):
        say(f"embeddings: grown from {embedding_rows(base):,} to {rows:,} rows, as they were in training")
        grow_embeddings(base, rows)
    tied = bool(base.config.get_text_config().tie_word_embeddings)
    if name != adapter_base(folder):
        say(f"base: {name}, as asked; the adapters name {adapter_base(folder)}")
    adapted = continue_adapters(base, folder, name, chosen=model is not None).eval()
    probe = _probe(adapted, rows or embedding_rows(base))
    expected = _logits(adapted, probe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it warns of, untied tables, is proven below
        merged = adapted.merge_and_unload()
    if tied and not merged.config.get_text_config().tie_word_embeddings:
        say("head: trained apart from the embeddings, so they are no longer tied")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.to(dtype).save_pretrained(partial)
    _copy_beside(folder, partial)
    difference = _difference(expected, _logits(_load(str(partial))[0].eval(), probe))
    if difference > _TOLERANCE.get(dtype, 5e-2):
        message = f"{partial}: the merged model's logits are off by {difference:.1e} of the largest."
        raise IntegrityError(
            message, "report this with the adapter's config; the model was not put in place."
        )
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    say(
        f"merged: {output}; its logits differ from the adapted model's "
        f"by {difference:.1e} of the largest ({dtype})"
    )
    return difference


def _load(name: str) -> tuple[PreTrainedModel, torch.dtype]:
    """Return a model in float32, and the dtype it is stored in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None) is not None:
            raise UsageError(
                f"{name}: is quantized; adapters are added to whole weights.",
                "name the unquantized base with --model.",
            )
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True), dtype
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"{name}: the base cannot be loaded: {reason}", "name it with --model.") from None


def _saved_rows(folder: Path, base: PreTrainedModel) -> int:
    """Embedding rows of the model that the adapters were trained on; 0 when they do not say."""
    from safetensors import safe_open

    embeddings = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embeddings).rpartition(".")[2]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if f".{name}." in key}  # noqa: SIM118 -- no dict
    width = embedding_table(base).shape[1]
    tables = [
        shape[0]
        for key, shape in shapes.items()
        if len(shape) == 2 and shape[1] == width and "trainable_tokens" not in key
    ]
    return max((rows for rows in tables if rows >= embedding_rows(base)), default=0)


def _probe(model: PreTrainedModel | PeftModel, rows: int) -> Tensor:
    """Ids to compare on: spread over the vocabulary, with the last ones, which a set may have added."""
    spread = torch.linspace(0, rows - 1, _PROBE_TOKENS).long()
    last = torch.arange(max(0, rows - 8), rows)
    return torch.cat([spread, last])[None].to(model.device)


def _logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits.float()


def _difference(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-6))


def _copy_beside(folder: Path, target: Path) -> None:
    """Bring along what inference needs beside the weights: tokenizer, chat template, stop tokens."""
    for path in {path for pattern in _BESIDE for path in folder.glob(pattern)}:
        if path.is_file():
            shutil.copy2(path, target / path.name)


def quantize(model: Path, calibration: Path, output: Path, bits: int, group_size: int, say: Say) -> None:
    """Write a GPTQ model beside the one it comes from.

    Args:
        calibration: a set; its rows, spread evenly, show GPTQ what the activations look like.
        group_size: weights that share a scale; smaller is more exact and larger on disk, -1 is a whole
            column.

    Raises:
        UsageError: a setting GPTQ does not know, adapters that are not merged, or GPTQModel is missing.
    """
    local_output(output)
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise UsageError(
            f"gptq: bits={bits}, group_size={group_size}; expected bits of {BITS}, groups of {GROUP_SIZES}."
        )
    if (model / "adapter_config.json").is_file():
        raise UsageError(
            f"{model}: holds adapters; GPTQ takes a whole model.", f"sfttrain merge {model} -o {model}-merged"
        )
    require_package("gptqmodel", "export --gptq")
    # No extra of ours installs it: it is built against the machine's torch.
    package: Any = importlib.import_module("gptqmodel")
    rows = calibration_rows(open_set(calibration), CALIBRATION_ROWS)
    say(f"gptq: {bits} bits in groups of {group_size}, calibrated on {len(rows)} documents of {calibration}")
    quantized = package.GPTQModel.load(str(model), package.QuantizeConfig(bits=bits, group_size=group_size))
    quantized.quantize(rows, batch_size=1)
    quantized.save(str(output))
    say(
        f"gptq: {output}; compare its evaluation loss with the original's before using it, "
        "and try group_size=32 if it is worse"
    )


def calibration_rows(opened: ShardSet, count: int) -> list[dict[str, Any]]:
    """Return ids and masks of documents spread over a set, each by itself, as GPTQ takes them."""
    rows = []
    for index in np.unique(np.linspace(0, len(opened) - 1, min(count, len(opened))).astype(np.int64)):
        ids = max((document.input_ids for document in opened[int(index)].documents()), key=len).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    return rows
