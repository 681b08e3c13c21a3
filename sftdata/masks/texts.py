"""Canonical rows in, texts with trained byte spans out: one pass, no tokenizer.

What comes out for a row depends only on the row and the settings. A row whose spans cannot be proven is a
fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sftdata.batches import (
    Completion,
    Conversation,
    Float32,
    Int64,
    Ragged,
    Ranges,
    Row,
    Tally,
    Text,
    TextBatch,
)
from sftdata.errors import RowError
from sftdata.masks import Mask, Spans, as_rendered, byte_ranges
from sftdata.masks.pictures import write_layouts
from sftdata.masks.turns import RenderedConversation, SpanFinder
from sftdata.pictures.families import PictureProcessor
from sftdata.pictures.rows import PicturedConversation
from sftdata.pictures.stretch import ImageRuns
from sftdata.render.shapes import Turn

_NONE: Ranges = []


@dataclass(frozen=True, slots=True)
class Renderer:
    """All that turns canonical rows into texts.

    Attributes:
        finder: renders conversations and finds their turns; None without a chat template.
        mask: says what is trained.
        end_token: written, and trained, after a last turn that has no stop token; "" for none.
        processor: lays out pictures; None where no row may hold one.
    """

    finder: SpanFinder | None
    mask: Mask = field(default_factory=Mask)
    end_token: str = ""
    processor: PictureProcessor | None = None


@dataclass(frozen=True, slots=True)
class RenderedRows:
    """What became of a list of canonical rows.

    Attributes:
        conversations: rendered by a chat template; None when there are none.
        raw: text and completion rows; None when there are none.
        images: the pictures of the conversations; None in a set without pictures.
    """

    conversations: TextBatch | None
    raw: TextBatch | None
    images: ImageRuns | None = None


def render_rows(rows: Sequence[Row], row: Int64, renderer: Renderer, tally: Tally) -> RenderedRows:
    """Render canonical rows (`Tokens` rows excepted: they have no text).

    Args:
        rows: canonical rows.
        row: int64[N], index of each into the RowBatch.
        tally: takes the rows whose spans cannot be proven, and what the audit and the summary show: `turns`,
            `turns_without_stop`, `rows_parted`, `messages_swallowed`, `reasoning_swallowed`,
            `rows_without_their_tools`, `rows_with_control_tokens`, `rows_mended_with_eos`,
            `rows_with_repeated_markers`, `messages_outside_generation`, and what rows and templates counted
            by name.
    """
    chats, raw = _Columns(), _Columns()
    fast = _FastPath(renderer, tally)
    for index, item in zip(row.tolist(), rows, strict=True):
        try:
            if isinstance(item, Conversation):
                pictured = isinstance(item, PicturedConversation)
                if not pictured and (found := fast.render(item, index)):
                    chats.put(index, *found)
                    continue
                columns, rendered = chats, _conversation(item, index, renderer, tally)
                if isinstance(item, PicturedConversation):
                    sizes = [picture.size for picture in item.pictures]
                    rendered = write_layouts(rendered, sizes, renderer.processor)
            elif isinstance(item, Completion | Text):
                text = item.text if isinstance(item, Text) else item.prompt + item.completion
                columns, rendered = raw, as_rendered(text)
            else:
                continue
            _refuse_surrogate(rendered.text)
            columns.add(index, rendered, renderer.mask.spans(item, rendered, index, tally))
        except RowError as error:
            tally.reject(index, error.fault)
    images = None if renderer.processor is None else chats.images(renderer.processor)
    return RenderedRows(chats.batch(reference_ends=False), raw.batch(reference_ends=True), images)


class _FastPath:
    """Conversations whose shape is cached and whose every turn is trained: most of them."""

    def __init__(self, renderer: Renderer, tally: Tally) -> None:
        finder = renderer.finder if renderer.mask.every_turn else None
        self._shapes = None if finder is None else finder.shapes
        self._closes_turns = bool(renderer.end_token)
        self._tally = tally

    def render(self, row: Conversation, index: int) -> tuple[str, Ranges] | None:
        """Return the text and the trained characters of a row; None for one that must be rendered."""
        if self._shapes is None or row.prompt_messages or row.trained.count(None) != len(row.trained):
            return None
        cached = self._shapes.render(row)
        if cached is None:
            return None
        shape, text, spans = cached
        if self._closes_turns and shape.turns and not shape.turns[-1].ended:
            return None
        _count_turns(shape.turns, index, self._tally)
        _count_names(row.counted, index, self._tally)
        return text, spans


class _Columns:
    """Collect texts and their spans, in bytes, and the runs of their pictures."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.trained: list[Ranges] = []
        self.literal: list[Ranges] = []
        self.closed: list[bool] = []
        self.row: list[int] = []
        self.weights: dict[int, list[float]] = {}  # of the texts whose ranges do not all weigh 1
        self.runs: list[int] = []  # of the pictures
        self.run_counts: list[int] = []  # of each text

    def add(self, row: int, rendered: RenderedConversation, spans: Spans) -> None:
        """Add one text with what it trains."""
        if spans.weights is not None:
            self.weights[len(self.texts)] = spans.weights
        literal = byte_ranges(rendered.text, rendered.literal)
        self._append(row, rendered.text, spans.ranges, literal, spans.closed, rendered.runs)

    def put(self, row: int, text: str, trained: Ranges) -> None:
        """Add one text of a chat template, trained in these characters, that holds nothing literal."""
        if not text.isascii():
            _refuse_surrogate(text)
            trained = byte_ranges(text, trained)
        self._append(row, text, trained, _NONE, True)

    def _append(
        self, row: int, text: str, trained: Ranges, literal: Ranges, closed: bool, runs: Sequence[int] = ()
    ) -> None:
        self.runs += runs
        self.run_counts.append(len(runs))
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

    def images(self, processor: PictureProcessor) -> ImageRuns:
        """Return the runs of all pictures."""
        around = tuple(text for _, text in processor.tokens)
        counts = np.array(self.run_counts, np.int64)
        return ImageRuns(processor.image_token, np.array(self.runs, np.int64), counts, around)

    def _loss_weights(self, trained: Ragged) -> Float32:
        weights = np.ones(len(trained.values), np.float32)
        for index, values in self.weights.items():
            weights[trained.offsets[index] : trained.offsets[index + 1]] = values
        return weights


