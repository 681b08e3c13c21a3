"""The loss of each document of each step, logged beside the run: see `sftdata.blame.log`.

Token losses are there after each forward. They are copied to the host without waiting, and summed by document
when the step's line is logged, a checkpoint written or the run ends: no step waits for its documents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sftdata.batches import Int64, offsets_of
from sftdata.blame.log import DocumentLosses, log_batch, log_path, log_schema, trained_set
from sftdata.errors import DataError
from sftdata.set.opened import ShardSet
from sftdata.set.store import explained, sync_folder
from sfttrain.data import BatchDocuments

Float64 = npt.NDArray[np.float64]
_MOST_PENDING = 1 << 20  # token losses that wait for their sums: 4 MB


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A micro-batch: its step, documents, and float32[N] losses on their way to the host."""

    step: int
    documents: BatchDocuments
    losses: Tensor


class DocumentLog(TrainerCallback):
    """Write the losses of this rank's documents.

    Args:
        run: folder of the run.
        sets: that it trains on.
        rank: this process.
    """

    def __init__(self, run: Path, sets: Sequence[ShardSet], rank: int) -> None:
        self._run, self._rank = run, rank
        named = [trained_set(run, opened.folder, opened.manifest.digest) for opened in sets]
        self._schema = log_schema(named)
        self._pending: list[_Pending] = []
        self._copied: torch.cuda.Event | None = None
        self._path = log_path(run, 0, rank)
        self._file: BinaryIO | None = None
        self._end = 0  # bytes that are whole

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Begin a file for what comes behind the checkpoint."""
        self._path = log_path(self._run, state.global_step, self._rank)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Write the documents of the steps that were logged."""
        self.flush()

    def add(self, step: int, documents: BatchDocuments, losses: Tensor) -> None:
        """Take the losses of a micro-batch.

        Args:
            step: that it is part of, from 1.
            losses: float32[N], of the supervised positions in order.

        Raises:
            DataError: these are not the tokens of the documents.
        """
        if len(losses) != int(documents.trained.sum()):
            found = f"step {step}: {len(losses)} losses of {int(documents.trained.sum())} trained tokens"
            raise DataError(f"{found}: another part of the program splits rows.", "leave log_documents out.")
        host = losses.detach().to("cpu", non_blocking=losses.is_cuda)
        if losses.is_cuda:
            self._copied = self._copied or torch.cuda.Event()
            self._copied.record()
        self._pending.append(_Pending(step, documents, host))
        if sum(len(part.losses) for part in self._pending) >= _MOST_PENDING:
            self.flush()

    def flush(self) -> None:
        """Write what is pending.

        Raises:
            SftError: it cannot be written.
        """
        if not self._pending:
            return
        if self._copied is not None:
            self._copied.synchronize()
        content = log_batch(_join(self._pending), self._schema).serialize()
        with explained(self._path):
            if self._file is None:
                self._path.parent.mkdir(exist_ok=True)
                self._file = self._path.open("xb")
                content = b"".join([self._schema.serialize(), content])
                sync_folder(self._path.parent)
            self._file.seek(self._end)  # behind what is whole, should a signal have cut an earlier write
            self._file.truncate()
            self._file.write(content)
            self._file.flush()
        self._end += len(content)
        self._pending.clear()

    def sync(self) -> None:
        """Bring everything to the disk, before a checkpoint counts.

        Raises:
            SftError: it cannot be written.
        """
        self.flush()
        if self._file is not None:
            with explained(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is pending, and end; also where the run has failed."""
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None


def _join(parts: Sequence[_Pending]) -> DocumentLosses:
    """Sum the losses of tokens by document."""
    sums = [_sums(part.documents, part.losses) for part in parts]
    known = [part.documents for part in parts]
    counts = [len(documents.trained) for documents in known]
    steps = np.repeat([part.step for part in parts], counts)
    places = np.concatenate([documents.places for documents in known])
    weights, losses = (np.concatenate([pair[index] for pair in sums]) for index in (0, 1))
    return DocumentLosses(
        step=steps.astype(np.int32),
        set=places[:, 0].astype(np.int16),
        row=places[:, 1],
        example_id=places[:, 2],
        tokens=np.concatenate([documents.tokens for documents in known]).astype(np.int32),
        trained=np.concatenate([documents.trained for documents in known]).astype(np.int32),
        bytes=places[:, 3].astype(np.int32),
        weight=weights.astype(np.float32),
        loss=losses.astype(np.float32),
    )


def _sums(documents: BatchDocuments, losses: Tensor) -> tuple[Float64, Float64]:
    """Return the weight and the weighted loss of each document, float64[D] each."""
    values = losses.double().numpy()
    if documents.weights is None:
        return documents.trained.astype(np.float64), _by_document(values, documents.trained)
    weights = documents.weights.astype(np.float64)
    return _by_document(weights, documents.trained), _by_document(values * weights, documents.trained)


def _by_document(values: Float64, counts: Int64) -> Float64:
    """float64[D], sums of stretches of so many values each; a value that is no number stays in its own."""
    sums = np.zeros(len(counts))
    some = counts > 0
    if some.any():
        sums[some] = np.add.reduceat(values, offsets_of(counts)[:-1][some])
    return sums
