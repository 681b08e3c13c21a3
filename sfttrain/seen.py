"""What a run has seen of its data, exactly: by set, by source, and by line, over all its legs.

A leg is a stretch of steps on the same sets in the same proportions. The account of the leg that is under way
is found by arithmetic from its steps; that of the legs before it lies in the checkpoint which it began from.

    seen.json    legs, with what each took of each set; sources, with how many documents came how often
    seen.arrow   for each source how often each of its lines came

A source is one, wherever it lies and whichever set it is in, if its name and the hash of its bytes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from sftdata.batches import Int64
from sftdata.choosing import Measure
from sftdata.errors import IntegrityError, UsageError
from sftdata.output import counted
from sftdata.set.manifest import SourceInfo, first_passes
from sftdata.set.opened import ShardSet
from sftdata.set.store import Sink, write_atomic
from sfttrain.data import Contents

if TYPE_CHECKING:
    from sfttrain.schedule import Order

SEEN_NAME, LINES_NAME = "seen.json", "seen.arrow"
Key = tuple[str, str]


class SetSeen(msgspec.Struct, frozen=True, omit_defaults=True):
    """What some steps took of a set.

    Attributes:
        name: of its folder.
        rows, tokens, trained: taken, repeats included; padding does not count.
        passes: how often the set was gone through, by its rows.
        share: of all that was taken, by what shares count.
        asked: the share that was asked for; None for passes.
    """

    name: str
    digest: str
    rows: int
    tokens: int
    trained: int
    passes: float
    share: float
    asked: float | None = None

    def __str__(self) -> str:
        asked = "" if self.asked is None else f"{self.asked:.3%} asked, {self.share:.3%} taken: "
        return (
            f"{self.name}: {asked}{counted(self.rows, 'row')}, {counted(self.tokens, 'token')},"
            f" {self.trained:,} trained, {self.passes:.2f} passes."
        )


class Leg(msgspec.Struct, frozen=True):
    """Steps on the same data in the same proportions: from `first_step`, so many, and what shares count."""

    first_step: int
    steps: int
    counted_by: Measure
    sets: list[SetSeen]


class SourceSeen(msgspec.Struct, frozen=True):
    """What a run took of a source.

    Attributes:
        xxh3: hash of its bytes.
        lines: that it has.
        documents: how many of them came so often; a document in several rows comes once for each of its
            parts.
        tokens, trained: taken, repeats included.
    """

    name: str
    xxh3: str
    lines: int
    documents: dict[int, int]
    tokens: int
    trained: int


class Seen(msgspec.Struct, frozen=True):
    """The account of a run up to a step."""

    steps: int
    legs: list[Leg]
    sources: list[SourceSeen]


@dataclass(slots=True, eq=False)
class Lines:
    """How often the lines of a source came.

    Attributes:
        times: int64[lines].
        tokens, trained: taken of all of them.
    """

    times: Int64
    tokens: int = 0
    trained: int = 0

    def add(self, times: Int64, tokens: int, trained: int) -> None:
        """Count more."""
        if len(times) > len(self.times):
            self.times = np.pad(self.times, (0, len(times) - len(self.times)))
        self.times[: len(times)] += times
        self.tokens += tokens
        self.trained += trained


class Account:
    """What a run has seen at any step of the leg that is under way.

    Args:
        sets, contents: of this leg.
        order: of this leg; its first step is where the leg begins.
        measure: what shares count.
        shares: asked of each set; empty for passes.
    """

    def __init__(
        self, sets: Sequence[ShardSet], contents: Sequence[Contents], order: Order, *, measure: Measure,
        shares: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self._sets, self._contents, self._order = list(sets), list(contents), order
        self._measure: Measure = measure
        asked: list[float | None] = [share / sum(shares) for share in shares]
        self._shares = asked or [None] * len(self._sets)
        self._before = Seen(0, [], [])
        self._lines: dict[Key, Lines] = {}
        self._begun = order.first_step

    @property
    def first_step(self) -> int:
        """Where the leg begins."""
        return self._order.first_step

    def go_on(self, folder: Path, step: int) -> None:
        """Continue the account of a checkpoint, which was written at that step of this leg or the one before.

        Raises:
            IntegrityError: it is damaged.
            UsageError: the checkpoint has none, and this is another leg than the one before.
        """
        if (folder / SEEN_NAME).is_file():
            self._before, self._lines = read_account(folder)
            self._begun = step
        elif self.first_step:
            what = f"{folder}: holds no account of what was seen, which a new leg would continue."
            fix = "use what it was started with, another output folder, or --overwrite to start anew."
            raise UsageError(what, fix)

    def at(self, step: int) -> Seen:
        """Return the account up to a step."""
        return self._account(step)[0]

    def leg(self, step: int) -> Leg:
        """Return what this leg takes up to a step."""
        return Leg(
            self.first_step, step - self.first_step, self._measure, self._taken(self._order.seen(step))
        )

    def write(self, folder: Path, step: int) -> None:
        """Write the account up to a step."""
        seen, lines = self._account(step)
        text = msgspec.json.format(msgspec.json.encode(seen), indent=2) + b"\n"
        write_atomic(folder / SEEN_NAME, lambda sink: sink.write(text))
        _write_lines(folder / LINES_NAME, lines)

    def passes(self, step: int) -> list[float]:
        """Return how often the run goes through each set up to a step, over all its legs."""
        earlier = [part for leg in self._earlier for part in leg.sets]
        return [
            float(taken.sum()) / len(taken)
            + sum(part.passes for part in earlier if part.digest == opened.manifest.digest)
            for opened, taken in zip(self._sets, self._order.seen(step), strict=True)
        ]

    @property
    def _earlier(self) -> list[Leg]:
        return [leg for leg in self._before.legs if leg.first_step != self.first_step]

    def _taken(self, times: Sequence[Int64]) -> list[SetSeen]:
        amounts = [
            {name: int(taken @ contents.amounts(name)) for name in ("rows", "tokens", "trained")}
            for contents, taken in zip(self._contents, times, strict=True)
        ]
        whole = sum(part[self._measure] for part in amounts)
        return [
            SetSeen(
                name=opened.folder.resolve().name,
                digest=opened.manifest.digest,
                **part,
                passes=part["rows"] / contents.rows,
                share=part[self._measure] / max(whole, 1),
                asked=share,
            )
            for opened, contents, share, part in zip(
                self._sets, self._contents, self._shares, amounts, strict=True
            )
        ]

    def _account(self, step: int) -> tuple[Seen, dict[Key, Lines]]:
        lines = {key: Lines(old.times.copy(), old.tokens, old.trained) for key, old in self._lines.items()}
        times = zip(self._order.seen(step), self._order.seen(self._begun), strict=True)
        for opened, contents, (now, before) in zip(self._sets, self._contents, times, strict=True):
            _count(lines, opened.manifest.sources, contents, (now - before)[contents.row])
        sources = [_source(key, part) for key, part in lines.items()]
        return Seen(step, [*self._earlier, self.leg(step)], sources), lines


def _count(lines: dict[Key, Lines], sources: Sequence[SourceInfo], contents: Contents, times: Int64) -> None:
    """Count parts of documents that came so often, int64[P], as lines of their sources."""
    count = sum(source.rows for source in sources)
    columns = (times, times * contents.tokens, times * contents.trained)
    # Sums of float64 are exact up to 2**53.
    came, tokens, trained = (
        np.bincount(contents.example, column, count).astype(np.int64) for column in columns
    )
    for source, first in zip(sources, first_passes(sources), strict=True):
        here = slice(source.first_id, source.first_id + source.rows)
        key = sources[first].name.rpartition("/")[2], source.xxh3
        own = lines.setdefault(key, Lines(np.zeros(source.rows, np.int64)))
        own.add(came[here], int(tokens[here].sum()), int(trained[here].sum()))


def _source(key: Key, lines: Lines) -> SourceSeen:
    counts = np.bincount(lines.times[lines.times > 0])
    documents = {int(times): int(counts[times]) for times in np.flatnonzero(counts)}
    return SourceSeen(*key, len(lines.times), documents, lines.tokens, lines.trained)


def _write_lines(path: Path, lines: dict[Key, Lines]) -> None:
    import pyarrow as pa

    table = pa.table(
        {
            "name": [name for name, _ in lines],
            "xxh3": [xxh3 for _, xxh3 in lines],
            "times": pa.array([part.times for part in lines.values()], pa.list_(pa.int64())),
        }
    )

    def write(sink: Sink) -> None:
        with pa.ipc.new_file(
            sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
        ) as writer:
            writer.write_table(table)

    write_atomic(path, write)


def read_account(folder: Path) -> tuple[Seen, dict[Key, Lines]]:
    """Read an account that lies in a folder.

    Raises:
        IntegrityError: it is damaged.
    """
    import pyarrow as pa

    try:
        seen = msgspec.json.decode((folder / SEEN_NAME).read_bytes(), type=Seen)
        with pa.memory_map(str(folder / LINES_NAME)) as file:
            table = pa.ipc.open_file(file).read_all()
            times = [part.values.to_numpy().copy() for part in table["times"]]
    except (OSError, msgspec.MsgspecError, pa.ArrowException) as error:
        fix = "remove the folder, then run again: it resumes from the one before."
        raise IntegrityError(f"{folder}: its {SEEN_NAME} or {LINES_NAME} is damaged: {error}.", fix) from None
    keys = zip(table["name"].to_pylist(), table["xxh3"].to_pylist(), strict=True)
    amounts = [(source.tokens, source.trained) for source in seen.sources]
    return seen, {key: Lines(part, *amount) for key, part, amount in zip(keys, times, amounts, strict=True)}
