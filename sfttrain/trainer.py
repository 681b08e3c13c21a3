"""A thin transformers Trainer: our order, our loss, sealed checkpoints, figures without logits. Nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from sfttrain import checkpoint
from sfttrain.data import TrainingRows
from sfttrain.loss import LossOutput
from sfttrain.order import Order


class SftTrainer(Trainer):
    """Train on rows of sets.

    Args:
        order: batches of this rank.
        run: what a checkpoint remembers of the data, see `checkpoint.Seal.run`.
        fused: whether the model carries the chunked loss.
        arguments: what transformers' Trainer takes.
    """

    def __init__(self, *, order: Order, run: dict[str, Any], fused: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.order, self.run, self.fused = order, run, fused
        self._figures = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # tokens, supervised, correct
        self._clock, self._tokens = time.perf_counter(), 0
        self.remove_callback(PrinterCallback)  # standard output is data; progress.py talks
        self.add_callback(_EpochOfOrder(order))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches. The order already knows ranks, so accelerate has nothing to shard."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            cast(TrainingRows, self.train_dataset),
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, without logits unless someone asked for them."""
        wants_logits = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        if self.fused and not wants_logits:
            inputs = {**inputs, "skip_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._count(inputs["input_ids"], outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate one batch; logits exist only when metrics are computed from them."""
        if not (self.fused and prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens seen, tokens per second and token accuracy to what is logged in training."""
        if "loss" in logs:
            logs.update(self._drain())
        super().log(logs, start_time)

    def _count(self, input_ids: Tensor, outputs: Any) -> None:
        self._figures[0] += input_ids.numel()
        if isinstance(outputs, LossOutput) and outputs.supervised is not None and outputs.correct is not None:
            self._figures[1] += outputs.supervised
            self._figures[2] += outputs.correct

    def _drain(self) -> dict[str, float]:
        """Return the figures since the last call, over all ranks."""
        self._fold_tokens()
        _, supervised, correct = self.accelerator.reduce(self._figures, "sum").tolist()
        self._figures.zero_()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        tokens, self._tokens = self._tokens, 0
        figures = {"tokens": self.state.num_input_tokens_seen, "seconds": seconds, "tokens_per_second": tokens / seconds}
        return figures | ({"mean_token_accuracy": correct / supervised} if supervised and correct >= 0 else {})

    def _fold_tokens(self) -> None:
        """Add the tokens of every rank to the state, which checkpoints keep."""
        tokens = int(self.accelerator.reduce(self._figures[0].clone(), "sum"))
        self._figures[0] = 0
        self._tokens += tokens
        self.state.num_input_tokens_seen += tokens

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint as transformers does, then seal it once every rank is done."""
        folder = Path(str(self.args.output_dir)) / f"{checkpoint.PREFIX}{self.state.global_step}"
        self._fold_tokens()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.seal(folder, self.state.global_step, self.run)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            raise checkpoint.explain_failed_write(folder, error) from error


class _EpochOfOrder(TrainerCallback):
    """Tell the order which epoch begins, before its batches are asked for."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.set_epoch(int(state.epoch or 0))
