"""Which document of one set is which of another, and what is the same in both, as array operations.

Documents are paired in four steps, each over what the steps before it have left: equal documents, the same
prompt, the same ids, the same place. A key is looked for at the same place first, and then anywhere, the
first with the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sftdata.batches import Bool, Int64, TokenBatch, offsets_of, positions_of
from sftdata.set.hashes import UInt64, hash_prompts
from sftdata.show.sides import Side
from sftdata.views.choose import found_in
from sftdata.views.documents import blocks_of

Kind = Literal["came", "went", "cut", "labels", "answer", "prompt", "text", "picture"]
MEANING: dict[Kind, str] = {
    "came": "came",
    "went": "went",
    "cut": "same document, cut differently",
    "labels": "same ids, other labels",
    "answer": "same prompt, another answer",
    "prompt": "same place and answer, another prompt",
    "text": "same place, another text",
    "picture": "same ids, another picture",
}
KINDS = tuple(MEANING)
_CAME, _WENT, _CUT, _LABELS, _ANSWER, _PROMPT, _TEXT, _PICTURE = range(len(KINDS))
SAME, MOVED = -1, -2


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Documents of two sides that belong together, each at most once.

    Attributes:
        a, b: int64[K], indices of both.
        equal: bool[K], they have the same ids and labels.
        alone_a, alone_b: int64, indices of the documents that have no counterpart.
    """

    a: Int64
    b: Int64
    equal: Bool
    alone_a: Int64
    alone_b: Int64


def _pair_documents(a: Side, b: Side) -> _Pairs:
    """Find the counterpart of each document."""
    pairing = _Pairing(a, b)
    every = np.ones(len(a), np.bool_), np.ones(len(b), np.bool_)
    pairing.by(a.document, b.document, every)
    equal = len(pairing)
    for side, free in zip(pairing.sides, pairing.free, strict=True):
        side.find(np.flatnonzero(free))  # of these alone the tokens are compared
    pairing.by(a.prompt, b.prompt, (a.prompt != 0, b.prompt != 0))
    pairing.by(*_hash_ids(pairing))
    pairing.by_place()
    return pairing.found(equal)


class _Pairing:
    """Two sides while they are paired.

    Attributes:
        free: bool[N] of each side, documents without a counterpart so far.
    """

    def __init__(self, a: Side, b: Side) -> None:
        self.sides = a, b
        self.free = np.ones(len(a), np.bool_), np.ones(len(b), np.bool_)
        self._pairs: list[tuple[Int64, Int64]] = []
        # The first side numbers the sources, so that its places ascend.
        at = np.minimum(np.searchsorted(a.places, b.places), len(a) - 1)
        there = np.flatnonzero(a.places[at] == b.places)
        self._place = at[there], there

    def __len__(self) -> int:
        return sum(len(a) for a, _ in self._pairs)

    def by(self, a: UInt64, b: UInt64, known: tuple[Bool, Bool]) -> None:
        """Pair documents with the same key: at the same place, then the first with the first.

        Args:
            a, b: uint64[N] or uint64[N, 2], keys of the documents of each side.
            known: bool[N] of each side, documents that have a key.
        """
        here, there = self._same_place()
        same = a[here] == b[there]
        same = same if same.ndim == 1 else same.all(axis=1)
        which = same & known[0][here] & known[1][there]
        self._take(here[which], there[which])
        open_a, open_b = (np.flatnonzero(free & has) for free, has in zip(self.free, known, strict=True))
        if len(open_a) and len(open_b):
            first, second = pair_up(a[open_a], b[open_b])
            self._take(open_a[first], open_b[second])

    def by_place(self) -> None:
        """Pair what is at the same place."""
        self._take(*self._same_place())

    def _same_place(self) -> tuple[Int64, Int64]:
        """Return the documents at the same place that are both still free."""
        here, there = self._place
        both = self.free[0][here] & self.free[1][there]
        self._place = here[both], there[both]
        return self._place

    def _take(self, a: Int64, b: Int64) -> None:
        """Pair documents, which are both free."""
        self.free[0][a] = False
        self.free[1][b] = False
        self._pairs.append((a, b))

    def found(self, equal: int) -> _Pairs:
        """Return all pairs; the first `equal` ones are of equal documents."""
        a, b = (np.concatenate([pair[side] for pair in self._pairs]) for side in (0, 1))
        alone = (np.flatnonzero(free) for free in self.free)
        return _Pairs(a, b, np.arange(len(a)) < equal, *alone)


