"""Which tokens are control tokens when someone types them into a message: the guarded ones.

A tokenizer matches its added tokens before it does anything else, wherever they stand. Of these

- *guarded* are the tokens marked `special: true`, those that stop generation, and whatever opens or ends a turn in this chat
  template, however it is marked (DeepSeek's `<｜User｜>` and `<｜Assistant｜>` are `special: false`). Typed into a message they
  are encoded as the text that they spell, so that no data ends a turn or forges one. `--trust-control-tokens` turns this off.
- All others are *text* like any other (`<think>`, `</think>`, `<tool_call>` of Qwen, GLM, Nemotron): inference encodes them as
  one id wherever they stand, and so do we, in messages of every role. Tags inside a turn never count as opening or ending it,
  even where the template writes one between a header and an answer (Qwen3), or names them in a system text.

What opens and ends turns is read off plain renders of the template: of the tokens it writes around a message, those on the
outside, and those that stand in the headers of several roles. What it writes for reasoning or around calls stands inside.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from sftdata.render.parting import common_prefix
from sftdata.render.probes import ANSWER, CALLS, RESULT, SYSTEM, USER, Frame, Message, frames
from sftdata.render.proof import any_of
from sftdata.render.template import ChatTemplate

_PLAIN: tuple[list[Message], ...] = (
    [SYSTEM, USER, ANSWER, USER, ANSWER],
    [USER, ANSWER, USER, ANSWER],
    [USER, ANSWER, SYSTEM, USER, ANSWER],
)
_ANSWERED: tuple[list[Message], ...] = (
    *([USER, call, RESULT, ANSWER] for call in CALLS),
    [USER, ANSWER, RESULT, ANSWER],
)
_ROLES = {"system", "user", "assistant"}
_NUMBER = re.compile(r"\d+")
_TAG = re.compile(r"([<\[])(/?)(\w[^\s<>\[\]|]*)([>\]])")


def guarded_tokens(
    template: ChatTemplate, special: Iterable[str], plain: Iterable[str], stops: Iterable[str]
) -> tuple[str, ...]:
    """Return the tokens that data must not become, by the rule above.

    Args:
        template: the chat template in use.
        special: added tokens that are marked `special: true`.
        plain: added tokens that are not.
        stops: what ends generation and turns.
    """
    plain = tuple(plain)
    turns = turn_tokens(template, (*special, *plain)) | set(stops)
    return (*special, *(token for token in plain if token in turns))


def describe_tokens(guarded: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Say in a sentence each which added tokens stay text when a message spells them, and which count there.

    >>> for sentence in describe_tokens(["<|im_end|>"], ["<think>", "</think>"]):
    ...     print(sentence)
    Typed into a message, these stay text: <|im_end|>.
    Typed into a message, these are encoded as one id: <think>, </think>.
    """
    guarded = tuple(token for token in guarded if token.strip())
    others = tuple(token for token in plain if token.strip() and token not in guarded)
    lists = (("stay text", guarded), ("are encoded as one id", others))
    return [f"Typed into a message, these {what}: {_listed(tokens)}." for what, tokens in lists if tokens]


def _listed(tokens: Iterable[str]) -> str:
    """List tokens; of those that differ by a number only, the first and how many."""
    groups: dict[str, list[str]] = defaultdict(list)
    for token in tokens:
        groups[_NUMBER.sub("#", token)].append(token)
    named = (
        own if len(own) < 4 else [f"{own[0]} and {len(own) - 1} more of its kind"] for own in groups.values()
    )
    return ", ".join(name for names in named for name in names)


def turn_tokens(template: ChatTemplate, tokens: Iterable[str]) -> set[str]:
    """Return those of the tokens that open or end a turn of `template`, by the rule above."""
    known = {token for token in tokens if token.strip()}
    pattern = any_of(known)
    if pattern is None:
        return set()
    found: set[str] = set()
    headers: dict[str, set[str]] = defaultdict(set)
    for messages in (*_PLAIN, *_ANSWERED):
        roles = [message["role"] for message in messages]
        for frame in frames(template, messages):
            # Before a tool's turn the system text may name tags, and calls may be opened by one.
            if messages in _ANSWERED and "tool" not in (roles[frame.before], roles[frame.after or 0]):
                continue
            ending, opening = _split(template, messages, frame, pattern)
            opened = "user" if frame.before < 0 or frame.after is None else roles[frame.after]
            found |= {token for token in ending[-1:] if not _inside(token, roles[frame.before], known)}
            found |= {token for token in opening[:1] if not _inside(token, opened, known)}
            for token in opening if frame.before >= 0 else ():
                headers[token].add(opened)
    return found | {token for token, of in headers.items() if len(of & _ROLES) > 1}


def _split(
    template: ChatTemplate, messages: list[Message], frame: Frame, pattern: re.Pattern[str]
) -> tuple[list[str], list[str]]:
    """Return the tokens of a frame that end the message before it, and those that open the message behind it.

    What ends a message stands there, too, when it is the last one.
    """
    tokens = pattern.findall(frame.text)
    if frame.before < 0:
        return [], tokens[1:] if tokens[:1] == [template.special_tokens.get("bos_token")] else tokens
    alone = frames(template, messages[: frame.before + 1])
    closing = pattern.findall(alone[-1].text) if alone and alone[-1].before == frame.before else []
    shared = common_prefix(tokens, closing)
    return tokens[:shared], tokens[shared:]


def _inside(token: str, role: str, known: set[str]) -> bool:
    """Say whether a token is a tag with a counterpart (`<think>`, `</think>`) in a turn of the model or a tool."""
    tag = _TAG.fullmatch(token)
    if tag is None or role in ("system", "user"):
        return False
    return f"{tag[1]}{'' if tag[2] else '/'}{tag[3]}{tag[4]}" in known
