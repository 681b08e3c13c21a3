"""Canonical rows in, texts with trained byte spans out: one pass, no tokenizer.

What comes out for a row depends only on the row and the settings. A row whose spans cannot be proven is a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sftdata.batches import Completion, Conversation, Float32, Int64, Ragged, Row, Tally, Text, TextBatch
from sftdata.errors import Fault, RowError
from sftdata.render.markers import find_spans
from sftdata.render.recipes import Turn, assistant_messages
from sftdata.render.spans import SpanFinder

TrainOn = Literal["auto", "assistant", "last-assistant", "completion", "all"]
Ranges = list[tuple[int, int]]
_NONE: Ranges = []


@dataclass(frozen=True, slots=True)
class Renderer:
    """All that turns canonical rows into texts.

    Attributes:
        finder: renders conversations and finds their turns; None without a chat template.
        train_on: which parts are trained; `auto` depends on the kind of row.
        response, instruction: markers that decide what is trained, instead of the kind; None without.
        end_token: written, and trained, after a last turn that has no stop token; "" for none.
        overrules: the flag, without its dashes, that decides what is trained whatever messages say of themselves; "" for none.
    """

    finder: SpanFinder | None
    train_on: TrainOn = "auto"
    response: str | None = None
    instruction: str | None = None
    end_token: str = ""
    overrules: str = ""


@dataclass(frozen=True, slots=True)
class RenderedRows:
    """What became of a list of canonical rows.

    Attributes:
        conversations: rendered by a chat template; None when there are none.
        raw: text and completion rows; None when there are none.
        faults: (index into the RowBatch, why).
        tally: what the audit and the summary show: `turns`, `turns_without_stop`, `rows_parted`, `messages_swallowed`,
            `reasoning_swallowed`, `rows_without_their_tools`, `rows_with_control_tokens`, `rows_mended_with_eos`,
            `rows_with_repeated_markers`, `messages_outside_generation`, and what rows and templates counted by name.
    """

    conversations: TextBatch | None
    raw: TextBatch | None
    faults: list[tuple[int, Fault]]
    tally: Tally


def render_rows(rows: Sequence[Row], row: Int64, renderer: Renderer) -> RenderedRows:
    """Render canonical rows (`Tokens` rows excepted: they have no text).

    Args:
        rows: canonical rows.
        row: int64[N], index of each into the RowBatch.
    """
    tally = Tally()
    faults: list[tuple[int, Fault]] = []
    chats, raw = _Columns(), _Columns()
    filler = _Filler(renderer, tally)
    for index, item in zip(row.tolist(), rows, strict=True):
        try:
            if isinstance(item, Conversation):
                if filled := filler.fill(item, index):
                    chats.put(index, *filled)
                    continue
                text, trained, literal, weights = _conversation(item, index, renderer, tally)
                chats.add(index, text, trained, renderer, tally, literal)
                if weights is not None:
                    chats.weigh(weights)
            elif isinstance(item, Completion):
                start = 0 if renderer.train_on == "all" else len(item.prompt)
                raw.add(index, item.prompt + item.completion, start, renderer, tally)
            elif isinstance(item, Text):
                raw.add(index, item.text, [(0, len(item.text))], renderer, tally)
        except RowError as error:
            faults.append((index, error.fault))
    return RenderedRows(chats.batch(reference_ends=False), raw.batch(reference_ends=True), faults, tally)


class _Filler:
    """The short way of most conversations: filled into the recipe of their shape, every turn trained."""

    def __init__(self, renderer: Renderer, tally: Tally) -> None:
        every_turn = renderer.response is None and renderer.train_on not in ("all", "last-assistant")
        self._finder = renderer.finder if every_turn else None
        self._mended = bool(renderer.end_token)
        self._tally = tally

    def fill(self, row: Conversation, index: int) -> tuple[str, Ranges] | None:
        """Return text and trained characters of a row; None for one that must go the long way."""
        if self._finder is None or row.prompt_messages or row.trained.count(None) != len(row.trained):
            return None
        filled = self._finder.fill(row)
        if filled is None:
            return None
        recipe, text, spans = filled
        if self._mended and recipe.turns and not recipe.turns[-1].ended:
            return None
        _count_turns(recipe.turns, index, self._tally)
        _count_names(row.counted, index, self._tally)
        return text, spans


class _Columns:
    """Collect rendered rows; ranges in characters on the way in, in bytes from here on."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.trained: list[Ranges] = []
        self.literal: list[Ranges] = []
        self.closed: list[bool] = []
        self.row: list[int] = []
        self.weights: dict[int, list[float]] = {}  # of the texts whose ranges do not all weigh 1

    def add(
        self,
        row: int,
        text: str,
        trained: Ranges | int,
        renderer: Renderer,
        tally: Tally,
        literal: Ranges | None = None,
    ) -> None:
        """Add one text that is trained in `trained`, or from that character to its end; markers, where given, decide instead."""
        _refuse_surrogate(text)
        if renderer.response is not None:
            marked = find_spans(_blanked(text, literal or []), renderer.response, renderer.instruction)
            tally.count("rows_with_repeated_markers", row, marked.repeated)
            size = len(text.encode())
            # An answer left empty at the end still has its end token to be generated.
            ending = (
                [(size, size)] if marked.closed and (not marked.spans or marked.spans[-1][1] < size) else []
            )
            spans, closed = marked.spans + ending, marked.closed
        else:
            # An empty completion still has its end token to be generated.
            ranges = (
                [(trained, len(text))]
                if isinstance(trained, int)
                else [pair for pair in trained if pair[0] < pair[1]]
            )
            spans, closed = byte_ranges(text, ranges), True
        self._append(row, text, spans, byte_ranges(text, literal or []), closed)

    def put(self, row: int, text: str, trained: Ranges) -> None:
        """Add one text of a chat template, trained in `trained`, that holds nothing literal."""
        if not text.isascii():
            _refuse_surrogate(text)
            trained = byte_ranges(text, trained)
        self._append(row, text, trained, _NONE, True)

    def weigh(self, weights: list[float]) -> None:
        """Say what the trained ranges of the text just added weigh."""
        self.weights[len(self.texts) - 1] = weights

    def _append(self, row: int, text: str, trained: Ranges, literal: Ranges, closed: bool) -> None:
        self.texts.append(text)
        self.trained.append(trained)
        self.literal.append(literal)
        self.closed.append(closed)
        self.row.append(row)

    def batch(self, *, reference_ends: bool) -> TextBatch | None:
        if not self.texts:
            return None
        trained = Ragged.from_lists(self.trained)
        return TextBatch(
            texts=self.texts,
            trained=trained,
            literal=Ragged.from_lists(self.literal),
            row=np.array(self.row, np.int64),
            reference_ends=reference_ends,
            closed=np.array(self.closed, np.bool_),
            loss_weights=self._loss_weights(trained) if self.weights else None,
        )

    def _loss_weights(self, trained: Ragged) -> Float32:
        weights = np.ones(len(trained.values), np.float32)
        for index, own in self.weights.items():
            weights[trained.offsets[index] : trained.offsets[index + 1]] = own
        return weights


