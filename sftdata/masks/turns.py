"""Find what the model must generate in a rendered conversation, for any chat template, linear in its turns.

A proven render (proof.py) says who wrote each character. A turn's span then

- starts where its generation prompt ends: after the text that `render(messages before it, add_generation_prompt=True)` writes
  behind the last data before the turn. Where prompt and final text part ways (a prompt that opens `<think>`), at the parting;
- stops after the stop token that the template writes behind the turn's own data.

The prompt is rendered once for each kind of transition (the messages' shapes on both sides and the very text between them) and
remembered, so eighty turns cost a handful of renders. A template with `{% generation %}` blocks says its spans itself. What
cannot be proven is a `RowError`, never a guess.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from operator import attrgetter
from typing import Any

from sftdata.batches import Conversation
from sftdata.errors import RowError
from sftdata.render.control_tokens import common_prefix, find_call_end, find_stops, guarded_tokens
from sftdata.render.marks import Mark, MarkedText, message_texts
from sftdata.render.proof import ProvenRenderer, any_of
from sftdata.render.shapes import MAX_RECIPES, Recipe, RecipeBook, Turn, assistant_messages
from sftdata.render.spellings import CALLS_FIX
from sftdata.render.template import CONTROL_SHAPE, ChatTemplate, TemplateRefusal


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A rendered conversation.

    Attributes:
        text: what the chat template writes.
        turns: its assistant turns, in order.
        literal: character ranges of the control tokens that data brought.
        swallowed, unthought: indices of messages of which the template left a text out, and of those that lost the reasoning.
        counted: what had to be put right to render the row, and what the template did not read, by the names of counters.
    """

    text: str
    turns: list[Turn]
    literal: list[tuple[int, int]]
    swallowed: list[int]
    unthought: list[int]
    counted: tuple[str, ...] = ()


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
        self._stop_shape = any_of(self.stops)
        self._renderer = ProvenRenderer(template, self.guarded, plain_tokens)
        self._prompts: dict[Any, str | None] = {}
        self._book = RecipeBook(template, self.guarded)
        self._recipes: dict[tuple[tuple[str, ...], tuple[int, ...]], Recipe | None] = {}

    def render(self, row: Conversation) -> RenderedConversation:
        """Render one conversation and find every assistant turn in it.

        Raises:
            RowError: the template refuses the row, or its spans cannot be proven.
        """
        filled = self.fill(row)
        if filled is None:
            return self._render(row)[0]
        recipe, text, spans = filled
        turns = [
            Turn(turn.message, *span, turn.ended, turn.parted)
            for turn, span in zip(recipe.turns, spans, strict=True)
        ]
        return RenderedConversation(text, turns, [], [], [], row.counted)

    def fill(self, row: Conversation) -> tuple[Recipe, str, list[tuple[int, int]]] | None:
        """Render a plain conversation by the recipe of its shape, with the (start, stop) of each turn; None for any other row."""
        contents = self._book.contents(row)
        if contents is None:
            return None
        empty = (
            tuple([index for index, content in enumerate(contents) if not content]) if "" in contents else ()
        )
        recipe = self._recipe(tuple([message["role"] for message in row.messages]), empty)
        if recipe is None or not self._book.admits(recipe, contents):
            return None
        return recipe, *recipe.fill(contents)

    def _recipe(self, roles: tuple[str, ...], empty: tuple[int, ...] = ()) -> Recipe | None:
        """Return the recipe of a shape, learnt from a made-up row when the shape comes first; None where there is none."""
        shape = roles, empty
        if shape not in self._recipes:
            if len(self._recipes) >= MAX_RECIPES:
                return None
            texts = ["" if number in empty else f"Text {number}." for number in range(len(roles))]
            row = Conversation(
                [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)], []
            )
            try:
                rendered, marked = self._render(row)
            except RowError:
                self._recipes[shape] = None
                return None
            # Where a prompt opens what the turn does not, an answer that opens it itself begins behind that.
            parted = any(turn.parted for turn in rendered.turns)
            tags = find_tags("".join(filter(None, self._prompts.values()))) if parted else ()
            self._recipes[shape] = (
                None if rendered.swallowed else self._book.learn(row, marked, rendered.turns, tags)
            )
        return self._recipes[shape]

    def _render(self, row: Conversation) -> tuple[RenderedConversation, MarkedText]:
        marked, row = self._renderer.render(row)
        assistants = assistant_messages(row)
        if self.template.has_generation:
            turns = self._generated_turns(row, marked, assistants)
        else:
            turns = [self._turn(row, marked, index) for index in assistants]
        for earlier, later in pairwise(turns):
            if later.start < earlier.stop:
                raise _unproven(later.message, "its span overlaps the turn before it")
        swallowed, unthought = self._renderer.swallowed(row, marked)
        return RenderedConversation(
            marked.text, turns, marked.literal, swallowed, unthought, row.counted
        ), marked

    # --------------------------------------------------------------------------------- derived turns

    def _turn(self, row: Conversation, marked: MarkedText, index: int) -> Turn:
        message = row.messages[index]
        calls = bool(message.get("tool_calls"))
        own = marked.places.get(index, [])
        if own and (own[-1] - own[0] + 1 != len(own) or not marked.marks[own[-1]].closes):
            raise _unproven(index, "its text stands in pieces between other messages")
        _refuse_lost(message, own, index)
        before, after = _neighbours(marked.marks, own, index)
        limit = after.position if after else len(marked.text)
        start, parted = self._start(row, marked, index, before, [marked.marks[place] for place in own], limit)
        answered = max(start, marked.marks[own[-1]].position) if own else start
        found = self._stop(marked, answered, limit)
        stop = found.end() if found else limit
        if calls:
            if not _calls_rendered(message, marked.text[start:stop]):
                raise _calls_lost(index)
            header = marked.text[before.position if before else 0 : start]
            if (after and not found) or _opens_another(
                header, marked.text[answered : found.start() if found else stop]
            ):
                raise _unproven(index, "no stop token ends its tool call")
        elif not found:
            stop = answered + _trailing_space(message, marked.text, answered)
        return Turn(index, start, stop, found is not None, parted)

    def _stop(self, marked: MarkedText, start: int, limit: int) -> re.Match[str] | None:
        """Return the first stop token that the template wrote between `start` and `limit`."""
        for found in self._stop_shape.finditer(marked.text, start, limit) if self._stop_shape else ():
            if not any(literal[0] <= found.start() < literal[1] for literal in marked.literal):
                return found
        return None

    def _start(
        self,
        row: Conversation,
        marked: MarkedText,
        index: int,
        before: Mark | None,
        own: list[Mark],
        limit: int,
    ) -> tuple[int, bool]:
        """Return where a turn starts, and whether its prompt parts from the text."""
        origin = before.position if before else 0
        lead = marked.text[origin : own[0].position if own else limit]
        written = self._written(row, index, before, lead, bool(own))
        if written is None:
            written = self._usual_header()
            opening = lead.rfind(written.partition("\n")[0]) if written else -1
            if opening < 0:
                raise _unproven(index, "no generation prompt can be rendered before it")
            origin, lead = origin + opening, lead[opening:]
        if marked.text.startswith(written, origin, own[-1].position if own else limit):
            return origin + len(written), False
        parting = find_parting(written, lead)
        # A text that lost its beginning lies in `lead` itself: nothing to search there.
        header = None if own and own[0].closes else header_after(written[parting:], lead[parting:])
        stopped = self._stop_shape is not None and self._stop_shape.match(lead[parting:].lstrip())
        if header is None and not own and not stopped and written[parting:].strip():
            raise _unproven(index, "an empty turn does not follow its generation prompt")
        again = (
            repeated_tag(written[parting:], marked.text[origin + parting : own[-1].position])
            if own and not lead[parting:]
            else 0
        )
        return origin + parting + (header or again), True

    def _written(
        self, row: Conversation, index: int, before: Mark | None, lead: str, answered: bool
    ) -> str | None:
        """Return what the generation prompt writes behind the data before a turn; None where no prompt can be rendered.

        Remembered by kind of transition: the shapes of the messages around it and the text that leads to the answer.
        """
        previous = before.message if before else -1
        shapes = tuple(
            self._renderer.shape(row.messages[place])
            for place in (0, max(previous, 0), max(index - 1, 0), index)
        )
        key = (lead, shapes, index - previous, answered, row.tools is None, repr(row.template_kwargs))
        if key not in self._prompts:
            prompt = self._renderer.prompt(row, index)
            last = prompt.marks[-1] if prompt and prompt.marks else None
            if prompt and (last and (last.message, last.closes)) != (
                before and (before.message, before.closes)
            ):
                raise _unproven(index, "its prompt does not end where the conversation before it ends")
            self._prompts[key] = prompt.text[last.position if last else 0 :] if prompt else None
        return self._prompts[key]

    def _usual_header(self) -> str:
        """Return what the generation prompt writes after a user's message: for a turn that no prompt can be rendered for."""
        user = [{"role": "user", "content": "A"}]
        try:
            return (
                self.template.render(user, add_generation_prompt=True)
                .removeprefix(self.template.render(user))
                .lstrip()
            )
        except TemplateRefusal:
            return ""

    # --------------------------------------------------------------------------- {% generation %} turns

    def _generated_turns(self, row: Conversation, marked: MarkedText, assistants: list[int]) -> list[Turn]:
        """Return the template's own blocks, each given to the message it speaks for."""
        turns = []
        for start, stop in marked.generation:
            owner = _owner(marked.marks, start, stop, assistants)
            turns.append(
                Turn(owner, start, stop, marked.text[start:stop].rstrip().endswith(self.stops), False)
            )
        for index in assistants:
            own = marked.places.get(index, [])
            _refuse_lost(row.messages[index], own, index)
            before, last = _neighbours(marked.marks, own, index)
            last = (
                marked.marks[own[-1]] if own else last
            )  # behind a call's data, the tool's answer may name the function again
            around = marked.text[
                before.position if before else 0 : last.position if last else len(marked.text)
            ]
            if not _calls_rendered(row.messages[index], around):
                raise _calls_lost(index)
        return turns


