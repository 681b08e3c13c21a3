"""Packed = unpacked: every document has the loss it has alone, and feels nothing of its neighbours."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from sfttrain.attention import VARLEN, register_attention
from sfttrain.data import Collator, Row
from sfttrain.proofs import Proof, Surroundings, prove
from sfttrain.tiny import shrunk
from tests.varlen_signatures import SIGNATURES

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo", "smollm3"]
NO_SDPA = {"gemma2"}  # it caps attention logits; transformers refuses
NO_FLEX = {"gpt2"}  # transformers refuses
QUICK = "llama"  # the long suite tries all
LENGTHS = (13, 5, 21, 9)


def _long(name: str, *more: str) -> Any:
    return pytest.param(name, *more, marks=() if name == QUICK else pytest.mark.slow)


PATHS = [
    _long(name, path)
    for name in FAMILIES
    for path in ("eager", "sdpa")
    if path == "eager" or name not in NO_SDPA
]


@pytest.mark.feature("attention")
@pytest.mark.parametrize(("name", "attention"), PATHS)
def test_every_document_has_the_loss_it_has_alone(name: str, attention: str) -> None:
    model = _model(name, attention)
    _assert_losses_equal(model, Collator(flatten=False))


@pytest.mark.parametrize(("name", "attention"), PATHS)
def test_changing_a_document_leaves_the_next_bitwise_unchanged(name: str, attention: str) -> None:
    model = _model(name, attention)
    documents = _documents()
    before = _logits(model, documents)
    documents[0] = (documents[0] + 17) % 90 + 3
    after = _logits(model, documents)
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])


@pytest.mark.torture  # every family compiles its kernels anew
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_FLEX])
def test_flex_attention_keeps_documents_apart(name: str) -> None:
    torch._dynamo.reset()
    _assert_losses_equal(_model(name, "flex_attention"), Collator(flatten=False))


@pytest.mark.parametrize("name", [_long(name) for name in FAMILIES if name not in ("gemma2", "gpt2")])
def test_varlen_attention_keeps_documents_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU; here a slow one stands in, so what is tested is everything that we hand to it."""
    kernel = SIGNATURES["2.13"]

    @functools.wraps(kernel)
    def in_16_bit(*states: Any, **options: Any) -> Any:
        """The rest of this model is in float32, which the kernel does not take."""
        query, key, value, *lengths = states
        return kernel(query.bfloat16(), key.bfloat16(), value.bfloat16(), *lengths, **options).to(query.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", in_16_bit)
    register_attention()
    model, reference = _model(name, VARLEN), _model(name, "eager")
    packed = torch.split(_logits(model, _documents(), Collator(flatten=True)), list(LENGTHS))
    with torch.no_grad():
        alone = [reference(input_ids=document[None]).logits[0] for document in _documents()]
    spread = torch.cat(alone).std()
    for found, wanted in zip(packed, alone, strict=True):
        assert (found - wanted).abs().max() < 0.05 * spread  # its products are in 16 bit


@pytest.mark.parametrize("name", [_long("mamba2"), _long("qwen3_next")])
def test_architectures_with_a_running_state_are_found_to_leak(name: str) -> None:
    proof = prove(AutoConfig.for_model(name), "eager", Surroundings("cpu", torch.float32))
    assert not proof.isolated
    assert proof.leak > 1e-3


@pytest.mark.parametrize("name", [_long(name) for name in FAMILIES])
def test_the_proof_holds_for_dense_families_at_their_default_size(name: str) -> None:
    proof = prove(AutoConfig.for_model(name), "eager", Surroundings("cpu", torch.float32))
    assert proof.isolated
    assert proof.leak == 0.0
    assert proof.fuses


@pytest.mark.parametrize(
    ("flaw", "apart", "isolated"),
    [
        ({}, True, True),
        ({"leak": 1e-3}, False, False),
        ({"difference": 1e-3}, False, False),
        ({"rounding": 9.0}, True, False),
    ],
)
def test_documents_are_isolated_only_where_nothing_leaks(
    flaw: dict[str, float], apart: bool, isolated: bool
) -> None:
    proof = Proof(**({"difference": 1e-6, "leak": 0.0, "loss_difference": None} | flaw))
    assert (proof.apart, proof.isolated) == (apart, isolated)


def _model(name: str, attention: str) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        next(shrunk(AutoConfig.for_model(name))), attn_implementation=attention
    ).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(
                weight, std=1.2 / weight.shape[-1] ** 0.5
            )  # far enough from zero for a leak to show
    model.config.use_cache = False
    return model


def _documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS]


def _row(documents: list[Tensor]) -> Row:
    ids = torch.cat(documents).numpy().astype(np.int32)
    return Row(ids, ids.copy(), np.array([len(document) for document in documents], np.int32))


def _logits(model: Any, documents: list[Tensor], collate: Collator | None = None) -> Tensor:
    batch = (collate or Collator(flatten=False))([_row(documents)])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[0]


def _assert_losses_equal(model: Any, collate: Collator) -> None:
    packed = torch.split(_logits(model, _documents(), collate), list(LENGTHS))
    for document, logits in zip(_documents(), packed, strict=True):
        with torch.no_grad():
            alone = model(input_ids=document[None]).logits[0]  # the model's own defaults: causal, no packing
        expected = cross_entropy(alone[:-1], document[1:]).item()
        assert cross_entropy(logits[:-1], document[1:]).item() == pytest.approx(expected, abs=1e-5)
