"""Constant-length rows from any iterable of rows, without files: bounded buffers, no lost tokens.

rows ── buffer ── (shuffle) ── canonical ── render ── encode ── one stream of tokens ── cut every max_length
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sftdata.acting import format_options, look_at, refuse_conflicts, refuse_without_effect
from sftdata.batches import (
    FILTERED,
    IGNORE_INDEX,
    Float32,
    Int32,
    Ragged,
    RowBatch,
    Tally,
    TextBatch,
    TokenBatch,
)
from sftdata.choosing import CHOOSING
from sftdata.config import DEFAULT_MAX_LENGTH, OF_PICTURES, PrepareConfig
from sftdata.encode.engine import choose_engine, load_encoder
from sftdata.encode.tokenizer import resolve_tokenizer
from sftdata.errors import DataError, UsageError
from sftdata.formats.convert import convert_rows
from sftdata.limit import limit_length
from sftdata.masks import choose_mask
from sftdata.masks.tokens import encode_batch
from sftdata.output import counted
from sftdata.pack import gather, plan_packs
from sftdata.pipeline import Stages, tokenize
from sftdata.plan import Job, choose_tokenizer
from sftdata.sources.planning import plan_sources
from sftdata.sources.ranges import Sizes
from sftdata.sources.source import open_source

BUFFER_ROWS = 1024
# Settings of `prepare` for the files of a set, for packing, and for the distribution of the work; the seed of
# a stream is its own.
NOT_STREAMED = frozenset({
    "inputs", "output", "overwrite", "split", "subset", "registry", "overlong", "packing", "max_rejects",
    "max_line_bytes", "slice_bytes", "workers", "like", *CHOOSING, *OF_PICTURES,
}) - {"seed"}  # fmt: skip

StreamedRow = dict[str, Int32 | Float32]


def refuse_unstreamed(settings: Iterable[str]) -> None:
    """Refuse settings that have no effect on a stream.

    Raises:
        UsageError: naming the first.
    """
    for name in settings:
        if name in NOT_STREAMED:
            raise UsageError(
                f"{name}: acts on sets; a stream is one text of tokens, cut every max_length.",
                "leave it out.",
            )


class Stream(Iterable[StreamedRow]):
    """Rows of exactly `max_length` tokens; each iteration starts from the beginning.

    Args:
        rows: the input, as dicts or strings; read in buffers, never whole.
        config: as for `prepare`; inputs and output are not used, and packing is one cut stream.
        buffer_rows: number of rows that are read, and shuffled, at a time.
        infinite: start over at the end of the input, forever.
        shuffle: shuffle the rows inside each buffer, differently in each pass.
        seed: of the shuffling.

    Attributes:
        rejected: number of rejected rows by the code of their fault, and of dropped ones by their reason.
    """

    def __init__(
        self, rows: Iterable[Any], config: PrepareConfig, *,
        buffer_rows: int = BUFFER_ROWS, infinite: bool = False, shuffle: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        refuse_conflicts(config)
        if isinstance(rows, str | bytes | PathLike) or not isinstance(rows, Iterable):
            what = f"rows: found {type(rows).__name__}; expected rows, as a list of dicts or a dataset."
            raise UsageError(
                what, "read a file with datasets.load_dataset, or make a set with sftdata.prepare."
            )
        if buffer_rows < 1:
            raise UsageError(f"buffer_rows: found {buffer_rows}; expected 1 or more.", "leave it out.")
        if infinite and iter(rows) is rows:
            raise UsageError(
                "infinite=True reads the input repeatedly, and an iterator is gone after once.",
                "give a list.",
            )
        self._rows, self._config, self._buffer_rows = rows, config, buffer_rows
        self._infinite, self._shuffle, self._seed = infinite, shuffle, seed
        self.rejected: Counter[str] = Counter()
        self._stages: Stages | None = None

    def __iter__(self) -> Iterator[StreamedRow]:
        """Yield int32[max_length] `input_ids` and `labels`, int32[S] `seq_lengths`.

        Raises:
            DataError: a whole buffer holds nothing to train on.
        """
        carried = TokenBatch.join([])
        for number, buffer in enumerate(self._buffers()):
            stages = self._stages = self._stages or self._load(buffer)
            tokens = TokenBatch.join([carried, self._tokens(stages, buffer, number)])
            whole = len(tokens.input_ids) // stages.job.max_length * stages.job.max_length
            yield from _cut(_slice(tokens, 0, whole), stages.job)
            carried = _slice(tokens, whole, len(tokens.input_ids))
        if len(carried) and self._stages:
            yield from _cut(carried, self._stages.job)
        if self.rejected:
            counts = ", ".join(f"{rows} {code}" for code, rows in self.rejected.most_common())
            warnings.warn(f"rows left out of the stream: {counts}", stacklevel=2)

    def _buffers(self) -> Iterator[list[Any]]:
        for epoch in count():
            source, random = iter(self._rows), np.random.default_rng([self._seed, epoch])
            empty = True
            while buffer := list(islice(source, self._buffer_rows)):
                empty = False
                order = random.permutation(len(buffer)) if self._shuffle else range(len(buffer))
                yield [buffer[index] for index in order]
            if not self._infinite or empty:
                return

    def _load(self, sample: list[Any]) -> Stages:
        """Choose format and tokenizer as `prepare` does, from the first buffer."""
        config = self._config
        tokenizer, _ = choose_tokenizer(config)
        max_length = config.max_length or min(tokenizer.model_max_length, DEFAULT_MAX_LENGTH)
        config = config.model_copy(update={"max_length": max_length, "packing": "wrapped"})
        name = config.format or "text"
        if config.formatter is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "stream.jsonl"
                path.write_bytes(b"\n".join(map(_as_line, sample)) + b"\n")
                name, look, _ = look_at(
                    config, plan_sources([open_source(str(path))], Sizes(1 << 30))[0], tokenizer
                )
                refuse_without_effect(config, [look] if look else [], tokenizer)
        options = format_options(config, chat=tokenizer.chat_template is not None)
        engine, _ = choose_engine(tokenizer, config.engine, worth_it=False)
        return Stages(
            Job(config, tokenizer, (name,), options, {"stream": 0}, engine, choose_mask(config, tokenizer))
        )

    def _tokens(self, stages: Stages, buffer: list[Any], number: int) -> TokenBatch:
        ids = np.arange(len(buffer), dtype=np.int64)
        rows = [row if isinstance(row, str) else dict(row) for row in buffer]
        batch = RowBatch(rows, ids, ids + 1, np.full_like(ids, -1))
        tally = Tally(batch)
        converted = convert_rows(batch, stages.job.formats[0], stages.job.options, tally)
        tokens, _ = tokenize(stages, converted, tally)
        tokens = limit_length(stages.job.mask.flags(tokens, tally), None, "truncate", tally)
        left_out = tally.left_out()
        filtered = left_out.pop(FILTERED, 0)
        self.rejected.update(left_out)
        self.rejected.update(reject.code for reject in tally.rejects)
        if not len(tokens) and filtered < len(buffer):
            first = tally.rejects[0] if tally.rejects else None
            reason = f" The first: {first.reason.rstrip('.')}." if first else ""
            fix = first.fix if first else "check the mask, as `sftdata preview` shows it."
            some = counted(len(buffer), "row")
            raise DataError(f"Nothing to train on in {some} of the stream (buffer {number}).{reason}", fix)
        return tokens


def _as_line(row: object) -> bytes:
    return msgspec.json.encode({"text": row} if isinstance(row, str) else row)


def _slice(tokens: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Return a range of the tokens, as examples of their own."""
    inside = tokens.offsets[(tokens.offsets > start) & (tokens.offsets < stop)]
    offsets = np.concatenate([[start], inside, [stop]]) if stop > start else np.array([start])
    rows = np.zeros(len(offsets) - 1, np.int64)
    return tokens.at(slice(start, stop), offsets - start, rows)


