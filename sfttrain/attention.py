"""Choose an attention implementation that keeps packed documents apart, and say why it was chosen.

| name | isolation comes from | needs |
|---|---|---|
| `flash_attention_3`, `flash_attention_2` | cumulative lengths | CUDA, 16 bit, the package |
| `varlen` | cumulative lengths; PyTorch's own FlashAttention | CUDA, 16 bit |
| `flex_attention` | block mask from position ids | CUDA |
| `sdpa`, `eager` | dense mask from position ids | nothing |
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

from sftdata.errors import UsageError

VARLEN = "varlen"
FLATTENED = frozenset({VARLEN, "flash_attention_2", "flash_attention_3"})  # want one row of documents and their lengths
NAMES = ("auto", "sdpa", "eager", "flex_attention", VARLEN, "flash_attention_2", "flash_attention_3")
_BY_SPEED = {"cuda": ("flash_attention_3", "flash_attention_2", VARLEN, "flex_attention", "sdpa")}
_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    VARLEN: "_supports_flash_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def register_varlen() -> None:
    """Make `attn_implementation="varlen"` known to transformers; no mask is built for it."""
    AttentionInterface.register(VARLEN, varlen_forward)


def choose_attention(requested: str, config: Any, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return (implementation, reason).

    Args:
        requested: one of `NAMES`; `auto` takes the fastest that this model, device and dtype allow.
        config: the model's transformers config.
        device: device type, "cuda" or "cpu".
        dtype: what attention computes in.

    Raises:
        UsageError: the one asked for cannot be used here.
    """
    if requested not in NAMES:
        raise UsageError(f"Unknown attention {requested!r}; expected one of {', '.join(NAMES)}.")
    if requested != "auto":
        obstacle = _obstacle(requested, config, device, dtype)
        if obstacle:
            raise UsageError(f"attention={requested} cannot be used: {obstacle}.", "set attention=auto.")
        return requested, "asked for"
    passed_over: list[str] = []
    for name in _BY_SPEED.get(device, ("sdpa",)):
        obstacle = _obstacle(name, config, device, dtype)
        if not obstacle:
            return name, "; ".join([f"the fastest usable on {device}", *passed_over])
        passed_over.append(f"{name}: {obstacle}")
    return "eager", "; ".join(passed_over)


def _obstacle(name: str, config: Any, device: str, dtype: torch.dtype) -> str:
    """Say what stands against an implementation, or return an empty string."""
    if name == "eager":
        return ""
    if not getattr(_model_class(config), _SUPPORT[name], True):
        return f"{config.model_type} does not support it"
    if name in ("sdpa", "flex_attention"):
        return ""
    if device != "cuda":
        return f"it needs CUDA and the device is {device}"
    if name in _PACKAGES:
        package = _PACKAGES[name]
        return "" if importlib.util.find_spec(package) else f"package {package} is not installed"
    return _varlen_obstacle(config.get_text_config(), dtype)


def _varlen_obstacle(config: Any, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this PyTorch has no torch.nn.attention.varlen"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bit, not in {dtype}"
    if getattr(config, "attention_dropout", 0):
        return "it has no attention dropout"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps attention logits"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return "" if width <= 256 and width % 8 == 0 else f"a head is {width} wide"


def _model_class(config: Any) -> Any:
    """Return the model class of a config, None where only its own code knows."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def varlen_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside each document of one flattened row.

    Args:
        query: float[1, H, T, D].
        key, value: float[1, H_kv, T, D].
        scaling: factor on the scores; None for 1 / sqrt(D).
        sliding_window: how many tokens back, itself included.
        kwargs: `cu_seq_lens_q` int32[N + 1] and `max_length_q` from the collator.

    Returns:
        float[1, T, H, D] and no weights.

    Raises:
        ValueError: without lengths, or asked for what it would have to ignore.
    """
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is None:
        raise ValueError("varlen attention needs document lengths; call model.set_attn_implementation('sdpa') to generate")
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"varlen attention knows no {', '.join(unknown)}")
    dtype = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else _compute_dtype(query)
    q, k, v = (states.transpose(1, 2).squeeze(0).to(dtype) for states in (query, key, value))
    longest = kwargs["max_length_q"]
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    from torch.nn.attention import varlen

    output = varlen.varlen_attn(
        q, k, v, lengths, lengths, longest, longest, scale=scaling, window_size=window, enable_gqa=query.shape[1] != key.shape[1]
    )
    return cast(Tensor, output).unsqueeze(0).to(query.dtype), None


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
