"""PyTorch's varlen kernel as an operator that a compiler does not look into, computed the slow way on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.varlen_signatures import _attend


@torch.library.custom_op("sfttest::varlen", mutates_args=())
def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int) -> Tensor:
    return _attend(q, k, v, lengths, lengths, longest, longest, None, (-1, 0))


@torch.library.custom_op("sfttest::varlen_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate softmax(q k^T s) v by hand, one document and one head at a time."""
    scale, group = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(states.shape) for states in (q, k, v))
    for start, stop in zip(lengths[:-1].tolist(), lengths[1:].tolist(), strict=True):
        hidden = torch.ones(stop - start, stop - start).triu(1).bool()
        for head in range(q.shape[1]):
            places = ((q, head), (k, head // group), (v, head // group), (grad, head))
            one_q, one_k, one_v, one_grad = (states[start:stop, at].float() for states, at in places)
            shares = (one_q @ one_k.T * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            slope = one_grad @ one_v.T
            slope = shares * (slope - (slope * shares).sum(-1, keepdim=True)) * scale
            dv[start:stop, head // group] += shares.T @ one_grad
            dq[start:stop, head] += slope @ one_k
            dk[start:stop, head // group] += slope.T @ one_q
    return dq.to(q), dk.to(k), dv.to(v)


@_varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int) -> Tensor:
    return torch.empty_like(q)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_backward(grad.contiguous(), *ctx.saved_tensors), None, None


_varlen.register_autograd(_differentiate, setup_context=_save)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Attend with the signature of torch 2.11."""
    return _varlen(query, key, value, cu_seq_q, max_q)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `varlen` use it."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def on_cpu() -> list[int]:
    """Let PyTorch's own operator run on a CPU; return the lengths of the rows that it is given, as they come."""
    from torch.nn.attention import varlen

    seen: list[int] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *more: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(len(q))
        out = _attend(q, k, v, lengths, lengths, more[1], more[2], None, (-1, 0))
        return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Tensor, *_: Any
    ) -> Any:
        return _backward(grad.contiguous(), q, k, v, lengths)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    return seen
