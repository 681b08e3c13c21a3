"""JSON that is not one row a line: an array of rows, or pretty-printed objects one after another.

A well-formed array is split by msgspec. A damaged one is walked bracket by bracket: an element that breaks the rules of JSON
ends where the next element begins, so that one bad element is one fault and its neighbours stay whole.
"""

from __future__ import annotations

import mmap
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import numpy as np

from sftdata.batches import RowBatch
from sftdata.errors import Fault
from sftdata.read.jsonrows import parse_row
from sftdata.read.lines import SHOWN_BYTES, too_long
from sftdata.read.slices import GRAIN_BYTES, Gathered, Marks, Slice, Source, Unreadable
from sftdata.read.streams import RawCount, read_all, read_range

Buffer = bytes | mmap.mmap
Span = tuple[int, int]

_split = msgspec.json.Decoder(list[msgspec.Raw]).decode
_one_value = msgspec.json.Decoder(msgspec.Raw).decode
_top_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_SPACE = b" \t\r\n"
_SEPARATORS = re.compile(rb"[\s,]*")
_SCALAR = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\s,\[\]{}"]+|.', re.DOTALL)
# A string must be followed by what JSON allows there: a missing quote is then noticed at the next string, not at the end.
_TOKEN = re.compile(rb'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"(?=\s*[:,\]}])|[{}\[\]"]')
_KEY = re.compile(rb'("[^"\\\n]*")\s*:')
_BEGINNING = re.compile(rb'(\s*)\{\s*("[^"\\\n]*")\s*:')
_OPENS = {ord("}"): ord("{"), ord("]"): ord("[")}


def plan_array(source: Source, slice_bytes: int) -> Marks:
    """Find the elements of an array and note where some of them start.

    The decompressed stream is laid in a nameless temporary file and mapped, so that memory holds element borders only.
    """
    count = RawCount.start()
    with tempfile.TemporaryFile() as copy:
        for block in read_all(source, count):
            copy.write(block)
        copy.flush()
        with mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start, end, closed = _inside(text, source.body)
            anchors: tuple[bytes, ...] = ()
            spans = _well_formed(text, source.body)
            if spans is None:
                anchors = _learn_anchors(text, start, end)
                spans = list(_walk(text, start, end, anchors))
    grain = min(slice_bytes, GRAIN_BYTES)
    chosen, wanted = [], -1
    for record, (first, _) in enumerate(spans):
        if first >= wanted:
            chosen.append((first, record))
            wanted = first - first % grain + grain
    notes = () if closed else (f"{source.path}: the array is never closed by ']'; the file may have been cut short.",)
    positions, records = np.array(chosen, np.int64).reshape(-1, 2).T
    return Marks(positions, records, end, len(spans), slice_bytes, count.size, count.hasher.hexdigest(), anchors, notes)


def read_array(piece: Slice, max_line_bytes: int) -> tuple[RowBatch, list[Unreadable]]:
    """Parse the elements of a slice."""
    text = b"".join(read_range(piece.source, piece.start, piece.stop))
    found = Gathered(piece)
    spans = _well_formed_part(text)
    if spans is None:
        spans = list(_walk(text, 0, len(text), piece.anchors))
    for record, (start, stop) in enumerate(spans, piece.first_record):
        element, offset = text[start:stop], piece.start + start
        if len(element) > max_line_bytes:
            found.reject(too_long(len(element), max_line_bytes), element[:SHOWN_BYTES], record, offset)
            continue
        row = parse_row(element)
        if type(row) is Fault:
            found.reject(row, element, record, offset)
        else:
            found.add(row, record, offset)
    return found.finish()


def _inside(text: Buffer, body: int) -> tuple[int, int, bool]:
    """Return where the elements start and end, and whether what opens is closed; bare objects need no brackets."""
    end = len(text)
    while end > body and text[end - 1] in _SPACE:
        end -= 1
    start = _skip_space(text, body)
    if start >= end or text[start] != ord("["):
        return start, end, True
    return (start + 1, end - 1, True) if end > start + 1 and text[end - 1] == ord("]") else (start + 1, end, False)


