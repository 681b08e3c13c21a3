"""Find what the model must generate in a rendered conversation, for any chat template, linear in its turns.

A proven render (proof.py) tells who wrote each character. The span of a turn then

- starts where its generation prompt ends: after the text that `render(messages before it,
  add_generation_prompt=True)` writes after the last data before the turn. Where that prompt and the rendered
  text diverge (a prompt that opens `<think>`), it starts where they do;
- stops after the stop token that the template writes after the turn's own data.

The prompt is rendered once for each kind of transition (the kinds of the messages on both sides, and the very
text between them) and remembered, so eighty turns cost a handful of renders. A template that has
`{% generation %}` blocks gives its spans itself. What cannot be proven is a `RowError`, never a guess.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from operator import attrgetter
from typing import NamedTuple

from sftdata.batches import Conversation, Ranges
from sftdata.errors import RowError
from sftdata.render.control_tokens import common_prefix, find_call_end, find_stops, guarded_tokens
from sftdata.render.proof import ProvenRenderer, Sentinel, TracedText, any_of
from sftdata.render.shapes import ProvenRender, ShapeCache, Turn, assistant_messages
from sftdata.render.spellings import CALLS_FIX
from sftdata.render.template import (
    CONTROL_SHAPE,
    ChatTemplate,
    Message,
    TemplateRefusal,
    content_of,
    functions_of,
    message_texts,
)

_TAG = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A rendered conversation.

    Attributes:
        text: what the chat template writes.
        turns: its assistant turns, in order.
        literal: character ranges of the control tokens that data spells.
        dropped, reasoning_dropped: indices of the messages of which the template dropped a text, and of those
            of which it dropped the reasoning.
        counted: names of counters: what was put right to render the row, and what the template did not read.
        runs: how many image tokens each image token of the text stands for.
    """

    text: str
    turns: list[Turn]
    literal: Ranges
    dropped: list[int]
    reasoning_dropped: list[int]
    counted: tuple[str, ...] = ()
    runs: tuple[int, ...] = ()


class _Region(NamedTuple):
    """The stretch of a rendered text that can belong to one message: between the data before and after it.

        data before | lead: header, opening tags | own data | stop token, header of the next | data after
                 origin                      own_start  own_stop                           limit

    Attributes:
        own: sentinels of the message's own texts; empty where none of them is rendered.
        before, after: the last sentinel before them and the first after them; None at an end of the text.
        text: all that the template wrote.
    """

    own: list[Sentinel]
    before: Sentinel | None
    after: Sentinel | None
    text: str

    @classmethod
    def of(cls, traced: TracedText, index: int) -> _Region:
        """Return the region of message `index`."""
        numbers = traced.by_message.get(index, [])
        before, after = _neighbours(traced.sentinels, numbers, index)
        return cls([traced.sentinels[number] for number in numbers], before, after, traced.text)

    @property
    def origin(self) -> int:
        """Where the data before ends."""
        return self.before.position if self.before else 0

    @property
    def limit(self) -> int:
        """Where the data after begins."""
        return self.after.position if self.after else len(self.text)

    @property
    def own_start(self) -> int:
        """Where its own data begins; `limit` without any."""
        return self.own[0].position if self.own else self.limit

    @property
    def own_stop(self) -> int:
        """Where its own data ends; `limit` without any."""
        return self.own[-1].position if self.own else self.limit


