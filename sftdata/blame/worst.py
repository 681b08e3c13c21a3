"""Which documents stand out in a log of losses: computed from its columns alone.

What a document loses on a trained token says little by itself: early steps lose more than late ones, text
that falls into single bytes loses little on each, and an answer of a word may lose anything. So each is held
against the documents of the steps around it, by token and by byte of text, and few tokens count for less:

    over   loss of a trained token, less the median of the documents of the steps around it; or the same by
           byte, times the bytes that a token has on average, where that is more
    score  `over` as a mean of all the times that it was seen, and as if 8 more tokens had lost what is usual
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from sftdata.batches import Bool, Columns, Float32, Int32, Int64
from sftdata.blame.log import DocumentLosses

Float64 = npt.NDArray[np.float64]
_WINDOW = 16, 256  # documents that a median is taken of, at least and at most
_WINDOWS = 16  # of a short log
_USUAL_TOKENS = 8  # that a score adds to those of a document
_NORMAL = 1.4826  # the standard deviation of a normal distribution, in medians of the distance to the median
_BEFORE = 20  # steps that a step is compared with
_JUMP = 6.0  # spreads of the steps before, from which on a step is a spike
_LEAST_JUMP = 0.1  # of the loss before


@dataclass(frozen=True, slots=True, eq=False)
class Ranking(Columns):
    """Documents, the worst first.

    Attributes:
        set: int64[D], which of the sets.
        example_id: int64[D].
        row: int64[D], a packed row that holds it.
        seen: int64[D], how often.
        first, last: int64[D], steps.
        tokens, trained: int64[D], of all the times together.
        loss: float64[D], of a trained token.
        over: float64[D], see above; by token alone for the documents of a step.
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


@dataclass(frozen=True, slots=True, eq=False)
class Excess:
    """What each stretch of a log lost on a token, and how far that lies above the documents around it.

    Attributes:
        mean: float64[N], loss of a trained token; no number where nothing was trained.
        by_token: float64[N], above the median; infinite where the loss is no finite number.
        over: float64[N], the same, or by byte if that is more.
    """

    mean: Float64
    by_token: Float64
    over: Float64


def rank_documents(losses: DocumentLosses, excess: Excess) -> Ranking:
    """Rank all documents that anything was trained of, over all the times that they were seen."""
    known = np.flatnonzero(losses.weight > 0)
    order = known[np.lexsort((losses.example_id[known], losses.set[known]))]
    part, mean, over = losses.take(order), excess.mean[order], excess.over[order]
    new = np.ones(len(part), np.bool_)
    new[1:] = (np.diff(part.set) != 0) | (np.diff(part.example_id) != 0)
    starts = np.flatnonzero(new)
    last = np.append(starts[1:], len(part))[: len(starts)] - 1
    whole, seen = _sums(part.weight, starts), last - starts + 1
    trained = _sums(part.trained, starts)
    certain = trained / (trained + _USUAL_TOKENS * seen)
    above = _sums(over * part.weight, starts) / whole
    found = Ranking(
        set=part.set[starts].astype(np.int64),
        example_id=part.example_id[starts],
        row=part.row[last],
        seen=seen,
        first=part.step[starts].astype(np.int64),
        last=part.step[last].astype(np.int64),
        tokens=_sums(part.tokens, starts).astype(np.int64),
        trained=trained.astype(np.int64),
        loss=_sums(mean * part.weight, starts) / whole,
        over=above,
        score=above * certain,
    )
    return found.take(np.lexsort((found.example_id, found.set, -found.score)))


def _sums(values: Float64 | Float32 | Int32, starts: Int64) -> Float64:
    """float64[S], sums of stretches that begin there and end where the next one begins."""
    if not len(starts):
        return np.zeros(0)
    sums: Float64 = np.add.reduceat(values, starts, dtype=np.float64)
    return sums


def rank_step(losses: DocumentLosses, excess: Excess, step: int) -> tuple[Ranking, Float64]:
    """Return the documents of a step, those first that raised its loss most, and float64[D], by how much.

    They have no score: that is of all the times that a document was seen.
    """
    first, last = np.searchsorted(losses.step, [step, step + 1])
    here = first + np.flatnonzero(losses.weight[first:last] > 0)
    raised = excess.by_token[here] * losses.weight[here] / losses.weight[here].sum(dtype=np.float64)
    order = np.argsort(-raised, kind="stable")
    here = here[order]
    part, once = losses.take(here), np.ones(len(here), np.int64)
    found = Ranking(
        set=part.set.astype(np.int64),
        example_id=part.example_id,
        row=part.row,
        seen=once,
        first=once * step,
        last=once * step,
        tokens=part.tokens.astype(np.int64),
        trained=part.trained.astype(np.int64),
        loss=excess.mean[here],
        over=excess.by_token[here],
        score=np.full(len(here), np.nan),
    )
    return found, raised[order]


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


def find_excess(losses: DocumentLosses) -> Excess:
    """Hold each stretch of a log against the documents of the steps around it."""
    known = losses.weight > 0
    mean = np.divide(losses.loss, losses.weight, out=np.full(len(losses), np.nan), where=known)
    over = _above(losses, mean)
    spelled = known & (losses.bytes > 0)
    if not spelled.any():
        return Excess(mean, over, over)
    token = losses.trained / np.maximum(losses.bytes, 1)
    average = losses.bytes[spelled].sum(dtype=np.float64) / losses.trained[spelled].sum(dtype=np.float64)
    by_byte = _above(losses, np.where(spelled, mean * token * average, np.nan))
    return Excess(mean, over, np.where(spelled, np.maximum(over, by_byte), over))


def _above(losses: DocumentLosses, values: Float64) -> Float64:
    """float64[N]: how far values lie above the median of the steps around; infinite for no number."""
    above = np.full(len(values), np.inf)
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite):
        around = running_median(losses.step[finite].astype(np.float64), values[finite])
        above[finite] = values[finite] - around
    return above


def running_median(keys: Float64, values: Float64) -> Float64:
    """float64[N]: median of the values around each, by ascending keys, on lines from window to window.

    Where all keys are one, as those of an evaluation, it is the median of all. The first windows are the
    smallest: losses fall steeply in the first steps.

    >>> running_median(np.zeros(3), np.array([1.0, 5.0, 2.0])).tolist()
    [2.0, 2.0, 2.0]
    """
    if keys[0] == keys[-1]:
        return np.full(len(values), np.median(values))
    least, most = _WINDOW
    most = int(np.clip(len(keys) // _WINDOWS, least, most))
    sizes = [least << doubled for doubled in range((most // least).bit_length())]
    grown = min(sum(sizes), len(keys))
    edges = [*accumulate(sizes, initial=0), *range(grown + most, len(keys), most)]
    inner = [edge for edge in edges if 0 < edge < len(keys) - least]
    windows = np.split(np.arange(len(keys)), inner)
    centres = np.array([np.median(keys[window]) for window in windows])
    medians = np.array([np.median(values[window]) for window in windows])
    found: Float64 = np.interp(keys, centres, medians)
    return found
