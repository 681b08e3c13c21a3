"""The best usable attention is chosen, and the reason said."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from transformers import AutoConfig

from sftdata.errors import UsageError
from sfttrain import attention
from sfttrain.attention import (
    FORCED,
    Choice,
    choose_attention,
    stand_in_forward,
    takes_no_mask,
    varlen_forward,
)
from tests.varlen_signatures import SIGNATURES


@pytest.fixture(autouse=True)
def _no_flash_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, {})


def _install(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    """Let these distributions be there, each with its module."""
    find, version = importlib.util.find_spec, importlib.metadata.version

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        if name.startswith("flash_attn"):
            return ModuleSpec(name, None) if name in packages.values() else None
        return find(name, package)

    def find_version(name: str) -> str:
        if name.startswith("flash-attn") and name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.0" if name in packages else version(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", find_version)


def _choose(
    family: str,
    requested: str = "auto",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
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
    assert "package flash-attn-3 is not installed" in choice.table
    assert choice.others == ("flex_attention", "sdpa", "eager")


@pytest.mark.feature("attention")
def test_an_installed_flash_attention_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    two, three, four = (
        {"flash-attn": "flash_attn"},
        {"flash-attn-3": "flash_attn_interface"},
        {"flash-attn-4": "flash_attn"},
    )
    for packages, best in ((two, 2), (two | three, 3), (two | three | four, 4), (four, 4)):
        with monkeypatch.context() as patch:
            _install(patch, packages)
            choice = _choose("qwen2")
            assert choice.name == f"flash_attention_{best}"
            assert "varlen" in choice.others


def test_a_module_of_another_package_is_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2 and 4 share a module."""
    _install(monkeypatch, {"flash-attn-4": "flash_attn"})
    assert "package flash-attn is not installed" in _choose("qwen2").table


def test_a_model_object_keeps_its_attention_where_that_is_usable() -> None:
    config = AutoConfig.for_model("qwen2")
    choice = choose_attention("auto", config, "cuda", torch.bfloat16, "sdpa")
    assert (choice.name, choice.reason) == ("sdpa", "the model object has it")
    assert choice.others == ("varlen", "flex_attention", "eager")
    assert choose_attention("auto", config, "cuda", torch.bfloat16, "flash_attention_2").name == "varlen"
    assert choose_attention("eager", config, "cuda", torch.bfloat16, "sdpa").name == "eager"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "16 bit"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"head_dim": 20}, "20 wide"),
    ],
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
        "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "flex_attention", "sdpa", "eager",
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
            with pytest.raises(
                UsageError,
                match='PyTorch has no such kernel for torch.float32 on cpu. Fix: set attention="auto"',
            ):
                _choose("llama", name, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("masked", [True, False])
def test_a_kernel_without_groups_is_given_as_many_heads_of_keys_as_of_queries(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    query, key, value = (torch.randn(2, heads, 8, 4) for heads in (6, 2, 2))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril() if masked else None
    grouped, _ = attention._forced_forward(SDPBackend.MATH, module, query, key, value, mask)
    monkeypatch.setattr(attention, "_UNGROUPED", (SDPBackend.MATH,))
    seen: list[int] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def kernel(query: Any, key: Any, value: Any, **options: Any) -> Any:
        seen.append(key.shape[1])
        assert not options.get("enable_gqa")
        return inner(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    ungrouped, _ = attention._forced_forward(SDPBackend.MATH, module, query, key, value, mask)
    assert seen == [6]
    assert torch.allclose(grouped, ungrouped, atol=1e-6)


@pytest.mark.feature("attention")
@pytest.mark.parametrize(
    ("requested", "why"),
    [
        ("varlen", "needs CUDA"),
        ("flash_attention_2", "needs CUDA"),
        ("flex_attention", "PyTorch has no backward pass of it on the cpu"),
    ],
)
def test_asking_for_what_cannot_be_is_an_error_with_a_fix(requested: str, why: str) -> None:
    with pytest.raises(UsageError, match=f'{why}.*Fix: set attention="auto"'):
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
        varlen_forward(torch.nn.Module(), states, states, states, None, softcap=30.0, **_lengths([0, 6]))


@pytest.mark.feature("attention")
@pytest.mark.parametrize("release", list(SIGNATURES))
@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_varlen_is_called_by_the_signature_that_is_there(
    release: str, window: int | None, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", SIGNATURES[release])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 14, 16).bfloat16() for heads in (4, 2, 2))
    lengths = _lengths([0, 9, 14])
    if release == "2.10" and window == 4:
        with pytest.raises(ValueError, match="has no window"):
            varlen_forward(torch.nn.Module(), query, key, value, None, scale, window, **lengths)
        return
    found, _ = varlen_forward(torch.nn.Module(), query, key, value, None, scale, window, **lengths)
    wanted = [
        _plain(*(states[0, :, part].float() for states in (query, key, value)), scale, window)
        for part in (slice(9), slice(9, 14))
    ]
    torch.testing.assert_close(found[0].float(), torch.cat(wanted), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 4])
def test_the_stand_in_of_the_proof_does_what_the_kernels_do(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 14, 16) for heads in (4, 2, 2))
    found, _ = stand_in_forward(
        torch.nn.Module(), query, key, value, None, 0.2, window, **_lengths([0, 9, 14])
    )
    wanted = [
        _plain(*(states[0, :, part] for states in (query, key, value)), 0.2, window)
        for part in (slice(9), slice(9, 14))
    ]
    torch.testing.assert_close(found[0], torch.cat(wanted))


def _lengths(starts: list[int]) -> dict[str, Any]:
    ends = torch.tensor(starts, dtype=torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": int(ends.diff().max())}


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    """One document, [H, T, D] to [T, H, D], by PyTorch's own attention."""
    row, column = torch.arange(query.shape[1])[:, None], torch.arange(query.shape[1])
    seen = (column <= row) if window is None else (column <= row) & (row - column < window)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query[None], key[None], value[None], seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)