class SpanFinder:
    """Render conversations with one template and find their turns.

    Args:
        template: the chat template.
        stop_tokens: strings that end generation (EOS and the generation config's).
        control_tokens: the tokenizer's added tokens that are marked `special: true`, as strings.
        plain_tokens: its other added tokens; those that open or end a turn are guarded like control tokens.
        trust_control_tokens: let control tokens inside data count as such.

    Attributes:
        guarded: tokens that are encoded as text where data spells them.
        call_end: what ends a turn that calls tools; None where the template does not tell.
        shapes: conversations rendered without running the template.
    """

    def __init__(
        self,
        template: ChatTemplate,
        stop_tokens: Sequence[str] = (),
        control_tokens: Iterable[str] = (),
        plain_tokens: Iterable[str] = (),
        trust_control_tokens: bool = False,
    ) -> None:
        control_tokens, plain_tokens = tuple(control_tokens), tuple(plain_tokens)
        self.template = template
        self.stops = find_stops(template, stop_tokens, (*control_tokens, *plain_tokens))
        self.guarded = (
            () if trust_control_tokens else guarded_tokens(template, control_tokens, plain_tokens, self.stops)
        )
        self.call_end = find_call_end(template, self.stops)
        self.shapes = ShapeCache(template, self.guarded, self._prove)
        self._stop_shape = any_of(self.stops)
        self._renderer = ProvenRenderer(template, self.guarded, plain_tokens)
        self._prompts: dict[tuple[object, ...], str | None] = {}

    def render(self, row: Conversation) -> RenderedConversation:
        """Render one conversation and find every assistant turn in it.

        Raises:
            RowError: the template refuses the row, or its spans cannot be proven.
        """
        cached = self.shapes.render(row)
        if cached is None:
            return self._render(row)[0]
        shape, text, spans = cached
        turns = [
            Turn(turn.message, *span, turn.ended, turn.diverges)
            for turn, span in zip(shape.turns, spans, strict=True)
        ]
        return RenderedConversation(text, turns, [], [], [], row.counted)

    def _prove(self, row: Conversation) -> ProvenRender | None:
        """Render a made-up conversation, to learn its shape; None where it is refused or loses a text."""
        try:
            rendered, traced = self._render(row)
        except RowError:
            return None
        if rendered.dropped:
            return None
        # Where a prompt opens a tag that the turn does not, an answer that opens it itself starts after it
        # (`repeated_tag`): such answers must be rendered.
        diverges = any(turn.diverges for turn in rendered.turns)
        tags = find_tags("".join(filter(None, self._prompts.values()))) if diverges else ()
        return ProvenRender(traced, rendered.turns, tags)

    def _render(self, row: Conversation) -> tuple[RenderedConversation, TracedText]:
        traced, row = self._renderer.render(row)
        assistants = assistant_messages(row)
        if self.template.has_generation:
            turns = self._generated_turns(row, traced, assistants)
        else:
            turns = [self._turn(row, traced, index) for index in assistants]
        for earlier, later in pairwise(turns):
            if later.start < earlier.stop:
                raise _unproven(later.message, "its span overlaps the turn before it")
        dropped, reasoning = self._renderer.dropped(row, traced)
        rendered = RenderedConversation(traced.text, turns, traced.literal, dropped, reasoning, row.counted)
        return rendered, traced

    # --------------------------------------------------------------------------------- derived turns

    def _turn(self, row: Conversation, traced: TracedText, index: int) -> Turn:
        """Find the turn of one assistant message: where its prompt ends, and which stop token ends it."""
        message, numbers = row.messages[index], traced.by_message.get(index, [])
        region = _Region.of(traced, index)
        if numbers and (numbers[-1] - numbers[0] + 1 != len(numbers) or not region.own[-1].closes):
            raise _unproven(index, "its text is rendered in pieces between other messages")
        _refuse_lost(message, numbers, index)
        start, diverges = self._start(row, index, region)
        # Stop tokens inside its own data, or in its header, do not end it.
        answered = max(start, region.own_stop) if region.own else start
        found = self._stop(traced, answered, region.limit)
        stop = found.end() if found else region.limit
        if message.get("tool_calls"):
            if not _calls_rendered(message, traced.text[start:stop]):
                raise _calls_lost(index)
            header = traced.text[region.origin : start]
            tail = traced.text[answered : found.start() if found else stop]
            if (region.after and not found) or _opens_another(header, tail):
                raise _unproven(index, "no stop token ends its tool call")
        elif not found:
            # Nothing ends the turn: it is the message's data alone, with the whitespace that ends it.
            stop = answered + _trailing_space(message, traced.text, answered)
        return Turn(index, start, stop, found is not None, diverges)

    def _stop(self, traced: TracedText, start: int, limit: int) -> re.Match[str] | None:
        """Return the first stop token that the template, not data, wrote between `start` and `limit`."""
        for found in self._stop_shape.finditer(traced.text, start, limit) if self._stop_shape else ():
            if not any(literal[0] <= found.start() < literal[1] for literal in traced.literal):
                return found
        return None

    def _start(self, row: Conversation, index: int, region: _Region) -> tuple[int, bool]:
        """Return where a turn starts, and whether its generation prompt diverges from the text."""
        origin = region.origin
        lead = region.text[origin : region.own_start]
        prompt = self._prompt_tail(row, index, region, lead)
        if prompt is None:
            # The template refuses to end before this message: look for the header it usually writes.
            prompt = self._usual_header
            opening = lead.rfind(prompt.partition("\n")[0]) if prompt else -1
            if opening < 0:
                raise _unproven(index, "no generation prompt can be rendered before it")
            origin, lead = origin + opening, lead[opening:]
        if region.text.startswith(prompt, origin, region.own_stop):
            return origin + len(prompt), False
        shared = find_divergence(prompt, lead)
        at = origin + shared
        return at + self._fed_after(index, region, at, prompt[shared:], lead[shared:]), True

    def _fed_after(self, index: int, region: _Region, at: int, prompt: str, lead: str) -> int:
        """Return how many characters after a divergence are still fed at inference, not generated.

        Args:
            index: of the message.
            region: of the message.
            at: where prompt and text diverge.
            prompt: the rest of the generation prompt.
            lead: the rest of what the template writes before the message's own data.
        """
        # Where the template cut off the beginning of its text, `lead` holds data: no header to find there.
        header = None if region.own and region.own[0].closes else header_after(prompt, lead)
        stopped = self._stop_shape is not None and self._stop_shape.match(lead.lstrip())
        if header is None and not region.own and not stopped and prompt.strip():
            raise _unproven(index, "an empty turn does not follow its generation prompt")
        if header or not region.own or lead:
            return header or 0
        # The prompt opens a tag that the template does not render: what of it the answer repeats is fed too.
        return repeated_tag(prompt, region.text[at : region.own_stop])

    def _prompt_tail(self, row: Conversation, index: int, region: _Region, lead: str) -> str | None:
        """Return what the generation prompt writes after the data before a turn; None where it is refused.

        It is remembered by the kind of transition: the kinds of the messages around it, and the text that
        leads to the answer.
        """
        before = region.before
        previous = before.message if before else -1
        kinds = tuple(
            self._renderer.kind_of(row.messages[number])
            for number in (0, max(previous, 0), max(index - 1, 0), index)
        )
        key = (lead, kinds, index - previous, bool(region.own), row.tools is None, repr(row.template_kwargs))
        if key not in self._prompts:
            prompt = self._renderer.prompt(row, index)
            last = prompt.sentinels[-1] if prompt and prompt.sentinels else None
            if prompt and (last and (last.message, last.closes)) != (
                before and (before.message, before.closes)
            ):
                raise _unproven(index, "its prompt does not end where the conversation before it ends")
            self._prompts[key] = prompt.text[last.position if last else 0 :] if prompt else None
        return self._prompts[key]

    @cached_property
    def _usual_header(self) -> str:
        """What the generation prompt writes after a user's message; "" where that cannot be rendered."""
        user = [{"role": "user", "content": "A"}]
        try:
            prompt = self.template.render(user, add_generation_prompt=True)
            return prompt.removeprefix(self.template.render(user)).lstrip()
        except TemplateRefusal:
            return ""

    # --------------------------------------------------------------------------- {% generation %} turns

    def _generated_turns(self, row: Conversation, traced: TracedText, assistants: list[int]) -> list[Turn]:
        """Return the template's own blocks, each with the message that it renders."""
        turns = []
        for start, stop in traced.generation:
            owner = _owner(traced.sentinels, start, stop, assistants)
            ended = traced.text[start:stop].rstrip().endswith(self.stops)
            turns.append(Turn(owner, start, stop, ended, diverges=False))
        for index in assistants:
            region = _Region.of(traced, index)
            _refuse_lost(row.messages[index], region.own, index)
            # After a call's data the tool's answer may name the function again: look no further than its own.
            around = region.text[region.origin : region.own_stop]
            if not _calls_rendered(row.messages[index], around):
                raise _calls_lost(index)
        return turns


