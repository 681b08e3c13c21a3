"""`silu(gate) * up` of a compiled layer, whose gradient is written where its inputs lie.

A compiler fuses the activation and both gradients into one kernel, which holds six tensors as wide as the
inner layer at once: the peak of a step with activation checkpoints. Here three of them serve for all, the
third for the gradient of the product at first and for the product itself at the end, which the projection
behind it wants.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_NAMES = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # all that the forward of such a part uses


@torch.library.custom_op("sfttrain::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, computed in float32 and rounded once."""
    if gate.device.type == "cuda":
        from sfttrain import gated_triton

        return gated_triton.forward(gate.contiguous(), up.contiguous())
    return (functional.silu(gate.float()) * up.float()).to(up.dtype)


@torch.library.custom_op("sfttrain::silu_mul_linear", mutates_args=())
def silu_mul_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """Return silu(gate) * up, projected: [..., inner] and [outer, inner] give [..., outer]."""
    return functional.linear(silu_mul(gate, up), weight)


@torch.library.custom_op("sfttrain::silu_mul_backward_", mutates_args=("gate", "up", "grad"))
def silu_mul_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """Replace `gate` and `up` by their gradients, and `grad` by silu(gate) * up; all are contiguous."""
    if gate.device.type == "cuda":
        from sfttrain import gated_triton

        gated_triton.backward(gate, up, grad)
        return
    g, u, d, share = gate.float(), up.float(), grad.float(), gate.float().sigmoid()
    found = (d * u * share * (1 + g * (1 - share)), d * g * share, g * share * u)
    for tensor, value in zip((gate, up, grad), found, strict=True):
        tensor.copy_(value)


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(up, memory_format=torch.contiguous_format)


@silu_mul_linear.register_fake
def _(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = (states.contiguous() for states in ctx.saved_tensors)
    silu_mul_backward_(gate, up, grad.clone(memory_format=torch.contiguous_format))
    return gate, up


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, weight = ctx.saved_tensors
    gate, up, rows = gate.contiguous(), up.contiguous(), grad.flatten(0, -2)
    inner = (rows @ weight).view(gate.shape)
    silu_mul_backward_(gate, up, inner)
    return gate, up, rows.T @ inner.flatten(0, -2)


silu_mul.register_autograd(_differentiate, setup_context=_keep)
silu_mul_linear.register_autograd(_differentiate_linear, setup_context=_keep)


def gate_in_place(layer: nn.Module) -> None:
    """Let the gated parts of a layer use it: three projections with `silu` between them, and no more."""
    for part in layer.modules():
        code = getattr(type(part).forward, "__code__", None)
        known = code is not None and set(code.co_names) == _NAMES and "forward" not in vars(part)
        if known and type(getattr(part, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation"):
            module: Any = part
            module.forward = types.MethodType(_forward, part)


def gate_as_before(layer: nn.Module) -> None:
    """Undo `gate_in_place`."""
    for part in layer.modules():
        if getattr(vars(part).get("forward"), "__func__", None) is _forward:
            del part.forward


def _forward(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if type(down) is nn.Linear and getattr(down, "bias", None) is None:
        together: Tensor = silu_mul_linear(gate, up, down.weight.to(gate.dtype))
        return together
    projected: Tensor = down(silu_mul(gate, up))  # an adapter's, for one
    return projected
