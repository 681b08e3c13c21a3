"""Documents of finished sets, as their indexes know them: where their tokens lie, and what they are like.

The documents of all bases lie end to end on one axis of tokens: document i is `offsets[i]` to
`offsets[i + 1]`.
Segments tile that axis: each is a stretch of a document that lies in one block, a mapped record batch of rows
or of rest. To read any stretch of any document is to look up the segments that it meets.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sftdata.batches import IGNORE_INDEX, Bool, Float32, Int32, Int64, TokenBatch, offsets_of, positions_of
from sftdata.errors import IntegrityError

UInt64 = npt.NDArray[np.uint64]
_STRETCH_TOKENS = 1 << 17  # copied at a time: their index arrays stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Tokens that lie end to end in one record batch of a base; every array is a view of its file.

    Attributes:
        input_ids, labels: int32[T].
        loss_weights: float32[T]; None in a base without weights.
    """

    input_ids: Int32
    labels: Int32
    loss_weights: Float32 | None


@dataclass(frozen=True, slots=True, eq=False)
class Located:
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
    def join(cls, parts: list[Located]) -> Located:
        """Put segments end to end, column by column; the list is emptied, so that no column is held twice."""
        columns = [[getattr(part, name) for part in parts] for name in cls.__slots__]
        parts.clear()
        columns.reverse()
        return cls(*(np.concatenate(columns.pop()) for _ in cls.__slots__))

    def take(self, order: Int64) -> Located:
        """Return these segments, by their indices, in this order."""
        return Located(*(getattr(self, name)[order] for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """All documents of the bases, in the order of their ids.

    Attributes:
        ids: int64[N], example id of each in the view.
        shard: int32[N], slice of a base that holds its first token, numbered over all bases.
        offsets: int64[N + 1], place of each on the axis of tokens.
        trained: int32[N], trained tokens, the document's first token aside.
        document: uint64[N, 2], hash of ids and labels.
        prompt: uint64[N], hash of the ids before the first trained one; of the document where it has none.
        starts: int64[S + 1], place of each segment on the axis of tokens.
        block, start, first_label, first_weight: of each segment, as in `Located`.
        blocks: where the tokens lie.
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
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Int64:
        """int64[N], tokens of each document."""
        return np.diff(self.offsets)

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

    def _read(self, start: Int64, stop: Int64) -> TokenBatch:
        """Read stretches of the axis of tokens, none across the end of its document."""
        first = np.searchsorted(self.starts, start, side="right") - 1
        count = np.maximum(np.searchsorted(self.starts, stop, side="left") - first, 0)
        segment = positions_of(first, count)
        skipped = np.maximum(np.repeat(start, count) - self.starts[segment], 0)
        length = np.minimum(np.repeat(stop, count), self.starts[segment + 1]) - self.starts[segment] - skipped
        source = self.start[segment] + skipped
        target = offsets_of(length)
        weighted = any(block.loss_weights is not None for block in self.blocks)
        total = int(target[-1])
        ids, trained = np.empty(total, np.int32), np.empty(total, np.bool_)
        weights = np.zeros(total, np.float32) if weighted else None
        block = self.block[segment]
        edges = np.searchsorted(target, np.arange(0, total, _STRETCH_TOKENS))
        for first_one, last in pairwise(np.unique(np.append(edges, len(segment))).tolist()):
            there = slice(first_one, last)
            for number in np.unique(block[there]).tolist():
                here = first_one + np.flatnonzero(block[there] == number)
                to: slice | Int64 = slice(target[first_one], target[last])
                if len(here) < last - first_one:
                    to = positions_of(target[here], length[here])
                taken = positions_of(source[here], length[here])
                _copy(self.blocks[number], taken, to, ids, trained, weights)
        restored = (skipped == 0) & self.first_label[segment]
        trained[target[:-1][restored]] = True
        if weights is not None:
            weights[target[:-1][restored]] = self.first_weight[segment[restored]]
        return TokenBatch(ids, trained, offsets_of(stop - start), np.arange(len(start)), weights)


def _copy(
    block: Block, taken: Int64, to: slice | Int64, ids: Int32, trained: Bool, weights: Float32 | None
) -> None:
    """Copy tokens of a block, by their places there, to their places in the whole."""
    ids[to] = block.input_ids.take(taken, mode="clip")
    trained[to] = labelled = block.labels.take(taken, mode="clip") != IGNORE_INDEX
    if weights is not None:
        weights[to] = labelled if block.loss_weights is None else block.loss_weights.take(taken, mode="clip")


def join_segments(segments: Located, blocks: tuple[Block, ...], where: str) -> Documents:
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
        raise IntegrityError(
            f"{where}: the segments of example {ids[wrong[0]]} leave a gap, or overlap.",
            "run `sftdata verify`, or prepare the set again with --overwrite.",
        )
    document, prompt = segments.document[first], segments.prompt[first]
    return Documents(
        ids=ids[first],
        shard=segments.shard[first],
        offsets=offsets,
        trained=trained,
        document=document,
        prompt=prompt if prompt.all() else np.where(prompt == 0, document[:, 0], prompt),
        starts=starts,
        block=segments.block,
        start=segments.start,
        first_label=segments.first_label,
        first_weight=segments.first_weight,
        blocks=blocks,
    )
