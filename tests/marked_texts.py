"""What response markers train in several texts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sftdata.batches import Bool
from sftdata.errors import Fault, RowError
from sftdata.masks.markers import TextAnswers, find_spans


class MarkedTexts(NamedTuple):
    """Columns of `TextAnswers`, and the fault of each text that has no spans."""

    spans: list[list[tuple[int, int]]]
    closed: Bool
    repeated: Bool
    faults: dict[int, Fault]


def mask_rows(texts: Sequence[str], response: str, instruction: str | None = None) -> MarkedTexts:
    rows: list[TextAnswers] = []
    faults: dict[int, Fault] = {}
    for index, text in enumerate(texts):
        try:
            rows.append(find_spans(text, response, instruction))
        except RowError as error:
            rows.append(TextAnswers([], False, False))
            faults[index] = error.fault
    closed, repeated = ([row[column] for row in rows] for column in (1, 2))
    return MarkedTexts([row.spans for row in rows], np.array(closed, bool), np.array(repeated, bool), faults)
