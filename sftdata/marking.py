"""Parts of a run share the scan of their input: each leaves its marks where they are built.

    SET.partial.parts/marks/NAME    of one range, named by the file as it is and by how it is scanned
    SET/builds/marks/NAME           the same in an object store

No part depends on another. Each scans its share, gives the others as long as that took, and then scans what
is still missing, in an order of its own: together, parts scan each range about once, and any one of them
alone scans them all.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from sftdata.batches import Int64
from sftdata.errors import IntegrityError, SftError, changed
from sftdata.output import StoreUrl
from sftdata.pipeline import WORTH_RANGES, load_nothing
from sftdata.set.store import explained
from sftdata.set.stores import put_bytes, store_at
from sftdata.sources.chunks import Source
from sftdata.sources.marks import Marks, decode_marks, encode_marks
from sftdata.sources.planning import in_turn
from sftdata.sources.ranges import Sizes, Stretch, scan
from sftdata.sources.remote import LocalCopy, is_url, state_of
from sftdata.sources.seals import FileState
from sftdata.sources.tables import stamp_of
from sftdata.version import __version__
from sftdata.workers import Workers

_LOOKS = 16  # at what others have left, in the time that a part gives them
Place: TypeAlias = Path | StoreUrl


def marked(
    place: Place, share: tuple[int, int], workers: Workers, sizes: Sizes, stretches: Sequence[Stretch]
) -> Iterator[Marks]:
    """Return the marks of stretches, in order: those that parts have left, and those of what is scanned now.

    Args:
        place: where marks are left.
        share: number of this part, from 0, and how many parts there are.
    """
    lengths = np.array([stretch.stop - stretch.start for stretch in stretches], np.int64)
    large = lengths.sum() >= WORTH_RANGES
    if not large and not any(stretch.source.held for stretch in stretches):
        yield from in_turn(sizes, stretches)
        return
    if isinstance(place, Path):
        with explained(place):
            place.mkdir(parents=True, exist_ok=True)
    states = {source: _state(source) for source in dict.fromkeys(one.source for one in stretches)}
    names = [_name(sizes, stretch, states[stretch.source]) for stretch in stretches]
    work = [
        [(name, stretches[index]) for index in indices.tolist() if (name := names[index]) is not None]
        for indices in in_order(lengths, *share)
    ]
    crew, began = workers if large else Workers(1), time.monotonic()
    for _ in crew.map(_leave, (place, sizes), work[0], load_nothing):
        pass
    _wait(place, {name for name, _ in work[1]}, time.monotonic() - began)
    for _ in crew.map(_leave, (place, sizes), work[1], load_nothing):
        pass
    for name, stretch in zip(names, stretches, strict=True):
        yield (name and _left(place, name, stretch)) or scan(sizes, stretch)


def in_order(lengths: Int64, number: int, of: int) -> tuple[Int64, Int64]:
    """Return the stretches of a part's share in order, and those of the others in one that no other part has.

    A stretch in which one share ends and the next begins is scanned by the part that makes more of its rows.
    """
    owner = (2 * np.cumsum(lengths) - lengths) * of // max(2 * int(lengths.sum()), 1)
    others = np.flatnonzero(owner != number)
    return np.flatnonzero(owner == number), np.random.default_rng(number).permutation(others)


def _wait(place: Place, names: set[str], seconds: float) -> None:
    """Wait until others have left these marks, at most so long: they may be slow, dead or yet to start."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not names <= store_at(place).sizes().keys():
        time.sleep(seconds / _LOOKS)


def _leave(how: tuple[Place, Sizes], work: tuple[str, Stretch]) -> None:
    """Scan a stretch and leave its marks, if no other has."""
    (place, sizes), (name, stretch) = how, work
    if _left(place, name, stretch) is None:
        marks = encode_marks(scan(sizes, stretch))
        now = replace(stretch.source, held="")
        if _name(sizes, stretch, _state(now)) != name:
            raise changed(stretch.source.path)
        with suppress(SftError):  # the set may be finished meanwhile, and the folder gone
            put_bytes(store_at(place), name, marks)


def _left(place: Place, name: str, stretch: Stretch) -> Marks | None:
    """Return the marks that are there; None where there are none, or damaged ones."""
    try:
        (data,) = store_at(place).get([name])
        return stamp_of(stretch.source, decode_marks(data))
    except (IntegrityError, ValueError):
        return None


def _name(sizes: Sizes, stretch: Stretch, state: FileState | None) -> str | None:
    """Return the name of the marks of a stretch; None for a dataset."""
    source = stretch.source
    if state is None:
        return None
    of_source = (__version__, source.path, source.head.hex(), *state)
    decides = (*of_source, *sizes, stretch.start, stretch.stop, stretch.whole)
    return hashlib.sha256(msgspec.json.encode(decides)).hexdigest()[:32]


def _state(source: Source) -> FileState | None:
    """Return what tells versions of a file apart on any machine; None where a library alone knows."""
    if source.container in ("saved", "hub"):
        return None
    if isinstance(source.held, LocalCopy):  # as it was before any of it was read
        return source.held.state
    if is_url(source.path):
        return state_of(source.path)
    found = os.stat(source.path)
    return found.st_size, found.st_mtime_ns
