"""The control tokens of a chat template: which end a turn, and which are guarded when a message spells them.

Both are read off plain renders of made-up conversations: what the template writes around their data.

A tokenizer matches its added tokens before it does anything else, wherever they are. Of these

- *guarded* are the tokens marked `special: true`, those that stop generation, and whatever opens or ends a
  turn in this chat template, however it is marked (DeepSeek's `<｜User｜>` and `<｜Assistant｜>` are
  `special: false`). Typed into a message they are encoded as the text that they spell, so that no data ends
  a turn or forges one. `--trust-control-tokens` turns this off.
- All others are *text* like any other (`<think>`, `</think>`, `<tool_call>` of Qwen, GLM, Nemotron):
  inference encodes them as one id wherever they are, and so do we, in messages of every role. Tags inside a
  turn never count as opening or ending it, even where the template writes one between a header and an answer
  (Qwen3), or names them in a system text.

Of the tokens that a template writes around a message, the outermost open and end turns, and so do those in
the headers of several roles. What it writes for reasoning or around calls is inside.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sftdata.render.proof import any_of, strip_sentinels, wrap_messages
from sftdata.render.template import CONTROL_SHAPE, ChatTemplate, Message, TemplateRefusal

# ------------------------------------------------ made-up conversations, and the gaps between their data

SYSTEM: Message = {"role": "system", "content": "S"}
USER: Message = {"role": "user", "content": "A"}
ANSWER: Message = {"role": "assistant", "content": "B"}
RESULT: Message = {"role": "tool", "content": "C", "name": "f", "tool_call_id": "abcdefghi"}
_TOOL: Message = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def _calling(arguments: object) -> Message:
    """Return an assistant message that calls a tool."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


# Templates take the arguments of a call as an object or as its JSON text.
CALLS = (_calling({"x": "y"}), _calling('{"x": "y"}'))


@dataclass(frozen=True, slots=True)
class Gap:
    """What a template writes between the data of two messages, or after that of the last.

    Attributes:
        text: the characters.
        before: index of the message whose data precedes them; -1 for none.
        after: index of the message whose data follows them; None for none.
    """

    text: str
    before: int
    after: int | None


def gaps(template: ChatTemplate, messages: list[Message]) -> list[Gap]:
    """Render a conversation and cut its messages' data out; no gaps where the template refuses it."""
    wrapped = wrap_messages(messages, lambda _: False)
    for tools in (None, [_TOOL]):
        try:
            traced = strip_sentinels(template.render(wrapped, tools), {})
        except TemplateRefusal:
            continue
        found, at, before = [], 0, -1
        for sentinel in traced.sentinels:
            if sentinel.message != before:
                found.append(Gap(traced.text[at : sentinel.position], before, sentinel.message))
            before, at = sentinel.message, sentinel.position
        return [*found, Gap(traced.text[at:], before, None)]
    return []


# ------------------------------------------------------------------------------------- what ends a turn

_BRACKETED = re.compile(r"<[^\s<>]+>|[\[\]][^\s\[\]]+[\[\]]")


def find_stops(
    template: ChatTemplate, stop_tokens: Sequence[str], control_tokens: Iterable[str]
) -> tuple[str, ...]:
    """Return the strings that end a turn of `template`.

    Where the template writes one of the tokenizer's stop tokens after an answer, that ends the turn. Where it
    does not, the model must write the whole run of control tokens that follows (Command R7B:
    `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`) up to the header of the next message, and the last of them ends
    the turn. Without such a run the first token of that header does (GLM-4: `<|user|>`). After a tool call
    the brackets of the call itself are skipped, and a token that the template also writes before it only
    opens the next message.
    """
    known = [*control_tokens, *stop_tokens]
    shape = re.compile(
        "|".join(
            [*sorted(map(re.escape, known), key=lambda token: (-len(token), token)), CONTROL_SHAPE.pattern]
        )
    )
    opening = _first_token(template, shape)
    stops = list(stop_tokens)
    for messages in ([USER, ANSWER], [USER, ANSWER, USER, ANSWER]):
        _, after = _around_second(template, messages)
        stops += (
            []
            if any(stop in after for stop in stops)
            else _last_of_run(template, messages, after, shape, opening)
        )
    for call in CALLS:
        for messages in ([USER, call], [USER, call, RESULT]):
            before, after = _around_second(template, messages)
            run = (
                []
                if any(stop in after for stop in stops)
                else _last_of_run(template, messages, after, CONTROL_SHAPE, opening)
            )
            stops += [stop for stop in run if stop not in before]
    return tuple(stop for stop in dict.fromkeys(stops) if stop.strip())


def find_call_end(template: ChatTemplate, stops: Sequence[str]) -> str | None:
    """Return the first of `stops` that the template writes after an answered tool call; None for none."""
    for call in CALLS:
        _, after = _around_second(template, [USER, call, RESULT])
        found = min((stop for stop in stops if stop in after), key=after.index, default=None)
        if found is not None:
            return found
    return None


