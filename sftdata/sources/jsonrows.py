"""JSON rows: one text to one row or the fault that says why not, and sources whose rows are not one a line.

Those hold an array of rows, or pretty-printed objects one after another. An element that is valid JSON ends
where msgspec says. One that breaks a rule inside, such as NaN, ends with its brackets and is one reject.
Where quotes or brackets do not match, it is unclear where the next element begins: the file is refused, with
the place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import msgspec
import numpy as np

from sftdata.batches import Reject, RowBatch
from sftdata.errors import DataError, Fault
from sftdata.sources.borders import Boundaries, grain_of
from sftdata.sources.chunks import (
    SHOWN_BYTES,
    Chunk,
    RowBoundaries,
    RowCollector,
    Source,
    too_long,
)
from sftdata.sources.streams import BLOCK_BYTES, RawCount, read_all, read_range, skip_bytes

# ----------------------------------------------------------------------------------------- one text, one row

JsonObject = dict[str, object]
"""An object of plain JSON data, such as a row or a message."""

MAX_DEPTH = 256  # below Python's recursion limit wherever the call comes from, so every process decides alike

_decode = msgspec.json.Decoder().decode
_POSITION = re.compile(r"\(byte (\d+)\)")
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}",
    re.DOTALL,
)
_FIX = "fix the row, here or in rejects.jsonl, and feed it in again."
_KINDS = {
    type(None): "null",
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}

ENVELOPE = frozenset({"file", "line", "record", "byte_offset", "code", "reason", "fix", "row"})
_OLD_ENVELOPE = ENVELOPE - {"record"}  # of sets made before records were numbered apart from lines
UNPARSED = frozenset(
    {"invalid-json", "invalid-utf8", "not-an-object", "too-deep", "lone-surrogate", "line-too-long"}
)


def kind_of(value: object) -> str:
    """Name a JSON value in words.

    >>> kind_of([]), kind_of(None)
    ('an array', 'null')
    """
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def from_json(value: object) -> object:
    """Return a value that may be written as JSON inside a string; one that is not JSON is returned as is."""
    if isinstance(value, str):
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _decode(value)
    return value


def parse_row(line: bytes) -> JsonObject | str | Fault:
    """Parse one JSON object; unwrap a line of `rejects.jsonl` to the row inside.

    A bare list of messages is a conversation.

    >>> parse_row(b'{"text": "hi"}')
    {'text': 'hi'}
    >>> parse_row(b'[1]').code
    'not-an-object'
    """
    try:
        row = _decode(line)
    except RecursionError:
        return _too_deep()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _explain(line, error)
    if type(row) is list and _is_conversation(row):
        row = {"messages": row}
    if type(row) is not dict:
        what = f"expected a JSON object, found {kind_of(row)}."
        return Fault("not-an-object", what, 'write it as an object: {"text": ...}.')
    # Counting brackets is far cheaper than walking every row, and a row with few of them cannot be deep.
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        return _too_deep()
    return _unwrap(row) if "byte_offset" in row and row.keys() in (ENVELOPE, _OLD_ENVELOPE) else row


def _is_conversation(row: list[object]) -> bool:
    return bool(row) and all(
        isinstance(message, dict) and ("role" in message or "from" in message) for message in row
    )


def _unwrap(envelope: JsonObject) -> JsonObject | str | Fault:
    """Return the row inside a line of `rejects.jsonl`; one that was never parsed is parsed now."""
    row = envelope["row"]
    if isinstance(row, dict):
        return row
    if isinstance(row, str):
        return parse_row(row.encode()) if envelope["code"] in UNPARSED else row
    return Fault("not-an-object", f"the reject's row is {kind_of(row)}, not an object or a line.", _FIX)


def _explain(line: bytes, error: Exception) -> Fault:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as wrong:
        where = f"byte 0x{line[wrong.start]:02x} at byte {wrong.start} of the row"
        fix = "convert the file to UTF-8, as with iconv -f latin1 -t utf-8."
        return Fault("invalid-utf8", f"{where} is not UTF-8 ({wrong.reason}).", fix)
    if escape := _LONE_SURROGATE.search(line):
        half = f"half a surrogate pair ({escape.group()[:6].decode()}) at byte {escape.start()}"
        fix = "write the whole pair, or \\ufffd in its place."
        return Fault("lone-surrogate", f"{half} is not a character.", fix)
    near = ""
    if place := _POSITION.search(str(error)):
        at = int(place.group(1))
        near = f", near {line[max(at - 10, 0) : at + 20].decode('utf-8', 'replace')!r}"
    return Fault("invalid-json", f"{str(error).rstrip('.')}{near}.", _FIX)


def _too_deep() -> Fault:
    return Fault("too-deep", f"the row nests deeper than {MAX_DEPTH} levels.", "flatten the row.")


def _depth(value: object) -> int:
    """Return the nesting depth, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner: list[object] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner.extend(child for child in children if isinstance(child, dict | list))
        level = inner
    return deepest


