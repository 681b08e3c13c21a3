"""Lists of different lengths laid end to end: where each begins, and where its items lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_Int64 = npt.NDArray[np.int64]


def offsets_of(lengths: Any) -> _Int64:
    """Turn int64[N] lengths into int64[N + 1] offsets.

    >>> offsets_of([3, 0, 2]).tolist()
    [0, 3, 3, 5]
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def positions_of(starts: _Int64, lengths: _Int64) -> _Int64:
    """Return start, start + 1, ... of each range, end to end.

    >>> positions_of(np.array([5, 20]), np.array([3, 2])).tolist()
    [5, 6, 7, 20, 21]
    """
    offsets = offsets_of(lengths)
    positions: _Int64 = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return positions
