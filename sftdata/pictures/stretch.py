"""From ids of the compact text, where an image token stands once for each run, to ids with every run in full.

An image token is matched before anything else happens to a text, so repeating its id is exact, and a picture
of 1,200 tokens costs the tokenizer one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sftdata.batches import Int64, Tally, TokenBatch, offsets_of
from sftdata.errors import Fault
from sftdata.output import counted


@dataclass(frozen=True, slots=True, eq=False)
class ImageRuns:
    """How often each image token of a batch of texts is to be repeated.

    Attributes:
        token: the image token.
        lengths: int64[K], of every run, text after text.
        counts: int64[N], runs of each text.
        never_trained: the tokens that are written for pictures.
    """

    token: str
    lengths: Int64
    counts: Int64
    never_trained: tuple[str, ...] = ()


def count_image_tokens(batch: TokenBatch, image_id: int) -> Int64:
    """Return int64[N], how many image tokens each example has: if not those of its layouts, some are lost."""
    before = np.zeros(len(batch.input_ids) + 1, np.int64)
    np.cumsum(batch.input_ids == image_id, out=before[1:])
    return np.diff(before[batch.offsets])


def refuse_stray(batch: TokenBatch, image_id: int, counts: Int64, token: str, tally: Tally) -> TokenBatch:
    """Reject the examples that have other image tokens than those of their pictures; return the others.

    Args:
        image_id: of the family's image token.
        counts: int64[N], how many of them each example's pictures have.
        token: the same token as text, for the message.
        tally: takes the rows.
    """
    found = count_image_tokens(batch, image_id)
    wrong = np.flatnonzero(found != counts)
    for index in wrong.tolist():
        there, wanted = counted(int(found[index]), "time"), counted(int(counts[index]), "time")
        what = f"the text has {token!r} {there}; its pictures have it {wanted}."
        fault = Fault("images-lost", what, "take that token out of the data.")
        tally.reject(int(batch.row[index]), fault)
    return batch.select(found == counts)


def stretch(batch: TokenBatch, image_id: int, runs: Int64) -> TokenBatch:
    """Return the batch with each image token as often as its run is long, and none of them trained.

    Args:
        image_id: of the family's image token.
        runs: int64[K], one for each image token of the batch, in order.

    Raises:
        ValueError: there are more runs than image tokens, or fewer.

    >>> one = TokenBatch(np.array([7, 9, 8], np.int32), np.ones(3, np.bool_), np.array([0, 3]), np.array([0]))
    >>> stretch(one, 9, np.array([2])).input_ids.tolist(), stretch(one, 9, np.array([2])).trained.tolist()
    ([7, 9, 9, 8], [True, False, False, True])
    """
    is_image = batch.input_ids == image_id
    times = np.ones(len(batch.input_ids), np.int64)
    if int(is_image.sum()) != len(runs):
        raise ValueError(f"{int(is_image.sum())} image tokens, {len(runs)} runs")
    times[is_image] = runs
    places = offsets_of(times)
    trained = np.repeat(batch.trained & ~is_image, times)
    weights = None if batch.loss_weights is None else np.repeat(batch.loss_weights, times) * trained
    ids = np.repeat(batch.input_ids, times)
    return TokenBatch(ids, trained, places[batch.offsets], batch.row, weights)
