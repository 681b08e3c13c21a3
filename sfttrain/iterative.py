"""Training step by step, on what a loop of the user's own makes as it goes: ids, or texts.

One call of `step` is one optimizer step. The loss is the mean over its trained tokens, however the step is
cut into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch import Tensor

from sftdata.batches import IGNORE_INDEX, Int32, Int64
from sftdata.errors import UsageError
from sftdata.output import counted
from sftdata.streaming import TextEncoder

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedConfig

LEARNING_RATE = 2e-5
MAX_GRAD_NORM = 1.0

Ids = Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


class IterativeTrainer:
    """Train a model on one batch after the other.

    Args:
        model: a causal or sequence-to-sequence model of transformers, adapters on it or not.
        tokenizer: folder or Hub id; only texts need it.
        optimizer: default: AdamW over what is trainable, at 2e-5.
        scheduler: moved on once a step.
        max_length: tokens; longer examples are cut.
        truncation_mode: keep the end of a long example, or its start.
        batch_size: examples per forward; default: all of a step at once.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: str | None = None, *,
        optimizer: torch.optim.Optimizer | None = None, scheduler: LRScheduler | None = None,
        max_length: int | None = None, truncation_mode: Literal["keep_end", "keep_start"] = "keep_end",
        batch_size: int | None = None,
    ) -> None:  # fmt: skip
        if truncation_mode not in ("keep_end", "keep_start"):
            raise UsageError(f"truncation_mode={truncation_mode!r}; expected keep_end or keep_start.")
        self.model = model
        self.max_length, self.truncation_mode = max_length, truncation_mode
        self.batch_size = batch_size
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(self._trained, lr=LEARNING_RATE)
        self.scheduler = scheduler
        self.steps = 0
        self._encoder = TextEncoder(tokenizer) if tokenizer else None

    def step(
        self, input_ids: Ids | None = None, attention_mask: Ids | None = None, labels: Ids | None = None, *,
        texts: Sequence[str] | None = None, texts_labels: Sequence[str] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Take one step and return its figures.

        Args:
            input_ids: token ids of each example.
            attention_mask: 1 for tokens, 0 for padding, which is taken off.
            labels: unshifted labels of a causal model (default: the ids), target ids of a
                sequence-to-sequence model.
            texts: what to train on; with `texts_labels`, what is given.
            texts_labels: what the model is to answer: trained alone, end token included.

        Returns:
            step, loss (mean of a trained token), grad_norm, learning_rate, tokens, trained_tokens.

        Raises:
            UsageError: the arguments do not fit each other.
        """
        if (input_ids is None) == (texts is None):
            raise UsageError("step() takes either input_ids or texts.")
        if input_ids is not None:
            examples = self._given(input_ids, attention_mask, labels)
        else:
            answers = None if texts_labels is None else list(texts_labels)
            examples = self._encode(list(texts or ()), answers)
        return self._optimize([self._cut(ids, own) for ids, own in examples])

    @property
    def _answers_apart(self) -> bool:
        return bool(cast("PreTrainedConfig", self.model.config).is_encoder_decoder)

    def _given(
        self, input_ids: Ids, attention_mask: Ids | None, labels: Ids | None
    ) -> list[tuple[Int32, Int32]]:
        if labels is None and self._answers_apart:
            what = "A sequence-to-sequence model has nothing to answer without labels."
            raise UsageError(what, "give labels.")
        ids = [_array(row) for row in input_ids]
        masks = (
            [np.ones(len(row), np.int32) for row in ids]
            if attention_mask is None
            else [_array(row) for row in attention_mask]
        )
        own = ids if labels is None else [_array(row) for row in labels]
        if not len(ids) == len(masks) == len(own):
            what = f"{len(ids)} input_ids, {counted(len(masks), 'attention mask')},"
            what += f" {counted(len(own), 'label')}."
            raise UsageError(what, "give one of each.")
        for row, mask, label in zip(ids, masks, own, strict=True):
            if len(row) != len(mask) or (not self._answers_apart and len(row) != len(label)):
                what = f"{len(row)} input_ids, {len(mask)} in their mask, {counted(len(label), 'label')}."
                raise UsageError(what, "make them equal.")
        kept = [mask != 0 for mask in masks]
        if self._answers_apart:
            return [(row[keep], label) for row, keep, label in zip(ids, kept, own, strict=True)]
        return [(row[keep], label[keep]) for row, keep, label in zip(ids, kept, own, strict=True)]

    def _encode(self, texts: list[str], answers: list[str] | None) -> list[tuple[Int32, Int32]]:
        if self._encoder is None:
            raise UsageError("Texts need a tokenizer.", "IterativeTrainer(model, tokenizer=...).")
        if answers is None:
            if self._answers_apart:
                what = "A sequence-to-sequence model has nothing to answer without texts_labels."
                raise UsageError(what, "give them.")
            answers, texts = texts, [""] * len(texts)
        if len(answers) != len(texts):
            what = f"{counted(len(texts), 'text')}, {len(answers):,} texts_labels."
            raise UsageError(what, "give one for each text.")
        if not self._answers_apart:
            return self._encoder.encode(texts, answers)
        given = self._encoder.encode(texts, [""] * len(texts))
        targets = self._encoder.encode([""] * len(texts), answers)
        return [(ids, target) for (ids, _), (target, _) in zip(given, targets, strict=True)]

    def _cut(self, ids: Int32, labels: Int32) -> tuple[Int32, Int32]:
        if self.max_length is None:
            return ids, labels
        part = slice(-self.max_length, None) if self.truncation_mode == "keep_end" else slice(self.max_length)
        return ids[part], labels[part]

    def _optimize(self, examples: list[tuple[Int32, Int32]]) -> dict[str, float]:
        first = 0 if self._answers_apart else 1  # a causal model does not predict the first token
        trained = sum(int((labels[first:] != IGNORE_INDEX).sum()) for _, labels in examples)
        if not trained:
            raise UsageError("No token of this step is trained.", "check labels and max_length.")
        self.model.train()
        total = 0.0
        size = self.batch_size or len(examples)
        for start in range(0, len(examples), size):
            batch = self._batch(examples[start : start + size])
            labels = batch.pop("labels")
            logits = self.model(**batch, **({"labels": labels} if self._answers_apart else {})).logits.float()
            targets = labels if self._answers_apart else labels[:, 1:]
            logits = logits if self._answers_apart else logits[:, :-1]
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                / trained
            )
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM))
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.steps += 1
        figures = {"step": self.steps, "loss": total, "grad_norm": norm, "learning_rate": rate}
        return figures | {"tokens": sum(len(ids) for ids, _ in examples), "trained_tokens": trained}

    def _batch(self, examples: list[tuple[Int32, Int32]]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        columns = {
            "input_ids": _padded([ids for ids, _ in examples], 0),
            "attention_mask": _padded([np.ones_like(ids) for ids, _ in examples], 0),
            "labels": _padded([labels for _, labels in examples], IGNORE_INDEX),
        }
        return {name: torch.from_numpy(column).to(device) for name, column in columns.items()}


def _array(row: Tensor | Sequence[int]) -> Int32:
    ids: Int32 = np.asarray(row.cpu() if isinstance(row, Tensor) else row, np.int32)
    return ids


def _padded(rows: list[Int32], value: int) -> Int64:
    width = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=value) for row in rows]).astype(
        np.int64
    )
