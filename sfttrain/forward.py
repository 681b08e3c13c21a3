"""Changes to a model's forward: terms of its loss are shared out, rotary factors follow each document.

Terms that a model adds to the cross entropy, such as the loss that balances a router's experts, are means
over a forward, so a step of several micro-batches must share them out: `term_share` is one part of the
micro-batches that train anything, on all ranks. Rotary factors that depend on the longest position of a batch
(longrope, dynamic NTK) would let packed documents change each other, so each gets those of its own length.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from sftdata.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils.generic import ModelOutput

Forward: TypeAlias = "Callable[..., ModelOutput]"
State = Tensor | int | float  # what a rotary module keeps from one forward to the next
DYNAMIC_ROPES = frozenset({"dynamic", "longrope"})  # rotary factors that follow the longest position


def share_terms(model: PreTrainedModel) -> None:
    """Let a model with its own loss count only `term_share` of what it adds to the cross entropy."""
    own_forward: Forward = model.forward

    def forward(self: PreTrainedModel, term_share: float | Tensor = 1.0, **inputs: object) -> ModelOutput:
        if inputs.get("labels") is None:
            return own_forward(**inputs)
        seen: list[Tensor] = []
        own_loss = self.loss_function

        def cross_entropy(*given: object, **options: object) -> Tensor:
            seen.append(own_loss(*given, **options))
            return seen[-1].clone()  # the model may add its terms in place

        with _loss_function(self, cross_entropy):
            outputs = own_forward(**inputs)
        if not seen:
            what = f"{type(self).__name__}: its loss has terms that cannot be separated."
            raise UsageError(what, "set loss=auto.")
        outputs["loss"] = seen[0] + (outputs["loss"] - seen[0]) * term_share
        return outputs

    model.forward = types.MethodType(forward, model)
    model.accepts_loss_kwargs = True  # type: ignore[assignment]  # torch: modules and tensors only


def hidden_and_terms(
    model: PreTrainedModel, own_forward: Forward, labels: Tensor, inputs: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    """Return the last hidden states, float[B, L, D], and the model's own terms, float[].

    The model's own forward runs with a cross entropy of zero and next to no logits; what is left of its loss
    are the terms.
    """
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(own_forward).parameters else {}
    try:
        with _loss_function(model, lambda logits, *_, **__: logits.new_zeros((), dtype=torch.float32)):
            outputs = own_forward(labels=labels, **few, **inputs)
    finally:
        hook.remove()
    return seen[0], outputs["loss"]


@contextmanager
def _loss_function(model: PreTrainedModel, function: Callable[..., Tensor]) -> Iterator[None]:
    """Give the model another cross entropy."""
    before = model.__dict__.get("_loss_function")
    model.loss_function = function
    try:
        yield
    finally:
        if before is None:
            model.__dict__.pop("_loss_function", None)
        else:
            model.loss_function = before


def disable_cache(model: nn.Module) -> None:
    """Turn the key-value cache off in every part of a model: inner configs have their own switch."""
    for part in model.modules():
        config = getattr(part, "config", None)
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the language model inside a config."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several, such as an encoder beside it
        return config


def depends_on_row_length(config: PreTrainedConfig, reach: int | None) -> bool:
    """Say whether rotary factors depend on a batch's longest position, and rows are long enough for it."""
    return any(reach is None or length < reach for _, length in dynamic_ropes(text_config(config)))


def dynamic_ropes(text: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Yield the kind of each rotary part that depends on the longest position, and from which length on."""
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = part.get("rope_type")
        if kind in DYNAMIC_ROPES:
            own = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            yield kind, int(own if own and kind == "longrope" else text.max_position_embeddings)


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


def _wrap(module: nn.Module) -> None:
    own_forward, fresh = module.forward, dict(_state(module))
    ropes = list(dynamic_ropes(cast("PreTrainedConfig", module.config)))
    limit = min(length for _, length in ropes)
    two_sides = all(kind == "longrope" and length == limit for kind, length in ropes)

    def forward(
        self: nn.Module, x: Tensor, position_ids: Tensor, *more: object, **options: object
    ) -> tuple[Tensor, ...]:
        lengths = document_lengths(position_ids)
        sides = (lengths > limit).long() if two_sides else torch.where(lengths > limit, lengths, 0)
        merged: tuple[Tensor, ...] = ()
        # longrope has one set of factors up to the limit and one beyond it; dynamic NTK has one for every
        # length beyond it. Each is computed as if only its own documents were there, and kept at their
        # tokens.
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
    """Return int64[..., L], the length of the document that each token is in, from its last position.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1, 0]])).tolist()
    [[3, 3, 3, 2, 2, 1]]
    """
    starts = position_ids == 0
    starts[..., 0] = True  # a row may begin in the middle of a document
    number = starts.cumsum(-1) - 1
    last = torch.zeros_like(position_ids).scatter_reduce_(-1, number, position_ids, "amax")
    return last.gather(-1, number) + 1


def _state(module: nn.Module) -> Iterator[tuple[str, State]]:
    """What a forward leaves behind for the next one, as it was before the first."""
    for name, buffer in module.named_buffers(recurse=False):
        yield name, getattr(module, name.replace("inv_freq", "original_inv_freq"), buffer).clone()
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        yield name, int(cast(int, module.original_max_seq_len))
    if "attention_scaling" in vars(module):
        yield "attention_scaling", cast(float, module.attention_scaling)


def _restore(module: nn.Module, fresh: Mapping[str, State], device: torch.device) -> None:
    for name, value in fresh.items():
        if isinstance(value, Tensor):
            module._buffers[name] = value.to(device, copy=True)
        else:
            setattr(module, name, value)
