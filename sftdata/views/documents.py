"""Documents of finished sets, as their indexes know them: where their tokens lie, and what they are like.

The documents of all bases lie end to end on one axis of tokens: document i is `offsets[i]` to
`offsets[i + 1]`.
Segments tile that axis: each is a stretch of a document that lies in one block, a mapped record batch of rows
or of rest. To read any stretch of any document is to look up the segments that it meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from sftdata.batches import (
    IGNORE_INDEX,
    Bool,
    Columns,
    Float32,
    Int32,
    Int64,
    TokenBatch,
    offsets_of,
    positions_of,
)
from sftdata.errors import VERIFY, IntegrityError
from sftdata.set.hashes import UInt64, hash_documents
from sftdata.set.held import Block
from sftdata.views.pictures import DocumentPictures

_STRETCH_TOKENS = 1 << 17  # copied at a time: their index arrays stay in the cache
_BLOCK_TOKENS = 1 << 22  # documents are read in blocks of about so many tokens


def blocks_of(lengths: Int64) -> Iterator[slice]:
    """Yield stretches of documents, of these numbers of tokens, that fit into memory one by one."""
    ends = offsets_of(lengths)[1:]
    edges = np.arange(_BLOCK_TOKENS, ends.max(initial=0), _BLOCK_TOKENS)
    firsts = np.unique(np.append(np.searchsorted(ends, edges), [0, len(lengths)]))
    for first, last in pairwise(firsts.tolist()):
        yield slice(first, last)


@dataclass(frozen=True, slots=True, eq=False)
class Located(Columns):
    """Stretches of documents, and the blocks that hold them, in any order.

    Attributes:
        example_id: int64[S], of the document, in the view's own numbering.
        block: int32[S], number of the block that holds the tokens.
        start: int64[S], first of them in that block.
        length, offset: int32[S], how many, and the first one's place in the document.
        trained: int32[S], labelled tokens, the first of the segment aside.
        first_label: bool[S], whether that one is labelled in the document, whatever the block has.
        first_weight: float32[S], what it weighs; 1 in a base without weights.
        shard: int32[S], number of the base's slice that holds the block, over all bases.
        document: uint64[S, 2], hash of all ids and labels of the document.
        prompt: uint64[S], hash of its ids before the first trained one; 0 where it has no prompt.
    """

    example_id: Int64
    block: Int32
    start: Int64
    length: Int32
    offset: Int32
    trained: Int32
    first_label: Bool
    first_weight: Float32
    shard: Int32
    document: UInt64
    prompt: UInt64

    @classmethod
    def drain(cls, parts: list[Located]) -> Located:
        """Put segments end to end, column by column; the list is emptied, so that no column is held twice."""
        columns = [[getattr(part, name) for part in parts] for name in cls.__slots__]
        parts.clear()
        columns.reverse()
        return cls(*(np.concatenate(columns.pop()) for _ in cls.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Where stretches of documents lie: runs of tokens in blocks, which laid end to end are the stretches.

    Attributes:
        count: int64[K], runs of each stretch; one without tokens has none.
        block: int32[R], block that holds a run.
        start, length: int64[R], first token in that block, and how many.
        inside: bool[R], whether it begins inside a segment, where the block has all labels.
        first_label: bool[R], whether a segment begins there with a label that the block may lack.
        first_weight: float32[R], what it weighs if so.
    """

    count: Int64
    block: Int32
    start: Int64
    length: Int64
    inside: Bool
    first_label: Bool
    first_weight: Float32


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """All documents of the bases, in the order of their ids.

    Attributes:
        ids: int64[N], example id of each in the view.
        shard: int32[N], slice of a base that holds its first token, numbered over all bases.
        offsets: int64[N + 1], place of each on the axis of tokens.
        trained: int32[N], trained tokens, the document's first token aside.
        document: uint64[N, 2], hash of ids and labels, and of weights if `weighted`.
        prompt: uint64[N], hash of the ids before the first trained one; 0 where it has no prompt.
        starts: int64[S + 1], place of each segment on the axis of tokens.
        block, start, first_label, first_weight: of each segment, as in `Located`.
        blocks: where the tokens lie.
        pictures: of each document; None where no base has any.
        weighted: whether `document` counts weights.
    """

    ids: Int64
    shard: Int32
    offsets: Int64
    trained: Int32
    document: UInt64
    prompt: UInt64
    starts: Int64
    block: Int32
    start: Int64
    first_label: Bool
    first_weight: Float32
    blocks: Sequence[Block]
    pictures: DocumentPictures | None = None
    weighted: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Int64:
        """int64[N], tokens of each document."""
        return np.diff(self.offsets)

    @property
    def prompt_keys(self) -> UInt64:
        """uint64[N], equal for equal prompts; a document without one counts by all its ids and labels."""
        none = self.prompt == 0
        return np.where(none, self.document[:, 0], self.prompt) if none.any() else self.prompt

    def runs(self, document: Int64, start: Int64, stop: Int64) -> Runs:
        """Return where stretches of documents lie; arguments as for `read`."""
        begin = self.offsets[document]
        return self._runs(begin + start, begin + stop)

    def read(self, document: Int64, start: Int64, stop: Int64) -> TokenBatch:
        """Return stretches of documents as examples of their own, `row` numbering the stretches.

        Args:
            document: int64[K], index of each stretch's document.
            start, stop: int64[K], tokens of that document, half-open.
        """
        begin = self.offsets[document]
        return self._read(begin + start, begin + stop)

    def whole(self, document: Int64) -> TokenBatch:
        """Return whole documents, int64[K], by their indices."""
        return self._read(self.offsets[document], self.offsets[document + 1])

    def weighing(self, which: Int64) -> Documents:
        """Return the same, hashed with weights: those of these documents, int64[K], all count as 1."""
        hashes = self.document.copy()
        for part in blocks_of(self.lengths[which]):
            batch = self.whole(which[part])
            pictures = None if self.pictures is None else self.pictures.hashes(which[part], batch)
            hashes[which[part]] = hash_documents(batch, True, pictures)
        return replace(self, document=hashes, weighted=True)

    def _runs(self, start: Int64, stop: Int64) -> Runs:
        """Find stretches of the axis of tokens, none across the end of its document."""
        first = np.searchsorted(self.starts, start, side="right") - 1
        count = np.maximum(np.searchsorted(self.starts, stop, side="left") - first, 0)
        segment = positions_of(first, count)
        skipped = np.maximum(np.repeat(start, count) - self.starts[segment], 0)
        length = np.minimum(np.repeat(stop, count), self.starts[segment + 1]) - self.starts[segment] - skipped
        return Runs(
            count=count,
            block=self.block[segment],
            start=self.start[segment] + skipped,
            length=length,
            inside=skipped > 0,
            first_label=(skipped == 0) & self.first_label[segment],
            first_weight=self.first_weight[segment],
        )

    def _read(self, start: Int64, stop: Int64) -> TokenBatch:
        """Read stretches of the axis of tokens, none across the end of its document."""
        runs = self._runs(start, stop)
        block, source, length = runs.block, runs.start, runs.length
        target = offsets_of(length)
        weighted = any(block.loss_weights is not None for block in self.blocks)
        total = int(target[-1])
        ids, trained = np.empty(total, np.int32), np.empty(total, np.bool_)
        weights = np.zeros(total, np.float32) if weighted else None
        edges = np.searchsorted(target, np.arange(0, total, _STRETCH_TOKENS))
        for first_one, last in pairwise(np.unique(np.append(edges, len(block))).tolist()):
            there = slice(first_one, last)
            for number in np.unique(block[there]).tolist():
                here = first_one + np.flatnonzero(block[there] == number)
                to: slice | Int64 = slice(target[first_one], target[last])
                if len(here) < last - first_one:
                    to = positions_of(target[here], length[here])
                taken = positions_of(source[here], length[here])
                _copy(self.blocks[number], taken, to, ids, trained, weights)
        trained[target[:-1][runs.first_label]] = True
        if weights is not None:
            weights[target[:-1][runs.first_label]] = runs.first_weight[runs.first_label]
        return TokenBatch(ids, trained, offsets_of(stop - start), np.arange(len(start)), weights)