def pair_up(a: UInt64, b: UInt64) -> tuple[Int64, Int64]:
    """Pair equal keys, uint64[N] or uint64[N, 2]: the first of `a` with the first of `b`, and so on.

    >>> first, second = pair_up(np.array([7, 7, 8], np.uint64), np.array([8, 7], np.uint64))
    >>> first.tolist(), second.tolist()
    ([0, 2], [1, 0])
    """
    both = np.concatenate([a, b])
    order, new = _grouped(both) if both.ndim == 1 else _grouped_by_two(both)
    start = np.append(0, np.flatnonzero(new) + 1)
    size = np.diff(np.append(start, len(both)))
    of_a = np.add.reduceat(order < len(a), start, dtype=np.int64)
    paired = np.minimum(of_a, size - of_a)
    return order[positions_of(start, paired)], order[positions_of(start + of_a, paired)] - len(a)


def _grouped(keys: UInt64) -> tuple[Int64, Bool]:
    """Sort keys, uint64[N]; return their order, and bool[N - 1], where another one begins.

    Each is sorted by its upper bits with its place in the lower ones: faster than the order of keys.
    """
    bits = np.uint64(len(keys).bit_length())
    packed = keys >> bits << bits | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    ordered = keys[order]
    new = ordered[1:] != ordered[:-1]
    packed >>= bits
    if (new & (packed[1:] == packed[:-1])).any():  # other keys with the same upper bits
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = ordered[1:] != ordered[:-1]
    return order, new


def _grouped_by_two(keys: UInt64) -> tuple[Int64, Bool]:
    """Do the same with keys of two numbers, uint64[N, 2]; as a rule the first number tells them apart."""
    order, new = _grouped(keys[:, 0])
    second = keys[order, 1]
    differs = second[1:] != second[:-1]
    if (differs & ~new).any():
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        ordered = keys[order]
        return order, (ordered[1:] != ordered[:-1]).any(axis=1)
    return order, new


def _hash_ids(pairing: _Pairing) -> tuple[UInt64, UInt64, tuple[Bool, Bool]]:
    """Hash the ids of what has no counterpart yet; only what is as long as one of the other side is read."""
    keys, known = [], []
    for side, other in ((0, 1), (1, 0)):
        own, free = pairing.sides[side], pairing.free[side].copy()
        if own.letters is None:  # a text has another number of tokens in another tokenizer
            lengths = pairing.sides[other].lengths[pairing.free[other]]
            free[free] = np.isin(own.lengths[free], lengths)
        elif not pairing.free[other].any():
            free[:] = False
        key = np.zeros(len(own), np.uint64)
        for part in own.blocks(np.flatnonzero(free)):
            batch = own.read_compared(part)
            key[part] = hash_prompts(replace(batch, trained=np.zeros_like(batch.trained)), None)
        keys.append(key)
        known.append(free)
    return keys[0], keys[1], (known[0], known[1])


# ---------------------------------------------------------------------------------------- what is the same


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """Every document that is in the rows of one of the sets, and what became of it.

    Attributes:
        a, b: int64[K], its index on each side; -1 where its rows do not hold it.
        kind: int64[K], index into `KINDS`, or `SAME` or `MOVED`.
        copy: bool[K], alone, and the other side holds an equal one.
        beside: bool[K], alone, and the other side holds it in its rest.
    """

    left: Side
    right: Side
    a: Int64
    b: Int64
    kind: Int64
    copy: Bool
    beside: Bool


def compare(left: Side, right: Side) -> Compared:
    """Find out what became of each document."""
    pairs = _pair_documents(left, right)
    held_a, held_b = left.held[pairs.a], right.held[pairs.b]
    both = held_a & held_b
    a, b = pairs.a[both], pairs.b[both]
    order = np.argsort(b)
    a, b, equal = a[order], b[order], pairs.equal[both][order]
    kind = np.where(_cut_alike(left, right, a, b), SAME, _CUT)
    kind[(kind == SAME) & (left.places[a] != right.places[b])] = MOVED
    other = np.flatnonzero(~equal)
    kind[other] = _compare(left, right, a[other], b[other])
    went = _alone(left, right, pairs.alone_a, pairs.a[held_a & ~held_b], pairs.equal[held_a & ~held_b])
    came = _alone(right, left, pairs.alone_b, pairs.b[held_b & ~held_a], pairs.equal[held_b & ~held_a])
    lacking_b, lacking_a = (np.full(len(alone[0]), -1) for alone in (went, came))
    return Compared(
        left,
        right,
        np.concatenate([a, went[0], lacking_a]),
        np.concatenate([b, lacking_b, came[0]]),
        np.concatenate([kind, np.full(len(went[0]), _WENT), np.full(len(came[0]), _CAME)]),
        *(np.concatenate([np.zeros(len(a), np.bool_), went[i], came[i]]) for i in (1, 2)),
    )


