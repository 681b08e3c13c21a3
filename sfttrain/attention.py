"""Choose an attention implementation that keeps packed documents apart, and say why it was chosen.

| name | isolation comes from | needs |
|---|---|---|
| `flash_attention_3`, `flash_attention_2` | cumulative lengths | CUDA, 16 bit, the package |
| `varlen` | cumulative lengths; PyTorch's own FlashAttention | CUDA, 16 bit |
| `flex_attention` | block mask from position ids | CUDA |
| `sdpa`, `eager` | dense mask from position ids | nothing |
| `sdpa:flash`, `sdpa:efficient`, `sdpa:math`, `sdpa:cudnn` | as `sdpa`, by this kernel of PyTorch or none | the kernel |

A forced kernel that takes no mask (`sdpa:flash` on a GPU) trains every document in a row of its own; `varlen` is the same
FlashAttention on packed rows.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sftdata.errors import UsageError

VARLEN = "varlen"
FLATTENED = frozenset({VARLEN, "flash_attention_2", "flash_attention_3"})  # want one row of documents and their lengths
FORCED = {
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa:math": SDPBackend.MATH,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
}
NAMES = ("auto", "sdpa", "eager", "flex_attention", VARLEN, "flash_attention_2", "flash_attention_3", *FORCED)
_BY_SPEED = ("flash_attention_3", "flash_attention_2", VARLEN, "flex_attention", "sdpa", "eager")
_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    VARLEN: "_supports_flash_attn",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
}
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


class Choice(NamedTuple):
    """The attention that training uses.

    Attributes:
        name: one of `NAMES`.
        reason: why this one.
        table: a line for each implementation, fastest first: chosen, usable, or what stands against it.
    """

    name: str
    reason: str
    table: str


def register_attention() -> None:
    """Make `varlen`, for which no mask is built, and the forced kernels of sdpa known to transformers."""
    AttentionInterface.register(VARLEN, varlen_forward)
    for name, kernel in FORCED.items():
        AttentionInterface.register(registered_name(name), partial(_forced_forward, kernel))
        AttentionMaskInterface.register(registered_name(name), sdpa_mask)


def registered_name(attention: str) -> str:
    """Return what transformers is told: it takes any name with "flash" in it for a FlashAttention of its own."""
    return attention.replace("flash", "fa") if attention in FORCED else attention


def choose_attention(requested: str, config: Any, device: str, dtype: torch.dtype) -> Choice:
    """Choose an implementation.

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
    obstacles = {name: _obstacle(name, config, device, dtype) for name in _BY_SPEED}
    if requested == "auto":
        # Compiled block masks pay off on a GPU only.
        usable = [name for name in _BY_SPEED if not obstacles[name] and (device == "cuda" or name != "flex_attention")]
        return Choice(usable[0], f"the fastest usable on {device}", _table(obstacles, usable[0]))
    obstacle = obstacles.get(requested) or _obstacle(requested, config, device, dtype)
    if obstacle:
        raise UsageError(f"attention={requested} cannot be used: {obstacle}.", "set attention=auto.")
    return Choice(requested, "asked for", _table(obstacles, requested))


def _table(obstacles: dict[str, str], chosen: str) -> str:
    verdicts = {name: obstacle or "usable" for name, obstacle in obstacles.items()} | {chosen: "chosen"}
    width = max(map(len, verdicts))
    return "\n".join(f"  {name:{width}}  {verdict}" for name, verdict in verdicts.items())


def takes_no_mask(attention: str, config: Any, device: str, dtype: torch.dtype) -> bool:
    """Say whether a forced kernel cannot keep the documents of a packed row apart."""
    return attention in FORCED and bool(_kernel_obstacle(attention, config, device, dtype, masked=True))


def _obstacle(name: str, config: Any, device: str, dtype: torch.dtype) -> str:
    """Say what stands against an implementation, or return an empty string."""
    if name == "eager":
        return ""
    if not getattr(_model_class(config), _SUPPORT[name.partition(":")[0]], True):
        return f"{config.model_type} does not support it"
    if name in FORCED:
        return _kernel_obstacle(name, config, device, dtype, masked=False)
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
    width = _head_width(config)
    return "" if width <= 256 and width % 8 == 0 else f"a head is {width} wide"


def _kernel_obstacle(name: str, config: Any, device: str, dtype: torch.dtype, masked: bool) -> str:
    """Try a kernel on eight tokens, shaped like this model's."""
    text = config.get_text_config()
    heads, width = text.num_attention_heads, _head_width(text)
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    module = cast(Any, torch.nn.Module())
    module.num_key_value_groups, module.is_causal = groups, True
    query, key = (torch.zeros(1, n, 8, width, dtype=dtype, device=device) for n in (heads, heads // groups))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device).tril() if masked else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each kernel that it did not take
            _forced_forward(FORCED[name], module, query, key, key, mask)
    except RuntimeError:
        return f"PyTorch has no such kernel for {dtype} on {device}"
    return ""


def _forced_forward(kernel: SDPBackend, *inputs: Any, **options: Any) -> tuple[Tensor, None]:
    with sdpa_kernel(kernel):
        forward: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
        return forward(*inputs, **options)


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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
