"""The two kernels of `gated`; triton comes with PyTorch for CUDA, so this file is read on a GPU only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _forward(gate, up, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward(gate, up, grad, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    tl.store(gate + at, (d * u * share * (1 + g * (1 - share))).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + at, (d * g * share).to(up.dtype.element_ty), mask=inside)
    tl.store(grad + at, (g * share * u).to(grad.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up of contiguous tensors."""
    out = torch.empty_like(up)
    _run(_forward, gate, up, out)
    return out


def backward(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """Write the gradients of `gate` and `up` in their places, and silu(gate) * up in that of `grad`."""
    _run(_backward, gate, up, grad)


def _run(kernel: Any, *tensors: Tensor) -> None:
    count = tensors[0].numel()
    kernel[(triton.cdiv(count, _BLOCK),)](*tensors, count, block=_BLOCK)
