"""From grains to chunks: a source is cut while its grains come in, and little is kept of what is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sftdata.batches import Int64
from sftdata.errors import changed
from sftdata.sources.borders import (
    DIGEST_BYTES,
    Digests,
    content_borders,
    join_contents,
    natural_borders,
    ranks_of,
    reach_of,
)
from sftdata.sources.chunks import Chunks, Source, SourcePlan
from sftdata.sources.seals import Seal, Stamp

SAMPLES = 32
_AT_ONCE = 8192  # grains


class Cutter:
    """Takes the grains of a source in order, and cuts it where that is settled.

    A border is settled once all grains within reach of it are known, and those before it with it. So the
    chunks are those of all grains cut at once.

    Args:
        step: bytes (or rows) of a chunk, on average.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        # Of grains that are not yet cut, and of those within reach before them.
        self._places, self._contents = np.zeros((0, 3), np.int64), np.zeros((0, DIGEST_BYTES), np.uint8)
        self._waiting: list[tuple[Int64, Digests]] = []
        self._count, self._wanted = 0, _AT_ONCE
        self._open = 0  # the first grain that is not in a chunk
        self._cut: list[tuple[Int64, Digests, Digests]] = []
        self._noted: list[tuple[Int64, list[Int64]]] = []

    def add(self, positions: Int64, records: Int64, lines: Int64, contents: Digests) -> None:
        """Add grains: where each begins (byte, record, line), and the hash of what it holds."""
        if not len(positions):
            return
        places = np.stack([positions, records, lines], axis=1)
        self._waiting.append((places, contents))
        self._noted.append((places[0].copy(), [_short(column) for column in (places - places[0]).T]))
        self._count += len(places)
        if self._count >= self._wanted:
            self._settle()

    def _join(self) -> None:
        self._places = np.concatenate([self._places, *(places for places, _ in self._waiting)])
        self._contents = np.concatenate([self._contents, *(contents for _, contents in self._waiting)])
        self._waiting = []

    def _settle(self) -> None:
        self._join()
        starts, sizes = self._places[:, 0], np.full(len(self._places), self._step, np.int64)
        natural = natural_borders(starts, ranks_of(self._contents), sizes)
        settled = natural[starts[natural] + reach_of(self._step) < starts[-1]]
        if len(settled) and settled[-1] > self._open:
            self._emit(int(settled[-1]), int(starts[-1]))
            kept = int(np.searchsorted(starts, starts[self._open] - reach_of(self._step)))
            kept = max(kept - 1, 0)  # one beyond reach: it tells that the source begins farther back
            self._places, self._contents = self._places[kept:].copy(), self._contents[kept:].copy()
            self._open -= kept
        self._count = len(self._places)
        self._wanted = 2 * self._count + _AT_ONCE

    def _emit(self, until: int, end: int) -> None:
        """Cut the grains from the first that is not in a chunk to this one."""
        starts, sizes = self._places[:, 0], np.full(len(self._places), self._step, np.int64)
        first = content_borders(starts, ranks_of(self._contents), end, sizes)
        first = first[(first >= self._open) & (first < until)]
        last = np.append(first, until)[1:]
        contents = b"".join(join_contents(self._contents, self._places[:, :2], first, last))
        joined = np.frombuffer(contents, np.uint8).reshape(-1, DIGEST_BYTES)
        self._cut.append((self._places[first], self._contents[first, :8], joined))
        self._open = until

    def finish(
        self,
        source: Source,
        end: int,
        total: int,
        raw: tuple[int, str],
        limit: int,
        *,
        seal: Seal | None = None,
        stamp: Stamp | None = None,
        notes: Sequence[str] = (),
    ) -> SourcePlan:
        """Cut the rest, and return the plan of the source.

        Args:
            end, total: where it ends, and its records.
            raw: size and hash of the raw file.
            limit: bytes of a row that is held.

        Raises:
            InputChangedError: it began otherwise when its container was recognised.
        """
        if seal is not None and not seal.hashes.startswith(source.head):
            raise changed(source.path)
        self._join()
        self._emit(len(self._places), end)
        places, ranks, contents = (np.concatenate(column) for column in zip(*self._cut, strict=True))
        chunks = _chunks(source, places, np.append(places[1:], [[end, total, 0]], axis=0), seal, stamp)
        chunks = replace(chunks, ranks=ranks_of(ranks), contents=contents)
        samples = _chunks(source, *self._sampled(end, total), seal, stamp)
        return SourcePlan(source, 0, total, *raw, chunks, samples, limit, tuple(notes))

    def _sampled(self, end: int, total: int) -> tuple[Int64, Int64]:
        """Return evenly spaced grains, the first and the last included: where each begins, and the next."""
        ends = np.cumsum([len(columns[0]) for _, columns in self._noted], dtype=np.int64)
        count = int(ends[-1]) if len(ends) else 0
        first = np.linspace(0, count - 1, min(SAMPLES, count)).astype(np.int64)

        def place(grain: int) -> list[int]:
            if grain == count:
                return [end, total, 0]
            of = int(np.searchsorted(ends, grain, side="right"))
            base, columns = self._noted[of]
            inside = grain - int(ends[of]) + len(columns[0])
            return [int(least) + int(column[inside]) for least, column in zip(base, columns, strict=True)]

        places = [np.array([place(grain) for grain in grains], np.int64) for grains in (first, first + 1)]
        return places[0].reshape(-1, 3), places[1].reshape(-1, 3)


def _short(column: Int64) -> Int64:
    """Return numbers from 0 on in as few bytes as hold them."""
    return column.astype(np.min_scalar_type(int(column.max())))


def _chunks(source: Source, begin: Int64, stop: Int64, seal: Seal | None, stamp: Stamp | None) -> Chunks:
    """Return chunks between places: byte (or row), record and line."""
    return Chunks(
        source,
        begin[:, 0].copy(),
        stop[:, 0].copy(),
        begin[:, 1].copy(),
        stop[:, 1] - begin[:, 1],
        begin[:, 2].copy() if source.container == "csv" else None,
        seal=seal,
        stamp=stamp,
    )