def _conversation(
    row: Conversation, index: int, renderer: Renderer, tally: Tally
) -> tuple[str, Ranges, Ranges, list[float] | None]:
    """Return text, trained and literal characters, and what each trained stretch weighs; None where all weigh 1."""
    if renderer.finder is None:
        raise RowError(
            "no-chat-template",
            "a conversation, and the tokenizer has no chat template",
            "--chat-template chatml",
        )
    if renderer.overrules and False in row.trained:
        what = f"messages[{row.trained.index(False)}] is switched off, and --{renderer.overrules} does not heed it."
        raise RowError(
            "switch-overruled", what, f"leave --{renderer.overrules} out, or take the switch off the message."
        )
    rendered = renderer.finder.render(row)
    text, turns = rendered.text, rendered.turns
    _count_turns(turns, index, tally)
    _count_names(rendered.counted, index, tally)
    tally.count("messages_swallowed", index, len(rendered.swallowed))
    tally.count(
        "rows_without_their_tools", index, bool(row.tools) and not _shows_tools(row, text, renderer.finder)
    )
    tally.count("rows_with_control_tokens", index, bool(rendered.literal))
    if renderer.end_token and turns and not turns[-1].ended:
        calls = bool(row.messages[turns[-1].message].get("tool_calls"))
        text = text[: turns[-1].stop] + ((calls and renderer.finder.call_end) or renderer.end_token)
        turns = [*turns[:-1], Turn(turns[-1].message, turns[-1].start, len(text), True, turns[-1].parted)]
        tally.count("rows_mended_with_eos", index)
    if renderer.train_on == "all":
        tally.count("reasoning_swallowed", index, len(rendered.unthought))
        return text, [(0, len(text))], rendered.literal, None
    wanted = _wanted(row, renderer.train_on)
    if renderer.response is None:
        outside = wanted.difference([turn.message for turn in turns])
        tally.count("messages_outside_generation", index, len(outside))
    chosen = [turn for turn in turns if turn.message in wanted and turn.start < turn.stop]
    if rendered.unthought:  # of turns that are only context, inference leaves it out too
        tally.count(
            "reasoning_swallowed", index, len({turn.message for turn in chosen} & {*rendered.unthought})
        )
    return text, [(turn.start, turn.stop) for turn in chosen], rendered.literal, _weights(row, chosen)


