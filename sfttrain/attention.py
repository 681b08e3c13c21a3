"""Choose an attention implementation that keeps packed documents apart, and say why it was chosen.

| name | isolation comes from | needs |
|---|---|---|
| `flash_attention_4`, `_3`, `_2` | cumulative lengths | CUDA, 16 bit, the package |
| `varlen` | cumulative lengths; PyTorch's own FlashAttention | CUDA, 16 bit |
| `flex_attention` | block mask from position ids | CUDA |
| `sdpa`, `eager` | dense mask from position ids | nothing |
| `sdpa:flash`, `:efficient`, `:math`, `:cudnn` | as `sdpa`, by this kernel of PyTorch or none | the kernel |

A forced kernel that takes no mask (`sdpa:flash` on a GPU) trains every document in a row of its own; `varlen`
is the same FlashAttention on packed rows.

`varlen_attn` of PyTorch takes other arguments in each release:

| torch | arguments after the lengths |
|---|---|
| 2.10 | `is_causal`, no `scale`, no window |
| 2.11 | `scale`, `window_size`; fewer key heads need no word |
| 2.12 to 2.14 | also `enable_gqa`, which fewer key heads need |
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sftdata.errors import UsageError
from sfttrain.forward import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VARLEN = "varlen"
STAND_IN = "documents"  # takes what the kernels of flattened rows take, in any dtype, on any device
# Name, and what it needs, as transformers checks it: distribution, module, major compute capability.
_PACKAGES = {
    "flash_attention_4": ("flash-attn-4", "flash_attn", 9),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface", 8),
    "flash_attention_2": ("flash-attn", "flash_attn", 8),
}
FLATTENED = frozenset({VARLEN, STAND_IN, *_PACKAGES})  # want one row of documents and their lengths
FLATTENED_DEVICES = {"cuda"}  # where their kernels run
FORCED = {
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa:math": SDPBackend.MATH,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
}
_UNGROUPED = (SDPBackend.EFFICIENT_ATTENTION,)  # kernels that take as many heads of keys as of queries
ASKED = "asked for"  # the reason for a choice that has no others
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_BY_SPEED = (*_PACKAGES, VARLEN, "flex_attention", "sdpa", "eager")
NAMES = ("auto", "sdpa", "eager", "flex_attention", VARLEN, *_PACKAGES, *FORCED)
_SUPPORT: dict[str, str] = {
    "sdpa": "_supports_sdpa",
    "flex_attention": "_supports_flex_attn",
    **dict.fromkeys(FLATTENED, "_supports_flash_attn"),
}


class Choice(NamedTuple):
    """The attention that training uses, unless the proof fails on it.

    Attributes:
        name: one of `NAMES`.
        reason: why this one.
        table: a line for each implementation, fastest first: chosen, usable, or why it is not.
        others: what to try next where the proof fails, fastest first; none for one that was asked for.
    """

    name: str
    reason: str
    table: str
    others: tuple[str, ...] = ()


def register_attention() -> None:
    """Register `varlen` and its stand-in, which take no mask, and the forced kernels of sdpa."""
    AttentionInterface.register(VARLEN, varlen_forward)
    AttentionInterface.register(STAND_IN, stand_in_forward)
    for name, kernel in FORCED.items():
        AttentionInterface.register(registered_name(name), partial(_forced_forward, kernel))
        AttentionMaskInterface.register(registered_name(name), sdpa_mask)


def registered_name(attention: str) -> str:
    """Return the name for transformers, which takes any with "flash" for a FlashAttention."""
    return attention.replace("flash", "fa") if attention in FORCED else attention


class AutoClass(Protocol):
    """A class of transformers that finds the model of a config."""

    def from_config(self, config: PreTrainedConfig, **options: object) -> PreTrainedModel:
        """Return a fresh model."""

    def from_pretrained(self, name: str | Path, **options: object) -> PreTrainedModel:
        """Return a model with its weights."""


def auto_class(config: PreTrainedConfig, pictured: bool = False) -> AutoClass:
    """Return the class of transformers that loads the model of a config.

    Args:
        pictured: the model is to take pictures; else it does where its family has no other class.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds: tuple[Any, Any] = AutoModelForCausalLM, AutoModelForImageTextToText
    reads, sees = (type(config) in kind._model_mapping for kind in kinds)
    return cast("AutoClass", kinds[pictured or (sees and not reads)])


def attentions(attention: str, config: PreTrainedConfig, pictured: bool) -> str | dict[str, str]:
    """Return what to ask transformers for: a vision tower has no documents, so it keeps to plain sdpa."""
    name = registered_name(attention)
    if not pictured:
        return name
    towers = {part: "sdpa" for part in config.sub_configs if part != "text_config"}
    return {"": name, "text_config": name, **towers}


