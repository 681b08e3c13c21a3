"""The best usable attention is chosen, and the reason said."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sftdata.errors import UsageError
from sfttrain.attention import choose_attention, varlen_forward


@pytest.fixture(autouse=True)
def _no_flash_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, set())


def _install(monkeypatch: pytest.MonkeyPatch, packages: set[str]) -> None:
    own = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        if name.startswith("flash_attn"):
            return ModuleSpec(name, None) if name in packages else None
        return own(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def _choose(
    family: str, requested: str = "auto", device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[str, str]:
    return choose_attention(requested, AutoConfig.for_model(family, **changes), device, dtype)


def test_a_cpu_takes_sdpa_and_eager_where_logits_are_capped() -> None:
    assert _choose("llama", device="cpu", dtype=torch.float32)[0] == "sdpa"
    name, reason = _choose("gemma2", device="cpu", dtype=torch.float32)
    assert name == "eager"
    assert "sdpa" in reason


def test_a_gpu_takes_pytorch_s_own_varlen_when_nothing_is_installed() -> None:
    name, reason = _choose("qwen2")
    assert name == "varlen"
    assert "flash_attn_interface is not installed" in reason


@pytest.mark.feature("attention")
def test_an_installed_flash_attention_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, {"flash_attn"})
    assert _choose("qwen2")[0] == "flash_attention_2"
    _install(monkeypatch, {"flash_attn", "flash_attn_interface"})
    assert _choose("qwen2")[0] == "flash_attention_3"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float32}, "16 bit"), ({"attention_dropout": 0.1}, "dropout"), ({"head_dim": 20}, "20 wide")],
)
def test_varlen_is_passed_over_for_a_reason(changes: dict[str, Any], reason: str) -> None:
    name, said = _choose("qwen2", **changes)
    assert name == "flex_attention"
    assert reason in said


def test_capped_logits_keep_varlen_and_sdpa_out() -> None:
    assert _choose("gemma2")[0] == "flex_attention"


@pytest.mark.feature("attention")
@pytest.mark.parametrize("requested", ["varlen", "flash_attention_2"])
def test_asking_for_what_cannot_be_is_an_error_with_a_fix(requested: str) -> None:
    with pytest.raises(UsageError, match="needs CUDA.*Fix: set attention=auto"):
        _choose("llama", requested, device="cpu")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="sdpa, eager"):
        _choose("llama", "fast")


def test_varlen_without_lengths_refuses_rather_than_mixes_documents() -> None:
    states = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="needs document lengths"):
        varlen_forward(torch.nn.Module(), states, states, states, None)


def test_varlen_refuses_what_it_would_ignore() -> None:
    states = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="softcap"):
        varlen_forward(torch.nn.Module(), states, states, states, None, softcap=30.0, cu_seq_lens_q=torch.tensor([0, 6]))