def _cut(tokens: TokenBatch, job: Job) -> Iterator[StreamedRow]:
    """Yield the packed rows of a range; the last one is padded if it is short."""
    if not len(tokens):
        return
    packs = plan_packs(tokens.lengths, job.max_length, "wrapped")
    ids, padding = np.zeros(len(tokens), np.int64), job.tokenizer.filler_id
    rows = gather(tokens, ids, packs, job.max_length, padding, weighted=job.config.loss_weights)
    for index in range(len(rows)):
        part = slice(rows.row_offsets[index], rows.row_offsets[index + 1])
        segments = slice(rows.segment_offsets[index], rows.segment_offsets[index + 1])
        row: StreamedRow = {
            "input_ids": rows.input_ids[part],
            "labels": rows.labels[part],
            "seq_lengths": rows.seq_lengths[segments],
        }
        if rows.loss_weights is not None:
            row["loss_weights"] = rows.loss_weights[part]
        yield row


class TextEncoder:
    """Encode texts with one tokenizer.

    Args:
        tokenizer: folder or Hub id.

    Raises:
        UsageError: it cannot be loaded.
    """

    def __init__(self, tokenizer: str) -> None:
        self._encoder = load_encoder(resolve_tokenizer(tokenizer), "tokenizers")

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[Int32, Int32]]:
        """Return input_ids and labels (each int32[T]) of prompts with the answers that follow them.

        An answer and the end token after it are trained; where it is empty, nothing is.
        """
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        spans = [
            [(len(prompt.encode()), len(text.encode()))] if answer else []
            for prompt, answer, text in zip(prompts, answers, texts, strict=True)
        ]
        nothing = Ragged.from_lists([[] for _ in texts])
        rows, closed = np.arange(len(texts)), np.ones(len(texts), np.bool_)
        given = TextBatch(texts, Ragged.from_lists(spans), nothing, rows, True, closed)
        batch = encode_batch(given, self._encoder, Tally())
        labels = np.where(batch.trained, batch.input_ids, IGNORE_INDEX).astype(np.int32)
        edges = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        return [(batch.input_ids[start:stop], labels[start:stop]) for start, stop in edges]
