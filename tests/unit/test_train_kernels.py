"""Liger's kernels: on one model only, never its loss, and left out with a reason where they are not proven."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from sftdata.errors import UsageError
from sfttrain import kernels
from sfttrain.config import read_settings
from sfttrain.kernels import add_kernels, apply_liger, prove_kernels
from sfttrain.proofs import Surroundings
from tests import liger_stand_in
from tests.liger_stand_in import CALLS


def _model(family: str = "qwen2") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _add(
    model: Any, asked: str, notes: list[str], dtype: torch.dtype = torch.bfloat16, **options: Any
) -> bool:
    config = read_settings(None, [], {"model": "m", "output": "o", "kernels": asked})
    return add_kernels(config, model, options, Surroundings("cpu", dtype), notes.append)


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a card."""
    liger_stand_in.install(monkeypatch)
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})


@pytest.mark.feature("Liger")
@pytest.mark.usefixtures("_on_a_gpu")
def test_kernels_are_on_this_model_and_on_no_other() -> None:
    from transformers.models.qwen2 import modeling_qwen2

    before = dict(vars(modeling_qwen2))
    model, other = _model(), _model()
    ids = torch.arange(3, 20)[None]
    plain = model(input_ids=ids).logits
    notes: list[str] = []
    assert _add(model, "auto", notes)
    assert notes == [
        "kernels: Liger's for Qwen2MLP, Qwen2RMSNorm, apply_rotary_pos_emb, proven on a tiny qwen2"
    ]
    assert {name for name, value in vars(modeling_qwen2).items() if before.get(name) is not value} == set()
    CALLS.clear()
    torch.testing.assert_close(model(input_ids=ids).logits, plain)
    assert Counter(CALLS) == {"norm": 5, "swiglu": 2, "rope": 2}
    CALLS.clear()
    other(input_ids=ids)
    _model()(input_ids=ids)
    assert not CALLS


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_sees_a_kernel_that_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    where = Surroundings("cpu", dtype)
    assert prove_kernels(_model().config, where, False, {}) < 2

    right = liger_stand_in.liger_rotary_pos_emb

    def wrong(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return right(q, k, cos, sin)[0], k

    monkeypatch.setattr(liger_stand_in, "liger_rotary_pos_emb", wrong)
    assert prove_kernels(_model().config, where, False, {}) > 3
    notes: list[str] = []
    assert not _add(_model(), "auto", notes, dtype)
    assert "kernels: PyTorch's (they round" in notes[0]
    with pytest.raises(UsageError, match=r'kernels="liger" cannot be used: they round .* set kernels="auto"'):
        _add(_model(), "liger", notes, dtype)


@pytest.mark.usefixtures("_on_a_gpu")
def test_what_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    assert not _add(_model("llama"), "auto", notes)
    assert notes == ["kernels: PyTorch's (Liger does not know llama)"]

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(kernels, "apply_liger", broken)
    assert not _add(_model(), "auto", notes)
    assert notes[-1] == "kernels: PyTorch's (they could not be tried on this architecture (no kernel image))"
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    assert not _add(_model(), "auto", notes)
    assert notes[-1].startswith("kernels: PyTorch's (liger_kernel does not import: ")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not _add(_model(), "auto", notes)
    assert notes[-1] == "kernels: PyTorch's (liger_kernel is not installed: pip install 'sftdata[gpu]')"


@pytest.mark.usefixtures("_on_a_gpu")
def test_options_reach_liger_and_its_loss_never_comes() -> None:
    model = _model()
    assert apply_liger(model, {"rope": False, "fused_linear_cross_entropy": True, "unknown": 1}) == [
        "Qwen2MLP",
        "Qwen2RMSNorm",
    ]


def test_liger_is_no_loss_any_more() -> None:
    with pytest.raises(UsageError, match='set kernels="liger"'):
        read_settings(None, [], {"model": "m", "output": "o", "loss": "liger"})
