"""The chunked loss is the plain loss: value, gradients, counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfttrain import loss as loss_module
from sfttrain.loss import Head, LossOutput, fuse_loss, supervised_loss

VOCABULARY, WIDTH = 211, 24


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, 17, WIDTH, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.3).to(dtype).requires_grad_()
    bias = (torch.randn(VOCABULARY) * 0.1).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (2, 17))
    labels[torch.rand(2, 17) < 0.4] = -100
    return hidden, weight, bias, labels


def _plain(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Full logits, full softmax: the slow way."""
    logits = (hidden @ weight.T + bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), reduction="sum")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five positions a chunk, so that the last one is short."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 5 * 4 * VOCABULARY)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_value_and_gradients_are_those_of_the_plain_loss(scale: float, softcap: float | None) -> None:
    hidden, weight, bias, labels = _inputs()
    expected = _plain(hidden, weight, bias, labels, scale, softcap)
    expected.backward()
    wanted = [tensor.grad.clone() for tensor in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    found, _, supervised, _ = supervised_loss(hidden, labels, Head(weight, bias, scale, softcap))
    (found * 1.0).backward()
    count = int((labels[:, 1:] != -100).sum())
    assert int(supervised) == count
    assert (found / count).item() == pytest.approx((expected / count).item(), abs=1e-6)
    for tensor, gradient in zip((hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(tensor.grad / count, gradient / count, atol=1e-6, rtol=1e-5)


def test_gradient_follows_what_is_done_with_the_loss() -> None:
    hidden, weight, bias, labels = _inputs()
    (supervised_loss(hidden, labels, Head(weight, bias))[0] * 0.25).backward()
    quarter = weight.grad.clone()
    weight.grad = None
    supervised_loss(hidden, labels, Head(weight, bias))[0].backward()
    torch.testing.assert_close(quarter * 4, weight.grad)


def test_bfloat16_is_within_its_rounding() -> None:
    hidden, weight, bias, labels = _inputs(torch.bfloat16)
    exact = _plain(hidden.float(), weight.float(), bias.float(), labels, 1.0, None)
    gradient = torch.autograd.grad(exact, weight)[0]
    found, _, _, _ = supervised_loss(hidden, labels, Head(weight, bias))
    found.backward()
    assert found.item() == pytest.approx(exact.item(), rel=1e-2)
    assert float((weight.grad.float() - gradient.float()).norm() / gradient.float().norm()) < 1e-2


def test_autocast_keeps_the_gradient_of_float32_weights_in_float32() -> None:
    hidden, weight, bias, labels = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _, _, _ = supervised_loss(hidden, labels, Head(weight, bias))
    found.backward()
    assert weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(_plain(hidden, weight, bias, labels, 1.0, None), weight)[0]
    assert float((weight.grad - exact).norm() / exact.norm()) < 1e-2


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, labels = _inputs()
    supervised_loss(hidden, labels, Head(weight.detach()))[0].backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_a_fully_masked_batch_gives_zero_loss_and_zero_gradient() -> None:
    hidden, weight, bias, labels = _inputs()
    found, correct, supervised, _ = supervised_loss(hidden, torch.full_like(labels, -100), Head(weight, bias))
    found.backward()
    assert (found.item(), int(correct), int(supervised)) == (0.0, 0, 0)
    assert float(weight.grad.abs().sum()) == 0.0
    assert float(hidden.grad.abs().sum()) == 0.0


def test_correct_tokens_are_those_that_argmax_finds() -> None:
    hidden, weight, bias, labels = _inputs()
    with torch.no_grad():
        best = (hidden @ weight.T + bias).argmax(-1)
        labels[0, 1:] = torch.where(labels[0, 1:] != -100, best[0, :-1], -100)  # half of them right
        _, correct, _, _ = supervised_loss(hidden, labels, Head(weight, bias))
    targets = labels[:, 1:]
    assert int(correct) == int(((best[:, :-1] == targets) & (targets != -100)).sum()) > 0


def test_pytorch_s_own_engine_agrees() -> None:
    hidden, weight, bias, labels = _inputs()
    ours = supervised_loss(hidden, labels, Head(weight, bias))[0]
    theirs = supervised_loss(hidden, labels, Head(weight, bias), "torch")[0]
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)


def test_a_fused_model_still_gives_logits_when_asked() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(VOCABULARY, (1, 9))
    expected = model(input_ids=ids, labels=ids)
    fuse_loss(model)
    fused = model(input_ids=ids, labels=ids, skip_logits=True)
    assert isinstance(fused, LossOutput)
    assert fused.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert model(input_ids=ids, labels=ids).logits.shape == (1, 9, VOCABULARY)
    assert model(input_ids=ids).logits.shape == (1, 9, VOCABULARY)


def test_the_largest_tensor_is_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, labels = _inputs()
    seen: list[int] = []
    own = loss_module._chunk
    monkeypatch.setattr(
        loss_module, "_chunk", lambda inputs, *rest: seen.append(len(inputs)) or own(inputs, *rest)
    )
    supervised_loss(hidden, labels, Head(weight, bias))
    assert max(seen) == 5
    assert sum(seen) == int((labels[:, 1:] != -100).sum())


@pytest.mark.feature("memory")
@pytest.mark.parametrize(("free", "rows"), [(40 << 30, 512), (1 << 30, 256), (700 << 20, 128), (0, 32)])
def test_chunks_take_a_quarter_of_the_free_memory_and_no_more_than_pays(
    free: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "room", lambda: free + 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    assert loss_module.chunk_rows("cuda", 1 << 18, 1 << 20) == rows
    large = loss_module.chunk_rows("cuda", 1 << 18, 1 << 20, beside=1 << 30)  # the gradient of a head
    assert large == (1024 if rows == 512 else rows)
