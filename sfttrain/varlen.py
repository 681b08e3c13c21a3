"""Attention within each document of a flattened row: PyTorch's varlen kernel, and a slow stand-in.

`varlen_attn` of PyTorch takes other arguments in each release:

| torch | arguments after the lengths |
|---|---|
| 2.10 | `is_causal`, no `scale`, no window |
| 2.11 | `scale`, `window_size`; fewer key heads need no word |
| 2.12 to 2.14 | also `enable_gqa`, which fewer key heads need |
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


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
    """Attend inside each document of one flattened row with PyTorch's own kernel.

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
    lengths, longest = _documents(kwargs)
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"varlen attention knows no {', '.join(unknown)}")
    if value.shape[-1] != query.shape[-1]:
        raise ValueError("varlen attention wants values as wide as the keys")
    dtype = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else _compute_dtype(query)
    q, k, v = (states.transpose(1, 2).squeeze(0).to(dtype).contiguous() for states in (query, key, value))
    window = None if sliding_window is None or sliding_window >= longest else sliding_window - 1
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn
    known = _arguments(kernel)
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scaling
    elif scaling is not None:
        q = q * (scaling * q.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window, 0)
    elif window is None:
        options["is_causal"] = True
    else:
        raise ValueError("varlen attention of this PyTorch has no window; torch 2.11 has")
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    output = kernel(q, k, v, lengths, lengths, longest, longest, **options)
    return cast(Tensor, output).unsqueeze(0).to(query.dtype), None


def stand_in_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute what varlen kernels do, a document at a time, in any dtype; arguments as `varlen_forward`.

    It knows caps on scores (`softcap`) and sinks (`s_aux`, float[H]), as FlashAttention 3 and 4 do.
    """
    lengths, _ = _documents(kwargs)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for first, last in zip(lengths[:-1].tolist(), lengths[1:].tolist(), strict=True):
        q, k, v = (states[0, :, first:last] for states in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(last - first, device=q.device)
        back = back[:, None] - back[None]
        hidden = back < 0 if sliding_window is None else (back < 0) | (back >= sliding_window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores).reshape(-1, 1, 1).expand(-1, last - first, 1)], -1)
        shares = functional.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
        outputs.append((shares[..., : last - first] @ v).transpose(0, 1))
    return torch.cat(outputs)[None], None


def _documents(kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    lengths = kwargs.get("cu_seq_lens_q")
    if lengths is None:
        raise ValueError(
            "varlen attention needs document lengths; call model.set_attn_implementation('sdpa') to generate"
        )
    return lengths, int(kwargs["max_length_q"])


def read_signature() -> None:
    """Read what PyTorch's kernel takes, where there is one: a layer that is being compiled cannot."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention import varlen

        _arguments(varlen.varlen_attn)


_known: tuple[Any, tuple[str, ...]] = (None, ())


def _arguments(kernel: Any) -> tuple[str, ...]:
    """Return the names of a kernel's arguments, read once: a compiled layer cannot trace `inspect`."""
    global _known
    if _known[0] is not kernel:
        _known = (kernel, tuple(inspect.signature(kernel).parameters))
    return _known[1]


def _compute_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
