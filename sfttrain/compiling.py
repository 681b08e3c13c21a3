"""Compile the repeated layer of a model and the arithmetic of the loss: once each, for any documents.

The layer is compiled together with its activation checkpoint, so that the casts of the weights, the norms,
the rotary factors and the activation fuse into a few kernels, and the backward pass recomputes only what it
needs. The number of documents and the longest one are symbols of the graph; the length of a row is a
constant. A checkpoint recomputes all but attention where keeping what attention gave costs no peak, or where
memory allows it: long documents spend most of their time there.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from sftdata.errors import UsageError
from sftdata.output import counted
from sfttrain.attention import head_width, read_signature
from sfttrain.config import TrainConfig
from sfttrain.device import sharded, weight_bytes
from sfttrain.forward import text_config
from sfttrain.gated import gate_as_before, gate_in_place

if TYPE_CHECKING:
    from transformers import TrainingArguments

ENOUGH_STEPS = 50  # what a compilation costs, a step must win back so many times
_DOCUMENT_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
# What selective checkpoints keep: operators whose first output is that of attention.
ATTENTION = [
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    *(f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
    "aten::_scaled_dot_product_flash_attention_for_cpu",
]


class Compilation(NamedTuple):
    """What is compiled: `layers` (and the loss), `loss`, or `none`; why; do checkpoints keep attention."""

    what: str
    reason: str
    keep: bool = False


def choose_compile(
    config: TrainConfig, args: TrainingArguments, model: nn.Module, steps: int, kernels: bool
) -> Compilation:
    """Choose what to compile.

    Args:
        config: `compile=auto` compiles on a GPU, where the run is long enough.
        args: of transformers' Trainer.
        model: to be trained.
        steps: of the run.
        kernels: whether the layers run other kernels already.

    Raises:
        UsageError: what was asked for cannot be compiled here.
    """
    asked = config.compile
    if asked == "none":
        return Compilation("none", "as asked")
    reason = _unsupported_reason(args, model, asked)
    if reason:
        if asked != "auto":
            raise UsageError(f"compile={asked} cannot be used: {reason}.", "set compile=none.")
        return Compilation("none", reason)
    if asked != "auto":
        return Compilation(asked, "as asked")
    if args.device.type != "cuda":
        return Compilation("none", "it pays on a GPU only")
    if steps < ENOUGH_STEPS:
        return Compilation("none", f"{counted(steps, 'step')}, fewer than {ENOUGH_STEPS}")
    if kernels:
        return Compilation("loss", "the layers run Liger's kernels")
    return Compilation("layers", counted(steps, "step"))


def _unsupported_reason(args: TrainingArguments, model: nn.Module, asked: str) -> str:
    if args.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if args.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "there is no C++ compiler"
    if sharded(args):
        return "the layers are sharded"
    if asked == "loss":
        return ""
    if getattr(args, "sequence_parallel", 1) > 1:
        return "ranks exchange heads inside the layers"
    if getattr(model, "is_quantized", False):
        return "the layers are quantized"
    if (getattr(args, "activation_checkpointing_kwargs", None) or {}).get("offload"):
        return "activations are offloaded"
    if next(repeated_layers(model), None) is None:
        return f"{type(model).__name__} has no repeated layer of transformers'"
    return ""


def repeated_layers(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    """Yield the outermost layers that transformers would checkpoint."""
    for child in model.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from repeated_layers(child)


def start_compiled(model: nn.Module, choice: Compilation) -> str:
    """Compile as chosen, at the next forward; return what that is, in words."""
    fused = _fused(model)
    parts = ["the loss"] if fused is not None else []
    if fused is not None:
        fused.compiles_loss = True
    if choice.what == "layers":
        kept = " (attention kept)" * choice.keep
        parts.insert(0, f"{counted(compile_layers(model, keep=choice.keep), 'layer')} as one{kept}")
    return " and ".join(parts) or "nothing"


def stop_compiled(model: nn.Module) -> None:
    """Undo `start_compiled`."""
    fused = _fused(model)
    if fused is not None:
        fused.compiles_loss = False
    restore_layers(model)


def _fused(model: nn.Module) -> Any:
    """Return the module whose forward is ours, None where the loss is the model's own."""
    return next((module for module in model.modules() if "compiles_loss" in vars(module)), None)