def _skip_space(text: Buffer, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _well_formed(text: Buffer, body: int) -> list[Span] | None:
    """Return the elements of a whole file that is valid JSON, else None."""
    start = _skip_space(text, body)
    with memoryview(text) as whole, whole[start:] as value:
        try:
            if text[start] == ord("["):
                return _locate(text, start + 1, _split(value))
            return [(start, start + len(memoryview(_one_value(value))))]
        except (msgspec.DecodeError, RecursionError):
            return None


def _well_formed_part(text: bytes) -> list[Span] | None:
    """Return the elements of a slice whose elements are valid JSON with commas between, else None."""
    try:
        return _locate(text, 0, _split(b"[" + text.rstrip(b", \t\r\n") + b"]"))
    except (msgspec.DecodeError, RecursionError):
        return None


def _locate(text: Buffer, position: int, values: list[msgspec.Raw]) -> list[Span]:
    """Return where each value lies, given that only separators lie between them."""
    spans = []
    for value in values:
        start = _after_separators(text, position, len(text))
        position = start + len(memoryview(value))
        spans.append((start, position))
    return spans


def _learn_anchors(text: Buffer, start: int, end: int) -> tuple[bytes, ...]:
    """Return how elements begin: the white space before them with each key that they have.

    Learnt on a first walk from the elements that are whole. What few of them have is not taken: it may come from an object inside
    a damaged element.
    """
    # The first element may itself be damaged: what looks like a key before its first closing brace will do to find the second.
    keys = Counter(_KEY.findall(text[start : start + GRAIN_BYTES].partition(b"}")[0]))
    spaces: Counter[bytes] = Counter()
    position = start
    while (position := _after_separators(text, position, end)) < end:
        stop = _element_end(text, position, end)
        if stop is None:
            known = next((item for item in _BEGINNING.finditer(text, position + 1, end) if item.group(2) in keys), None)
            known = known or (None if spaces else _BEGINNING.search(text, position + 1, end))
            position = known.end(1) if known else end
            continue
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            keys.update(msgspec.json.encode(key) for key in _top_keys(text[position:stop]))
            spaces[_space_before(text, position)] += 1
        position = stop
    enough = spaces.total() / 20
    return tuple(sorted(space + key for space in spaces for key in keys if min(spaces[space], keys[key]) >= enough))


def _space_before(text: Buffer, position: int) -> bytes:
    start = position
    while start and text[start - 1] in _SPACE:
        start -= 1
    return text[start:position]


def _walk(text: Buffer, position: int, end: int, anchors: tuple[bytes, ...]) -> Iterator[Span]:
    """Yield the elements of damaged JSON; nothing but white space and commas is left out."""
    while (position := _after_separators(text, position, end)) < end:
        stop = _element_end(text, position, end) or _next_anchor(text, position + 1, end, anchors)
        yield position, stop
        position = stop


def _after_separators(text: Buffer, position: int, end: int) -> int:
    separators = _SEPARATORS.match(text, position, end)
    return separators.end() if separators else position


def _element_end(text: Buffer, start: int, end: int) -> int | None:
    """Return where the value that begins at `start` ends, or None when its brackets or quotes do not match."""
    if text[start] not in b"{[":
        scalar = _SCALAR.match(text, start, end)
        return scalar.end() if scalar else None
    depth = bytearray()
    for token in _TOKEN.finditer(text, start, end):
        byte = text[token.start()]
        if byte == ord('"'):
            if token.end() - token.start() == 1:
                return None
        elif byte in b"{[":
            depth.append(byte)
        elif depth.pop() != _OPENS[byte]:
            return None
        elif not depth:
            return token.end()
    return None


def _next_anchor(text: Buffer, start: int, end: int, anchors: tuple[bytes, ...]) -> int:
    """Return where the next element seems to begin."""
    for candidate in _BEGINNING.finditer(text, start, end):
        if candidate.group(1) + candidate.group(2) in anchors:
            return candidate.end(1)
    return end
