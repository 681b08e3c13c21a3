"""JSON that is not one row a line: an array of rows, or pretty-printed objects one after another.

A sound source is planned in one pass. In a damaged one, a second pass learns how its elements begin, and a third finds them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

import msgspec
import numpy as np

from sftdata.batches import Reject, RowBatch
from sftdata.errors import Fault
from sftdata.sources.chunks import GRAIN_BYTES, Chunk, Gathered, Marks, Source
from sftdata.sources.elements import Begins, DamagedArrayError, Element, Elements
from sftdata.sources.jsonrows import parse_row
from sftdata.sources.lines import SHOWN_BYTES, too_long
from sftdata.sources.streams import RawCount, read_all, read_range, skip_bytes

_split = msgspec.json.Decoder(list[msgspec.Raw]).decode
_top_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_SEPARATORS = re.compile(rb"[\s,]*")
_KEY = re.compile(rb'("[^"\\\n]*")\s*:')


def plan_array(source: Source, slice_bytes: int, max_line_bytes: int) -> Marks:
    """Find the elements of an array and note where some of them start.

    Memory: one element, or `max_line_bytes` of it.
    """
    count = RawCount.start()
    blocks = skip_bytes(read_all(source, count), source.body)
    found = Elements(blocks, source.body, max_line_bytes, None, whole=True, strict=True)
    grain = min(slice_bytes, GRAIN_BYTES)
    anchors: tuple[bytes, ...] = ()
    try:
        borders, end, total = _borders(found, source.body, grain)
        for _ in blocks:  # the hash is that of the whole file
            pass
    except DamagedArrayError:
        for _ in blocks:
            pass
        anchors = _learn_anchors(source, max_line_bytes)
        found = Elements(_again(source), source.body, max_line_bytes, _among(anchors), whole=True)
        borders, end, total = _borders(found, source.body, grain)
    notes = (
        ()
        if found.closed
        else (f"{source.path}: the array is never closed by ']'; the file may have been cut short.",)
    )
    positions, records = np.array(borders, np.int64).reshape(-1, 2).T
    raw = count.size, count.hasher.hexdigest()
    return Marks(positions, records, end, total, slice_bytes, *raw, anchors, notes, seal=count.blocks.seal())


def read_array(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    """Parse the elements of a chunk."""
    found = Gathered(chunk)
    for record, element in enumerate(_elements(chunk, max_line_bytes), chunk.first_record):
        if element.length > max_line_bytes:
            found.reject(
                too_long(element.length, max_line_bytes), element.text[:SHOWN_BYTES], record, element.start
            )
            continue
        row = parse_row(element.text)
        if type(row) is Fault:
            found.reject(row, element.text, record, element.start)
        else:
            found.add(row, record, element.start)
    return found.finish()


def _elements(chunk: Chunk, limit: int) -> Iterator[Element]:
    """Return the elements of a chunk: all at once where they are sound and of usual size."""
    blocks = read_range(chunk)
    if chunk.stop - chunk.start <= limit:
        text = b"".join(blocks)
        with suppress(msgspec.DecodeError, RecursionError):
            return _located(text, chunk.start, _split(b"[" + text.rstrip(b", \t\r\n") + b"]"))
        blocks = iter([text])
    return iter(Elements(blocks, chunk.start, limit, _among(chunk.anchors)))


def _located(text: bytes, offset: int, values: list[msgspec.Raw]) -> Iterator[Element]:
    """Yield each value with its place, given that only separators lie between them."""
    position = 0
    for value in values:
        separators = _SEPARATORS.match(text, position)
        start = separators.end() if separators else position
        position = start + len(memoryview(value))
        yield Element(offset + start, position - start, text[start:position], b"")


def _borders(found: Elements, body: int, grain: int) -> tuple[list[tuple[int, int]], int, int]:
    """Return (byte, number) of about one element per grain, where the last one ends, and how many there are."""
    chosen, wanted, end, total = [], -1, body, 0
    for element in found:
        if element.start >= wanted:
            chosen.append((element.start, total))
            wanted = element.start - element.start % grain + grain
        end = element.start + element.length
        total += 1
    return chosen, end, total


def _learn_anchors(source: Source, limit: int) -> tuple[bytes, ...]:
    """Return how elements begin: the white space before them with each key that they have.

    Learnt from the elements that are whole. What few of them have is not taken: it may come from an object inside a damaged
    element.
    """
    blocks, head = _again(source), b""
    while len(head) < GRAIN_BYTES and (block := next(blocks, b"")):
        head += block
    # The first element may itself be damaged: what looks like a key before its first closing brace will do to find the second.
    keys = Counter(_KEY.findall(head[:GRAIN_BYTES].partition(b"}")[0]))
    spaces: Counter[bytes] = Counter()
    elements = Elements(
        chain([head], blocks), source.body, limit, lambda _, key: key in keys or not spaces, whole=True
    )
    for element in elements:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            keys.update(msgspec.json.encode(key) for key in _top_keys(element.text))
            spaces[element.space] += 1
    enough = spaces.total() / 20
    return tuple(
        sorted(space + key for space in spaces for key in keys if min(spaces[space], keys[key]) >= enough)
    )


def _again(source: Source) -> Iterator[bytes]:
    return skip_bytes(read_all(source, RawCount.start()), source.body)


def _among(anchors: tuple[bytes, ...]) -> Begins | None:
    return (lambda space, key: space + key in anchors) if anchors else None