def _count_turns(turns: Sequence[Turn], row: int, tally: Tally) -> None:
    tally.counts["turns"] += len(turns)
    parted = False
    for turn in turns:
        if not turn.ended:
            tally.count("turns_without_stop", row)
        if turn.parted:
            parted = True
    tally.count("rows_parted", row, parted)


def _count_names(names: Sequence[str], row: int, tally: Tally) -> None:
    for name in names:
        tally.count(name, row)


def _shows_tools(row: Conversation, text: str, finder: SpanFinder) -> bool:
    """Say whether a rendered text names every tool that the row offers; a call alone is not an offer."""
    tools = [tool.get("function", tool) for tool in row.tools or ()]
    names = [str(tool.get("name", "")) for tool in tools if isinstance(tool, dict)]
    return finder.template.takes_tools and all(name in text for name in names)


def _wanted(row: Conversation, train_on: TrainOn) -> set[int]:
    """Return the indices of the assistant messages that policy and the messages' own switches train."""
    assistants = assistant_messages(row)
    first = 0 if train_on == "assistant" else row.prompt_messages
    if train_on == "last-assistant":
        first = max(assistants, default=0)
    return {
        index for index in assistants if row.trained[index] or (row.trained[index] is None and index >= first)
    }


def _weights(row: Conversation, turns: list[Turn]) -> list[float] | None:
    own = [row.trained[turn.message] for turn in turns]
    return (
        [float(1 if one is None else one) for one in own]
        if any(isinstance(one, float) for one in own)
        else None
    )


def _blanked(text: str, literal: Ranges) -> str:
    r"""Return a text of as many bytes, without the control tokens that data spells: they are no part of a marker.

    >>> _blanked("[A]é[A]b", [(4, 7)])
    '[A]é\x00\x00\x00b'
    """
    parts, at = [], 0
    for start, stop in sorted(literal):
        parts += [text[at:start], "\0" * len(text[max(at, start) : stop].encode())]
        at = max(at, stop)
    return "".join([*parts, text[at:]])


def byte_ranges(text: str, ranges: Ranges) -> Ranges:
    """Turn character ranges into utf-8 byte ranges.

    >>> byte_ranges("é1é2", [(1, 2), (2, 4)])
    [(2, 3), (3, 6)]
    """
    if not ranges or text.isascii():
        return ranges
    edges = sorted({edge for pair in ranges for edge in pair})
    at, place, where = 0, 0, {}
    for edge in edges:
        place += len(text[at:edge].encode())
        at = edge
        where[edge] = place
    return [(where[start], where[stop]) for start, stop in ranges]


def _refuse_surrogate(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "text holds half a surrogate pair, which utf-8 cannot"
        raise RowError("lone-surrogate", what, "repair the character") from None
