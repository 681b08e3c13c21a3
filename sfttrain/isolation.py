"""Prove, on the user's own architecture at tiny size, that packing keeps documents apart and that the chunked loss is the loss.

The proof runs what training will run: the same model class, attention implementation, device and compute dtype, with
random weights. A packed row must give every document the logits it has alone, and a change in one document must leave
the logits of the next untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfttrain.attention import registered_name
from sfttrain.data import Batch, Collator, Row
from sfttrain.loss import fuse_loss

_LENGTHS = (11, 7, 14)
_VOCABULARY = 96
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": _VOCABULARY, "n_inner": 96, "ffn_hidden_size": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "query_pre_attn_scalar": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "num_heads": 8, "state_size": 16, "sliding_window": 8,
    "vocab_size_per_layer_input": _VOCABULARY, "hidden_size_per_layer_input": 16,
}  # fmt: skip
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Proof:
    """What the tiny model showed.

    Attributes:
        difference: largest |packed - alone| over the logits of every document.
        leak: largest change of a document's logits when the document before it changes.
        loss_difference: |chunked loss - the model's own loss|, relative; None where the loss could not be taken apart.
        tolerance: what rounding allows.
    """

    difference: float
    leak: float
    loss_difference: float | None
    tolerance: float

    @property
    def isolated(self) -> bool:
        """Whether packed documents stay apart."""
        return self.difference <= self.tolerance and self.leak <= self.tolerance / 10

    @property
    def fuses(self) -> bool:
        """Whether the chunked loss is this model's loss."""
        return self.loss_difference is not None and self.loss_difference <= self.tolerance / 10


def prove(
    config: Any, attention: str, flatten: bool, device: str, compute: torch.dtype, trusted: bool = False, packed: bool = True
) -> Proof:
    """Build the architecture at tiny size and try it.

    Args:
        config: transformers config of the model to be trained.
        attention: implementation to try.
        flatten: whether it takes one flattened row.
        compute: dtype of the matrix products in training.
        trusted: whether code from the model's repository may run.
        packed: several documents share a row; otherwise only the loss is tried.
    """
    with _own_randomness():
        model = _tiny_model(config, attention, trusted).to(device)
        documents = [torch.randint(3, _VOCABULARY, (length,)) for length in (_LENGTHS if packed else _LENGTHS[:1])]
        other = [torch.randint(3, _VOCABULARY, documents[0].shape), *documents[1:]]
        collate = Collator(flatten)
        cast = torch.autocast(device, dtype=compute, enabled=compute != torch.float32)
        with cast, torch.no_grad():
            together = _logits(model, collate([_row(documents)]), device)
            changed = _logits(model, collate([_row(other)]), device)
            alone = torch.cat([_logits(model, collate([_row([document])]), device) for document in documents])
        loss_difference = _compare_losses(model, collate([_row(documents)]), device, cast)
    kept = together[_LENGTHS[0] :] - changed[_LENGTHS[0] :]
    return Proof(_largest(together - alone), _largest(kept), loss_difference, _TOLERANCE[compute])


def shrink(config: Any) -> Any:
    """Return a copy of a config at tiny size, with every kind of layer it mixes."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads_differ = getattr(text, "num_key_value_heads", None) not in (None, getattr(text, "num_attention_heads", None))
    layers = _layers_to_keep(text)
    for name, size in _SIZES.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            _set(text, name, min(value, size))
    if getattr(text, "num_key_value_heads", None) is not None and not heads_differ:
        _set(text, "num_key_value_heads", text.num_attention_heads)
    _set(text, "num_hidden_layers", layers)
    for name in ("layer_types", "layers_block_type", "no_rope_layers", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            _set(text, name, list(getattr(text, name))[:layers])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            _set(text, name, 0)
    for name in [name for name in vars(text) if name.endswith(("dropout", "_pdrop"))]:
        _set(text, name, 0.0)
    return small


def _set(config: Any, name: str, value: Any) -> None:
    with suppress(AttributeError):  # some configs compute the field from others
        setattr(config, name, value)


def _layers_to_keep(text: Any) -> int:
    """Take layers from the bottom until every kind has come up."""
    total = int(text.num_hidden_layers)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        return min(2, total)
    return max(min(2, total), max(list(kinds).index(kind) for kind in set(kinds)) + 1)


def _tiny_model(config: Any, attention: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    small = shrink(config)
    model = AutoModelForCausalLM.from_config(
        small, attn_implementation=registered_name(attention), dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    model.config.use_cache = False
    return model.eval()


def _row(documents: list[Tensor]) -> Row:
    ids = torch.cat(documents).numpy().astype(np.int32)
    lengths = np.array([len(document) for document in documents], np.int32)
    labels = ids.copy()
    labels[np.cumsum(lengths) - lengths] = -100
    return Row(ids, labels, lengths)


def _logits(model: Any, batch: Batch, device: str) -> Tensor:
    inputs = {name: value for name, value in _on(batch, device).items() if name != "labels"}
    logits: Tensor = model(**inputs).logits[0]
    return logits.float()


def _compare_losses(model: Any, batch: Batch, device: str, cast: Any) -> float | None:
    """Return the relative difference between the model's own loss and the chunked one, None if that one fails."""
    batch = _on(batch, device)
    with cast, torch.no_grad():
        own = float(model(**batch).loss)
        fuse_loss(model)
        try:
            chunked = float(model(**batch, skip_logits=True).loss)
        except (AttributeError, TypeError, RuntimeError):
            return None
    return abs(own - chunked) / max(abs(own), 1e-6)


def _on(batch: Batch, device: str) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the random state of the run as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