def _owner(sentinels: list[Sentinel], start: int, stop: int, assistants: list[int]) -> int:
    """Return the assistant message whose data a block holds; if it holds none, the next one."""
    first = bisect_left(sentinels, start, key=attrgetter("position"))
    for sentinel in islice(sentinels, first, None):
        if sentinel.position > stop:
            break
        if sentinel.message in assistants:
            return sentinel.message
    earlier = max((sentinel.message for sentinel in sentinels[:first]), default=-1)
    return next((index for index in assistants if index > earlier), assistants[-1] if assistants else 0)


def _neighbours(
    sentinels: list[Sentinel], numbers: list[int], index: int
) -> tuple[Sentinel | None, Sentinel | None]:
    """Return the last sentinel before a message's own (at `numbers`) and the first after them."""
    if numbers:
        first, last = numbers[0], numbers[-1]
        return (
            sentinels[first - 1] if first else None,
            sentinels[last + 1] if last + 1 < len(sentinels) else None,
        )
    earlier = [sentinel for sentinel in sentinels if sentinel.message < index]
    later = [sentinel for sentinel in sentinels if sentinel.message > index]
    return (earlier[-1] if earlier else None), (later[0] if later else None)


def _opens_another(header: str, tail: str) -> bool:
    """Return whether a control token of the turn's header follows a call's data: another turn has begun."""
    return any(token in header for token in CONTROL_SHAPE.findall(tail))