def compile_layers(
    model: nn.Module, backend: str = "inductor", in_place: bool | None = None, keep: bool = False
) -> int:
    """Let the layers of a model train compiled, until `restore_layers`; return how many there are.

    Evaluation and generation are left as they are.

    Args:
        model: its layers are those that transformers would checkpoint.
        backend: of `torch.compile`.
        in_place: whether the gradient of gated activations is written where they lie; default: on a GPU.
        keep: let activation checkpoints keep what attention gave.
    """
    read_signature()
    known = [part for part in torch.compiler.config.dynamic_sources.split(",") if part]
    ours = [f"L['inputs']['{name}']" for name in _LONGEST]
    torch.compiler.config.dynamic_sources = ",".join(dict.fromkeys([*known, *ours]))
    # DDP overlaps by the hooks of each layer; to split the graph of one, the compiler would have to open its
    # checkpoint.
    torch._dynamo.config.optimize_ddp = False
    layers = list(repeated_layers(model))
    for layer in layers:
        module: Any = layer
        if next(model.parameters()).device.type == "cuda" if in_place is None else in_place:
            gate_in_place(layer)
        kind = module.__class__
        module.__class__ = _compiled_kind(getattr(kind, "plain_kind", kind), backend, keep)
    return len(layers)


def layers_compiled(model: nn.Module) -> bool:
    """Say whether `compile_layers` acts on a model."""
    return any(hasattr(type(module), "plain_kind") for module in model.modules())


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    gate_as_before(model)
    for layer in repeated_layers(model):
        _recompute(layer, None)
    for module in model.modules():
        module.__class__ = getattr(type(module), "plain_kind", type(module))


@cache
def _but_attention() -> Callable[[], Any]:
    """Return the contexts of a checkpoint that keeps what attention gave."""
    names = (name.split("::") for name in ATTENTION)
    packets = [getattr(getattr(torch.ops, space), name, None) for space, name in names]
    operators = [packet.default for packet in packets if packet is not None]
    return partial(create_selective_checkpoint_contexts, operators)


def _recompute(layer: nn.Module, contexts: Callable[[], Any] | None) -> None:
    """Set the contexts of a layer's checkpoint, None for those that recompute everything.

    Every step: transformers turns checkpoints on anew when training begins.
    """
    module: Any = layer
    own = getattr(layer, "_gradient_checkpointing_func", None)
    if isinstance(own, partial) and own.keywords.get("context_fn") is not contexts:
        options = {name: value for name, value in own.keywords.items() if name != "context_fn"}
        more = {} if contexts is None else {"context_fn": contexts}
        module._gradient_checkpointing_func = partial(own.func, *own.args, **options, **more)


def free_to_keep(model: nn.Module, tokens: int, accumulated: bool) -> bool:
    """Say whether a step peaks no higher where checkpoints keep what attention gave.

    It is let go of layer by layer in the backward pass, while gradients are added: where a layer's gradient
    takes more than its input and attention do, the peak is the end, when all gradients are there.

    Args:
        tokens: of a batch.
        accumulated: gradients of earlier micro-batches are there from the start.
    """
    layer, config = next(repeated_layers(model), None), text_config(cast(Any, model).config)
    if layer is None or accumulated:
        return False
    # The residual stream has the dtype of the embeddings, attention that of the products.
    states = config.hidden_size * next(model.parameters()).element_size()
    kept = 2 * config.num_attention_heads * head_width(config)
    return bool(tokens * (states + kept) <= weight_bytes(layer, trained=True))


@cache
def _compiled_kind(kind: Any, backend: str, keep: bool) -> type[nn.Module]:
    """Return a subclass whose training calls are compiled, `__call__` and checkpoint included."""

    def plain(layer: nn.Module, hidden: Tensor, *more: Any, **inputs: Any) -> Any:
        return kind.__call__(layer, hidden, *more, **inputs)

    compiled: Callable[..., Any] = torch.compile(plain, backend=backend)

    def call(self: nn.Module, *given: Any, **inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return kind.__call__(self, *given, **inputs)
        _recompute(self, _but_attention() if keep else None)
        for name in _DOCUMENT_LENGTHS:
            if isinstance(inputs.get(name), Tensor):
                torch._dynamo.maybe_mark_dynamic(inputs[name], 0)
        return compiled(self, *given, **inputs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**names, "__call__": call, "plain_kind": kind})
