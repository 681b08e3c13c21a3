"""The loss of a model on a set: of all of it, of each source, and the documents that it finds hardest.

The rows take the way that they take in an evaluation during a run, so the figures are the same. The loss of
each document goes through a log like that of a run, which names the worst by file and line.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sftdata.blame.named import Blamed, LoggedRun
from sftdata.errors import UsageError
from sftdata.output import counted, one_line
from sftdata.set.opened import ShardSet
from sfttrain.arguments import Run, training_arguments
from sfttrain.chat import ADAPTERS
from sfttrain.config import read_settings
from sfttrain.data import Collator, TrainingRows
from sfttrain.device import out_of_memory
from sfttrain.documents import DocumentLog
from sfttrain.refusals import Reading, open_sets
from sfttrain.trainer import SftTrainer
from sfttrain.training import add_workers, load

_SHOWN = 72  # characters of an answer
_NAME = "set"
_OF_DOCUMENTS = {
    "place",
    "source",
    "line",
    "example_id",
    "row",
    "tokens",
    "trained",
    "loss",
    "over",
    "excerpt",
}


@dataclass(frozen=True, slots=True)
class SourceLoss:
    """The mean loss of a trained token of a source, and how many documents and trained tokens that is."""

    name: str
    loss: float
    documents: int
    trained: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model makes of a set.

    Attributes:
        model: folder or Hub id.
        data: folder of the set.
        whole: of all documents.
        sources: the same by source, in the order of the set.
        worst: documents furthest above the median loss, see `sftdata.blame.worst`.
    """

    model: str
    data: str
    whole: SourceLoss
    sources: tuple[SourceLoss, ...]
    worst: tuple[Blamed, ...]

    def lines(self) -> Iterator[str]:
        """Yield what is printed."""
        yield f"{self.model} on {_figures(self.whole)}, perplexity {_perplexity(self.whole.loss)}"
        for source in self.sources if len(self.sources) > 1 else ():
            yield f"  {_figures(source)}"
        if self.worst:
            yield "The worst documents:"
        for number, found in enumerate(self.worst, start=1):
            size = f"{found.trained:,} of {counted(found.tokens, 'token')} trained"
            place, above = one_line(found.place), f"{found.over:.2f} over the median"
            yield f"{number:>3}  {place}  loss {found.loss:.2f}, {above}; {size}"
            if found.excerpt:
                yield f"     {one_line(found.excerpt)[:_SHOWN]}"

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        worst = [
            {name: found for name, found in one.to_json().items() if name in _OF_DOCUMENTS}
            for one in self.worst
        ]
        figures = {name: figure for name, figure in asdict(self.whole).items() if name != "name"}
        sources = [asdict(source) for source in self.sources]
        return {"model": self.model, "set": self.data, **figures, "sources": sources, "worst": worst}


def _figures(part: SourceLoss) -> str:
    size = f"{counted(part.trained, 'trained token')} in {counted(part.documents, 'document')}"
    return f"{one_line(part.name)}: loss {part.loss:.4f} of {size}"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 20 else "beyond any use"


def evaluate(model: str, data: Path, base: str | None, batch_size: int, worst: int) -> Evaluation:
    """Return the losses of a model, or of adapters on their base, on a set.

    Args:
        model: folder or Hub id of a model, or folder of adapters.
        base: of adapters, where it is not the one that they name.
        batch_size: rows at a time.
        worst: documents to name.

    Raises:
        SftError: model or set cannot be opened, do not fit each other, or a batch does not fit the memory.
    """
    adapted = (Path(model) / ADAPTERS).is_file()
    if base is not None and not adapted:
        raise UsageError(f"--model {base}: {model} holds no adapters to put on it.", "leave --model out.")
    named = {"adapter": Path(model), "model": base} if adapted else {"model": model}
    with tempfile.TemporaryDirectory() as folder:
        training = {"per_device_eval_batch_size": batch_size}
        config = read_settings(
            None, [], {"sets": (data,), "output": Path(folder), "training": training, **named}
        )
        sets, _ = open_sets(config)
        reading = Reading(sets)
        setting = Run(config, training_arguments(config), {}, evaluated=True, trains=False)
        add_workers(config, setting.args, sets)
        reading.check()
        if setting.args.world_size > 1:
            raise UsageError("sfttrain eval: runs in one process.", "start it without a launcher.")
        with reading.first():
            metrics = _evaluated(setting, sets)
        reading.finish()
        logged = LoggedRun(config.output, [data])
        return _conclude(model, sets[0], metrics, logged.worst(worst))


def _evaluated(setting: Run, sets: list[ShardSet]) -> dict[str, float]:
    """Evaluate, and log the losses of the documents; return the mean losses as transformers names them."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, plan, _ = load(setting, sets, {}, None, None)
    model._hf_peft_config_loaded = (
        True  # else transformers refuses quantized weights, as if they were trained
    )
    rows = TrainingRows(sets, plan.unpack, by_source=True, places=True)
    documents = DocumentLog(setting.config.output, sets, 0)
    trainer = SftTrainer(
        order=None, run={}, plan=plan, documents=documents, model=model, args=setting.args,
        eval_dataset=rows, data_collator=Collator(plan.flatten, plan.boundaries, plan.restart, plan.pictures),
    )  # fmt: skip
    try:
        return trainer.evaluate(metric_key_prefix=_NAME)
    except RuntimeError as error:
        if out_of_memory(error, 1) is None:
            raise
        what = f"A batch of {counted(setting.args.eval_batch_size, 'row')} does not fit the memory."
        raise UsageError(what, "--batch-size 1.") from None
    finally:
        documents.close()


def _conclude(
    model: str, opened: ShardSet, metrics: dict[str, float], worst: tuple[Blamed, ...]
) -> Evaluation:
    ledger, loss = opened.manifest.ledger, metrics[f"{_NAME}_loss"]
    sources = tuple(
        SourceLoss(source.name, metrics[f"{_NAME}_loss_{source.name}"], tally.rows, tally.tokens_trained)
        for source in opened.manifest.sources
        if f"{_NAME}_loss_{source.name}" in metrics and (tally := ledger.sources.get(source.name))
    )
    whole = SourceLoss(str(opened.folder), loss, ledger.documents, ledger.tokens_trained)
    return Evaluation(model, str(opened.folder), whole, sources, worst)
