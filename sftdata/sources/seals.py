"""The bytes that were planned: hashes by which reading finds any that were written since.

A set is made of the very bytes whose hash its manifest holds. A stream is hashed block by block while it is
planned, and each block again when a chunk reads it: whatever was written in between is found, even in place,
of the same length and with its old times. Columnar files are mapped by their libraries; there the state of
the files is compared before and after each read, and they are hashed again where it differs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from sftdata.errors import changed
from sftdata.sources.remote import State, is_url, state_of

HASHED_BYTES = 64 << 10  # of one block
HASH_BYTES = 8
FileState = tuple[int, ...] | State
_CLOCK_NS = 20_000_000  # the clock of a file system moves in steps; two changes within one look alike


class BlockHashes:
    """xxh3-64 of each block of a stream, the last one shorter."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._block = xxhash.xxh3_64()
        self._filled = self._size = 0

    def update(self, data: bytes) -> None:
        """Add what comes next."""
        view = memoryview(data)
        self._size += len(view)
        while view:
            part = view[: HASHED_BYTES - self._filled]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == HASHED_BYTES:
                self._close()
            view = view[len(part) :]

    def seal(self) -> Seal:
        """Return the seal of the whole stream; nothing may be added afterwards."""
        if self._filled:
            self._close()
        return Seal(0, bytes(self._done), self._size)

    def _close(self) -> None:
        self._done += self._block.digest()
        self._block = xxhash.xxh3_64()
        self._filled = 0


@dataclass(frozen=True, slots=True)
class Seal:
    """What a stretch of a stream must hold.

    Attributes:
        first: number of the first block that the stretch touches.
        hashes: of this block and those after it.
        end: where the stream ended when it was planned, bytes; what was appended since is not read.
    """

    first: int
    hashes: bytes
    end: int

    @property
    def stop(self) -> int:
        """Number of the block behind the last."""
        return self.first + len(self.hashes) // HASH_BYTES

    def since(self, block: int) -> bytes:
        """Return the hashes of the blocks from this number on."""
        return self.hashes[max(block - self.first, 0) * HASH_BYTES :]

    def part(self, start: int, stop: int) -> Seal:
        """Return the seal of bytes `start:stop`."""
        first, last = start // HASHED_BYTES, -(-stop // HASHED_BYTES)
        hashes = self.hashes[(first - self.first) * HASH_BYTES : (last - self.first) * HASH_BYTES]
        return Seal(first, hashes, self.end)


def block_hashes(data: bytes) -> bytes:
    """Return the hashes of the blocks of some bytes, end to end."""
    hashes = BlockHashes()
    hashes.update(data)
    return hashes.seal().hashes


def unchanged(path: str, blocks: Iterable[bytes], seal: Seal, start: int, stop: int) -> Iterator[bytes]:
    """Yield bytes `start:stop` of a stream, each block after its hash was compared.

    Args:
        path: for the message.
        blocks: of the stream, of `HASHED_BYTES` each, from the one that holds `start` on.

    Raises:
        InputChangedError: they are not those that were planned.
    """
    position = start // HASHED_BYTES * HASHED_BYTES
    for block in blocks:
        block = block[: seal.end - position]
        at = (position // HASHED_BYTES - seal.first) * HASH_BYTES
        if xxhash.xxh3_64_digest(block) != seal.hashes[at : at + HASH_BYTES]:
            raise changed(path)
        yield block[max(start - position, 0) : stop - position]
        position += HASHED_BYTES
        if position >= stop:
            return
    if position < stop:
        raise changed(path)


@dataclass(frozen=True, slots=True)
class Stamp:
    """The state of the files of a columnar source when they were hashed.

    Attributes:
        files: name, and device, number, size, time of writing and of last change of each, or its `State`.
        xxh3_128: of their bytes, one file after the other.
    """

    files: tuple[tuple[str, FileState], ...]
    xxh3_128: str

    def holds(self) -> bool:
        """Whether the files still look as they did."""
        return all(_state(name) == state for name, state in self.files)


def states_of(names: Sequence[str]) -> tuple[tuple[str, FileState], ...]:
    """Return what the file system says of files, once it could tell a change from the one before.

    Raises:
        InputChangedError: a file is gone.
    """
    states = tuple((name, _state(name)) for name in names)
    for name, state in states:
        if not state:
            raise changed(name)
    times = [state[-1] for _, state in states if isinstance(state[-1], int)]
    if any(abs(time.time_ns() - last) < _CLOCK_NS for last in times):
        time.sleep(_CLOCK_NS / 1e9)
        return tuple((name, _state(name)) for name in names)
    return states


def _state(name: str) -> FileState:
    if is_url(name):
        return state_of(name)
    try:
        found = os.stat(name)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
