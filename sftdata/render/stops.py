"""Which strings end a turn: the tokenizer's stop tokens, and what the chat template itself writes after an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sftdata.render.parting import common_prefix
from sftdata.render.probes import ANSWER, CALLS, RESULT, SYSTEM, USER, Message, frames
from sftdata.render.template import CONTROL_SHAPE, ChatTemplate

_BRACKETED = re.compile(r"<[^\s<>]+>|[\[\]][^\s\[\]]+[\[\]]")


def find_stops(
    template: ChatTemplate, stop_tokens: Sequence[str], control_tokens: Iterable[str]
) -> tuple[str, ...]:
    """Return the strings that end a turn of `template`.

    Where the template writes one of the tokenizer's stop tokens after an answer, that ends the turn. Where it does not, the model
    must write the whole run of control tokens that follows (Command R7B: `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`), as far as it
    stands before the header of the next message, and the last of them ends the turn. Without such a run the first token of
    that header does (GLM-4: `<|user|>`). After a tool call the brackets of the call itself are passed over, and a token that
    stands before it too only opens the next message.
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
    """Return which of `stops` the template writes first behind a tool call that is answered; None where it writes none."""
    for call in CALLS:
        _, after = _around_second(template, [USER, call, RESULT])
        found = min((stop for stop in stops if stop in after), key=after.index, default=None)
        if found is not None:
            return found
    return None


def find_unknown_tokens(template: ChatTemplate, known: Iterable[str]) -> tuple[str, ...]:
    """Return the tokens of `template` that neither a tokenizer nor their look tells: `[|end|]`, `<sep>`, `[e~[`.

    Where no known control token follows an answer, what stands in brackets right behind every answer must be one; and with it all
    that is written around messages in the same brackets (`[|user|]`).
    """
    shape = re.compile(
        "|".join([*map(re.escape, sorted(known, key=len, reverse=True)), CONTROL_SHAPE.pattern])
    )
    found = [*frames(template, [USER, ANSWER, USER, ANSWER]), *frames(template, [USER, ANSWER])]
    behind = [frame.text for frame in found if frame.before in (1, 3)]
    ends = {"".join(_BRACKETED.findall(text)[:1] if _BRACKETED.match(text) else []) for text in behind}
    if len(ends) != 1 or "" in ends or any(shape.search(text) for text in behind):
        return ()
    (end,) = ends
    tokens = [token for frame in found for token in _BRACKETED.findall(frame.text)]
    kin = [] if end[1].isalnum() else [token for token in tokens if token[:2] == end[:2]]
    return tuple(dict.fromkeys([end, *kin]))


def _around_second(template: ChatTemplate, messages: list[Message]) -> tuple[str, str]:
    """Return the text before the data of the second message and the text from there to the next data; "" where refused."""
    found = frames(template, messages)
    before = "".join(frame.text for frame in found if frame.before < 1)
    after = next((frame.text for frame in found if frame.before == 1), "")
    return before, after


def _last_of_run(
    template: ChatTemplate, messages: list[Message], after: str, shape: re.Pattern[str], opening: str | None
) -> list[str]:
    """Return the last of the control tokens that stand side by side behind the second message, the next header left out."""
    run = _run(after, shape)
    alone = _run(_around_second(template, messages[:2])[1], shape)
    own = run[: common_prefix(run, alone) or None]
    if opening in own[1:]:
        own = own[: own.index(opening, 1)]
    return own[-1:]


def _run(text: str, shape: re.Pattern[str]) -> list[str]:
    """Return the first control token of a text and those that follow it side by side."""
    found: list[str] = []
    at = -1
    for match in shape.finditer(text):
        if found and match.start() != at:
            break
        found.append(match[0])
        at = match.end()
    return found


def _first_token(template: ChatTemplate, shape: re.Pattern[str]) -> str | None:
    """Return the control token that opens a conversation, behind its BOS."""
    bos = template.special_tokens.get("bos_token")
    for messages in ([SYSTEM, USER], [USER]):
        found = frames(template, messages)
        tokens = [match[0] for match in shape.finditer(found[0].text) if match[0] != bos] if found else []
        if tokens:
            return tokens[0]
    return None
