"""What liger-kernel 0.8 does to a Qwen2, with the same signature and the same places, in plain PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CALLS: list[str] = []  # of kernels


class LigerRMSNorm(nn.Module):
    """Only its forward is used, bound to the model's own module."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        CALLS.append("norm")
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class LigerSwiGLUMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append("swiglu")
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def liger_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    CALLS.append("rope")
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(states: Tensor) -> Tensor:
        left, right = states.chunk(2, -1)
        return (states * cos + torch.cat((-right, left), -1) * sin).to(states.dtype)

    return turned(q), turned(k)


def apply_liger_kernel_to_qwen2(
    rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, rms_norm: bool = True,
    swiglu: bool = True, model: Any = None,
) -> None:  # fmt: skip
    from transformers.models.qwen2 import modeling_qwen2

    assert not cross_entropy
    assert not fused_linear_cross_entropy, "the loss stays ours"
    modelling: Any = modeling_qwen2
    if rope:
        modelling.apply_rotary_pos_emb = liger_rotary_pos_emb
    if rms_norm:
        modelling.Qwen2RMSNorm = LigerRMSNorm
    if swiglu:
        modelling.Qwen2MLP = LigerSwiGLUMLP
    base = getattr(model, model.base_model_prefix, model)
    norms = [base.norm]
    for layer in base.layers:
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.forward = MethodType(LigerRMSNorm.forward, norm)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `liger_kernel` be there."""
    package, transformers, patching = (
        ModuleType(f"liger_kernel{tail}") for tail in ("", ".transformers", ".transformers.monkey_patch")
    )
    known: Any = patching
    known.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": apply_liger_kernel_to_qwen2}
    for module in (package, transformers, patching):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: ModuleSpec(name, None) if name == "liger_kernel" else find(name, package),
    )
    CALLS.clear()
