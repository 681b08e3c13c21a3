"""Where turns begin in token ids: the headers that a chat template writes, read off made-up conversations.

Only headers with a control token count (`<|im_start|>user`), since a text may spell any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from sftdata.batches import Bool, Int32, Int64
from sftdata.masks.markers import match_ids
from sftdata.render.control_tokens import ANSWER, CALLS, RESULT, SYSTEM, USER, common_prefix, find_stops, gaps
from sftdata.render.template import ChatTemplate, Message, TemplateRefusal
from sftdata.vocabulary import Vocabulary

_THINKING = re.compile(r"</?think(?:ing)?>")  # opened for the model, or closed
_CONVERSATIONS: tuple[list[Message], ...] = (
    [SYSTEM, USER, ANSWER, USER, ANSWER],
    [USER, ANSWER, USER, ANSWER],
    *([USER, call, RESULT, ANSWER] for call in CALLS),
)


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """The turns in token rows laid end to end, in order.

    Attributes:
        start, body: int64[K], first token of each header, and the first one after it, whitespace included.
        stop: int64[K], where the next turn, or the row, ends it.
        answer, system: bool[K], turns of the model, and system prompts.
    """

    start: Int64
    body: Int64
    stop: Int64
    answer: Bool
    system: Bool


@dataclass(frozen=True, slots=True)
class Headers:
    """How turns begin and end, in ids.

    Attributes:
        roles: of each header, by its ids, without outer whitespace.
        ends: tokens that end a turn, or generation.
        written: the control tokens that the chat template writes behind the first message.
    """

    roles: dict[tuple[int, ...], str] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()

    def turns(self, input_ids: Int32, offsets: Int64) -> Turns:
        """Find the turns of rows, int32[T] ids end to end with int64[N + 1] offsets."""
        none = np.zeros(0, np.int64)
        found = [match_ids(input_ids, offsets, pattern) for pattern in self.roles]
        start, counts = np.concatenate([none, *found]), [0, *map(len, found)]
        size = np.repeat([0, *map(len, self.roles)], counts)
        role = np.repeat(["", *self.roles.values()], counts)
        order = np.lexsort((-size, start))
        order = order[np.diff(start[order], prepend=-1) > 0]  # the longest of those that begin at one token
        start, size, role = start[order], size[order], role[order]
        end = offsets[np.searchsorted(offsets, start, side="right")]
        stop = np.minimum(np.append(start[1:], len(input_ids))[: len(start)], end)
        return Turns(start, start + size, stop, role == "assistant", role == "system")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def find_headers(vocabulary: Vocabulary, tokenizer: Tokenizer) -> Headers:
    """Return the headers of a tokenizer's chat template; none where it has none, or they are plain text."""
    if vocabulary.chat_template is None or not vocabulary.added:
        return Headers(ends=vocabulary.stop_ids)
    template = ChatTemplate(vocabulary.chat_template, vocabulary.named)
    by_text = {text: index for index, text in vocabulary.added.items()}
    known = [vocabulary.text_of([index]) for index in sorted(vocabulary.stop_ids)]
    ends = {by_text[stop] for stop in find_stops(template, known, by_text) if stop in by_text}
    pattern = re.compile(f"({'|'.join(map(re.escape, sorted(by_text, key=len, reverse=True)))})")
    inside = [gap.text for messages in _CONVERSATIONS for gap in gaps(template, messages) if gap.before >= 0]
    written = frozenset(by_text[token] for text in inside for token in pattern.findall(text))
    roles = dict[tuple[int, ...], str]()
    for role, text, start, stop in _headers(template, pattern):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        placed = zip(encoding.ids, encoding.offsets, strict=True)
        ids = tuple(index for index, (first, last) in placed if start <= first < min(stop, last))
        if vocabulary.added.keys() & {*ids}:
            roles.setdefault(ids, role)
        elif role == "assistant":  # else an answer would count to the turn before it
            return Headers(ends=vocabulary.stop_ids, written=written)
    return Headers(roles, vocabulary.stop_ids | ends, written)


def _headers(template: ChatTemplate, pattern: re.Pattern[str]) -> Iterator[tuple[str, str, int, int]]:
    """Yield the role of each turn that follows another, a text, and where in it the header of the turn is."""
    bos = template.special_tokens.get("bos_token", "")
    for messages in _CONVERSATIONS:
        text = ""
        for gap in gaps(template, messages):
            if gap.after is None:
                break
            message, at = messages[gap.after], len(text)
            text += gap.text + (str(message["content"]) or "x")
            if gap.before < 0 and message is not SYSTEM:
                continue  # what the template writes before all else is in that header
            alone = gaps(template, messages[: gap.before + 1])[-1:] if gap.before >= 0 else []
            closing = next((one.text for one in alone if one.before == gap.before), "")
            pieces, ending = pattern.split(gap.text), pattern.split(closing)
            header = "".join(pieces[common_prefix(pieces, ending) :]).lstrip()
            at += len(gap.text) - len(header)
            header = _THINKING.split(header.partition("\n")[0])[0].rstrip()
            if pattern.search(behind := header.removeprefix(bos)):
                header, at = behind, at + len(header) - len(behind)
            if message["role"] == "assistant":
                header = _prompted(template, messages[: gap.after], header, pattern)
            yield str(message["role"]), text, at, at + len(header)


def _prompted(template: ChatTemplate, messages: list[Message], header: str, pattern: re.Pattern[str]) -> str:
    """Return as much of an answer's header as the generation prompt ends in; all, where it goes on."""
    try:
        prompt = template.render(messages, add_generation_prompt=True).rstrip()
    except TemplateRefusal:
        return header
    parts = (header[:stop].rstrip() for stop in range(len(header), 0, -1))
    return next((part for part in parts if pattern.search(part) and prompt.endswith(part)), header)
