"""A set that several processes build at once, on any machines, in a folder that none of them owns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from sftdata.set.build import PLAN, SLICES, Build, ShardResult
from sftdata.set.ledger import LISTS, write_parts
from sftdata.set.store import explained, link_file, remove, write_atomic


class SharedBuild(Build):
    """The slices of one plan, which names the folder: it is never cleared, and nothing in it is locked.

    Args:
        folder: of all such builds of one set.
        name: of the plan.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder / name)

    def join(self, plan: Mapping[str, object]) -> None:
        """Begin, or go on with others.

        Args:
            plan: all that decides the bytes of the set, for whoever looks.
        """
        with explained(self.folder):
            (self.folder / SLICES).mkdir(parents=True, exist_ok=True)
        text = msgspec.json.encode(plan, order="sorted")
        write_atomic(self.folder / PLAN, partial(write_parts, [text]))

    def gather(self, output: Path, results: Sequence[ShardResult]) -> Build:
        """Return a build of `output` in a folder of its own, with links to what these tasks made."""
        own = Build(output, self.output.with_name(f"{self.output.name}.{os.urandom(4).hex()}"))
        with explained(own.folder):
            (own.folder / SLICES).mkdir(parents=True)
            for result in results:
                for file in (*result.shards, *result.files):
                    link_file(self.folder / file.name, own.folder / file.name)
                for name in LISTS:
                    link_file(self.part(result.index, name), own.part(result.index, name))
        return own

    def end(self) -> None:
        """Remove everything once the set stands; others that still write there fail, and find the set.

        A folder loses its name first, at once: one that finishes can never put half of it in place.
        """
        for left in self.output.parent.glob(f"{self.output.name}.*"):
            with suppress(OSError):  # another removes it
                gone = left.with_name(f"{self.output.name}.{os.urandom(4).hex()}")
                os.rename(left, gone)
                remove(gone)
        with suppress(OSError):  # parts of another plan
            self.output.parent.rmdir()
