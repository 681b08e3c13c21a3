"""Where a JSON value ends, told by its quotes and brackets alone."""

from __future__ import annotations

import re

import numpy as np

_CHUNK_BYTES = 128 << 10
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRUCTURE = b'"\\{}[]'
_QUOTE = ord('"')
# A string must be followed by what JSON allows there: a missing quote is then noticed at the next string, not at the end.
_TOKEN = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"(?=\s*[:,\]}])|[{}\[\]"]')
_OPENS = {ord("}"): ord("{"), ord("]"): ord("[")}
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"{[")] = 1
_STEPS[list(b"}]")] = -1


class Nesting:
    """Follows a value through a stream in which nothing is held; it begins with a bracket, a quote, or the letters of a word."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._word: bool | None = None

    def feed(self, data: memoryview) -> int | None:
        """Return how many of these bytes belong to the value; None when all do and it goes on."""
        for start in range(0, len(data), _CHUNK_BYTES):
            stop = self._follow(bytes(data[start : start + _CHUNK_BYTES]))
            if stop is not None:
                return start + stop
        return None

    def _follow(self, data: bytes) -> int | None:
        if self._word is None:
            self._word = data[0] not in b'{["'
        if self._word:
            found = re.search(rb'[\s,\[\]{}"]', data)
            return found.start() if found else None
        if len(data.translate(None, _STRUCTURE)) == len(
            data
        ):  # the inside of a text, as most of what is endless
            self._escaped = False
            return None
        if self._escaped:
            data = b"_" + data[1:]
        if b"\\" in data:
            data = _ESCAPE.sub(b"__", data)
        self._escaped = data.endswith(b"\\")
        codes = np.frombuffer(data, np.uint8)
        quotes = codes == _QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ self._in_string
        steps = _STEPS[codes]
        steps[inside] = 0
        depth = np.cumsum(steps, dtype=np.int64) + self._depth
        ends = np.flatnonzero((depth <= 0) & ~inside & (quotes | (steps < 0)))
        self._depth, self._in_string = int(depth[-1]), bool(inside[-1])
        return int(ends[0]) + 1 if len(ends) else None


def brackets_end(text: bytes, start: int, end: int) -> int | None:
    """Return where the array or object that begins at `start` ends, or None when its brackets or quotes do not match."""
    depth = bytearray()
    for token in _TOKEN.finditer(text, start, end):
        byte = text[token.start()]
        if byte == _QUOTE:
            if token.end() - token.start() == 1:
                return None
        elif byte in b"{[":
            depth.append(byte)
        elif depth.pop() != _OPENS[byte]:
            return None
        elif not depth:
            return token.end()
    return None
