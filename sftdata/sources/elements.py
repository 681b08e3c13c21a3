"""The elements of a JSON array in a stream: no more is held than one of them, and of an endless one its beginning.

An element that is valid JSON ends where msgspec says. One that breaks the rules ends with its brackets, where they match, or
where the next element begins: one bad element is one fault, and its neighbours stay whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from sftdata.sources.chunks import GRAIN_BYTES
from sftdata.sources.lines import SHOWN_BYTES
from sftdata.sources.nesting import Nesting, brackets_end
from sftdata.sources.streams import BLOCK_BYTES

Begins = Callable[
    [bytes, bytes], bool
]  # white space before, first key in its quotes -> whether an element may begin so

_one_value = msgspec.json.Decoder(msgspec.Raw).decode
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
_POSITION = re.compile(r"\(byte (\d+)\)")
_SPACE = b" \t\r\n"
_SEPARATORS = re.compile(rb"[\s,]*")
_SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s,\[\]{}"]++|.', re.DOTALL)
# Bounded, so that whether it is found does not depend on where one block of the stream ends.
_BEGINNING = re.compile(rb'\{\s{0,256}("[^"\\\n]{0,256}")\s{0,256}:')
_LONGEST_BEGINNING = 2048
_WIDEST_SPACE = 256
_CUT_TOKEN = 16  # bytes from the end of a block within which an error may come from the cut alone


class Element(NamedTuple):
    """One element of the array, whole or damaged.

    Attributes:
        start: byte where it begins.
        length: bytes.
        text: the element; its first bytes where it is longer than the limit.
        space: white space before it.
    """

    start: int
    length: int
    text: bytes
    space: bytes


class DamagedArrayError(Exception):
    """An element is not JSON."""


class Elements:
    """Iterate over the elements of an array, or over objects that follow each other without brackets around them.

    Args:
        blocks: the stream from `offset` on.
        limit: a longer element is not held, bytes.
        begins: how elements begin, where that is known of an array that is damaged.
        whole: this is all of the source, the array's own brackets included.
        strict: stop at the first damaged element.

    Attributes:
        closed: once all is read: what was opened is closed.

    Raises:
        DamagedArrayError: an element is damaged.
    """

    def __init__(
        self,
        blocks: Iterator[bytes],
        offset: int,
        limit: int,
        begins: Begins | None,
        *,
        whole: bool = False,
        strict: bool = False,
    ) -> None:
        self.closed = True
        self._blocks, self._limit, self._begins = iter(blocks), limit, begins
        self._window, self._base, self._at = b"", offset, 0
        self._ended, self._strict = False, strict
        if whole:
            self._skip(re.compile(rb"\s*"))
            self.closed = self._window[self._at : self._at + 1] != b"["
            self._at += not self.closed

    def __iter__(self) -> Iterator[Element]:
        while True:
            space = self._skip(_SEPARATORS)
            if self._at == len(self._window):
                return
            if not self.closed and self._window[self._at] == ord("]") and self._is_last():
                self.closed = True
                return
            yield self._element(space)

    @property
    def _held(self) -> int:
        return len(self._window) - self._at

    @property
    def _may_grow(self) -> bool:
        return not self._ended and self._held <= self._limit

    def _more(self) -> None:
        """Read on until twice as much is held, so that what is looked at again and again stays linear."""
        parts, held = [self._window[self._at :]], self._held
        wanted = max(min(2 * held, held + (4 << 20)), BLOCK_BYTES)
        while held < wanted and (block := next(self._blocks, b"")):
            parts.append(block)
            held += len(block)
        self._ended = held < wanted
        self._base += self._at
        self._at, self._window = 0, b"".join(parts)

    def _skip(self, pattern: re.Pattern[bytes]) -> bytes:
        """Pass over separators; return the white space at their end."""
        passed = b""
        while True:
            found = pattern.match(self._window, self._at)
            assert found is not None
            passed = (passed + found.group())[-_WIDEST_SPACE - 1 :]
            self._at = found.end()
            if self._held or self._ended:
                return passed[len(passed.rstrip(_SPACE)) :]
            self._more()

    def _is_last(self) -> bool:
        """Return whether nothing but white space follows the bracket at hand."""
        while self._may_grow and not self._window[self._at + 1 :].strip():
            self._more()
        return self._ended and not self._window[self._at + 1 :].strip()

    def _element(self, space: bytes) -> Element:
        if self._window[self._at] not in b"{[":
            # In a damaged array it may be what an element left behind, whose quotes would pair with those of the next.
            return self._scalar(space) if self._begins is None else self._search(None, space)
        while True:
            with memoryview(self._window) as window, window[self._at : self._at + self._limit + 1] as view:
                stop, sure = _value_end(view)
            if stop:
                return self._take(self._at + stop, space)
            if sure or not self._may_grow:
                break
            self._more()
        if stop is None and (
            sure or self._held > self._limit
        ):  # it nests too deep for msgspec, or goes on beyond the limit
            return self._search(Nesting(), space)
        if self._strict:
            raise DamagedArrayError
        while self._held < GRAIN_BYTES and not self._ended:
            self._more()
        end = brackets_end(self._window, self._at, min(self._at + GRAIN_BYTES, len(self._window)))
        return self._take(end, space) if end else self._search(None, space)

    def _scalar(self, space: bytes) -> Element:
        while True:
            found = _SCALAR.match(self._window, self._at, self._at + self._limit + 1)
            assert found is not None
            cut = found.end() == len(self._window) or found.group() == b'"'
            if not (cut and self._may_grow):
                break
            self._more()
        if found.end() - found.start() > self._limit or (found.group() == b'"' and self._held > self._limit):
            return self._search(Nesting(), space)
        return self._take(found.end(), space)

    def _take(self, stop: int, space: bytes) -> Element:
        text = self._window[self._at : stop]
        element = Element(self._base + self._at, len(text), text, space)
        self._at = stop
        return element

    def _search(self, nesting: Nesting | None, space: bytes) -> Element:
        """Return the element that ends with its brackets, if they count, or before another that begins."""
        start, head = self._base + self._at, b""
        fed, looked = self._at, self._at + 1
        while True:
            stop = nesting.feed(memoryview(self._window)[fed:]) if nesting else None
            stop = None if stop is None else fed + stop
            begin = self._beginning(looked, stop)
            if begin is not None or stop is not None or self._ended:
                break
            fed, looked = len(self._window), max(looked, len(self._window) - _LONGEST_BEGINNING)
            if self._held > max(self._limit, SHOWN_BYTES):
                head = head or self._window[self._at : self._at + SHOWN_BYTES]
                self._at = max(self._at, len(self._window) - 2 * _LONGEST_BEGINNING)
            moved = self._at
            self._more()
            fed, looked = fed - moved, looked - moved
        if begin is None and stop is None and self._strict:
            raise DamagedArrayError
        last = (
            stop
            if begin is None and stop is not None
            else self._without_separators(begin or self._last_byte())
        )
        length = self._base + last - start
        text = head or self._window[self._at : last]
        self._at = last
        return Element(start, length, text[:SHOWN_BYTES] if length > self._limit else text, space)

    def _without_separators(self, end: int) -> int:
        return max(len(self._window[:end].rstrip(_SPACE + b",")), self._at + 1)

    def _last_byte(self) -> int:
        """Return where an element ends that nothing ends before the stream does; the array's own bracket is not part of it."""
        text = self._window.rstrip(_SPACE)
        return len(text) - (not self.closed and text.endswith(b"]") and len(text) - 1 > self._at)

    def _beginning(self, start: int, stop: int | None) -> int | None:
        """Return where the next element seems to begin; what the end of a block may cut is looked at with the next block."""
        if self._begins is None:
            return None
        end = len(self._window) if stop is None else stop
        sure = end if self._ended or stop is not None else end - _LONGEST_BEGINNING
        for found in _BEGINNING.finditer(self._window, start, end):
            if found.start() >= sure:
                return None
            before = self._window[max(found.start() - _WIDEST_SPACE - 1, 0) : found.start()]
            if self._begins(before[len(before.rstrip(_SPACE)) :], found.group(1)):
                return found.start()
        return None


def _value_end(view: memoryview) -> tuple[int | None, bool]:
    """Return where the JSON value ends that a text begins with, and whether more text would change nothing.

    0 stands for what is not JSON, None for a value that goes on, or (surely) nests too deep for msgspec.
    """
    try:
        return len(memoryview(_one_value(view))), True
    except msgspec.DecodeError as error:
        said = str(error)
    except RecursionError:
        return None, True
    if found := _TRAILING.search(said):
        stop = int(found.group(1)) - 1  # it counts the byte that should not be there
        return (stop if view[stop - 1] not in _SPACE else len(bytes(view[:stop]).rstrip(_SPACE))), True
    place = _POSITION.search(said)
    if place is None:  # it ends before it should
        return None, False
    return 0, int(place.group(1)) < len(view) - _CUT_TOKEN
