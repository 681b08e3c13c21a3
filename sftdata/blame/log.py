"""The log of a run's documents: the loss of each document of each step, in `RUN/documents`.

    00000000-rank-0.arrows    what rank 0 trained from step 1 on
    00000040-rank-0.arrows    what it trained after the run was resumed from the checkpoint of step 40

Each is an Arrow stream, to which record batches are appended; its metadata names the sets. A run that resumes
cuts what lies behind its checkpoint off, and writes files of its own: no step is there twice, and what a
process of an earlier leg still writes reaches no file that counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sftdata.batches import Columns, Float32, Int32, Int64
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.local import named, path_from
from sftdata.set.store import Sink, write_atomic

LOG_FOLDER = "documents"
_SUFFIX = ".arrows"
_SETS = b"sets"
_COLUMNS = {
    "step": pa.int32(),
    "set": pa.int16(),
    "row": pa.int64(),
    "example_id": pa.int64(),
    "tokens": pa.int32(),
    "trained": pa.int32(),
    "bytes": pa.int32(),
    "weight": pa.float32(),
    "loss": pa.float32(),
}


class TrainedSet(msgspec.Struct, frozen=True):
    """A set that a run trains on.

    Attributes:
        digest: of its manifest.
        path: where it lies, absolute.
        beside: the same, from the folder of the run.
    """

    digest: str
    path: str
    beside: str


def trained_set(run: Path, folder: Path, digest: str) -> TrainedSet:
    """Describe a set so that it is found again where run and set are moved together, or the run alone."""
    return TrainedSet(digest, named(folder.resolve()), path_from(run.resolve(), folder.resolve()))


@dataclass(frozen=True, slots=True, eq=False)
class DocumentLosses(Columns):
    """What became of documents in training; index i in each column is the same stretch of one.

    Attributes:
        step: int32[N], optimizer step, from 1.
        set: int16[N], which of the sets.
        row: int64[N], packed row of the set that holds it.
        example_id: int64[N].
        tokens: int32[N], all of the stretch.
        trained: int32[N], tokens whose loss counts.
        bytes: int32[N], of the text of these, control tokens apart; 0 where the set brings no tokenizer.
        weight: float32[N], the sum of what they weigh; `trained` where the set has no weights.
        loss: float32[N], the sum of their negative log likelihoods, each times its weight.
    """

    step: Int32
    set: npt.NDArray[np.int16]
    row: Int64
    example_id: Int64
    tokens: Int32
    trained: Int32
    bytes: Int32
    weight: Float32
    loss: Float32

    def __len__(self) -> int:
        return len(self.step)


def log_schema(sets: Sequence[TrainedSet]) -> pa.Schema:
    """Return the schema of a file of the log."""
    return pa.schema(list(_COLUMNS.items()), metadata={_SETS: msgspec.json.encode(list(sets))})


def log_path(run: Path, step: int, rank: int) -> Path:
    """Return the file for what a rank trains behind a step."""
    return run / LOG_FOLDER / f"{step:08}-rank-{rank}{_SUFFIX}"


def log_files(run: Path) -> list[Path]:
    """Return the files of a run's log, by step and rank."""
    return sorted((run / LOG_FOLDER).glob(f"*-rank-*{_SUFFIX}"))


def log_batch(columns: DocumentLosses, schema: pa.Schema) -> pa.RecordBatch:
    """Return what is appended to a file of the log."""
    arrays = [pa.array(getattr(columns, name), kind) for name, kind in _COLUMNS.items()]
    return pa.record_batch(arrays, schema=schema)


def cut_after(run: Path, step: int) -> None:
    """Take away what a run logged behind a step, because it is about to be taken again.

    A file that is cut is written anew: what an earlier process still holds open is another one.
    """
    for path in log_files(run):
        if _begins(path) >= step:
            path.unlink()
            continue
        reader = _Reader(path)
        kept, gone = [], False
        for batch in reader:
            count = int(np.searchsorted(batch.column("step").to_numpy(), step, side="right"))
            gone |= count < len(batch)
            kept += [batch.slice(0, count)] if count else []
        if reader.schema is None:
            path.unlink()
        elif gone or reader.torn:
            write_atomic(path, partial(_write, [reader.schema, *kept]))
    with suppress(OSError):  # it holds something, or was never there
        (run / LOG_FOLDER).rmdir()


def _write(parts: Sequence[pa.Schema | pa.RecordBatch], sink: Sink) -> None:
    for part in parts:
        sink.write(part.serialize())


def _begins(path: Path) -> int:
    return int(path.name.partition("-")[0])


class _Reader:
    """The whole batches of a file; a run that was killed may have left part of one more.

    Attributes:
        schema: None where not even that is whole.
        torn: whether something is left over.
    """

    def __init__(self, path: Path) -> None:
        self.torn = False
        self._source = pa.memory_map(str(path)) if path.stat().st_size else None
        try:
            self._stream = None if self._source is None else pa.ipc.open_stream(self._source)
        except (pa.ArrowInvalid, OSError):
            self._stream = None
        self.schema: pa.Schema | None = None if self._stream is None else self._stream.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while self._stream is not None:
            try:
                yield self._stream.read_next_batch()
            except StopIteration:
                return
            except (pa.ArrowInvalid, OSError):
                self.torn = True
                return


def read_log(run: Path) -> tuple[tuple[TrainedSet, ...], DocumentLosses]:
    """Read the log of a run, finished or not, by step.

    Returns:
        The sets that the run has trained on, and the columns; `set` is an index into these sets.

    Raises:
        UsageError: the folder holds no such log.
        IntegrityError: a file is none of a log.
    """
    sets: dict[str, TrainedSet] = {}
    parts: list[list[npt.NDArray[np.generic]]] = []
    for path in log_files(run):
        reader = _Reader(path)
        if reader.schema is None:
            continue
        numbers = _numbers(path, reader.schema, sets)
        for batch in reader:
            columns = [batch.column(name).to_numpy() for name in _COLUMNS]
            columns[1] = numbers[columns[1]]
            parts.append(columns)
    if not parts:
        found = f"{run}: holds no losses of documents"
        raise UsageError(f"{found}.", "train with `sfttrain run ... --log-documents`.")
    whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
    parts.clear()  # as large as what they were joined to
    order = np.argsort(whole[0], kind="stable")
    return tuple(sets.values()), DocumentLosses(*(column[order] for column in whole))


def read_legs(run: Path) -> list[tuple[str, ...]]:
    """Return the digests of the sets of each leg of a run, the last leg first."""
    schemas = [_Reader(path).schema for path in reversed(log_files(run))]
    return list(
        dict.fromkeys(tuple(one.digest for one in _named(schema)) for schema in schemas if schema is not None)
    )


def _numbers(path: Path, schema: pa.Schema, sets: dict[str, TrainedSet]) -> npt.NDArray[np.int16]:
    """Return the number over all files of each set of this one; a later file knows the place better."""
    if list(schema.names) != list(_COLUMNS) or _SETS not in (schema.metadata or {}):
        what = f"{path}: is no log of documents: it has the columns {', '.join(schema.names):.100}."
        raise IntegrityError(what, "take it out of the folder.")
    named = _named(schema)
    sets |= {one.digest: one for one in named}
    order = {digest: number for number, digest in enumerate(sets)}
    return np.array([order[one.digest] for one in named], np.int16)


def _named(schema: pa.Schema) -> list[TrainedSet]:
    return msgspec.json.decode(schema.metadata[_SETS], type=list[TrainedSet])
