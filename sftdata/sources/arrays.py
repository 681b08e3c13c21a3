"""JSON sources whose rows are not one a line: an array of rows, or pretty-printed objects one after another.

An element that is valid JSON ends where msgspec says. One that breaks a rule inside, such as NaN, ends with
its brackets and is one reject. Where quotes or brackets do not match, it is unclear where the next element
begins: the file is refused, with the place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import numpy as np

from sftdata.batches import Int64, Reject, RowBatch
from sftdata.errors import DataError, Fault
from sftdata.sources.borders import Boundaries, Bytes
from sftdata.sources.chunks import (
    SHOWN_BYTES,
    Chunk,
    RowCollector,
    too_long,
)
from sftdata.sources.jsonrows import POSITION, parse_row
from sftdata.sources.streams import CACHED_BYTES, read_range

_split = msgspec.json.Decoder(list[msgspec.Raw]).decode
_one_value = msgspec.json.Decoder(msgspec.Raw).decode
_SPACE = b" \t\r\n"
_SEPARATORS = re.compile(rb"[\s,]*")
_SEPARATES = np.isin(np.arange(256), list(b" \t\r\n\f\v,"))
_FOLLOWING = re.compile(rb"(\s*,\s*)[{\[][^:]{0,32}")  # and how the next element begins
_SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s,\[\]{}"]++', re.DOTALL)
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
_SHOWN_BEFORE = 10  # bytes of what is damaged
_CUT_TOKEN = 16  # bytes from the end of a block within which an error may come from the cut alone


class Element(NamedTuple):
    """One element of the array.

    Attributes:
        start: byte where it begins.
        length: bytes.
        text: the element; its first bytes where it is longer than the limit.
    """

    start: int
    length: int
    text: bytes


class Batch(NamedTuple):
    """Elements that follow each other: as of an `Element`, `starts` and `lengths` int64[N]."""

    starts: Int64
    lengths: Int64
    texts: Sequence[Bytes]


def scan_array(elements: Elements, found: Boundaries) -> Iterator[None]:
    """Note where some of the elements start; yield now and then.

    Memory: one element, or `max_line_bytes` of it.

    Raises:
        DataError: an element is damaged, and where it ends is unclear.
    """
    for part in elements.batches():
        found.rows(part.texts, part.starts, part.lengths, np.zeros_like(part.starts))
        yield


def guess_element(data: bytes, head: bytes) -> int:
    """Return where an element most likely begins in a text from the middle of an array; -1 if none does.

    Args:
        head: how the first element of the array begins: what begins likewise is most likely one, too.
    """
    begun = re.match(rb"\s*\[?\s*([{\[][^:]{0,32}:?)", head)
    found = re.search(rb"[}\]]\s*,\s*(" + re.escape(begun[1]) + rb")", data) if begun else None
    return found.start(1) if found else -1


def opens_array(head: bytes) -> bool:
    """Say whether a source that begins so is an array, or its elements follow each other without brackets."""
    return head.lstrip().startswith(b"[")


def read_array(chunk: Chunk, max_line_bytes: int) -> tuple[RowBatch, list[Reject]]:
    """Parse the elements of a chunk."""
    found = RowCollector(chunk)
    for record, element in enumerate(_elements(chunk, max_line_bytes), chunk.first_record):
        if element.length > max_line_bytes:
            fault = too_long(element.length, max_line_bytes)
            found.reject(fault, element.text[:SHOWN_BYTES], record, element.start)
            continue
        row = parse_row(element.text)
        if isinstance(row, Fault):
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
            array = b"".join((b"[", text.rstrip(b", \t\r\n"), b"]"))
            return _located(array, chunk.start, _split(array))
        blocks = iter([text])
    return iter(Elements(chunk.source.path, blocks, chunk.start, limit))


def _located(array: bytes, offset: int, values: list[msgspec.Raw]) -> Iterator[Element]:
    """Yield each value of an array of them with its place; only separators lie between them."""
    if not values:
        return
    lengths = _lengths(values)
    for start, length in zip(_starts(array, lengths).tolist(), lengths.tolist(), strict=True):
        yield Element(offset + start, length, array[start + 1 : start + 1 + length])


def _lengths(values: list[msgspec.Raw]) -> Int64:
    return np.array([len(memoryview(value)) for value in values], np.int64)


def _starts(array: bytes, lengths: Int64, usual: int = 1) -> Int64:
    """Return where values of these lengths begin behind the opening bracket of an array that holds no others.

    Args:
        usual: how many bytes lie between two of them, if it is always the same.
    """
    starts = np.cumsum(lengths + usual) - lengths - usual
    if len(array) - 2 == starts[-1] + lengths[-1]:
        separates = _SEPARATES[np.frombuffer(array, np.uint8)[starts[:, None] + 1 - np.arange(usual + 1)]]
        if separates[1:, 1:].all() and not separates[:, 0].any():
            return starts
    found, position = list[int](), 1
    for length in lengths.tolist():
        separators = _SEPARATORS.match(array, position)
        found.append((separators.end() if separators else position) - 1)
        position = found[-1] + 1 + length
    return np.array(found, np.int64)


class Elements:
    """Iterate over the elements of an array, or over objects that follow each other without brackets around.

    No more is held than one element, and of one beyond the limit its beginning.

    Args:
        path: for the message.
        blocks: the stream from `offset` on, in blocks of any size; the elements do not depend on it.
        limit: a longer element is not held, bytes.
        whole: this is all of the source, the array's own brackets included.
        inside: what begins here is inside of the array's brackets.

    Attributes:
        closed: once all is read: what was opened is closed.

    Raises:
        DataError: an element is damaged, and where it ends is unclear.
    """

    def __init__(
        self, path: str, blocks: Iterator[bytes], offset: int, limit: int, *,
        whole: bool = False, inside: bool = False,
    ) -> None:  # fmt: skip
        self.closed = not inside
        self._path, self._blocks, self._limit = path, iter(blocks), limit
        # window[at:] is what is held; window[0] is byte `base` of the source.
        self._window, self._base, self._at = b"", offset, 0
        self._ended = False
        self._tried = -1  # where the last attempt to decode many ended
        if whole:
            self._skip(re.compile(rb"\s*"))
            self.closed = self._window[self._at : self._at + 1] != b"["
            self._at += not self.closed

    def batches(self) -> Iterator[Batch]:
        """Yield the same elements, many at a time where they are sound and of usual size."""
        while True:
            if (found := self._many()) is None:
                if (element := self._one()) is None:
                    return
                found = Batch(np.array([element.start]), np.array([element.length]), [element.text])
            yield found

    def __iter__(self) -> Iterator[Element]:
        return iter(self._one, None)

    def _one(self) -> Element | None:
        """Return the next element; None at the end."""
        self._skip(_SEPARATORS)
        if not self._held:
            return None
        first = self._window[self._at : self._at + 1]
        if first == b"]" and not self.closed:
            self._at += 1
            self._skip(re.compile(rb"\s*"))
            if self._held:
                raise self._damage("text after the end of the array")
            self.closed = True
            return None
        if first in b"]}":
            raise self._damage("a bracket that nothing opened")
        return self._element() if first in b"{[" else self._scalar()

    def _many(self) -> Batch | None:
        """Return the elements behind the last one that are decoded at once; None if there are none such.

        They reach to the last one in the window that begins as the next one does. That is most likely no
        part of another: if it is, what is before it is no JSON.
        """
        if self._held < CACHED_BYTES // 2 and not self._ended:
            self._more()
        following = _FOLLOWING.match(self._window, self._at)
        stop = self._window.rfind(following.group(), self._at) if following else 0
        if following is None or stop <= self._at or self._base + stop <= self._tried:
            return None
        self._tried = self._base + stop
        with suppress(msgspec.DecodeError, RecursionError), memoryview(self._window) as window:
            text = b"".join((b"[", window[following.end(1) : stop], b"]"))
            values = _split(text)
            lengths = _lengths(values)
            if lengths.max() <= self._limit:
                starts = _starts(text, lengths, following.end(1) - self._at) + following.end(1)
                self._at = stop
                return Batch(starts + self._base, lengths, values)
        return None

    @property
    def _held(self) -> int:
        return len(self._window) - self._at

    @property
    def _may_grow(self) -> bool:
        return not self._ended and self._held <= self._limit

    def _more(self) -> None:
        """Read on until twice as much is held, so that what is looked at again and again stays linear."""
        gone = max(self._at - _SHOWN_BEFORE, 0)
        parts, held = [self._window[gone:]], self._held
        wanted = max(min(2 * held, held + (4 << 20)), CACHED_BYTES)
        while held < wanted and (block := next(self._blocks, b"")):
            parts.append(block)
            held += len(block)
        self._ended = held < wanted
        self._base += gone
        self._at, self._window = self._at - gone, b"".join(parts)

    def _skip(self, pattern: re.Pattern[bytes]) -> None:
        """Pass over what a pattern of single bytes matches."""
        while True:
            found = pattern.match(self._window, self._at)
            self._at = found.end() if found else self._at
            if self._held or self._ended:
                return
            self._more()

    def _element(self) -> Element:
        while True:
            with memoryview(self._window) as window, window[self._at : self._at + self._limit + 1] as view:
                stop, sure, wrong = _value_end(view)
            if stop:
                return self._take(self._at + stop)
            if sure or not self._may_grow:
                break
            self._more()
        if stop is None if sure else self._held > self._limit:
            return self._uncounted()
        if stop is None:
            raise self._cut_short()
        # It breaks a rule inside; if its quotes and brackets match, it ends with them all the same.
        while (end := _brackets_end(self._window, self._at, self._at + self._limit + 1)) is None:
            if not self._may_grow:
                raise self._damage(wrong)
            self._more()
        return self._take(end)

    def _scalar(self) -> Element:
        """Return a value without brackets, which is no row, but ends where it should."""
        while True:
            found = _SCALAR.match(self._window, self._at, self._at + self._limit + 1)
            if not self._may_grow or (found and found.end() < len(self._window)):
                break
            self._more()
        if found is None or found.end() - found.start() > self._limit:
            raise self._damage(f"a value that is no object, without an end in {self._limit} bytes")
        return self._take(found.end())

    def _take(self, stop: int) -> Element:
        text = self._window[self._at : stop]
        element = Element(self._base + self._at, len(text), text)
        self._at = stop
        return element

    def _uncounted(self) -> Element:
        """Return an element longer than the limit, or too deep for msgspec, by counting its brackets."""
        start, head, fed, nesting = self._base + self._at, b"", self._at, _Nesting()
        while (stop := nesting.feed(memoryview(self._window)[fed:])) is None:
            if self._ended:
                raise self._cut_short()
            if self._held > max(self._limit, SHOWN_BYTES):
                head = head or self._window[self._at : self._at + SHOWN_BYTES]
                self._at = len(self._window)  # let go of the rest
            fed = self._held
            self._more()
            fed += self._at
        stop += fed
        length = self._base + stop - start
        text = head or self._window[self._at : stop]
        self._at = stop
        return Element(start, length, text[:SHOWN_BYTES] if length > self._limit else text)

    def _damage(self, wrong: str) -> DataError:
        """Return the error of an element whose end is unclear; `wrong` may name a byte of the element."""
        place = POSITION.search(wrong)
        at = self._at + (int(place.group(1)) if place else 0)
        near = self._window[max(at - _SHOWN_BEFORE, 0) : at + 20].decode("utf-8", "replace")
        why = wrong[: place.start()].rstrip() if place else wrong
        return DataError(
            f"{self._path}: damaged at byte {self._base + at}: {why}, near {near!r}.",
            "correct the file there, or write one row a line (JSON lines), where damage costs one row.",
        )

    def _cut_short(self) -> DataError:
        what = f"{self._path}: ends inside the element that begins at byte {self._base + self._at}."
        return DataError(what, "fetch or write the file again; it was cut short, or a bracket is missing.")


def _value_end(view: memoryview) -> tuple[int | None, bool, str]:
    """Return where the JSON value at the start of a text ends, whether that is sure, and what is wrong.

    It is sure where more text would change nothing. The end is 0 for what is not JSON, None for a value that
    goes on, or (where that is sure) nests too deep for msgspec.
    """
    try:
        return len(memoryview(_one_value(view))), True, ""
    except msgspec.DecodeError as error:
        wrong = str(error)
    except RecursionError:
        return None, True, ""
    if found := _TRAILING.search(wrong):
        stop = int(found.group(1)) - 1  # it counts the byte that should not be there
        return len(bytes(view[:stop]).rstrip(_SPACE)), True, ""
    place = POSITION.search(wrong)
    if place is None:  # it ends before it should
        return None, False, wrong
    return 0, int(place.group(1)) < len(view) - _CUT_TOKEN, wrong


# A string must be followed by what JSON allows there: a missing quote is then noticed at the next string.
_TOKEN = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"(?=\s*[:,\]}])|[{}\[\]"]')
_OPENS = {b"}": b"{", b"]": b"["}


def _brackets_end(text: bytes, start: int, end: int) -> int | None:
    """Return where the array or object at `start` ends; None when its brackets or quotes do not match."""
    opened: list[bytes] = []
    for found in _TOKEN.finditer(text, start, end):
        token = found.group()
        if token in (b"{", b"["):
            opened.append(token)
        elif token == b'"' or (token in _OPENS and opened.pop() != _OPENS[token]):
            return None
        if not opened:
            return found.end()
    return None


_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"{[")] = 1
_STEPS[list(b"}]")] = -1


class _Nesting:
    """Follows an array or object through a stream without holding it, by its quotes and brackets alone."""

    _BYTES = 128 << 10  # looked at at once

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the last byte was a backslash that escapes the next one

    def feed(self, data: memoryview) -> int | None:
        """Return how many of these bytes belong to the value; None when all do and it goes on."""
        for start in range(0, len(data), self._BYTES):
            stop = self._follow(bytes(data[start : start + self._BYTES]))
            if stop is not None:
                return start + stop
        return None

    def _follow(self, data: bytes) -> int | None:
        if len(data.translate(None, b'"\\{}[]')) == len(data):  # inside a text, as most of what is endless is
            self._escaped = False
            return None
        if self._escaped:
            data = b"_" + data[1:]
        if b"\\" in data:
            data = _ESCAPE.sub(b"__", data)
        self._escaped = data.endswith(b"\\")
        codes = np.frombuffer(data, np.uint8)
        # A byte is inside a string when an odd number of quotes lie at or before it; brackets there do not
        # count.
        inside = np.logical_xor.accumulate(codes == ord('"')) ^ self._in_string
        steps = _STEPS[codes]
        steps[inside] = 0
        depth = np.cumsum(steps, dtype=np.int64) + self._depth
        ends = np.flatnonzero((depth == 0) & (steps < 0))
        self._depth, self._in_string = int(depth[-1]), bool(inside[-1])
        return int(ends[0]) + 1 if len(ends) else None
