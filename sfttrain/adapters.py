"""Low-rank adapters: added, continued, and merged into their base; and the embeddings trained beside them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sftdata.errors import IntegrityError, UsageError
from sftdata.output import counted, local_output
from sfttrain.attention import auto_class
from sfttrain.config import LoraSettings, adapter_base
from sfttrain.process import Say, reason_of
from sfttrain.vocabulary import embedding_rows, embedding_table, grow_embeddings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FEW_TOKENS = 256  # up to here single rows of the embeddings are trained, beyond it whole tables
_PROBE_TOKENS = 64
READ_WITH = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "processor_config.json", "preprocessor_config.json", "*.model", "vocab*", "merges.txt",
)  # fmt: skip
"""Files beside the weights that inference needs."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


def add_adapters(
    model: PreTrainedModel, lora: LoraSettings, untrained: Sequence[int], excluded: Sequence[str], say: Say
) -> PeftModel:
    """Freeze the model and add adapters to it; embeddings that the set needs are trained too.

    Args:
        untrained: ids whose embeddings were never trained.
        excluded: modules that get no adapters.

    Raises:
        UsageError: a target or a module to save is no module of this model.
    """
    from peft import LoraConfig, get_peft_model

    saved = _names(lora.modules_to_save)
    embeddings = _embedding_names(model)
    rows: dict[str, list[int]] | None = None
    if untrained and not set(saved) & set(embeddings):
        rows, saved = _train_embeddings(model, embeddings, untrained, saved, say)
    skipped = [
        name for name, _ in model.named_modules() if any(name.startswith(f"{tower}.") for tower in excluded)
    ]
    if lora.target == "all-linear":
        skipped += _without_adapters(model)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target == "all-linear" else _names(lora.target),
        exclude_modules=skipped or None,
        target_parameters=_names(lora.parameters) or None,
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=saved or None,
        ensure_weight_tying=bool(set(saved) & set(embeddings))
        and _tied(model),  # single rows are tied anyway
        task_type="CAUSAL_LM",
        trainable_token_indices=rows,
    )
    _silence_peft()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="target_parameters=")  # none of them was found
            adapted = get_peft_model(model, settings)
    except (ValueError, RuntimeWarning, UserWarning) as error:
        fix = "name modules of this model, or use target=all-linear."
        parameters = f" parameters={lora.parameters!r}" if lora.parameters else ""
        raise UsageError(f"lora target={lora.target!r}{parameters}: {error}", fix) from None
    _say_targets(adapted, say)
    return adapted


