"""Loss per trained token of a set, and of each source in it, exact for any batch size and rank count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sftdata.batches import IGNORE_INDEX


class EvalFigures:
    """Sums over the trained tokens of one evaluation.

    Args:
        sources: names of the sources of the set; one alone gets no figure of its own.
        device: where the sums are kept until they are read.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        self.sources = list(sources) if len(sources) > 1 else []
        self._sums = torch.zeros(1 + len(self.sources), 2, dtype=torch.float64, device=device)  # loss, tokens

    def add(self, token_losses: Tensor, labels: Tensor, source: Tensor | None) -> None:
        """Add a batch.

        Args:
            token_losses: float32[N], of the supervised positions in order.
            labels: int64[B, L], unshifted.
            source: int64[B, L], number of each token's source.
        """
        losses = token_losses.to(torch.float64)
        both = torch.stack([losses, torch.ones_like(losses)], 1)
        self._sums[0] += both.sum(0)
        if self.sources and source is not None:
            targets = source[:, 1:][labels[:, 1:] != IGNORE_INDEX]
            self._sums.index_add_(0, targets + 1, both)

    def metrics(self, prefix: str, reduce: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return the mean loss of a token, of all and by source; `reduce` sums over ranks."""
        sums = reduce(self._sums).tolist()
        names = [f"{prefix}_loss", *(f"{prefix}_loss_{source}" for source in self.sources)]
        return {name: loss / tokens for name, (loss, tokens) in zip(names, sums, strict=True) if tokens}


def token_losses_of(outputs: Any, labels: Tensor) -> Tensor:
    """Return the loss of each supervised position, float32[N], from what a model put out."""
    given: Tensor | None = getattr(outputs, "token_losses", None)
    if given is not None:
        return given
    chosen = labels[:, 1:] != IGNORE_INDEX
    logits = outputs.logits[:, :-1][chosen].float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][chosen], reduction="none")