def _alone(own: Side, other: Side, free: Int64, dropped: Int64, equal: Bool) -> tuple[Int64, Bool, Bool]:
    """Return the documents that only this side's rows hold: indices, whether copies, and whether beside.

    Args:
        free: int64, documents without a counterpart.
        dropped: int64, documents whose counterpart is in no row; `equal`, bool, where it is the same.
    """
    free = free[own.held[free]]
    copies = _among(own.document[free], other.document[other.held])
    which = np.concatenate([free, dropped])
    order = np.argsort(which, kind="stable")
    copy = np.append(copies, np.zeros(len(dropped), np.bool_))[order]
    return which[order], copy, np.append(np.zeros(len(free), np.bool_), equal)[order]


def _among(few: UInt64, many: UInt64) -> Bool:
    """bool[K]: hashes, uint64[K, 2], that are among many others, which are not sorted for that."""
    near, low = np.zeros(1 << 16, np.bool_), np.uint64((1 << 16) - 1)
    near[few[:, 0] & low] = True
    return found_in(few, many[near[many[:, 0] & low]])


def _cut_alike(left: Side, right: Side, a: Int64, b: Int64) -> Bool:
    """bool[K]: equal documents whose rows hold the same stretches; of two tokenizers, whether cut at all."""
    alike: Bool = left.whole[a] == right.whole[b]
    if left.letters is None:
        open_ones = np.flatnonzero(~left.whole[a] | ~right.whole[b])
        alike[open_ones] = equal_stretches(*_pieces(left, a[open_ones]), *_pieces(right, b[open_ones]))
    return alike


def _pieces(side: Side, which: Int64) -> tuple[Int64, Int64]:
    """Return the stretches of some documents, end to end, and the offsets of each document's."""
    count = np.diff(side.piece_offsets)[which]
    return side.pieces[positions_of(side.piece_offsets[which], count)], offsets_of(count)


def _compare(left: Side, right: Side, a: Int64, b: Int64) -> Int64:
    """Return the kind of each pair, int64[K], by what of the two is the same."""
    kinds = np.full(len(a), _TEXT)
    for part in blocks_of(left.lengths[a] + right.lengths[b]):
        one, other = left.read_compared(a[part]), right.read_compared(b[part])
        same_ids = equal_stretches(one.input_ids, one.offsets, other.input_ids, other.offsets)
        prompt = left.prompt[a[part]]
        same_prompt = (prompt == right.prompt[b[part]]) & (prompt != 0)
        answers = _answers(one)
        same_answer = equal_stretches(*answers, *_answers(other)) & (np.diff(answers[1]) > 0)
        pictures = zip(left.pictures_of(a[part]), right.pictures_of(b[part]), strict=True)
        same_pictures = np.array([mine == theirs for mine, theirs in pictures], np.bool_)
        ways = [same_ids & same_pictures, same_ids, same_prompt, same_answer]
        kinds[part] = np.select(ways, [_LABELS, _PICTURE, _ANSWER, _PROMPT], _TEXT)
    return kinds


def _answers(batch: TokenBatch) -> tuple[Int64, Int64]:
    """Return the trained tokens of some documents, end to end, and the offsets of each document's."""
    return batch.input_ids[batch.trained].astype(np.int64), offsets_of(batch.trained)[batch.offsets]


def equal_stretches(a: npt.NDArray[np.generic], of_a: Int64, b: npt.NDArray[np.generic], of_b: Int64) -> Bool:
    """bool[K]: stretches of two arrays that hold the same values.

    Args:
        of_a, of_b: int64[K + 1], offsets of the stretches.
    """
    equal: Bool = np.diff(of_a) == np.diff(of_b)
    length = np.diff(of_a)[equal]
    differs = a[positions_of(of_a[:-1][equal], length)] != b[positions_of(of_b[:-1][equal], length)]
    before = offsets_of(differs)[offsets_of(length)]
    equal[equal] = np.diff(before) == 0
    return equal
