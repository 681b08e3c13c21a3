"""The values that pass between stages, and the tally that passes through all of them.

A batch consists of columns; index i in each column is the same example.

    RowBatch ── canonical ──> list[Row] ── render ──> TextBatch ── encode ──> TokenBatch ── pack ──> PackPlan

`row` columns are indices into the chunk's RowBatch, so that the origin of every later value is known. One
`Tally` from reading to the ledger holds the counts of the stages, and the rows they reject or drop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from sftdata.errors import Fault, place

Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

Ranges = list[tuple[int, int]]
"""Half-open (start, stop) pairs."""

IGNORE_INDEX = -100
"""The label of a token that is not trained, as torch and transformers have it."""


# ---------------------------------------------------------------------------------------------- read


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """The rows of one chunk, as parsed.

    Attributes:
        rows: one JSON object each (`str` for a line of plain text).
        example_ids: int64[N], number of the row over all inputs, which the manifest maps to file and line.
        lines: int64[N], 1-based line where the row starts; its number in the source where that is not read by
            lines.
        byte_offsets: int64[N], where the row starts in the (decompressed) source; -1 where that is unknown.
        file: name of the source.
        numbered_from: number in the source, from 1, that a row with example id 0 would have.
        by_line: whether the source is read by lines.
    """

    rows: list[Any]
    example_ids: Int64
    lines: Int64
    byte_offsets: Int64
    file: str = ""
    numbered_from: int = 1
    by_line: bool = True

    def __len__(self) -> int:
        return len(self.rows)

    def record_of(self, index: int) -> int:
        """Return the number of a row in its source, from 1."""
        return int(self.example_ids[index]) + self.numbered_from

    def line_of(self, index: int) -> int | None:
        """Return the line where a row starts; None in a source that is not read by lines."""
        return int(self.lines[index]) if self.by_line else None


# ----------------------------------------------------------------------------------------- canonical
# One object a row: structs, which are made several times faster than dataclasses.


class Conversation(msgspec.Struct, frozen=True):
    """Messages as `apply_chat_template` takes them, with what the row says about training them.

    Attributes:
        messages: dicts of plain JSON data: `role` (system, user, assistant, tool; others pass through to the
            template), `content` (str, or absent beside `tool_calls`), `reasoning_content`, `tool_calls`
            (arguments an object or its text).
        trained: one per message: its own switch, True / False, None where `train_on` decides, or its weight,
            a float above 0.
        tools: JSON schemas of the tools, or None.
        template_kwargs: this row's own template arguments.
        prompt_messages: how many leading messages are prompt only (conversational prompt/completion rows).
        counted: repairs made while reading the row, as names of counters, one entry each.
    """

    messages: list[dict[str, Any]]
    trained: list[bool | float | None]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    prompt_messages: int = 0
    counted: tuple[str, ...] = ()


class Completion(msgspec.Struct, frozen=True):
    """A prompt and the completion to train, both rendered text, joined without a separator."""

    prompt: str
    completion: str


class Text(msgspec.Struct, frozen=True):
    """Running text."""

    text: str


class Tokens(msgspec.Struct, frozen=True):
    """A row tokenized elsewhere: int ids and labels (-100 where not trained), of equal length."""

    input_ids: list[int]
    labels: list[int]


Row = Conversation | Completion | Text | Tokens


# -------------------------------------------------------------------------------------------- render


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Lists of half-open ranges: `values[offsets[i]:offsets[i + 1]]` belongs to example i.

    Attributes:
        values: int64[K, 2], (start, stop) pairs, ascending and disjoint inside one example.
        offsets: int64[N + 1].
    """

    values: Int64
    offsets: Int64

    @classmethod
    def from_lists(cls, lists: list[list[tuple[int, int]]]) -> Ragged:
        """Build from one list of (start, stop) pairs per example.

        >>> Ragged.from_lists([[(0, 2)], [], [(1, 3), (5, 6)]]).offsets.tolist()
        [0, 1, 1, 3]
        """
        flat = [pair for pairs in lists for pair in pairs]
        return cls(np.array(flat, np.int64).reshape(-1, 2), offsets_of([len(pairs) for pairs in lists]))

    def __getitem__(self, index: int) -> Int64:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True, slots=True, eq=False)
class TextBatch:
    """Rendered texts with what is trained in them, before any tokenizer.

    Attributes:
        texts: str[N].
        trained: byte ranges (utf-8) of each text that the model must generate.
        literal: byte ranges whose text is data although it spells a control token: encode without matching
            it.
        row: int64[N], index into the RowBatch.
        reference_ends: BOS and EOS are the tokenizer's to add (raw text); else the template wrote them.
        closed: bool[N], whether a trained end token (EOS) belongs after the text; only read with
            `reference_ends`.
        loss_weights: float32[K], one for each range of `trained`; None where all are 1.
    """

    texts: list[str]
    trained: Ragged
    literal: Ragged
    row: Int64
    reference_ends: bool
    closed: Bool
    loss_weights: Float32 | None = None

    def __len__(self) -> int:
        return len(self.texts)