def _owner(marks: list[Mark], start: int, stop: int, assistants: list[int]) -> int:
    """Return the assistant message whose data stands in a block; for an empty block, the next one after the data before it."""
    first = bisect_left(marks, start, key=attrgetter("position"))
    for mark in islice(marks, first, None):
        if mark.position > stop:
            break
        if mark.message in assistants:
            return mark.message
    earlier = max((mark.message for mark in marks[:first]), default=-1)
    return next((index for index in assistants if index > earlier), assistants[-1] if assistants else 0)


def _neighbours(marks: list[Mark], own: list[int], index: int) -> tuple[Mark | None, Mark | None]:
    """Return the last mark before a turn's own marks and the first after them."""
    if own:
        return (marks[own[0] - 1] if own[0] else None), (
            marks[own[-1] + 1] if own[-1] + 1 < len(marks) else None
        )
    earlier = [mark for mark in marks if mark.message < index]
    later = [mark for mark in marks if mark.message > index]
    return (earlier[-1] if earlier else None), (later[0] if later else None)


def _opens_another(header: str, tail: str) -> bool:
    """Say whether what follows a call's data writes a control token of the turn's own header: the next message has begun."""
    return any(token in header for token in CONTROL_SHAPE.findall(tail))


def _calls_rendered(message: dict[str, Any], text: str) -> bool:
    """Say whether `text` names every function that a message calls, as often as it does."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
    names = Counter(str(call.get("name", "")) for call in calls if isinstance(call, dict))
    return all(text.count(name) >= times for name, times in names.items())


def _trailing_space(message: dict[str, Any], text: str, at: int) -> int:
    """Return how much of the white space that ends a message's content stands at `at`."""
    content = message.get("content")
    space = content[len(content.rstrip()) :] if isinstance(content, str) and content.strip() else ""
    return common_prefix(space, text[at:])


