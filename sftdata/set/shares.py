"""The shares of a mixture: what was asked of each source, and what the set holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec

from sftdata.choosing import Measure
from sftdata.set.store import Count

MEASURES: tuple[Measure, ...] = get_args(Measure)


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source of a mixture, or the sources that one glob matches.

    Attributes:
        name: the name or glob.
        asked: its part of the whole, 0 to 1.
        by: what the share counts.
        available: how much of that one pass over its documents has.
        rows, tokens, trained: what the set holds of it, repeats included.
    """

    name: str
    asked: float
    by: Measure
    available: Count
    rows: Count
    tokens: Count
    trained: Count

    @property
    def passes(self) -> float:
        """How often its documents are gone through."""
        taken: int = getattr(self, self.by)
        return taken / max(self.available, 1)


def realised(shares: Sequence[Share], by: Measure) -> list[float]:
    """Return the part that each source has of the mixture, 0 to 1."""
    counts = [getattr(share, by) for share in shares]
    return [count / max(sum(counts), 1) for count in counts]
