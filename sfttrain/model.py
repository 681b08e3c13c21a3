"""Load or make the model: dtype, attention, new embeddings, adapters. Never runs code from a repository unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sftdata.errors import UsageError
from sfttrain.config import LoraSettings, TrainConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computes_in_bf16() -> bool:
    """Say whether this machine's GPU computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights: float32 where they are trained, since small updates vanish in 16 bit."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.bfloat16 if config.lora and computes_in_bf16() else torch.float32


def load_config(config: TrainConfig) -> Any:
    """Return the model's transformers config.

    Raises:
        UsageError: there is none, or it cannot be used.
    """
    from transformers import AutoConfig

    source = str(config.init_from_config or config.model)
    try:
        return AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(source, error, config.trust_remote_code) from None


def load_model(config: TrainConfig, model_config: Any, attention: str) -> Any:
    """Return the model with its weights, or with fresh ones under `init_from_config`.

    Raises:
        UsageError: no safetensors, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    dtype = weight_dtype(config)
    if config.init_from_config is not None:
        return AutoModelForCausalLM.from_config(
            model_config, attn_implementation=attention, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
    source = str(config.model)
    _refuse_pickle(Path(source))
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            config=model_config,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            quantization_config=_quantization(config.quantize),
        )
    except (OSError, ValueError, ImportError) as error:
        raise _unusable(source, error, config.trust_remote_code) from None


def embedding_rows(model: Any) -> int:
    """Return how many token ids the model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def add_adapters(model: Any, lora: LoraSettings, activation_checkpointing: bool) -> Any:
    """Freeze the model and add low-rank adapters to it."""
    from peft import LoraConfig, get_peft_model

    targets: Any = lora.target if lora.target == "all-linear" else lora.target.split("+")
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    if activation_checkpointing:
        model.enable_input_require_grads()  # checkpointed layers pass no gradient on to inputs that want none
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        fix = "name modules of this model, or use target=all-linear."
        raise UsageError(f"lora target {lora.target!r}: {error}", fix) from None


def _quantization(kind: str | None) -> Any:
    if kind is None:
        return None
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"quantize={kind} needs the package bitsandbytes.", "pip install bitsandbytes.")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


def _refuse_pickle(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    found = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "no weights"
    fix = "if you trust it, convert it with save_pretrained." if pickles else "name a folder with model.safetensors."
    raise UsageError(f"{folder}: found {found}; expected safetensors.", fix)


def _unusable(source: str, error: Exception, trusted: bool) -> UsageError:
    text = str(error).strip().split("\n")[0]
    if "trust_remote_code" in str(error) and not trusted:
        return UsageError(f"{source}: brings its own code.", "read that code; if you trust it, add --trust-remote-code.")
    return UsageError(f"{source}: transformers cannot load it: {text}", "name a folder or Hub id of a causal language model.")