def choose_attention(
    requested: str, config: PreTrainedConfig, device: str, dtype: torch.dtype, own: str | None = None
) -> Choice:
    """Choose an implementation.

    Args:
        requested: one of `NAMES`; `auto` takes the fastest that this model, device and dtype allow.
        config: the model's transformers config.
        device: device type, "cuda" or "cpu".
        dtype: what attention computes in.
        own: the one that a model object was made with, which `auto` keeps where it is usable.

    Raises:
        UsageError: the one asked for cannot be used here.
    """
    if requested not in NAMES:
        raise UsageError(f"Unknown attention {requested!r}; expected one of {', '.join(NAMES)}.")
    reasons = {name: unsupported_reason(name, config, device, dtype) for name in _BY_SPEED}
    if requested == "auto":
        usable = [name for name in _BY_SPEED if not reasons[name]]
        if (
            own in NAMES
            and own != "auto"
            and not (reasons.get(own) or unsupported_reason(own, config, device, dtype))
        ):
            others = tuple(name for name in usable if name != own)
            return Choice(own, "the model object has it", _table(reasons, own), others)
        return Choice(
            usable[0], f"the fastest usable on {device}", _table(reasons, usable[0]), tuple(usable[1:])
        )
    reason = reasons.get(requested) or unsupported_reason(requested, config, device, dtype)
    if reason:
        raise UsageError(f"attention={requested} cannot be used: {reason}.", "set attention=auto.")
    return Choice(requested, ASKED, _table(reasons, requested))


def _table(reasons: dict[str, str], chosen: str) -> str:
    verdicts = {name: reason or "usable" for name, reason in reasons.items()} | {chosen: "chosen"}
    width = max(map(len, verdicts))
    return "\n".join(f"  {name:{width}}  {verdict}" for name, verdict in verdicts.items())


def takes_no_mask(attention: str, config: PreTrainedConfig, device: str, dtype: torch.dtype) -> bool:
    """Say whether a forced kernel cannot keep the documents of a packed row apart."""
    return attention in FORCED and bool(_kernel_reason(attention, config, device, dtype, masked=True))


def unsupported_reason(name: str, config: PreTrainedConfig, device: str, dtype: torch.dtype) -> str:
    """Return why an implementation is unsupported here, or an empty string."""
    if name == "eager":
        return ""
    if not getattr(_model_class(config), _SUPPORT[name.partition(":")[0]], True):
        return f"{config.model_type} does not support it"
    if name in FORCED:
        return _kernel_reason(name, config, device, dtype, masked=False)
    if name == "flex_attention" and device in ("cpu", "mps"):
        return f"PyTorch has no backward pass of it on the {device}"
    if name in ("sdpa", "flex_attention"):
        return ""
    if device not in FLATTENED_DEVICES:
        return f"it needs CUDA and the device is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in 16 bit, not in {dtype}"
    if name != "flash_attention_2" and drops_out(config):
        return "it has no attention dropout"
    return _package_reason(name, device) if name in _PACKAGES else _varlen_reason(text_config(config))


def drops_out(config: PreTrainedConfig) -> bool:
    """Say whether a model drops weights of its attention in training."""
    return any(getattr(text_config(config), name, False) for name in _DROPOUTS)


def _package_reason(name: str, device: str) -> str:
    distribution, module, capability = _PACKAGES[name]
    if not _installed(distribution, module):
        return f"package {distribution} is not installed"
    from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

    if name not in FLASH_ATTN_KERNEL_FALLBACK:
        return "this transformers does not know it"
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < capability:
        return f"it needs a GPU of compute capability {capability}.0"
    return ""


def _installed(distribution: str, module: str) -> bool:
    """Check both: FlashAttention 2 and 4 share a module, and a module may be left without its package."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(module) is not None


def _varlen_reason(config: PreTrainedConfig) -> str:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this PyTorch has no torch.nn.attention.varlen"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "the model caps attention logits"
    width = head_width(config)
    return "" if width <= 256 and width % 8 == 0 else f"a head is {width} wide"


def _kernel_reason(name: str, config: PreTrainedConfig, device: str, dtype: torch.dtype, masked: bool) -> str:
    """Try a kernel on eight tokens, shaped like this model's."""
    text = text_config(config)
    heads, width = text.num_attention_heads, head_width(text)
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    module = cast(Any, torch.nn.Module())
    module.num_key_value_groups, module.is_causal = groups, True
    query, key = (torch.zeros(1, n, 8, width, dtype=dtype, device=device) for n in (heads, heads // groups))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device).tril() if masked else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each kernel that was not chosen
            _forced_forward(FORCED[name], module, query, key, key, mask)
    except RuntimeError:
        return f"PyTorch has no such kernel for {dtype} on {device}"
    return ""


def _forced_forward(
    kernel: SDPBackend, module: Any, query: Tensor, key: Tensor, value: Tensor, *inputs: Any, **options: Any
) -> tuple[Tensor, None]:
    if kernel in _UNGROUPED and query.shape[1] > key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        # Hide the groups, so that transformers does not request them from the kernel.
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    with sdpa_kernel(kernel):
        forward: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
        return forward(module, query, key, value, *inputs, **options)


def head_width(config: PreTrainedConfig) -> int:
    """Return how many numbers a head of attention has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class of a config, None where only its own code knows."""
    mapping = cast(Any, auto_class(config))._model_mapping
    known: type[PreTrainedModel] | None = mapping.get(type(config), None)
    return known


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
