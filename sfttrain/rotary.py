"""Rotary factors that depend on the longest position (longrope, dynamic NTK), kept apart by document."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfttrain.shrink import DYNAMIC_ROPES, dynamic_ropes


def keep_rotary_apart(model: nn.Module) -> int:
    """Let rotary modules use each document's own longest position; return how many modules that are.

    Documents are known by positions that begin again at 0, so padding must begin again too.
    """
    dynamic = [module for module in model.modules() if _is_dynamic(module)]
    for module in dynamic:
        _wrap(module)
    return len(dynamic)


def _is_dynamic(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return hasattr(module, "forward") and any(kind in DYNAMIC_ROPES for kind in kinds)


def _wrap(module: Any) -> None:
    own_forward, fresh = module.forward, dict(_state(module))
    ropes = list(dynamic_ropes(module.config))
    limit = min(length for _, length in ropes)
    two_sides = all(kind == "longrope" and length == limit for kind, length in ropes)

    def forward(self: Any, x: Tensor, position_ids: Tensor, *more: Any, **options: Any) -> tuple[Tensor, ...]:
        lengths = document_lengths(position_ids)
        sides = (lengths > limit).long() if two_sides else torch.where(lengths > limit, lengths, 0)
        merged: tuple[Tensor, ...] = ()
        for side in sides.unique().tolist():
            _restore(self, fresh, x.device)
            chosen = sides == side
            factors = own_forward(x, torch.where(chosen, position_ids, 0), *more, **options)
            merged = tuple(
                torch.where(chosen[..., None], new, old)
                for new, old in zip(factors, merged or factors, strict=True)
            )
        return merged

    module.forward = types.MethodType(forward, module)


def document_lengths(position_ids: Tensor) -> Tensor:
    """int64[..., L], for each token how long its document is, by its last position.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist()
    [[3, 3, 3, 2, 2, 1]]
    """
    starts = position_ids == 0
    starts[..., 0] = True
    number = starts.cumsum(-1) - 1
    last = torch.zeros_like(position_ids).scatter_reduce_(-1, number, position_ids, "amax")
    return last.gather(-1, number) + 1


def _state(module: Any) -> Iterator[tuple[str, Any]]:
    """What a forward leaves behind for the next one, as it was before the first."""
    for name, buffer in module.named_buffers(recurse=False):
        yield name, getattr(module, name.replace("inv_freq", "original_inv_freq"), buffer).clone()
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        yield name, int(module.original_max_seq_len)
    if "attention_scaling" in vars(module):
        yield "attention_scaling", module.attention_scaling


def _restore(module: Any, fresh: dict[str, Any], device: torch.device) -> None:
    for name, value in fresh.items():
        if name in module._buffers:
            module._buffers[name] = value.to(device, copy=True)
        else:
            setattr(module, name, value)