# -------------------------------------------------------------------------------------------- encode


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Token ids of all examples, end to end.

    Attributes:
        input_ids: int32[T].
        trained: bool[T].
        offsets: int64[N + 1]; example i is `input_ids[offsets[i]:offsets[i + 1]]`.
        row: int64[N], index into the RowBatch.
        loss_weights: float32[T], above 0 where trained, 0 elsewhere; None where all are 1.
    """

    input_ids: Int32
    trained: Bool
    offsets: Int64
    row: Int64
    loss_weights: Float32 | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def lengths(self) -> Int64:
        """int64[N], tokens per example."""
        return np.diff(self.offsets)

    def select(self, keep: Bool) -> TokenBatch:
        """Return the examples where `keep`, bool[N], is True."""
        if keep.all():
            return self
        tokens = np.repeat(keep, self.lengths)
        offsets = offsets_of(self.lengths[keep])
        return self.at(tokens, offsets, self.row[keep])

    def pick(self, examples: Int64) -> TokenBatch:
        """Return these examples, int64[K], in this order."""
        lengths = self.lengths[examples]
        places = positions_of(self.offsets[:-1][examples], lengths)
        return self.at(places, offsets_of(lengths), self.row[examples])

    def in_row_order(self) -> TokenBatch:
        """Return the examples in the order of their rows; examples of one row keep theirs."""
        order = np.argsort(self.row, kind="stable")
        return self if (np.diff(order) > 0).all() else self.pick(order)

    def at(self, tokens: Int64 | Bool | slice, offsets: Int64, row: Int64) -> TokenBatch:
        """Return the tokens that an index, a mask or a slice picks, as examples of their own."""
        weights = None if self.loss_weights is None else self.loss_weights[tokens]
        return TokenBatch(self.input_ids[tokens], self.trained[tokens], offsets, row, weights)

    def weights(self) -> Float32:
        """float32[T], 1 for every trained token unless the data gives weights."""
        return self.trained.astype(np.float32) if self.loss_weights is None else self.loss_weights

    @classmethod
    def join(cls, parts: list[TokenBatch]) -> TokenBatch:
        """Put batches end to end; their `row` columns are taken as they are.

        >>> ids, trained = np.arange(3, dtype=np.int32), np.ones(3, np.bool_)
        >>> one = TokenBatch(ids, trained, np.array([0, 1, 3]), np.array([4, 5]))
        >>> TokenBatch.join([one, one]).offsets.tolist()
        [0, 1, 3, 4, 6]
        """
        if not parts:
            return cls(np.zeros(0, np.int32), np.zeros(0, np.bool_), offsets_of([]), np.zeros(0, np.int64))
        if len(parts) == 1:
            return parts[0]
        offsets = offsets_of(np.concatenate([part.lengths for part in parts]))
        weighted = any(part.loss_weights is not None for part in parts)
        weights = np.concatenate([part.weights() for part in parts]) if weighted else None
        names = ("input_ids", "trained", "row")
        ids, trained, row = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(ids, trained, offsets, row, weights)


# ---------------------------------------------------------------------------------------------- pack


@dataclass(frozen=True, slots=True, eq=False)
class PackPlan:
    """Which tokens of which example go where. A document is a stretch of one example inside one packed row.

    Attributes:
        offsets: int64[P + 1]; packed row p holds documents `offsets[p]:offsets[p + 1]`, in order.
        example: int64[D], index into the TokenBatch.
        start, stop: int64[D], the stretch of that example's own tokens, half-open.
    """

    offsets: Int64
    example: Int64
    start: Int64
    stop: Int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def within(self, example: Int64, start: Int64) -> PackPlan:
        """Return the plan in terms of the examples that its own are stretches of.

        Args:
            example: int64[N], what each example of this plan is a stretch of.
            start: int64[N], where in it the stretch begins.
        """
        before = start[self.example]
        return PackPlan(self.offsets, example[self.example], self.start + before, self.stop + before)


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """The columns of a shard, in final layout.

    Attributes:
        input_ids, labels: int32[T]; T = P * max_length when rows are constant-length.
        row_offsets: int64[P + 1], token offsets of the rows.
        seq_lengths: int32[S], document lengths row after row, padding as segments of its own: one last in a
            row, and between documents in a view that pads them to a multiple.
        example_ids: int64[S], input row behind each document, -1 for padding.
        segment_offsets: int64[P + 1], into `seq_lengths` and `example_ids`.
        loss_weights: float32[T], above 0 where trained, 0 elsewhere; None in a set without weights.
        images: int32[K], pictures of the segments, end to end, as numbers in the sidecar of the shard.
        image_counts: int32[S], how many each segment has; None, as `images`, in a set without pictures.
    """

    input_ids: Int32
    labels: Int32
    row_offsets: Int64
    seq_lengths: Int32
    example_ids: Int64
    segment_offsets: Int64
    loss_weights: Float32 | None = None
    images: Int32 | None = None
    image_counts: Int32 | None = None

    def __len__(self) -> int:
        return len(self.row_offsets) - 1


# --------------------------------------------------------------------------------------------- tally

EXAMPLES = 3  # rows listed for a count
FILTERED = "formatter"
"""The reason of a row for which the user's formatter returned None."""


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A row that cannot be used: its place, the reason and the fix; made where it fails, written unchanged.

    Attributes:
        file: name of the source.
        line: 1-based line where it starts; None in a file that is not read by lines.
        record: 1-based number of its line, CSV record, array element or table row in the file.
        byte_offset: where the row starts in the decompressed source; -1 where rows have no byte position.
        code: stable kebab-case name of the fault.
        reason: what was found and expected.
        fix: how to fix it.
        row: the row as parsed, or its text if it could not be parsed.
    """

    file: str
    line: int | None
    record: int
    byte_offset: int
    code: str
    reason: str
    fix: str
    row: object

    @property
    def place(self) -> str:
        """Where the row is, in words."""
        if self.line is None:  # only the rows of a table have no byte position
            return place(self.file, self.record, "row" if self.byte_offset < 0 else "element")
        return place(self.file, self.record, "line" if self.line == self.record else "record", self.line)


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """A valid row that is not in the shards.

    Attributes:
        file, line, record: where it is, as in a `Reject`.
        reason: key of `rows_dropped` or `rows_filtered` in the ledger.
        tokens: its length; None if it was dropped before it was tokenized.
    """

    file: str
    line: int | None
    record: int
    reason: str
    tokens: int | None


class Tally:
    """Counts by name with the rows behind them, and the rows that are rejected or dropped.

    Args:
        batch: the rows, with their places; None if all rows are known to be valid.
        rejects: rows that could not be read.

    Attributes:
        counts: by name of the counter.
        rows: indices into the batch of the rows of a count.
        rejects, dropped: in the order of the stages.
        tokens_cut: tokens cut from rows that stay.
        tokens_dropped: of rows (with `--overlong split`, of parts of rows) that were dropped, by reason.
    """

    def __init__(self, batch: RowBatch | None = None, rejects: Iterable[Reject] = ()) -> None:
        self.batch = RowBatch([], *np.zeros((3, 0), np.int64)) if batch is None else batch
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.rejects = [*rejects]
        self.dropped: list[Dropped] = []
        self.tokens_cut = 0
        self.tokens_dropped: Counter[str] = Counter()

    def count(self, name: str, row: int, number: int = 1) -> None:
        """Add `number`, if it is not 0, for a row."""
        if number:
            self.counts[name] += number
            self.rows.setdefault(name, []).append(row)

    def count_rows(self, name: str, rows: Int64) -> None:
        """Add one for each of these rows, int64[K]."""
        if len(rows):
            self.counts[name] += len(rows)
            self.rows.setdefault(name, []).extend(rows.tolist())

    def reject(self, row: int, fault: Fault) -> None:
        """Reject a row of the batch, as it was read."""
        offset, own = int(self.batch.byte_offsets[row]), self.batch.rows[row]
        self.rejects.append(Reject(**self._place(row), byte_offset=offset, **asdict(fault), row=own))

    def drop(self, row: int, reason: str, tokens: int | None = None) -> None:
        """Drop a row of the batch, which has that many tokens."""
        self.dropped.append(Dropped(**self._place(row), reason=reason, tokens=tokens))

    def _place(self, row: int) -> dict[str, Any]:
        batch = self.batch
        return {"file": batch.file, "line": batch.line_of(row), "record": batch.record_of(row)}

    def left_out(self) -> Counter[str]:
        """Return how many rows were dropped, by reason."""
        return Counter(row.reason for row in self.dropped)


# ------------------------------------------------------------------------------------------- columns


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Columns of one length, some of which may be None: index i in each is the same thing."""

    def take(self, which: Int64 | Bool | slice) -> Self:
        """Return some of the things, by index or by flag, in this order."""
        columns = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(None if column is None else column[which] for column in columns))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Put columns end to end."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        return cls(*(None if own[0] is None else np.concatenate(own) for own in columns))


def offsets_of(lengths: Sequence[int] | Int64 | Int32 | Bool) -> Int64:
    """Turn int64[N] lengths into int64[N + 1] offsets.

    >>> offsets_of([3, 0, 2]).tolist()
    [0, 3, 3, 5]
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def positions_of(starts: Int64, lengths: Int64) -> Int64:
    """Return start, start + 1, ... of each range, end to end.

    >>> positions_of(np.array([5, 20]), np.array([3, 2])).tolist()
    [5, 6, 7, 20, 21]
    """
    offsets = offsets_of(lengths)
    positions: Int64 = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return positions


def count_between(places: Int64, start: Int64, stop: Int64) -> Int64:
    """Count the places, int64[K] ascending, in each half-open stretch, int64[S]; an empty one has none.

    >>> count_between(np.array([1, 4, 5]), np.array([0, 4, 6]), np.array([2, 6, 5])).tolist()
    [1, 2, 0]
    """
    counts: Int64 = np.searchsorted(places, stop) - np.searchsorted(places, np.minimum(start, stop))
    return counts
