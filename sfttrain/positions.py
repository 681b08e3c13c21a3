"""Positions in three dimensions for packed rows (mRoPE of Qwen-VL), and the row that tells documents apart.

Models that have them take `position_ids` of four rows: an ordinary position, then time, height and width. The
first row is what transformers builds the mask of packed documents from; with three rows, or two dimensions,
documents see each other. The time of a picture stands still, so it cannot serve as that row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sftdata.batches import Bool, Int64, offsets_of

Grid = tuple[int, int]
"""Rows and columns of the tokens that stand for a picture."""


def grid_positions(image: Bool, lengths: Int64, grids: Sequence[Grid]) -> Int64:
    """int64[4, N], counting from 0 in every document: an ordinary position, then time, height and width.

    A text goes on behind a picture as if the picture were as long as its longer side.

    Args:
        image: bool[N], the tokens that stand for pictures.
        lengths: int64[D], of the documents, padding included; they sum to N.
        grids: of the pictures, in order.

    >>> image = np.array([False, True, True, True, True, False, False])
    >>> grid_positions(image, np.array([6, 1]), [(2, 2)]).tolist()
    [[0, 1, 2, 3, 4, 5, 0], [0, 1, 1, 1, 1, 3, 0], [0, 1, 1, 2, 2, 3, 0], [0, 1, 2, 1, 2, 3, 0]]
    """
    begins = np.repeat(offsets_of(lengths)[:-1], lengths)
    plain = np.arange(len(image), dtype=np.int64) - begins
    places, sizes = np.flatnonzero(image), [rows * columns for rows, columns in grids]
    saved = np.zeros(len(image) + 1, np.int64)  # by which a picture is shorter than its tokens are many
    starts = [places[first] for first in offsets_of(sizes)[:-1]]
    for start, size, grid in zip(starts, sizes, grids, strict=True):
        saved[start + size] += size - max(grid)
    before = np.cumsum(saved[:-1])
    found = np.tile(plain - (before - before[begins]), (4, 1))
    for start, size, (rows, columns) in zip(starts, sizes, grids, strict=True):
        own = slice(start, start + size)
        found[1:, own] = found[1, start] + np.stack(
            [np.zeros(size, np.int64), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)]
        )
    found[0] = plain
    return found
