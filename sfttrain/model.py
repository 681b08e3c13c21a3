"""Load or make the model: dtype, attention, quantization. Never runs code from a repository unasked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from sftdata.errors import UsageError
from sfttrain.attention import registered_name
from sfttrain.config import TrainConfig
from sfttrain.packages import require_package

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computes_in_bf16() -> bool:
    """Say whether this machine's GPU computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights: float32 where they are trained, since small updates vanish in 16 bit."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.bfloat16 if config.adapted and computes_in_bf16() else torch.float32


def load_config(config: TrainConfig) -> Any:
    """Return the model's transformers config.

    Raises:
        UsageError: there is none, or it cannot be used.
    """
    from transformers import AutoConfig

    source = str(config.init_from_config or config.model)
    try:
        found = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(source, error, config.trust_remote_code) from None
    for name, value in config.model_init_kwargs.items():
        owner = _owner(found, name)
        if owner is not None:
            setattr(owner, name, value)
        elif config.init_from_config is not None:
            raise UsageError(
                f"model_init_kwargs.{name}: {found.model_type} has no such field in its config.",
                "leave it out.",
            )
    return found


def _owner(model_config: Any, name: str) -> Any:
    """Return the config that has a field: the model's own, or that of its text part; None where it is none of a config."""
    text = model_config.get_text_config()
    return next((one for one in (model_config, text) if hasattr(one, name)), None)


def load_model(config: TrainConfig, model_config: Any, attention: str, device: torch.device) -> Any:
    """Return the model with its weights, or with fresh ones under `init_from_config`.

    Args:
        device: where a quantized base goes, which cannot be moved later; one device per process.

    Raises:
        UsageError: no safetensors, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    dtype = weight_dtype(config)
    if config.init_from_config is not None:
        return AutoModelForCausalLM.from_config(
            model_config,
            attn_implementation=registered_name(attention),
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
        )
    source = str(config.model)
    _refuse_pickle(Path(source))
    arguments = {
        "config": model_config,
        "revision": config.revision,
        "dtype": dtype,
        "attn_implementation": registered_name(attention),
        "use_safetensors": True,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.quantize is not None:
        arguments |= {"quantization_config": _quantization(config.quantize), "device_map": {"": device}}
    try:
        more = {
            name: value
            for name, value in config.model_init_kwargs.items()
            if _owner(model_config, name) is None
        }
        return AutoModelForCausalLM.from_pretrained(source, **(arguments | more))
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise _unusable(source, error, config.trust_remote_code) from None


def disable_cache(model: Any) -> None:
    """Let no part of a model keep keys and values in training: where inner configs differ, theirs is what counts."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def describe_model(model: Any, config: TrainConfig) -> str:
    """Say what was loaded, with what was defaulted."""
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    revision = f", revision {config.revision}" if config.revision else ""
    more = "".join(f", {key}={value}" for key, value in config.model_init_kwargs.items())
    quantized = f", base quantized to {config.quantize}" if config.quantize else ""
    return f"model: {type(model).__name__} in {' and '.join(dtypes)}{quantized}{revision}{more}"


def _quantization(kind: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao-int8":
        require_package("torchao", f"quantize={kind}", "torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    require_package("bitsandbytes", f"quantize={kind}", "quantize")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if computes_in_bf16() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _refuse_pickle(folder: Path) -> None:
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)
    )
    found = f"only {pickles[0]}, a pickle, which can run code when loaded" if pickles else "no weights"
    fix = (
        "if you trust it, convert it with save_pretrained."
        if pickles
        else "name a folder with model.safetensors."
    )
    raise UsageError(f"{folder}: found {found}; expected safetensors.", fix)


def _unusable(source: str, error: Exception, trusted: bool) -> UsageError:
    text = str(error).strip().split("\n")[0]
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown:
        found = f"{source}: model_init_kwargs.{unknown[1]}: neither a field of its config nor an argument of from_pretrained"
        return UsageError(f"{found}.", "leave it out.")
    if "trust_remote_code" in str(error) and not trusted:
        return UsageError(
            f"{source}: brings its own code.", "read that code; if you trust it, add --trust-remote-code."
        )
    return UsageError(
        f"{source}: transformers cannot load it: {text}",
        "name a folder or Hub id of a causal language model.",
    )
