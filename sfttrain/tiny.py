"""The proof's model: the same class at tiny size, with random weights large enough for a leak to show."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from sfttrain.data import Batch
from sfttrain.model import disable_cache
from sfttrain.shrink import shrunk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_STATE_WEIGHTS = ("A_log", "dt_", "time_", "decay")  # their scale is what makes the recurrence stable
_MOST_WEIGHTS = 400_000_000


def smallest_that_runs(config: PreTrainedConfig, trusted: bool, reach: int | None) -> PreTrainedConfig:
    """Return the config of the smallest model of this architecture that takes a row.

    Raises:
        Exception: whatever the family raises on the smallest, where none does.
    """
    failure: Exception | None = None
    for small in shrunk(config, reach):
        try:
            with torch.device("meta"):
                weights = sum(
                    weight.numel() for weight in tiny_model(small, "eager", trusted, fill=False).parameters()
                )
            if weights > _MOST_WEIGHTS:
                raise ValueError(f"its smallest model has {weights:,} weights")
            with torch.no_grad():
                tiny_model(small, "eager", trusted)(input_ids=torch.arange(3, 36)[None])
        except Exception as error:  # whatever a family raises where heads are too few for it
            failure = failure or error
            continue
        return small
    assert failure is not None
    raise failure


def tiny_model(small: PreTrainedConfig, attention: str, trusted: bool, fill: bool = True) -> PreTrainedModel:
    """Make a model of a small config; the same weights each time, whatever the attention."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(small), attn_implementation=attention, dtype=torch.float32, trust_remote_code=trusted
    )
    disable_cache(model)
    if fill:
        _fill(model)
    model.eval()
    return model


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Draw weights so large that all parts of a layer matter, and none that begin at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() < 2 or any(mark in name for mark in _STATE_WEIGHTS):
            weight.add_(noise, alpha=0.1)
        else:
            weight.copy_(noise * (1.2 / weight.shape[-1] ** 0.5))


def unreached(model: PreTrainedModel, batch: Batch) -> tuple[str, ...]:
    """Return names of the largest modules outside the language model that get no gradient from text."""
    decoder = model.get_decoder()
    with torch.enable_grad():
        model(**batch).loss.backward()
    names: list[str] = []
    for name, module in model.named_modules():
        weights = list(module.parameters())
        inside = any(part is decoder for part in module.modules()) or any(
            name.startswith(f"{one}.") for one in names
        )
        if (
            name
            and weights
            and not inside
            and all(weight.grad is None for weight in weights)
            and not _within(decoder, module)
        ):
            names.append(name)
    model.zero_grad(set_to_none=True)
    return tuple(names)


def _within(decoder: nn.Module, module: nn.Module) -> bool:
    return any(part is module for part in decoder.modules())


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Leave the random state of the run as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Let float32 be float32, whatever the run allows its matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
