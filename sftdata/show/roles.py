"""Who speaks where, for the gutter of a view: read from the headers that the chat template wrote as control tokens.

Only control tokens count, so text that spells a header is never taken for one. Roles decide no colour: labels do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "inst": "user", "assistant": "assistant",
    "/inst": "assistant", "model": "assistant", "bot": "assistant", "gpt": "assistant", "chatbot": "assistant", "ai": "assistant",
    "tool": "tool", "tools": "tool", "observation": "tool", "ipython": "tool", "function": "tool",
    "tool_results": "tool", "system_prompt": "system", "/tool_results": "assistant",
}  # fmt: skip
_NAME = re.compile(r"/?[a-z]+(?:_[a-z]+)*")
_BRACKETS = re.compile(r"^[^\w/]+|\W+$")
_SHOWN = 9  # characters of a role that the template names otherwise


class Spoken(Protocol):
    """What a piece of a view tells about who speaks."""

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def trained(self) -> bool: ...  # noqa: D102

    @property
    def special(self) -> bool: ...  # noqa: D102


class Turn(NamedTuple):
    """A stretch of pieces under one role.

    Attributes:
        role: of who speaks; `prompt`, `answer` or `text` where no header says it.
        start, stop: half-open, counted in pieces.
    """

    role: str
    start: int
    stop: int


def find_turns(pieces: Sequence[Spoken]) -> list[Turn]:
    """Return the turns of a document, end to end; the first begins at its first piece."""
    if not pieces:
        return []
    found = list(_headers(pieces)) or list(_stretches(pieces))
    first, role = found[0]
    if all(piece.special or not piece.text.strip() for piece in pieces[:first]):  # a BOS
        found[0] = (0, role)
    else:
        found.insert(0, (0, "prompt"))
    return [Turn(role, start, stop) for (start, role), (stop, _) in pairwise([*found, (len(pieces), "")])]


def _headers(pieces: Sequence[Spoken]) -> Iterator[tuple[int, str]]:
    """Yield (piece, role) of each control token that is a header, or that begins one: `<|user|>`, `<|im_start|>user`."""
    openers: set[str] = set()
    for index, piece in enumerate(pieces):
        if not piece.special:
            continue
        own = _ROLES.get(_word(piece.text))
        if own:
            yield index, own
            continue
        name = _name_after(pieces, index + 1)
        if name in _ROLES:
            openers.add(piece.text)
            yield index, _ROLES[name]
        elif name and piece.text in openers:  # a role of the user's own
            yield index, name[:_SHOWN]


def _word(token: str) -> str:
    """Return the name within a control token.

    >>> _word("<|user|>"), _word("[/INST]"), _word("<｜Assistant｜>"), _word("<|USER_TOKEN|>")
    ('user', '/inst', 'assistant', 'user')
    """
    return _BRACKETS.sub("", token.lower()).removesuffix("_token")


def _name_after(pieces: Sequence[Spoken], index: int) -> str:
    """Return the rest of the line after a control token, as far as the next one."""
    text = ""
    while index < len(pieces) and not pieces[index].special and "\n" not in text and len(text) <= 2 * _SHOWN:
        text += pieces[index].text
        index += 1
    line = text.partition("\n")[0].strip().lower()
    return line if _NAME.fullmatch(line) else ""


def _stretches(pieces: Sequence[Spoken]) -> Iterator[tuple[int, str]]:
    """Yield prompts and answers by what is trained; a text that is trained from its first or second piece on is a text."""
    changes = [i for i, piece in enumerate(pieces) if not i or piece.trained != pieces[i - 1].trained]
    if len(changes) <= 2 and changes[-1] <= 1 and pieces[-1].trained:
        yield 0, "text"
        return
    for index in changes:
        yield index, "answer" if pieces[index].trained else "prompt"