def _unproven(index: int, why: str) -> RowError:
    fix = "give a template with {% generation %} blocks, or change the row"
    return RowError("spans-unproven", f"messages[{index}]: {why}", fix)


def _refuse_lost(message: dict[str, Any], own: list[int], index: int) -> None:
    # A call may hold numbers only, which carry no marks: its name tells whether it stands there.
    if not own and not message.get("tool_calls") and any(message_texts(message)):
        raise _unproven(index, "its text does not appear in the rendered conversation")


def _calls_lost(index: int) -> RowError:
    return RowError(
        "tool-calls-lost", f"messages[{index}]: the chat template does not render its tool calls", CALLS_FIX
    )


_TAG = re.compile(r"<[^<>\s]+>")


def find_parting(written: str, region: str) -> int:
    """Return where `written` and `region` part ways, never inside a tag of either.

    >>> find_parting("<|assistant|><think>", "<|assistant|><tool_call>")
    13
    """
    at = common_prefix(written, region)
    for text in (written, region):
        for tag in _TAG.finditer(text):
            if tag.start() < at < tag.end():
                at = tag.start()
    return at


def header_after(rest: str, region: str) -> int | None:
    r"""Return where the rest of a generation prompt ends in `region`, or its last tags do; None where they do not stand there.

    A template may write other space, one more end token or one instruction less before a rendered turn than before the generation
    prompt. The header itself is still fed at inference, so it is not for the model to generate.

    >>> header_after("### Answer:\n", "    ### Answer:\nYes"), header_after("<think>\n", "Yes")
    (16, None)
    """
    for opening in (0, *(tag.start() for tag in _TAG.finditer(rest))):
        core = rest[opening:].strip()
        if core and core in region:
            stop = region.index(core) + len(core)
            return stop + common_prefix(rest[len(rest.rstrip()) :], region[stop:])
    return None


def repeated_tag(rest: str, answer: str) -> int:
    r"""Return the length of the tag that the rest of a generation prompt opens and the answer repeats; 0 for none.

    >>> repeated_tag("<think>\n", "<think>Two.</think>Four."), repeated_tag("<think>\n", "Four.")
    (7, 0)
    """
    tag = _TAG.match(rest.lstrip())
    return len(tag[0]) if tag and answer.startswith(tag[0]) else 0


def find_tags(text: str) -> set[str]:
    """Return the tags of a text."""
    return set(_TAG.findall(text))
