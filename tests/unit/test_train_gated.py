"""The gated activation that differentiates in place has the value and the gradient of the plain one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfttrain.gated import gate_in_place, silu_mul, silu_mul_linear
from tests.liger_stand_in import LigerSwiGLUMLP


def _inputs(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 5, 24), (2, 5, 24), (8, 24))
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def _outcome(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Value and gradients, in float32."""
    value = function(*inputs)
    torch.manual_seed(1)
    value.backward(torch.randn(value.shape).to(value))
    return [value.detach().float(), *(one.grad.float() for one in inputs if one.grad is not None)]


def _plain(gate: Tensor, up: Tensor, weight: Tensor | None = None) -> Tensor:
    product = functional.silu(gate) * up
    return product if weight is None else product @ weight.T


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projected", [False, True])
def test_value_and_gradient_are_those_of_the_plain_formula(
    dtype: torch.dtype, projected: bool, device: str
) -> None:
    count = 3 if projected else 2
    exact = _outcome(
        _plain, [one.detach().float().requires_grad_() for one in _inputs(dtype, device)[:count]]
    )
    found = _outcome(silu_mul_linear if projected else silu_mul, _inputs(dtype, device)[:count])
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < rounding


def test_only_what_is_known_is_replaced() -> None:
    from transformers import LlamaConfig
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=32, intermediate_size=16)
    gelu = LlamaConfig(hidden_size=32, intermediate_size=16, hidden_act="gelu")
    scaled = SimpleNamespace(
        hidden_size=8, intermediate_size=16, hidden_act="silu", mlp_bias=False, mlp_multipliers=(2.0, 3.0)
    )
    known, other, more = LlamaMLP(config), LlamaMLP(gelu), FalconH1MLP(cast(Any, scaled))
    patched = LlamaMLP(config)
    patched.forward = LigerSwiGLUMLP.forward.__get__(patched)
    layer = nn.ModuleList([known, other, more, patched])
    before = patched.forward
    gate_in_place(layer)
    assert ["forward" in vars(part) for part in (known, other, more)] == [True, False, False]
    assert patched.forward is before
