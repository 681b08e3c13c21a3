"""The best usable attention is chosen, and the reason said."""

from __future__ import annotations

import importlib.util
import re
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sftdata.errors import UsageError
from sfttrain.attention import FORCED, Choice, choose_attention, takes_no_mask, varlen_forward


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
) -> Choice:
    return choose_attention(requested, AutoConfig.for_model(family, **changes), device, dtype)


def test_a_cpu_takes_sdpa_and_eager_where_logits_are_capped() -> None:
    assert _choose("llama", device="cpu", dtype=torch.float32)[0] == "sdpa"
    choice = _choose("gemma2", device="cpu", dtype=torch.float32)
    assert choice.name == "eager"
    assert re.search("sdpa +gemma2 does not support it", choice.table)


def test_a_gpu_takes_pytorch_s_own_varlen_when_nothing_is_installed() -> None:
    choice = _choose("qwen2")
    assert choice.name == "varlen"
    assert "flash_attn_interface is not installed" in choice.table


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
    choice = _choose("qwen2", **changes)
    assert choice.name == "flex_attention"
    assert reason in choice.table


def test_capped_logits_keep_varlen_and_sdpa_out() -> None:
    assert _choose("gemma2")[0] == "flex_attention"


@pytest.mark.feature("attention")
def test_a_table_says_of_every_implementation_what_came_of_it() -> None:
    lines = [line.split(maxsplit=1) for line in _choose("qwen2").table.splitlines()]
    assert [name for name, _ in lines] == [
        "flash_attention_3", "flash_attention_2", "varlen", "flex_attention", "sdpa", "eager",
    ]  # fmt: skip
    assert [name for name, verdict in lines if verdict == "chosen"] == ["varlen"]
    assert [name for name, verdict in lines if verdict == "usable"] == ["flex_attention", "sdpa", "eager"]


@pytest.mark.feature("attention")
def test_a_forced_kernel_of_sdpa_is_tried_before_it_is_promised() -> None:
    for name in FORCED:
        if name in ("sdpa:flash", "sdpa:math"):
            assert _choose("llama", name, device="cpu", dtype=torch.float32)[:2] == (name, "asked for")
            assert not takes_no_mask(name, AutoConfig.for_model("llama"), "cpu", torch.float32)
        else:
            with pytest.raises(UsageError, match="PyTorch has no such kernel for torch.float32 on cpu. Fix: set attention=auto"):
                _choose("llama", name, device="cpu", dtype=torch.float32)


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