def _calls_rendered(message: Message, text: str) -> bool:
    """Return whether `text` names every function that a message calls, as often as it does."""
    names = Counter(str(function.get("name", "")) for function in functions_of(message))
    return all(text.count(name) >= times for name, times in names.items())


def _trailing_space(message: Message, text: str, at: int) -> int:
    """Return how much of the whitespace that ends a message's content is rendered at `at`."""
    content = content_of(message)
    space = content[len(content.rstrip()) :] if content.strip() else ""
    return common_prefix(space, text[at:])


def _unproven(index: int, reason: str) -> RowError:
    fix = "give a template with {% generation %} blocks, or change the row"
    return RowError("spans-unproven", f"messages[{index}]: {reason}", fix)


def _refuse_lost(message: Message, own: Sequence[object], index: int) -> None:
    # A call may hold nothing but numbers, which bear no sentinels: its name tells whether it is rendered.
    if not own and not message.get("tool_calls") and any(message_texts(message)):
        raise _unproven(index, "its text does not appear in the rendered conversation")


def _calls_lost(index: int) -> RowError:
    what = f"messages[{index}]: the chat template does not render its tool calls"
    return RowError("tool-calls-lost", what, CALLS_FIX)


# ---------------------------------------------------------- where a generation prompt and a turn diverge


def find_divergence(prompt: str, text: str) -> int:
    """Return where `prompt` and `text` diverge, never inside a tag of either.

    >>> find_divergence("<|assistant|><think>", "<|assistant|><tool_call>")
    13
    """
    at = common_prefix(prompt, text)
    for other in (prompt, text):
        for tag in _TAG.finditer(other):
            if tag.start() < at < tag.end():
                at = tag.start()
    return at


def header_after(rest: str, text: str) -> int | None:
    r"""Return where the rest of a generation prompt, or its last tags, end in `text`; None if not there.

    A template may write other whitespace, one more end token or one instruction less before a rendered turn
    than before the generation prompt. The header itself is still fed at inference, so it is not for the model
    to generate.

    >>> header_after("### Answer:\n", "    ### Answer:\nYes"), header_after("<think>\n", "Yes")
    (16, None)
    """
    for opening in (0, *(tag.start() for tag in _TAG.finditer(rest))):
        core = rest[opening:].strip()
        if core and core in text:
            stop = text.index(core) + len(core)
            return stop + common_prefix(rest[len(rest.rstrip()) :], text[stop:])
    return None


def repeated_tag(rest: str, answer: str) -> int:
    r"""Return the length of the tag that a generation prompt opens and the answer repeats; 0 for none.

    >>> repeated_tag("<think>\n", "<think>Two.</think>Four."), repeated_tag("<think>\n", "Four.")
    (7, 0)
    """
    tag = _TAG.match(rest.lstrip())
    return len(tag[0]) if tag and answer.startswith(tag[0]) else 0


def find_tags(text: str) -> set[str]:
    """Return the tags of a text."""
    return set(_TAG.findall(text))
