"""Terms that a model adds to the cross entropy, such as the loss that balances a router's experts.

Such terms are means over a forward, so a step of several micro-batches must share them out: `term_share` is
one part of the micro-batches that train anything, on all ranks.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sftdata.errors import UsageError


def share_terms(model: Any) -> None:
    """Let a model with its own loss count only `term_share` of what it adds to the cross entropy."""
    own_forward = model.forward

    def forward(self: Any, term_share: Any = 1.0, **inputs: Any) -> Any:
        if inputs.get("labels") is None:
            return own_forward(**inputs)
        seen: list[Tensor] = []
        own_loss = self.loss_function

        def cross_entropy(*given: Any, **options: Any) -> Tensor:
            seen.append(own_loss(*given, **options))
            return seen[-1].clone()  # the model may add its terms in place

        with _loss_function(self, cross_entropy):
            outputs = own_forward(**inputs)
        if not seen:
            raise UsageError(
                f"{type(self).__name__}: its loss has terms that cannot be separated.", "set loss=auto."
            )
        outputs["loss"] = seen[0] + (outputs["loss"] - seen[0]) * term_share
        return outputs

    model.forward = types.MethodType(forward, model)
    model.accepts_loss_kwargs = True


def hidden_and_terms(
    model: Any, own_forward: Any, labels: Tensor, inputs: dict[str, Any]
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
def _loss_function(model: Any, function: Any) -> Iterator[None]:
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
