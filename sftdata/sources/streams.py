"""Bytes of a source, decompressed, from anywhere to anywhere; damage is an error that names the file.

A compressed stream can only be read forward. Each process keeps its last stream open, so that a worker that
takes chunks in increasing order decompresses a file once, not once per chunk.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, cast

import xxhash

from sftdata.errors import IntegrityError, SftError, UsageError, changed
from sftdata.sources.chunks import Chunk, Compression, Source
from sftdata.sources.remote import RANGE_BYTES, RemoteFile, is_url, read_range_of
from sftdata.sources.seals import HASHED_BYTES, BlockHashes, unchanged

BLOCK_BYTES = 1 << 20
COMPRESSED_BLOCK_BYTES = 32 << 10
CACHED_BYTES = 512 << 10

MAGIC: tuple[tuple[bytes, Compression], ...] = (
    (rb"\x1f\x8b", "gzip"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"\xfd7zXZ\x00", "xz"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bz2"),
)


def compression_of(start: bytes) -> Compression:
    """Recognise a compression by the first bytes of a file."""
    return next((name for magic, name in MAGIC if re.match(magic, start)), "none")


def open_raw(path: str, held: str = "") -> BinaryIO:
    """Open a local file or a URL for reading; `held` keeps what is read of the latter.

    Raises:
        UsageError: it cannot be opened.
    """
    if is_url(path):
        return cast(BinaryIO, RemoteFile(path, held))
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}).", "check the path and its permissions."
        ) from None


class Decompressor(Protocol):
    """Decompresses one member of a stream: what lzma, bz2 and zstd share."""

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""

    @property
    def unused_data(self) -> bytes:
        """What was given after its end."""

    @property
    def needs_input(self) -> bool:
        """Whether all that can be made of what was given has been returned."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return at most `max_length` bytes of what has been given so far."""


class _Gzip:
    """zlib's decompressor behind the interface of the others, which keep what they have not consumed."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # A full block may leave more inside zlib although all input is consumed.
        self.needs_input = not self._inner.unconsumed_tail and len(out) < max_length
        return out


def _start_zstd() -> Decompressor:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    # As wide a window as `zstd --long=31` may write.
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
    return zstd.ZstdDecompressor(options=options)


_DECOMPRESSORS: dict[Compression, Callable[[], Decompressor]] = {
    "gzip": _Gzip,
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
    "zstd": _start_zstd,
}


def decompress(blocks: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    """Decompress a stream of one or more members into blocks of at most 1 MiB, the last member whole.

    A small file may hold any amount of zeros, so output is bounded rather than input.

    Raises:
        EOFError: the stream ends inside a member.
        Exception: whatever the library raises on damaged bytes.
    """
    if compression == "none":
        yield from blocks
        return
    start = _DECOMPRESSORS[compression]
    decoder = start()
    fed = False
    for block in blocks:
        while block:
            if decoder.eof:
                block = block.lstrip(b"\0")  # gzip members may be padded with zeros
                if not block:
                    break
                decoder, fed = start(), False
            yield from filter(None, _drain(decoder, block))
            fed = True
            block = decoder.unused_data if decoder.eof else b""
    if fed and not decoder.eof:
        raise EOFError("the stream ends in the middle")


def _drain(decoder: Decompressor, data: bytes) -> Iterator[bytes]:
    yield decoder.decompress(data, BLOCK_BYTES)
    while not decoder.eof and not decoder.needs_input:
        yield decoder.decompress(b"", BLOCK_BYTES)


def raw_blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the rest of a file in blocks.

    Raises:
        SftError: the disk or the connection fails.
    """
    try:
        while block := stream.read(size):
            yield block
    except OSError as error:
        name = getattr(stream, "name", None) or getattr(stream, "path", "the input")
        what = f"{name}: cannot be read: {error.strerror or error}."
        raise SftError(what, "check the disk or the connection, then run the same command again.") from error