def find_unknown_tokens(template: ChatTemplate, known: Iterable[str]) -> tuple[str, ...]:
    """Return the tokens of `template` that neither tokenizer nor look reveals: `[|end|]`, `<sep>`, `[e~[`.

    Where no known control token follows an answer, what is in brackets right after every answer must be one;
    and so must all that is written around messages in the same brackets (`[|user|]`).
    """
    shape = re.compile(
        "|".join([*map(re.escape, sorted(known, key=len, reverse=True)), CONTROL_SHAPE.pattern])
    )
    found = [*gaps(template, [USER, ANSWER, USER, ANSWER]), *gaps(template, [USER, ANSWER])]
    after = [gap.text for gap in found if gap.before in (1, 3)]
    ends = {"".join(_BRACKETED.findall(text)[:1] if _BRACKETED.match(text) else []) for text in after}
    if len(ends) != 1 or "" in ends or any(shape.search(text) for text in after):
        return ()
    (end,) = ends
    tokens = [token for gap in found for token in _BRACKETED.findall(gap.text)]
    kin = [] if end[1].isalnum() else [token for token in tokens if token[:2] == end[:2]]
    return tuple(dict.fromkeys([end, *kin]))


def _around_second(template: ChatTemplate, messages: list[Message]) -> tuple[str, str]:
    """Return the text before the second message's data, and from its end to the next; "" where refused."""
    found = gaps(template, messages)
    before = "".join(gap.text for gap in found if gap.before < 1)
    after = next((gap.text for gap in found if gap.before == 1), "")
    return before, after


def _last_of_run(
    template: ChatTemplate, messages: list[Message], after: str, shape: re.Pattern[str], opening: str | None
) -> list[str]:
    """Return the last of the run of control tokens after the second message, without the next header."""
    run = _run(after, shape)
    # What the template writes there too when nothing follows is no header.
    alone = _run(_around_second(template, messages[:2])[1], shape)
    ending = run[: common_prefix(run, alone) or None]
    if opening in ending[1:]:
        ending = ending[: ending.index(opening, 1)]
    return ending[-1:]


def _run(text: str, shape: re.Pattern[str]) -> list[str]:
    """Return the first control token of a text and those that follow it without a gap."""
    found: list[str] = []
    at = -1
    for match in shape.finditer(text):
        if found and match.start() != at:
            break
        found.append(match[0])
        at = match.end()
    return found


def _first_token(template: ChatTemplate, shape: re.Pattern[str]) -> str | None:
    """Return the control token that opens a conversation, after its BOS."""
    bos = template.special_tokens.get("bos_token")
    for messages in ([SYSTEM, USER], [USER]):
        found = gaps(template, messages)
        tokens = [match[0] for match in shape.finditer(found[0].text) if match[0] != bos] if found else []
        if tokens:
            return tokens[0]
    return None


# ------------------------------------------------------------------------- guarded: data must not become them

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
    """List the added tokens that stay text when a message spells them, and those that count; a sentence each.

    >>> for sentence in describe_tokens(["<|im_end|>"], ["<think>", "</think>"]):
    ...     print(sentence)
    Typed into a message, these stay text: <|im_end|>.
    Typed into a message, these are encoded as one id: <think>, </think>.
    """
    guarded = tuple(token for token in guarded if token.strip())
    others = tuple(token for token in plain if token.strip() and token not in guarded)
    lists = (("stay text", guarded), ("are encoded as one id", others))
    return [f"Typed into a message, these {verb}: {_listed(tokens)}." for verb, tokens in lists if tokens]


def _listed(tokens: Iterable[str]) -> str:
    """List tokens; of those that differ only by a number, the first and how many more."""
    groups: dict[str, list[str]] = defaultdict(list)
    for token in tokens:
        groups[_NUMBER.sub("#", token)].append(token)
    named = (
        group if len(group) < 4 else [f"{group[0]} and {len(group) - 1} more of its kind"]
        for group in groups.values()
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
        roles = [str(message["role"]) for message in messages]
        for gap in gaps(template, messages):
            # Before a tool's turn the system text may name tags, and calls may be opened by one.
            if messages in _ANSWERED and "tool" not in (roles[gap.before], roles[gap.after or 0]):
                continue
            ending, opening = _split(template, messages, gap, pattern)
            opened = "user" if gap.before < 0 or gap.after is None else roles[gap.after]
            found |= {token for token in ending[-1:] if not _inside(token, roles[gap.before], known)}
            found |= {token for token in opening[:1] if not _inside(token, opened, known)}
            for token in opening if gap.before >= 0 else ():
                headers[token].add(opened)
    return found | {token for token, of in headers.items() if len(of & _ROLES) > 1}


def _split(
    template: ChatTemplate, messages: list[Message], gap: Gap, pattern: re.Pattern[str]
) -> tuple[list[str], list[str]]:
    """Return the tokens of a gap that end the message before it, and those that open the message after it.

    What ends a message is also written when it is the last one.
    """
    tokens = pattern.findall(gap.text)
    if gap.before < 0:
        return [], tokens[1:] if tokens[:1] == [template.special_tokens.get("bos_token")] else tokens
    alone = gaps(template, messages[: gap.before + 1])
    closing = pattern.findall(alone[-1].text) if alone and alone[-1].before == gap.before else []
    shared = common_prefix(tokens, closing)
    return tokens[:shared], tokens[shared:]


def _inside(token: str, role: str, known: set[str]) -> bool:
    """Return whether a token is a paired tag (`<think>`, `</think>`) in a turn of the model or a tool."""
    tag = _TAG.fullmatch(token)
    if tag is None or role in ("system", "user"):
        return False
    return f"{tag[1]}{'' if tag[2] else '/'}{tag[3]}{tag[4]}" in known


def common_prefix(one: Sequence[str], two: Sequence[str]) -> int:
    """Return the length of the common prefix: characters of texts, items of lists."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
