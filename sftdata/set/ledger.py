"""The ledger: what became of every row and every token, and lists of the rows behind its counts.

Tasks count apart; counts merge in any order. The lists stand beside the shards, one JSON object a line: each
task writes its part, and the set joins them in order.

    rejects.jsonl   rows that cannot be used, with the row itself, to be fixed and fed back in
    dropped.jsonl   rows that were read and are not in the shards, with the reason
    counted.jsonl   the rows behind each counter, as ranges of example ids
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from sftdata.batches import (
    EXAMPLES,
    FILTERED,
    IGNORE_INDEX,
    Int32,
    Int64,
    PackedRows,
    Reject,
    Tally,
    offsets_of,
)
from sftdata.errors import VERIFY, IntegrityError
from sftdata.pictures.loaded import Picture
from sftdata.set.local import file_of
from sftdata.set.store import Count, RowLength, Sink

REJECTS_NAME, DROPPED_NAME, COUNTED_NAME = "rejects.jsonl", "dropped.jsonl", "counted.jsonl"
LISTS = (REJECTS_NAME, DROPPED_NAME, COUNTED_NAME)

Counts = dict[str, Count]
PICTURES = (
    "pictures_in", "pictures_kept", "pictures_in_rejected_rows", "pictures_in_dropped_rows",
    "pictures_left_out", "pictures_stored", "picture_bytes", "picture_pixels",
)  # fmt: skip
"""What is counted of pictures."""
_OF_SOME = (
    "documents_left_out",
    "tokens_left_out",
    "documents_repeated",
    *PICTURES,
)  # not written where there are none
_Key = TypeVar("_Key", str, int)
Line = TypeVar("Line", bound=msgspec.Struct)


class SegmentedRows(Protocol):
    """Packed rows, as far as their segments go."""

    @property
    def seq_lengths(self) -> Int32:
        """int32[S], tokens of each segment, row after row."""

    @property
    def example_ids(self) -> Int64:
        """int64[S], input row behind each, -1 for padding."""

    def __len__(self) -> int: ...


class SourceCounts(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What one source gave to the set.

    Attributes:
        rows: rows kept.
        tokens: tokens of these rows in the set, trained or context.
        tokens_trained: those with a label.
    """

    rows: Count = 0
    tokens: Count = 0
    tokens_trained: Count = 0