@dataclass(slots=True)
class RawCount:
    """Size and hash of the raw bytes that passed through `watch`; block hashes of what they unpack to."""

    size: int = 0
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    blocks: BlockHashes = field(default_factory=BlockHashes)

    def watch(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass blocks on, counting and hashing them."""
        for block in blocks:
            self.size += len(block)
            self.hasher.update(block)
            yield block


def _checked(source: Source, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Turn whatever a damaged stream raises into one line."""
    done = 0
    try:
        for block in decompress(blocks, source.compression):
            done += len(block)
            yield block
    except SftError:
        raise
    except Exception as error:  # zlib, lzma, bz2 and zstd each raise their own
        if source.compression == "none":
            raise
        where = f"{source.path}: the {source.compression} stream"
        what = f"{where} is damaged after {done} decompressed bytes ({error})."
        raise IntegrityError(what, "fetch or compress the file again; nothing of it was used.") from None


def read_all(source: Source, count: RawCount | None = None) -> Iterator[bytes]:
    """Yield the whole decompressed stream; `count` counts and hashes its raw bytes.

    Raises:
        IntegrityError: the compressed stream is damaged or cut short.
    """
    size = BLOCK_BYTES if source.compression == "none" else COMPRESSED_BLOCK_BYTES
    size = RANGE_BYTES if is_url(source.file) else size
    with open_raw(source.file, source.held) as stream:
        raw = raw_blocks(stream, size)
        if count is None:
            yield from _checked(source, raw)
            return
        for block in _checked(source, count.watch(raw)):
            count.blocks.update(block)
            yield block


def in_cache(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut blocks into pieces that stay in the cache of a core while they are looked at."""
    return (block[at : at + CACHED_BYTES] for block in blocks for at in range(0, len(block), CACHED_BYTES))


def skip_bytes(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield what lies after the first `size` bytes."""
    for block in blocks:
        if len(block) > size:
            yield block[size:]
        size = max(size - len(block), 0)


def read_from(source: Source, start: int) -> Iterator[bytes]:
    """Yield the decompressed stream from a byte on; what lies before is read where it is compressed only."""
    if source.compression != "none":
        yield from skip_bytes(read_all(source), start)
        return
    with open_raw(source.file, source.held) as stream:
        stream.seek(start)
        yield from raw_blocks(stream, RANGE_BYTES if is_url(source.file) else BLOCK_BYTES)


class _Forward:
    """A decompressed stream, in blocks of `HASHED_BYTES`, that remembers its position."""

    def __init__(self, source: Source) -> None:
        self.stream = open_raw(source.file, source.held)
        self._blocks = _regrouped(_checked(source, raw_blocks(self.stream, COMPRESSED_BLOCK_BYTES)))
        self.number = -1
        self._last = b""

    def blocks(self, first: int) -> Iterator[bytes]:
        """Yield blocks from number `first` on, which must not lie before the last one read."""
        if first == self.number:
            yield self._last
        for block in self._blocks:
            self.number += 1
            self._last = block
            if self.number >= first:
                yield block


def _regrouped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    waiting = bytearray()
    for block in blocks:
        waiting += block
        start = 0
        while len(waiting) - start >= HASHED_BYTES:
            yield bytes(waiting[start : start + HASHED_BYTES])
            start += HASHED_BYTES
        del waiting[:start]
    if waiting:
        yield bytes(waiting)


_last: dict[Source, _Forward] = {}


def read_range(chunk: Chunk, start: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a chunk of the decompressed stream, in blocks.

    Args:
        start: where to begin; default: where the chunk does.

    Raises:
        InputChangedError: they are not those that were planned.
    """
    assert chunk.seal is not None
    start = chunk.start if start is None else start
    if start < chunk.stop:
        last = -(-chunk.stop // HASHED_BYTES)
        blocks = _blocks_from(chunk.source, start // HASHED_BYTES, last, chunk.seal.end)
        yield from unchanged(chunk.source.path, blocks, chunk.seal, start, chunk.stop)


def _blocks_from(source: Source, first: int, last: int, end: int) -> Iterator[bytes]:
    """Yield blocks of `HASHED_BYTES` of the decompressed stream from `first` on, at least up to `last`.

    Args:
        end: where it ended when it was planned.
    """
    if source.compression == "none":
        if is_url(source.file):
            yield from _remote_blocks(source, first, last, end)
            return
        with open_raw(source.file, source.held) as stream:
            stream.seek(first * HASHED_BYTES)
            yield from raw_blocks(stream, HASHED_BYTES)
        return
    forward = _last.get(source)
    if forward is None or forward.number > first:
        close_streams()
        forward = _last[source] = _Forward(source)
    try:
        yield from forward.blocks(first)
    except IntegrityError:  # it was whole when it was planned
        raise changed(source.path) from None


_border: dict[tuple[str, int], bytes] = {}  # the block that the next chunk begins in, too


def _remote_blocks(source: Source, first: int, last: int, end: int) -> Iterator[bytes]:
    url = source.file
    begun = _border.get((url, first))
    if begun is not None:
        yield begun
        first += 1
    for start in range(first * HASHED_BYTES, min(last * HASHED_BYTES, end), RANGE_BYTES):
        part = read_range_of(url, start, min(start + RANGE_BYTES, last * HASHED_BYTES, end), source.held)
        _border.clear()
        _border[url, last - 1] = part[(last - 1) * HASHED_BYTES - start :]
        yield from (part[at : at + HASHED_BYTES] for at in range(0, len(part), HASHED_BYTES))


def close_streams() -> None:
    """Close the stream kept open for the next chunk."""
    for forward in _last.values():
        forward.stream.close()
    _last.clear()