def _conversation(row: Conversation, index: int, renderer: Renderer, tally: Tally) -> RenderedConversation:
    """Render a conversation, with an end token after the last turn if it needs one."""
    if renderer.finder is None:
        what = "a conversation, and the tokenizer has no chat template"
        raise RowError("no-chat-template", what, "--chat-template chatml")
    if (flag := renderer.mask.overrules) and False in row.trained:
        what = f"messages[{row.trained.index(False)}] is switched off, and --{flag} overrides it."
        raise RowError("switch-overruled", what, f"leave --{flag} out, or take the switch off the message.")
    rendered = renderer.finder.render(row)
    text, turns = rendered.text, rendered.turns
    _count_turns(turns, index, tally)
    _count_names(rendered.counted, index, tally)
    tally.count("messages_swallowed", index, len(rendered.dropped))
    tally.count(
        "rows_without_their_tools", index, bool(row.tools) and not _shows_tools(row, text, renderer.finder)
    )
    tally.count("rows_with_control_tokens", index, bool(rendered.literal))
    if not renderer.end_token or not turns or turns[-1].ended:
        return rendered
    last = turns[-1]
    calls = bool(row.messages[last.message].get("tool_calls"))
    text = text[: last.stop] + ((calls and renderer.finder.call_end) or renderer.end_token)
    tally.count("rows_mended_with_eos", index)
    return replace(rendered, text=text, turns=[*turns[:-1], replace(last, stop=len(text), ended=True)])


def _count_turns(turns: Sequence[Turn], row: int, tally: Tally) -> None:
    tally.counts["turns"] += len(turns)
    diverges = False
    for turn in turns:
        if not turn.ended:
            tally.count("turns_without_stop", row)
        if turn.diverges:
            diverges = True
    tally.count("rows_parted", row, diverges)


def _count_names(names: Sequence[str], row: int, tally: Tally) -> None:
    for name in names:
        tally.count(name, row)


def _shows_tools(row: Conversation, text: str, finder: SpanFinder) -> bool:
    """Return whether a rendered text names every tool that the row offers; a call alone is not an offer."""
    tools = [tool.get("function", tool) for tool in row.tools or ()]
    names = [str(tool.get("name", "")) for tool in tools if isinstance(tool, dict)]
    return finder.template.takes_tools and all(name in text for name in names)


def _refuse_surrogate(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        what = "text holds half a surrogate pair, which utf-8 cannot"
        raise RowError("lone-surrogate", what, "repair the character") from None