def _without_adapters(model: PreTrainedModel) -> list[str]:
    """Return names of linear layers that peft refuses: Mamba's kernels read their weights only."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    refused = set()
    for name in {
        path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }:
        try:
            if check is not None:
                check(LoraConfig(), model, name)
        except ValueError:
            refused.add(name)
    return sorted(refused)


def _say_targets(adapted: PeftModel, say: Say) -> None:
    """Say which weights got adapters, and which matrices of the layers stay as they are."""
    base = cast("PreTrainedModel", adapted.get_base_model())
    ends = [
        one.weight for one in (base.get_input_embeddings(), base.get_output_embeddings()) if one is not None
    ]
    adapters = [
        _weight_name(path, getattr(module, "parameter_name", "weight"))
        for path, module in base.named_modules()
        if _adapts(module)
    ]
    frozen = [
        _weight_name(*path.rpartition(".")[::2])
        for path, weight in base.named_parameters()
        if weight.dim() > 1
        and not weight.requires_grad
        and not path.endswith("bias")
        and not any(weight is end for end in ends)
    ]
    rest = [name for name in dict.fromkeys(frozen) if name not in adapters]
    without = f"; none on {', '.join(rest)}" if rest else ""
    say(
        f"lora: adapters on {counted(len(adapters), 'weight')}: {', '.join(dict.fromkeys(adapters))}{without}"
    )


def _adapts(module: nn.Module) -> bool:
    return bool(len(getattr(module, "lora_A", ())) or len(getattr(module, "lora_embedding_A", ())))


def _weight_name(path: str, parameter: str) -> str:
    """Name a weight without its place among the layers: q_proj, experts.gate_up_proj."""
    module = [part for part in path.split(".") if not part.isdigit() and part != "base_layer"][-1]
    return module if parameter == "weight" else f"{module}.{parameter}"


def continue_adapters(model: PreTrainedModel, folder: Path, name: str, *, chosen: bool = False) -> PeftModel:
    """Load the adapters of an earlier run to train them on.

    Args:
        name: what the model is called, to compare with the base that the adapters name.
        chosen: whether the model was named as the one they belong to, by whatever name they call it.

    Raises:
        UsageError: they belong to another model.
    """
    from peft import PeftModel

    base = adapter_base(folder)
    if not chosen and base != name and Path(base).resolve() != Path(name).resolve():
        fix = (
            f"set --model {base}; if that is the same model elsewhere, "
            "fix base_model_name_or_path in adapter_config.json."
        )
        raise UsageError(f"{folder}: these are adapters of {base}; the model is {name}.", fix)
    _silence_peft()
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        fix = (
            "let base_model_name_or_path in their adapter_config.json "
            "name the model that they were trained on."
        )
        raise UsageError(f"{folder}: these adapters do not fit {name}: {reason:.200}", fix) from None


def has_adapted_head(model: PreTrainedModel) -> bool:
    """Say whether low-rank updates go into the head, so that its weight alone is not the whole head."""
    return hasattr(model.get_output_embeddings(), "lora_A")


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """Make a quantized base ready for adapters: everything frozen, norms and embeddings in float32."""
    from peft import prepare_model_for_kbit_training

    prepare: Callable[..., PreTrainedModel] = prepare_model_for_kbit_training
    return prepare(model, use_gradient_checkpointing=False)  # the trainer sees to that


def _train_embeddings(
    model: PreTrainedModel, embeddings: list[str], untrained: Sequence[int], saved: list[str], say: Say
) -> tuple[dict[str, list[int]] | None, list[str]]:
    """Return the rows to train of each table, None if a table is trained in full, and the modules to save."""
    # Of tied tables only the input side is named: the head follows.
    tables = embeddings[:1] if _tied(model) else embeddings
    if len(untrained) <= FEW_TOKENS:
        say(
            f"embeddings: training {counted(len(untrained), 'row')} of {' and '.join(tables)}, "
            "since the model was never trained on these tokens"
        )
        return {table: list(untrained) for table in tables}, saved
    say(
        f"embeddings: {' and '.join(tables)} are trained in full, "
        f"since the model was never trained on {counted(len(untrained), 'token')} of the set"
    )
    return None, [*saved, *tables]


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Names of the input and output embeddings, without the path to them."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [
        next((name for name, module in model.named_modules() if module is one), "")
        for one in embeddings
        if one is not None
    ]
    return [path.rpartition(".")[2] for path in paths]


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _names(text: str) -> list[str]:
    return [name for name in text.split("+") if name]


def _silence_peft() -> None:
    """Silence peft's warning that it saves the resized embeddings, which is intended."""
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")


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
    adapted, dtype = load_adapted(folder, model, say)
    base = cast("PreTrainedModel", adapted.get_base_model())
    tied = bool(base.config.get_text_config().tie_word_embeddings)
    probe = _probe(adapted, embedding_rows(base))
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
        what = f"{partial}: the merged model's logits are off by {difference:.1e} of the largest."
        raise IntegrityError(what, "report this with the adapter's config; the model was not put in place.")
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    say(
        f"merged: {output}; its logits differ from the adapted model's "
        f"by {difference:.1e} of the largest ({dtype})"
    )
    return difference


def load_adapted(folder: Path, model: str | None, say: Say) -> tuple[PeftModel, torch.dtype]:
    """Return adapters on their base in float32, and the dtype that the base is stored in.

    Args:
        folder: of the adapters.
        model: the base, where it is not the one that the adapters name.

    Raises:
        UsageError: there is no base, or the adapters do not fit it.
    """
    name = model or adapter_base(folder)
    base, dtype = _load(name)
    rows = _saved_rows(folder, base)
    if rows > embedding_rows(base):
        say(f"embeddings: grown from {embedding_rows(base):,} to {rows:,} rows, as they were in training")
        grow_embeddings(base, rows)
    if name != adapter_base(folder):
        say(f"base: {name}, as asked; the adapters name {adapter_base(folder)}")
    return continue_adapters(base, folder, name, chosen=model is not None).eval(), dtype


def _load(name: str) -> tuple[PreTrainedModel, torch.dtype]:
    """Return a model in float32, and the dtype it is stored in."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "quantization_config", None) is not None:
            what = f"{name}: is quantized; adapters are added to whole weights."
            raise UsageError(what, "name the unquantized base with --model.")
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        return auto_class(config).from_pretrained(name, dtype=torch.float32, use_safetensors=True), dtype
    except (OSError, ValueError) as error:
        what = f"{name}: the base cannot be loaded: {reason_of(error)}"
        raise UsageError(what, "name it with --model.") from None


def _saved_rows(folder: Path, base: PreTrainedModel) -> int:
    """Embedding rows of the model that the adapters were trained on; 0 when they do not say."""
    from safetensors import safe_open

    embeddings = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embeddings).rpartition(".")[2]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = [key for key in file.keys() if f".{name}." in key]  # noqa: SIM118 -- no dict
        shapes = {key: file.get_slice(key).get_shape() for key in keys}
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
    """Bring along what inference needs beside the weights: tokenizer, processor, template, stop tokens."""
    for path in {path for pattern in READ_WITH for path in folder.glob(pattern)}:
        if path.is_file():
            shutil.copy2(path, target / path.name)
