"""JSON rows: one text to one row, or the fault that says why not."""

from __future__ import annotations

import re
from contextlib import suppress

import msgspec

from sftdata.errors import Fault

# ----------------------------------------------------------------------------------------- one text, one row

JsonObject = dict[str, object]
"""An object of plain JSON data, such as a row or a message."""

MAX_DEPTH = 256  # below Python's recursion limit wherever the call comes from, so every process decides alike

_decode = msgspec.json.Decoder().decode
POSITION = re.compile(r"\(byte (\d+)\)")
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
    if place := POSITION.search(str(error)):
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
