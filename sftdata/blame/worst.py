"""Which documents stand out in a log of losses: computed from its columns alone.

What a document loses on a trained token says little by itself: early steps lose more than late ones, and
answers of a word vary more than those of a page. So each is compared with the documents of the steps around
it, and how far it lies above them with how far those of its own length vary:

    over   loss of a trained token, less the median of the documents of the steps around it
    score  `over`, as a mean of all the times that it was seen, less its median among documents with about as
           many trained tokens, in units of their spread (1.48 times the median distance from the median)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from sftdata.batches import Bool, Float32, Int32, Int64
from sftdata.blame.log import DocumentLosses

Float64 = npt.NDArray[np.float64]
_WINDOW = 16, 256  # documents that a median is taken of, at least and at most
_WINDOWS = 16  # of a short log
_NORMAL = (
    1.4826  # the standard deviation of a normal distribution, in medians of the distance from the median
)
_LEAST_SPREAD = 0.1  # of a length, in that of all: a few alike documents make no scale
_BEFORE = 20  # steps that a step is compared with
_JUMP = 6.0  # spreads of the steps before, from which on a step is a spike
_LEAST_JUMP = 0.1  # of the loss before


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Documents, the worst first.

    Attributes:
        set: int64[D], which of the sets.
        example_id: int64[D].
        row: int64[D], a packed row that holds it.
        seen: int64[D], how often.
        first, last: int64[D], steps.
        tokens, trained: int64[D], of all the times together.
        loss: float64[D], of a trained token.
        over: float64[D], above that of the steps around it.
        score: float64[D], see above; infinite where the loss is no finite number.
    """

    set: Int64
    example_id: Int64
    row: Int64
    seen: Int64
    first: Int64
    last: Int64
    tokens: Int64
    trained: Int64
    loss: Float64
    over: Float64
    score: Float64

    def __len__(self) -> int:
        return len(self.set)

    def take(self, chosen: Int64 | slice) -> Ranking:
        """Return some of them."""
        return Ranking(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """The steps of a log, in order.

    Attributes:
        step: int64[S].
        loss: float64[S], of a trained token.
        weight: float64[S].
        before: float64[S], median loss of the steps before; that of the first step is its own.
        spike: bool[S], whether the loss jumped.
    """

    step: Int64
    loss: Float64
    weight: Float64
    before: Float64
    spike: Bool


def rank_documents(losses: DocumentLosses) -> Ranking:
    """Rank all documents that anything was trained of, over all the times that they were seen."""
    mean, over = _over(losses)
    known = np.flatnonzero(losses.weight > 0)
    order = known[np.lexsort((losses.example_id[known], losses.set[known]))]
    part, mean, over = losses.take(order), mean[order], over[order]
    new = np.ones(len(part), np.bool_)
    new[1:] = (np.diff(part.set) != 0) | (np.diff(part.example_id) != 0)
    starts = np.flatnonzero(new)
    last = np.append(starts[1:], len(part))[: len(starts)] - 1
    whole = _sums(part.weight, starts)
    trained = _sums(part.trained, starts).astype(np.int64)
    above = _sums(over * part.weight, starts) / whole
    found = Ranking(
        set=part.set[starts].astype(np.int64),
        example_id=part.example_id[starts],
        row=part.row[last],
        seen=last - starts + 1,
        first=part.step[starts].astype(np.int64),
        last=part.step[last].astype(np.int64),
        tokens=_sums(part.tokens, starts).astype(np.int64),
        trained=trained,
        loss=_sums(mean * part.weight, starts) / whole,
        over=above,
        score=_in_spreads(above, trained),
    )
    return found.take(np.lexsort((found.example_id, found.set, -found.score)))


def _sums(values: Float64 | Float32 | Int32, starts: Int64) -> Float64:
    """float64[S], sums of stretches that begin there and end where the next one begins."""
    if not len(starts):
        return np.zeros(0)
    sums: Float64 = np.add.reduceat(values, starts, dtype=np.float64)
    return sums


def rank_step(losses: DocumentLosses, step: int) -> tuple[DocumentLosses, Float64, Float64]:
    """Return the documents of a step by how much each raised its loss, the first most.

    Returns:
        Them; float64[D], how far their loss lies above that of the steps around; float64[D], by how much
        that raised the loss of the step.
    """
    _, over = _over(losses)
    here = np.flatnonzero((losses.step == step) & (losses.weight > 0))
    part, over = losses.take(here), over[here]
    raised = over * part.weight / max(float(part.weight.sum(dtype=np.float64)), 1e-30)
    order = np.argsort(-raised, kind="stable")
    return part.take(order), over[order], raised[order]


def find_steps(losses: DocumentLosses) -> Steps:
    """Return the loss of each step, and where it jumped."""
    new = np.ones(len(losses), np.bool_)
    new[1:] = np.diff(losses.step) != 0
    starts = np.flatnonzero(new)
    weight = _sums(losses.weight, starts)
    loss = _sums(losses.loss, starts) / np.where(weight > 0, weight, 1)
    before, spread = loss.copy(), np.full(len(loss), np.inf)
    for index in range(1, len(loss)):
        recent = loss[max(0, index - _BEFORE) : index]
        recent = recent[np.isfinite(recent)]
        if len(recent) >= _BEFORE // 4:
            before[index] = np.median(recent)
            spread[index] = _NORMAL * np.median(np.abs(recent - before[index]))
    jump = loss - before
    spike = (jump > _JUMP * spread) & (jump > _LEAST_JUMP * np.abs(before))
    return Steps(losses.step[starts].astype(np.int64), loss, weight, before, spike | ~np.isfinite(loss))


def _over(losses: DocumentLosses) -> tuple[Float64, Float64]:
    """Return the loss of a trained token of each document, and how far it lies above those around it.

    A loss that is no finite number lies infinitely far above.
    """
    known = losses.weight > 0
    mean = np.divide(losses.loss, losses.weight, out=np.full(len(losses), np.nan), where=known)
    finite = np.flatnonzero(np.isfinite(mean))
    over = np.full(len(mean), np.inf)
    if len(finite):
        around = running_median(losses.step[finite].astype(np.float64), mean[finite])
        over[finite] = mean[finite] - around
    return mean, over


def _in_spreads(over: Float64, trained: Int64) -> Float64:
    """Return float64[D] in units of the spread of documents of about the same length."""
    score = np.full(len(over), np.inf)
    finite = np.flatnonzero(np.isfinite(over))
    if not len(finite):
        return score
    finite = finite[np.argsort(trained[finite], kind="stable")]
    amount, values = np.log(trained[finite]), over[finite]
    values = values - running_median(amount, values)
    distance = np.abs(values)
    spread = np.maximum(running_median(amount, distance), _LEAST_SPREAD * float(np.median(distance)))
    score[finite] = values / np.maximum(_NORMAL * spread, 1e-12)
    return score


def running_median(keys: Float64, values: Float64) -> Float64:
    """float64[N]: median of the values around each, by ascending keys, on lines from window to window.

    >>> running_median(np.zeros(3), np.array([1.0, 5.0, 2.0])).tolist()
    [2.0, 2.0, 2.0]
    """
    size = int(np.clip(len(keys) // _WINDOWS, *_WINDOW))
    windows = np.array_split(np.arange(len(keys)), max(1, len(keys) // size))
    centres = np.array([np.median(keys[window]) for window in windows])
    medians = np.array([np.median(values[window]) for window in windows])
    found: Float64 = np.interp(keys, centres, medians)
    return found
