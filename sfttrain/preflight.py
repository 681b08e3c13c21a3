"""Everything that can be known before step 1: the set is whole, the vocabulary fits, packing does not leak, a step works."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sftdata.errors import DataError, UsageError
from sfttrain.attention import FLATTENED, takes_no_mask
from sfttrain.config import TrainConfig
from sfttrain.data import Batch
from sfttrain.isolation import Proof, prove
from sfttrain.talk import Say as Say


@dataclass(frozen=True, slots=True)
class Plan:
    """What preflight decided.

    Attributes:
        attention: implementation.
        flatten: whether batches are one row with cumulative lengths.
        unpack: whether every document is trained alone.
        loss: engine of the fused loss, or None for the model's own.
    """

    attention: str
    flatten: bool
    unpack: bool
    loss: str | None


def choose_path(config: TrainConfig, model_config: Any, attention: str, device: str, compute: torch.dtype, say: Say) -> Plan:
    """Try packing and the chunked loss on the architecture at tiny size, and decide what training may use.

    Raises:
        UsageError: packing would leak and `packing=require`, or the loss asked for is not this model's.
    """
    flatten = attention in FLATTENED
    maskless = takes_no_mask(attention, model_config, device, compute)
    if maskless and config.packing == "require":
        raise UsageError(f"packing=require: {attention} takes no mask.", "set attention=auto, or packing=auto.")
    try:
        proof = prove(model_config, attention, flatten, device, compute, config.trust_remote_code, packed=not maskless)
    except Exception as error:  # whatever a foreign model raises: what cannot be shown is not relied on
        return _without_proof(config, attention, error, say)
    unpack = config.packing == "unpack" or maskless or _falls_back(config, model_config, proof)
    if maskless:
        say(f"packing: {attention} takes no mask; every document is trained in a row of its own")
    elif unpack and config.packing != "unpack":
        say(f"packing: {_leak_text(model_config, attention, proof)}; every document is trained in a row of its own")
    elif not unpack:
        say(f"packing: proven on a tiny {model_config.model_type}: packed = alone within {proof.difference:.1e} ({attention})")
    # A model with a state between tokens knows no cumulative lengths: give it padded rows.
    return Plan(attention, flatten and proof.isolated, unpack, _loss_engine(config, model_config, proof, say))


def _falls_back(config: TrainConfig, model_config: Any, proof: Proof) -> bool:
    if proof.isolated:
        return False
    if config.packing == "require":
        leak = _leak_text(model_config, "", proof)
        raise UsageError(f"packing=require: {leak}.", "set packing=auto to train documents one by one.")
    return True


def _leak_text(model_config: Any, attention: str, proof: Proof) -> str:
    where = f" with {attention}" if attention else ""
    by = max(proof.difference, proof.leak)
    return f"{model_config.model_type}{where} leaks between packed documents (logits move by {by:.1e})"


def _without_proof(config: TrainConfig, attention: str, error: Exception, say: Say) -> Plan:
    reason = str(error).split("\n")[0] or type(error).__name__
    if config.packing == "require":
        message = f"packing=require: it could not be tried on this architecture ({reason})."
        raise UsageError(message, "set packing=auto.") from error
    say(f"packing: could not be tried on this architecture ({reason}); every document is trained in a row of its own")
    return Plan(attention, False, True, None)


def _loss_engine(config: TrainConfig, model_config: Any, proof: Proof, say: Say) -> str | None:
    if config.loss in ("plain", "liger"):
        return None
    if not proof.fuses and config.objective != "nll":
        reason = f"{model_config.model_type} has a head that does more than the chunked loss knows"
        raise UsageError(f"objective={config.objective}: {reason}.", "set objective=nll.")
    if proof.fuses:
        return "torch" if config.loss == "torch" else "chunked"
    reason = f"{model_config.model_type}: its head does more than the chunked loss knows"
    if config.loss != "auto":
        raise UsageError(f"loss={config.loss}: {reason}.", "set loss=auto.")
    say(f"loss: the model's own, with full logits ({reason})")
    return None


def checkpoint_bytes(model: Any) -> int:
    """Bytes of one checkpoint: the weights that are saved, and two Adam moments per trained weight."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return 3 * int(trained) + (0 if hasattr(model, "peft_config") else int(frozen))


def first_row(batch: Batch) -> tuple[int, Batch]:
    """Return how many rows a batch has, and its first one as a batch."""
    rows = len(batch["input_ids"])
    return rows, {name: value[:1] if isinstance(value, Tensor) and len(value) == rows else value for name, value in batch.items()}


def try_step(model: Any, batch: Batch, fused: bool, cast: AbstractContextManager[Any]) -> float:
    """Run one forward and backward; return its seconds. Weights, gradients and random state stay as they were.

    Raises:
        UsageError: the device has too little memory.
        DataError: the loss is no finite number.
    """
    started = time.perf_counter()
    extra = {"skip_logits": True} if fused else {}
    model.train()
    try:
        with torch.random.fork_rng(), cast:
            loss = model(**batch, **extra).loss
        loss.backward()
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UsageError(
            f"One forward and backward does not fit: {reason}.",
            "set activation_checkpointing=true, a smaller batch, --lora, or prepare with a smaller --max-length.",
        ) from None
    finally:
        model.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"The loss of the first batch is {value}.", "check the model's weights and dtype.")
    return time.perf_counter() - started


def describe_memory(model: Any) -> str:
    """Say what the weights, their gradients and Adam's moments take."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    text = f"{total:,} parameters, {trained:,} trained; "
    text += f"weights {weights / 1e9:.2f} GB, gradients and optimizer {state / 1e9:.2f} GB"
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e9
        text += f"; trial step peaked at {peak:.2f} of {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB"
    return text
