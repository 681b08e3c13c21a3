"""A thin transformers Trainer: our order, our loss, sealed checkpoints, figures without logits."""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from sftdata.batches import IGNORE_INDEX
from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sfttrain import checkpoint
from sfttrain.data import BatchDocuments, Row, TrainingRows
from sfttrain.documents import DocumentLog
from sfttrain.given import CustomRows, custom_rows
from sfttrain.loss import LossOutput, chunk_rows, items_of
from sfttrain.path import Plan
from sfttrain.process import share_of_rows
from sfttrain.schedule import Order, Passes
from sfttrain.seen import Account
from sfttrain.sequence import group_of, of_whole_rows

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.trainer_utils import EvalLoopOutput
    from transformers.utils.generic import ModelOutput


class SftTrainer(Trainer):
    """Train on rows of sets.

    Args:
        order: batches of this rank; None for a stream, which has its own.
        run: what a checkpoint remembers of the data, see `checkpoint.Seal.run`.
        plan: what was decided on loss and attention.
        account: of what the run sees of its sets, in the main process; every checkpoint holds it.
        beside: folders that every checkpoint gets copies of, so that it loads by itself.
        documents: where the loss of each document goes, if anywhere.
        arguments: what transformers' Trainer takes.
    """

    def __init__(
        self,
        *,
        order: Order | None,
        run: checkpoint.Identity,
        plan: Plan,
        account: Account | None = None,
        beside: Sequence[Path] = (),
        documents: DocumentLog | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.documents = documents
        if documents is not None:
            self.add_callback(documents)
        self.order, self.run, self.fused, self._terms = order, run, plan.loss is not None, plan.terms
        self.account, self.beside = account, beside
        self.splits = self.fused and not self._terms  # losses of the parts of a batch add up to its loss
        self._term_share = 1.0  # of the terms of one micro-batch in those of the step
        # Tokens, supervised positions, correct predictions.
        self._figures = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self._clock, self._tokens = time.perf_counter(), 0
        self.remove_callback(PrinterCallback)  # standard output is data; progress.py writes to standard error
        if order is not None:
            self.add_callback(_EpochOfOrder(order))
        # A weight is cast once in a forward, so a cache saves no cast, and keeps all of them until the loss.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if self.fused:
            self.label_smoother = None  # the chunked loss smooths by itself
        self._evaluated = EvalFigures([], self.args.device)
        self._weighted = bool(getattr(self.train_dataset, "weighted", False))
        if self._weighted:
            self._require_weighted_loss()

    def checkpoint_activations(self) -> None:
        """Turn activation checkpoints on, where asked for, as transformers does when training begins."""
        if not self.args.activation_checkpointing:
            return
        options = dict(cast(dict[str, object] | None, self.args.activation_checkpointing_kwargs) or {})
        ours = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        # Newer transformers and older ones, and models such as peft's that have only the older name.
        word = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(self.model, f"{word}_checkpointing_enable")
        enable(**{f"{word}_checkpointing_kwargs": options or None}, **ours)

    def get_train_dataloader(self) -> DataLoader[Row]:
        """Return this rank's batches. The order already knows ranks, so accelerate has nothing to shard."""
        return self._loader(cast(Dataset[Row], self.train_dataset), self.order)

    def get_eval_dataloader(self, eval_dataset: object = None) -> DataLoader[Row]:
        """Return this rank's share of an evaluation set: every row once, none repeated to fill a batch."""
        given: object = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, str):
            given = cast(Mapping[str, object], self.eval_dataset)[given]
        known = isinstance(given, TrainingRows | CustomRows)
        rows = cast(TrainingRows | CustomRows, given if known else custom_rows(given))
        self._evaluated = EvalFigures(rows.sources, self.args.device)
        rank, ranks = share_of_rows(self.args)
        return self._loader(
            rows,
            Order(
                Passes([len(rows)], [1.0], seed=0, shuffle=False),
                batch_size=self.args.eval_batch_size,
                rank=rank,
                ranks=ranks,
            ),
        )

    def _loader(self, rows: Dataset[Row], order: Order | None) -> DataLoader[Row]:
        # Several workers would each read the whole stream and repeat it.
        workers = self.args.dataloader_num_workers if order is not None else 0
        return _Loader(
            rows,
            batch_size=self.args.train_batch_size if order is None else 1,  # 1: the order makes batches
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:  # fmt: skip
        """Return the loss, without logits unless they are needed."""
        wants_logits = return_outputs or self.label_smoother is not None or self.compute_loss_func is not None
        if self.fused and not wants_logits:
            inputs = {**inputs, "skip_logits": True}
        documents = cast(BatchDocuments | None, inputs.pop("documents", None))
        if self._terms and model.training:
            inputs = {**inputs, "term_share": _trains(inputs["labels"]) * self._term_share}
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._count(inputs["input_ids"], outputs)
            if self.documents is not None and documents is not None:
                self._log_documents(documents, token_losses_of(outputs, labels))
        return (loss, outputs) if return_outputs else loss

    def _log_documents(self, documents: BatchDocuments, losses: Tensor) -> None:
        """Note the losses of a micro-batch; of ranks that hold rows together, the first one does."""
        width = self.args.world_size // share_of_rows(self.args)[1]
        if width > 1:
            losses = of_whole_rows(losses, group_of(width))
        if self.documents is not None and self.args.process_index % width == 0:
            self.documents.add(self.state.global_step + 1, documents, losses)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor | int | None:
        """Return the divisor of a step's losses: the sum of their weights, or transformers' count."""
        if self._terms:
            trained = sum((_trains(batch["labels"]) for batch in batch_samples), torch.zeros(())).to(device)
            self._term_share = 1 / max(1.0, float(self.accelerator.reduce(trained, "sum")))
        if not self._weighted and not any("loss_weights" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        self._require_weighted_loss()
        items = sum(
            items_of(batch["labels"], batch.get("loss_weights")).to(device) for batch in batch_samples
        )
        return self.accelerator.reduce(items, "sum") if self.args.average_tokens_across_devices else items

    def _require_weighted_loss(self) -> None:
        if not self.fused or self.compute_loss_func is not None:
            found = (
                "The rows have loss_weights, which neither the model's own loss nor compute_loss_func knows"
            )
            raise UsageError(f"{found}.", "set loss=auto, or prepare without --loss-weights.")

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Evaluate one batch; logits exist only when metrics are computed from them."""
        inputs = self._prepare_inputs(inputs)
        source, labels, _ = inputs.pop("source", None), inputs["labels"], inputs.pop("loss_weights", None)
        documents = cast(BatchDocuments | None, inputs.pop("documents", None))
        extra = {"skip_logits": True} if self.fused and prediction_loss_only else {}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, **extra)
        losses = token_losses_of(outputs, labels)
        self._evaluated.add(losses, labels, source)
        if self.documents is not None and documents is not None:
            self._log_documents(documents, losses)
        mean = losses.mean() if len(losses) else losses.sum()
        return (mean, None, None) if prediction_loss_only else (mean, outputs.logits.detach(), labels)

    def evaluation_loop(
        self, dataloader: DataLoader[Row], description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Evaluate a set; its loss is the mean over trained tokens, of all and of each source."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        cast(dict[str, float], output.metrics).update(
            self._evaluated.metrics(metric_key_prefix, lambda sums: self.accelerator.reduce(sums, "sum"))
        )
        return output

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *more: Any, **options: Any) -> None:
        """Log, evaluate and save as transformers does, while the loss and the weights are finite."""
        control = self.control
        if (
            control.should_log
            or control.should_save
            or control.should_evaluate
            or control.should_training_stop
        ):
            self._require_finite(tr_loss)
        super()._maybe_log_save_evaluate(tr_loss, *more, **options)

    def _require_finite(self, loss: Tensor) -> None:
        """Refuse to go on with a loss, or to save weights, that are no numbers; every rank does.

        Raises:
            DataError: naming the step, and where to go on from.
        """
        astray = ~torch.isfinite(loss).all()
        # FSDP and DeepSpeed shard the weights, so each rank would see only its part.
        if self.control.should_save and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            weights = cast(nn.Module, self.model).parameters()
            astray |= ~torch.stack(
                [weight.isfinite().all() for weight in weights if weight.requires_grad]
            ).all()
        if not self.accelerator.reduce(astray.float(), "sum"):
            return
        if self.state.global_step == 1:
            what = "The loss of the first batch is no number."
            raise DataError(what, "check the model's weights and dtype.")
        found = f"step {self.state.global_step}: the loss or the weights are not finite (nan or infinite)"
        kept = checkpoint.newest_complete(Path(str(self.args.output_dir)))
        left = f"{kept[0]} is the last good checkpoint" if kept else "no checkpoint was written before"
        fix = (
            "lower learning_rate, set max_grad_norm=1, or look at the rows of that step, which"
            " --log-documents and `sftdata blame` name; then run into another output folder."
        )
        raise DataError(f"The run has diverged: {found}; {left}.", fix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens seen, tokens per second and token accuracy to what is logged in training."""
        if "loss" in logs:
            logs.update(self._drain())
        super().log(logs, start_time)

    def _count(self, input_ids: Tensor, outputs: ModelOutput) -> None:
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
        figures = {
            "tokens": self.state.num_input_tokens_seen,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
        return figures | (
            {"mean_token_accuracy": correct / supervised} if supervised and correct >= 0 else {}
        )

    def _fold_tokens(self) -> None:
        """Add the tokens of every rank to the state, which checkpoints keep."""
        tokens = int(self.accelerator.reduce(self._figures[0].clone(), "sum"))
        self._figures[0] = 0
        self._tokens += tokens
        self.state.num_input_tokens_seen += tokens

    def _issue_warnings_after_load(self, load_result: _IncompatibleKeys) -> None:
        """Refuse a checkpoint that lacks weights; those that are tied to others are saved once."""
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        lost = [*load_result.unexpected_keys, *(key for key in load_result.missing_keys if key not in tied)]
        if lost:
            found = f"The checkpoint does not fit the model: {', '.join(lost):.300}."
            raise IntegrityError(found, "start anew with --overwrite.")
        cast("PreTrainedModel", self.model).tie_weights()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint as transformers does, then seal it once every rank is done."""
        folder = Path(str(self.args.output_dir)) / f"{checkpoint.PREFIX}{self.state.global_step}"
        self._fold_tokens()
        if self.documents is not None:
            self.documents.sync()
        inner = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            with _names_as_loaded(cast(nn.Module, inner)):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for read_with in self.beside:
                    shutil.copytree(read_with, folder, dirs_exist_ok=True)
                if self.account is not None:
                    for place in (folder, folder.parent):
                        self.account.write(place, self.state.global_step)
                checkpoint.seal(folder, self.state.global_step, self.run)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            raise checkpoint.explain_failed_write(folder, error) from error


class _Loader(DataLoader[Row]):
    """Say what went wrong in a worker as it was said there, not as a traceback."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except SftError as error:
            lines = error.message.strip().split("\n")
            if len(lines) == 1:
                raise
            raise type(error)(lines[-1].partition(": ")[2]) from None


@contextmanager
def _names_as_loaded(model: nn.Module) -> Iterator[None]:
    """Save weights under the names that a resumed run loads, not those that the family's first files had."""
    own = cast(Callable[..., None], model.save_pretrained)
    if "save_original_format" not in inspect.signature(own).parameters:
        yield  # adapters
        return
    model.save_pretrained = partial(own, save_original_format=False)  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.save_pretrained


def _trains(labels: Tensor) -> Tensor:
    """float32[], 1 where a batch trains anything, 0 where it only fills up a step."""
    return (labels[:, 1:] != IGNORE_INDEX).any().float()


class _EpochOfOrder(TrainerCallback):
    """Set the epoch of the order before its batches are requested."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        # The state's own epoch counts those of the data before, where the leg is new.
        self._order.set_epoch(state.global_step // self._order.steps_per_epoch)


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

    def metrics(self, prefix: str, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the mean loss of a token, of all and by source; `reduce` sums over ranks."""
        sums = reduce(self._sums).tolist()
        names = [f"{prefix}_loss", *(f"{prefix}_loss_{source}" for source in self.sources)]
        return {name: loss / tokens for name, (loss, tokens) in zip(names, sums, strict=True) if tokens}


@torch.no_grad()
def token_losses_of(outputs: CausalLMOutput, labels: Tensor) -> Tensor:
    """Return the loss of each supervised position, float32[N], from what a model put out."""
    given: Tensor | None = getattr(outputs, "token_losses", None)
    if given is not None:
        return given
    logits = cast(Tensor, outputs.logits)
    rows, places = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    step = max(1, chunk_rows(logits.device.type, logits.shape[-1], len(rows)))
    losses = [
        torch.nn.functional.cross_entropy(
            logits[row, place].float(), labels[row, place + 1], reduction="none"
        )
        for row, place in zip(rows.split(step), places.split(step), strict=True)
    ]
    return torch.cat(losses)
