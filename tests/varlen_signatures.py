"""`torch.nn.attention.varlen.varlen_attn` with the signature of each PyTorch release, computed the slow way on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def varlen_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    return _attend(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, (-1, 0) if is_causal else (-1, -1)
    )


def varlen_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_2_12(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError(
            f"Expect query and key/value to have the same number of heads but got Hq={query.size(1)}"
        )
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


SIGNATURES: dict[str, Callable[..., Tensor]] = {
    "2.10": varlen_2_10, "2.11": varlen_2_11, "2.12": varlen_2_12, "2.13": varlen_2_12, "2.14": varlen_2_12,
}  # fmt: skip


def _attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, starts_key: Tensor | None, longest: int, longest_key: int,
    scale: float | None, window: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Attention one document and one head at a time, in float32: [T, H, D]. The kernel takes 16 bit and int32 lengths only."""
    assert query.dtype == key.dtype == value.dtype
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert starts_key is not None
    assert starts.dtype == torch.int32
    assert torch.equal(starts, starts_key)
    assert longest == longest_key == int(starts.diff().max())
    assert int(starts[-1]) == len(query)
    back, ahead = window
    assert ahead == 0, "training looks back only"
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        documents = []
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            q, k, v = (
                states[start:stop, index].float()
                for states, index in ((query, head), (key, head // group), (value, head // group))
            )
            scores = q @ k.T * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
            seen = [[row - column >= 0 and (back < 0 or row - column <= back) for column in range(stop - start)]
                    for row in range(stop - start)]  # fmt: skip
            documents.append(scores.masked_fill(~torch.tensor(seen), -math.inf).softmax(-1) @ v)
        heads.append(torch.cat(documents))
    return torch.stack(heads, 1).to(query.dtype)