# ------------------------------------------------------------------------------------------ arrays of rows

_split = msgspec.json.Decoder(list[msgspec.Raw]).decode
_one_value = msgspec.json.Decoder(msgspec.Raw).decode
_SPACE = b" \t\r\n"
_SEPARATORS = re.compile(rb"[\s,]*")
_SCALAR = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[^\s,\[\]{}"]++', re.DOTALL)
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
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


def plan_array(source: Source, slice_bytes: int, max_line_bytes: int) -> RowBoundaries:
    """Find the elements of an array and note where some of them start.

    Memory: one element, or `max_line_bytes` of it.

    Raises:
        DataError: an element is damaged, and where it ends is unclear.
    """
    count = RawCount()
    blocks = skip_bytes(read_all(source, count), source.body)
    found = Elements(source.path, blocks, source.body, max_line_bytes, whole=True)
    borders = Boundaries(grain_of(slice_bytes))
    end, total = source.body, 0
    for element in found:
        borders.row(element.start, element.length, element.text, record=total)
        end = element.start + element.length
        total += 1
    for _ in blocks:  # the hash is that of the whole file
        pass
    cut = f"{source.path}: the array is never closed by ']'; the file may have been cut short."
    return count.boundaries(borders, end, total, slice_bytes, notes=() if found.closed else (cut,))


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
            return _located(text, chunk.start, _split(b"[" + text.rstrip(b", \t\r\n") + b"]"))
        blocks = iter([text])
    return iter(Elements(chunk.source.path, blocks, chunk.start, limit))


def _located(text: bytes, offset: int, values: list[msgspec.Raw]) -> Iterator[Element]:
    """Yield each value with its place, given that only separators lie between them."""
    position = 0
    for value in values:
        separators = _SEPARATORS.match(text, position)
        start = separators.end() if separators else position
        position = start + len(memoryview(value))
        yield Element(offset + start, position - start, text[start:position])


class Elements:
    """Iterate over the elements of an array, or over objects that follow each other without brackets around.

    No more is held than one element, and of one beyond the limit its beginning.

    Args:
        path: for the message.
        blocks: the stream from `offset` on, in blocks of any size; the elements do not depend on it.
        limit: a longer element is not held, bytes.
        whole: this is all of the source, the array's own brackets included.

    Attributes:
        closed: once all is read: what was opened is closed.

    Raises:
        DataError: an element is damaged, and where it ends is unclear.
    """

    def __init__(
        self, path: str, blocks: Iterator[bytes], offset: int, limit: int, *, whole: bool = False
    ) -> None:
        self.closed = True
        self._path, self._blocks, self._limit = path, iter(blocks), limit
        # window[at:] is what is held; window[0] is byte `base` of the source.
        self._window, self._base, self._at = b"", offset, 0
        self._ended = False
        if whole:
            self._skip(re.compile(rb"\s*"))
            self.closed = self._window[self._at : self._at + 1] != b"["
            self._at += not self.closed

    def __iter__(self) -> Iterator[Element]:
        while True:
            self._skip(_SEPARATORS)
            if not self._held:
                return
            first = self._window[self._at : self._at + 1]
            if first == b"]" and not self.closed:
                self._at += 1
                self._skip(re.compile(rb"\s*"))
                if self._held:
                    raise self._damage("text after the end of the array")
                self.closed = True
                return
            if first in b"]}":
                raise self._damage("a bracket that nothing opened")
            yield self._element() if first in b"{[" else self._scalar()

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
            fed = self._held  # the window will begin with what is held
            self._more()
        stop += fed
        length = self._base + stop - start
        text = head or self._window[self._at : stop]
        self._at = stop
        return Element(start, length, text[:SHOWN_BYTES] if length > self._limit else text)

    def _damage(self, wrong: str) -> DataError:
        """Return the error of an element whose end is unclear; `wrong` may name a byte of the element."""
        place = _POSITION.search(wrong)
        at = self._at + (int(place.group(1)) if place else 0)
        near = self._window[max(at - 10, 0) : at + 20].decode("utf-8", "replace")
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
    place = _POSITION.search(wrong)
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