def _copy(
    block: Block, taken: Int64, to: slice | Int64, ids: Int32, trained: Bool, weights: Float32 | None
) -> None:
    """Copy tokens of a block, by their places there, to their places in the whole."""
    ids[to] = block.input_ids.take(taken, mode="clip")
    trained[to] = labelled = block.labels.take(taken, mode="clip") != IGNORE_INDEX
    if weights is not None:
        weights[to] = labelled if block.loss_weights is None else block.loss_weights.take(taken, mode="clip")


def join_segments(segments: Located, blocks: Sequence[Block], where: str) -> Documents:
    """Put the segments of each document together.

    Args:
        where: the base or bases, for the message.

    Raises:
        IntegrityError: the segments of a document leave a gap, or overlap.
    """
    if (np.diff(segments.example_id) < 0).any() or (np.diff(segments.offset) != 0).any():
        segments = segments.take(np.lexsort((segments.offset, segments.example_id)))
    ids, length = segments.example_id, segments.length.astype(np.int64)
    starts = offsets_of(length)
    begins = np.diff(ids, prepend=-1) != 0
    first: Int64 | slice = slice(None)  # where each segment is a document, nothing is copied
    offsets, trained = starts, segments.trained
    wrong = np.flatnonzero(segments.offset) if begins.all() else np.zeros(0, np.int64)
    if not begins.all():
        first = np.flatnonzero(begins)
        offsets = np.append(starts[first], starts[-1])
        wrong = np.flatnonzero(
            starts[:-1] - np.repeat(offsets[:-1], np.diff(np.append(first, len(ids)))) != segments.offset
        )
        # A label on a document's own first token trains nothing.
        trained = np.add.reduceat(segments.trained + (segments.first_label & ~begins), first, dtype=np.int32)
    if len(wrong):
        what = f"{where}: the segments of example {ids[wrong[0]]} leave a gap, or overlap."
        raise IntegrityError(what, VERIFY)
    return Documents(
        ids=ids[first],
        shard=segments.shard[first],
        offsets=offsets,
        trained=trained,
        document=segments.document[first],
        prompt=segments.prompt[first],
        starts=starts,
        block=segments.block,
        start=segments.start,
        first_label=segments.first_label,
        first_weight=segments.first_weight,
        blocks=blocks,
    )
