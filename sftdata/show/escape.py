"""Make visible what would act instead of show: terminal escapes, carriage returns, direction overrides, invisible characters."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"  # invisible by nature, and part of Persian words and of emoji
_ACTING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_SUSPECT = re.compile(r"[^\x20-\x7e\n\u00c0-\u024f\u4e00-\u9fff]")


def visible(text: str) -> str:
    r"""Return text that does nothing but show, newlines aside.

    >>> visible("a\x1b[31mred\x07 \u202egnol\r\n")
    'a␛[31mred␇ \\u202egnol␍\n'
    """
    return _SUSPECT.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    if unicodedata.category(character) not in _ACTING or character in _JOINERS:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