class Ledger(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Counts that must add up.

        rows_in    = rows_kept + rows_rejected + rows_filtered + rows_dropped + documents_left_out
        tokens_in  = tokens_trained + tokens_context + tokens_cut + tokens_in_dropped_rows + tokens_left_out
        rows_packed * max_length = tokens_trained + tokens_context + tokens_padding
        pictures_in = pictures_kept + pictures_in_rejected_rows + pictures_in_dropped_rows + pictures_left_out

    Attributes:
        rows_rejected, rows_filtered, rows_dropped: rows by fault code, by rule, by reason.
        tokens_trained: tokens whose label is not -100.
        tokens_context: the other tokens of the examples.
        tokens_cut: tokens by over-long policy.
        max_length: tokens per packed row; None while nothing is packed or where rows keep their own length.
        counters: everything else worth a number: `boundary_splits`, `literal_rows`, ...
        examples: rows behind a counter, by its name: the ids of the first three.
        lengths: examples by length before any cut, {lower bound of the bin: examples}, see `length_bins`.
        sources: what each source gave.
        documents_left_out: of the sets that a view is made of, by the step that left them out.
        tokens_left_out: tokens of these documents.
        documents_repeated: documents taken of which another pass over their source is taken too, the first of
            them aside; `rows_in` counts them.
        pictures_in: that rows name, in a set with pictures; of the rows of which this could be read.
        pictures_left_out: of `documents_left_out`.
        pictures_stored: in sidecars, where each stands once for its slice.
        picture_bytes, picture_pixels: of these.
    """

    rows_in: Count = 0
    rows_kept: Count = 0
    rows_rejected: Counts = {}
    rows_filtered: Counts = {}
    rows_dropped: Counts = {}
    tokens_in: Count = 0
    tokens_trained: Count = 0
    tokens_context: Count = 0
    tokens_cut: Counts = {}
    tokens_in_dropped_rows: Count = 0
    rows_packed: Count = 0
    documents: Count = 0
    max_length: RowLength | None = None
    tokens_padding: Count = 0
    counters: Counts = {}
    examples: dict[str, list[Count]] = {}
    lengths: dict[Count, Count] = {}
    sources: dict[str, SourceCounts] = {}
    documents_left_out: Counts = {}
    tokens_left_out: Count = 0
    documents_repeated: Count = 0
    pictures_in: Count = 0
    pictures_kept: Count = 0
    pictures_in_rejected_rows: Count = 0
    pictures_in_dropped_rows: Count = 0
    pictures_left_out: Count = 0
    pictures_stored: Count = 0
    picture_bytes: Count = 0
    picture_pixels: Count = 0

    @property
    def tokens(self) -> int:
        """Tokens in the set, padding aside."""
        return self.tokens_trained + self.tokens_context

    def count_tally(self, tally: Tally, overlong: str) -> None:
        """Add what the stages counted of a chunk, and the rows and tokens that left.

        Args:
            overlong: the policy by which tokens were cut.
        """
        ids = tally.batch.example_ids
        dropped = tally.left_out()
        filtered = dropped.pop(FILTERED, 0)
        _add(self.rows_rejected, Counter(reject.code for reject in tally.rejects))
        _add(self.rows_filtered, {FILTERED: filtered} if filtered else {})
        _add(self.rows_dropped, dropped)
        _add(self.tokens_cut, {overlong: tally.tokens_cut} if tally.tokens_cut else {})
        self.tokens_in_dropped_rows += tally.tokens_dropped.total()
        _add(self.counters, +tally.counts)
        for name, rows in tally.rows.items():
            self.examples[name] = ids[rows[:EXAMPLES]].tolist()

    def count_pictures(self, named: Mapping[int, int], documents: Set[int], kept: Set[int]) -> None:
        """Add the pictures of a chunk.

        Args:
            named: how many a row names, by its index.
            documents: rows that became documents; the others are rejected.
            kept: those of which something is in a packed row.
        """
        self.pictures_in += sum(named.values())
        self.pictures_kept += sum(count for row, count in named.items() if row in kept)
        self.pictures_in_rejected_rows += sum(count for row, count in named.items() if row not in documents)
        self.pictures_in_dropped_rows += sum(
            count for row, count in named.items() if row in documents and row not in kept
        )

    def count_stored(self, pictures: Iterable[Picture]) -> None:
        """Add the pictures of a sidecar."""
        for picture in pictures:
            self.pictures_stored += 1
            self.picture_bytes += picture.file_bytes
            self.picture_pixels += picture.height * picture.width

    def count_lengths(self, lengths: Int64) -> None:
        """Add examples, int64[N] tokens each, to the histogram of lengths."""
        bins, counts = np.unique(length_bins(lengths), return_counts=True)
        _add(self.lengths, dict(zip(bins.tolist(), counts.tolist(), strict=True)))

    def count_packed(
        self, rows: PackedRows, max_length: int | None, sources: Mapping[str, int] | None = None
    ) -> None:
        """Add packed rows, as they stand in a shard.

        Args:
            rows: columns of a shard, or of a part of it.
            max_length: tokens per row; None where rows keep their own length.
            sources: first example id of each source, ascending, to count what each gave.
        """
        edges = offsets_of(rows.seq_lengths)
        trained = np.diff(np.searchsorted(np.flatnonzero(rows.labels != IGNORE_INDEX), edges))
        self.count_segments(rows, trained, len(rows.input_ids), max_length, sources)

    def count_segments(
        self, rows: SegmentedRows, trained: Int64, slots: int, max_length: int | None,
        sources: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """Add packed rows of which only the segments are known.

        Args:
            rows: their segments.
            trained: int64[S], labelled tokens of each.
            slots: tokens of the rows, padding included.
            max_length, sources: as for `count_packed`.
        """
        is_document = rows.example_ids >= 0
        tokens, labelled = int(rows.seq_lengths[is_document].sum(dtype=np.int64)), int(trained.sum())
        packed = Ledger(
            tokens_trained=labelled,
            tokens_context=tokens - labelled,
            rows_packed=len(rows),
            documents=int(is_document.sum()),
            max_length=max_length if len(rows) else None,
            tokens_padding=slots - tokens,
        )
        if sources:
            packed.sources = _count_sources(rows, trained, sources)
        self.merge(packed)

    def merge(self, other: Ledger) -> None:
        """Add another ledger to this one.

        Raises:
            ValueError: the two count rows of different lengths.
        """
        lengths = {self.max_length, other.max_length} - {None}
        mixed = self.rows_packed and other.rows_packed and self.max_length != other.max_length
        if mixed or len(lengths) > 1:
            raise ValueError(
                f"ledgers of rows of {self.max_length} and {other.max_length} tokens cannot be merged"
            )
        for name in self.__struct_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "examples":
                for counter, ids in theirs.items():
                    mine[counter] = sorted({*mine.get(counter, ()), *ids})[:EXAMPLES]
            elif isinstance(mine, dict):
                _add_sources(mine, theirs) if name == "sources" else _add(mine, theirs)
            elif name != "max_length":
                setattr(self, name, mine + theirs)
        self.max_length = next(iter(lengths), None)

    def check(self, where: str = "ledger") -> None:
        """Assert the law of conservation.

        Raises:
            IntegrityError: naming the equation that does not hold, with both sides.
        """
        rejected, filtered, dropped = (
            sum(c.values()) for c in (self.rows_rejected, self.rows_filtered, self.rows_dropped)
        )
        cut, left_out = sum(self.tokens_cut.values()), sum(self.documents_left_out.values())
        _equal(
            where,
            f"rows_in = rows_kept {self.rows_kept} + rejected {rejected} + filtered {filtered}"
            f" + dropped {dropped} + left out {left_out}",
            self.rows_in,
            self.rows_kept + rejected + filtered + dropped + left_out,
        )
        _equal(
            where,
            f"tokens_in = trained {self.tokens_trained} + context {self.tokens_context} + cut {cut}"
            f" + in dropped rows {self.tokens_in_dropped_rows} + left out {self.tokens_left_out}",
            self.tokens_in,
            self.tokens + cut + self.tokens_in_dropped_rows + self.tokens_left_out,
        )
        lost = self.pictures_in_rejected_rows + self.pictures_in_dropped_rows + self.pictures_left_out
        _equal(
            where,
            f"pictures_in = kept {self.pictures_kept} + in rejected rows {self.pictures_in_rejected_rows}"
            f" + in dropped rows {self.pictures_in_dropped_rows} + left out {self.pictures_left_out}",
            self.pictures_in,
            self.pictures_kept + lost,
        )
        if self.max_length is None:
            _equal(where, "tokens_padding = 0, as rows keep their own length", self.tokens_padding, 0)
        else:
            _equal(
                where,
                f"rows_packed {self.rows_packed} * max_length {self.max_length}"
                f" = trained {self.tokens_trained} + context {self.tokens_context}"
                f" + padding {self.tokens_padding}",
                self.rows_packed * self.max_length,
                self.tokens + self.tokens_padding,
            )

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data, every mapping in the order of its keys."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        return {name: _ordered(value) for name, value in plain.items() if value or name not in _OF_SOME}

    @classmethod
    def from_json(cls, data: object) -> Ledger:
        """Read what `to_json` returned.

        Raises:
            msgspec.ValidationError: the data is no ledger.
        """
        return msgspec.convert(data, cls, str_keys=True)


def length_bins(lengths: Int64) -> Int64:
    """Return the lower bound of each length's bin: exact up to 15 tokens, then eight bins for each doubling.

    >>> length_bins(np.array([0, 7, 15, 16, 17, 18, 1000, 1024])).tolist()
    [0, 7, 15, 16, 16, 18, 960, 1024]
    """
    exponent = np.frexp(np.asarray(lengths, np.float64))[1].astype(np.int64)
    shift = np.maximum(exponent - 4, 0)
    bins: Int64 = (np.asarray(lengths, np.int64) >> shift) << shift
    return bins


def distinct(ids: Int64) -> Int64:
    """Return the different values among int64[N] >= 0, ascending; ten times as fast as `np.unique`."""
    ids = np.sort(ids)
    kept: Int64 = ids[np.diff(ids, prepend=-1) > 0]
    return kept


def _count_sources(
    rows: SegmentedRows, trained: Int64, sources: Mapping[str, int]
) -> dict[str, SourceCounts]:
    documents = np.flatnonzero(rows.example_ids >= 0)
    ids = rows.example_ids[documents]
    # An empty source shares its first id with the next one, which is the one that has the example.
    source = np.searchsorted(list(sources.values()), ids, side="right") - 1
    names, counts = list(sources), {}
    for index in distinct(source).tolist():
        own = documents[source == index]
        counts[names[index]] = SourceCounts(
            rows=len(distinct(ids[source == index])),
            tokens=int(rows.seq_lengths[own].sum(dtype=np.int64)),
            tokens_trained=int(trained[own].sum()),
        )
    return counts


def _add(mine: dict[_Key, int], theirs: Mapping[_Key, int]) -> None:
    for key, count in theirs.items():
        mine[key] = mine.get(key, 0) + count


def _add_sources(mine: dict[str, SourceCounts], theirs: dict[str, SourceCounts]) -> None:
    for name, counts in theirs.items():
        kept = mine.setdefault(name, SourceCounts())
        kept.rows += counts.rows
        kept.tokens += counts.tokens
        kept.tokens_trained += counts.tokens_trained


def _equal(where: str, equation: str, left: int, right: int) -> None:
    if left != right:
        raise IntegrityError(f"{where}: {equation} does not hold: {left} is not {right}.")


def _ordered(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {str(key): value[key] for key in sorted(value)}


# ------------------------------------------------------------------------------- the rows behind the counts


class CountedRows(msgspec.Struct, frozen=True, kw_only=True):
    """The rows that one task added to a counter.

    Attributes:
        counter: its name in the ledger.
        examples: first and last example id of each run of rows that follow each other.
    """

    counter: str
    examples: list[tuple[int, int]]


def encode_reject(reject: Reject) -> bytes:
    r"""Return a reject as one JSON line; what UTF-8 cannot hold (half a surrogate pair) is kept as an escape.

    >>> where = dict(file="a.csv", line=3, record=2, byte_offset=9)
    >>> encode_reject(Reject(**where, code="late", reason="r", fix="f", row='"'))
    b'{"file":"a.csv","line":3,"record":2,"byte_offset":9,"code":"late","reason":"r","fix":"f","row":"\\""}\n'
    """
    try:
        line = msgspec.json.encode(reject)
    except (UnicodeEncodeError, msgspec.MsgspecError, TypeError, OverflowError):
        plain = {name: getattr(reject, name) for name in reject.__struct_fields__}
        line = json.dumps(plain, default=str, separators=(",", ":")).encode()
    return line + b"\n"


def first_reject(rejects: Iterable[Reject], code: str) -> Reject:
    """Return the first row that was rejected for this reason."""
    return next(reject for reject in rejects if reject.code == code)


def decode_rejects(lines: Iterable[bytes]) -> Iterator[Reject]:
    """Yield the rejects in lines of JSON."""
    return (msgspec.json.decode(line, type=Reject) for line in lines)


def read_lines(path: Path, kind: type[Line], fix: str = VERIFY) -> Iterator[Line]:
    """Yield what each line of a list of this kind says; nothing where there is no such file.

    Raises:
        IntegrityError: the list is damaged.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as lines:
            for line in lines:
                yield msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{path}: damaged: {error}.", fix) from None


def encode_lines(items: Iterable[msgspec.Struct]) -> bytes:
    r"""Return items as JSON lines.

    >>> encode_lines([CountedRows(counter="rows_parted", examples=[(0, 4), (7, 7)])])
    b'{"counter":"rows_parted","examples":[[0,4],[7,7]]}\n'
    """
    return b"".join(msgspec.json.encode(item) + b"\n" for item in items)


def runs_of(ids: Int64) -> list[tuple[int, int]]:
    """Return the first and last of each run of ids, int64[N], that follow each other; each id counts once.

    >>> runs_of(np.array([3, 1, 2, 7, 7]))
    [(1, 3), (7, 7)]
    """
    ids = np.unique(ids)
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
    ends = np.append(starts[1:], len(ids)) - 1
    return list(zip(ids[starts].tolist(), ids[ends].tolist(), strict=True)) if len(ids) else []


def counted_rows(rows: Mapping[str, Int64]) -> Iterator[CountedRows]:
    """Yield what one task counted, by name; `rows` are example ids, int64[N], of each counter."""
    for name in sorted(rows):
        if len(rows[name]):
            yield CountedRows(counter=name, examples=runs_of(rows[name]))


def write_parts(parts: Iterable[bytes], sink: Sink) -> None:
    """Write bytes end to end."""
    for part in parts:
        sink.write(part)


def read_counted(folder: Path) -> dict[str, Int64]:
    """Return the ids of all rows behind each counter, int64[N], ascending; none for a set without the list.

    Raises:
        IntegrityError: the list is damaged.
    """
    found: dict[str, list[Int64]] = {}
    for counted in read_lines(file_of(folder, COUNTED_NAME), CountedRows):
        runs = found.setdefault(counted.counter, [])
        runs += [np.arange(first, last + 1) for first, last in counted.examples]
    return {name: np.concatenate(parts) for name, parts in found.items()}
