"""What is trained, and why: one mask, chosen once in the plan, says which tokens of a set have a label.

A token has a label if and only if the model must generate it. What that is depends on the kind of row:

| row | trained |
|---|---|
| conversation | the assistant's turns, each from the end of its prompt to the token that ends it (turns.py) |
| prompt and completion | the completion, and the EOS after it |
| text | all of it, and the EOS after it |
| ids | those whose own label is the id (`read_given` in tokens.py) |

`--train-on` and the switches of the messages choose among turns. A response template chooses instead of them:
what follows the marker, looked for in the text (`TextMarkers`) or in the ids (`IdMarkers`, `TRL0710`).

To ask why one token is trained, follow its row:

1. `Mask.spans` gives the byte ranges of the row's text that are trained (texts.py asks it row by row).
2. A token is trained where it begins inside a range; a text is cut where a token would straddle the edge of
   one. BOS never is; the EOS that closes a raw text is, where a range runs to the end of that text
   (tokens.py).
3. `Mask.flags` has the last word on the ids: the masks that look for markers there decide anew.
4. A cut by `--overlong` takes labels away with their tokens, and never adds one (limit_length).
5. The first token of a document has no label: there is nothing before it to predict it from (pack.py).

>>> Mask().spans(Completion("2+2=", "4"), as_rendered("2+2=4"), 0, Tally())
Spans(ranges=[(4, 5)], closed=True, weights=None)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from sftdata.batches import Bool, Completion, Conversation, Ranges, Row, Tally, TokenBatch
from sftdata.config import PrepareConfig
from sftdata.encode.engine import load_encoder
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.masks.markers import find_id_spans, find_spans, trl_0_7_10_mask
from sftdata.masks.turns import RenderedConversation
from sftdata.render.shapes import Turn, assistant_messages

TrainOn = Literal["auto", "assistant", "last-assistant", "completion", "all"]


class Spans(NamedTuple):
    """What one text trains.

    Attributes:
        ranges: bytes (utf-8), half-open, ascending, disjoint. One that is empty at the end of the text trains
            the EOS after it.
        closed: whether a trained EOS belongs after the text, where the chat template has not written one.
        weights: what each range weighs in the loss; None where all weigh 1.
    """

    ranges: Ranges
    closed: bool = True
    weights: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Mask:
    """Train by the kind of the row: turns, the completion, or all.

    Attributes:
        train_on: which parts; `auto` is every turn of a conversation, the completion after its prompt, all
            of a text.
        never: ids that are never trained, as those that stand for pictures.
    """

    train_on: TrainOn = "auto"
    never: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def overrules(self) -> str:
        """The flag, without its dashes, that overrules the switches of messages; "" for none."""
        return "train-on all" if self.train_on == "all" else ""

    @property
    def every_turn(self) -> bool:
        """Whether a conversation without switches or a prompt of its own trains all its turns."""
        return self.train_on not in ("all", "last-assistant")

    def spans(self, row: Row, rendered: RenderedConversation, index: int, tally: Tally) -> Spans:
        """Return what a row's text trains.

        Args:
            row: a conversation, completion or text.
            rendered: its text, with turns where a chat template wrote it.
            index: of the row in the RowBatch, for `tally`.
            tally: counts `messages_outside_generation` and `reasoning_swallowed`.

        Raises:
            RowError: the mask cannot be proven for this row.
        """
        text = rendered.text
        if isinstance(row, Completion):
            # An empty completion still has its end token to be generated.
            return Spans(byte_ranges(text, [(0 if self.train_on == "all" else len(row.prompt), len(text))]))
        if not isinstance(row, Conversation) or self.train_on == "all":
            tally.count("reasoning_swallowed", index, len(rendered.reasoning_dropped))
            return Spans(byte_ranges(text, [(0, len(text))] if text else []))
        outside = self._wanted(row).difference([turn.message for turn in rendered.turns])
        tally.count("messages_outside_generation", index, len(outside))
        turns = self._chosen(row, rendered, index, tally)
        ranges = byte_ranges(text, [(turn.start, turn.stop) for turn in turns])
        return Spans(ranges, True, _weights(row, turns))

    def flags(self, tokens: TokenBatch, tally: Tally) -> TokenBatch:
        """Return the tokens flagged by a search in their ids; the tally takes the rows that are lost.

        Here there is no search: what the spans trained stays.
        """
        return tokens

    def _flagged(self, tokens: TokenBatch, trained: Bool) -> TokenBatch:
        """Return the tokens with these flags, but for those that are never trained."""
        if self.never:
            trained = trained & ~np.isin(tokens.input_ids, self.never)
        return TokenBatch(tokens.input_ids, trained, tokens.offsets, tokens.row)

    def _chosen(
        self, row: Conversation, rendered: RenderedConversation, index: int, tally: Tally
    ) -> list[Turn]:
        wanted = self._wanted(row)
        chosen = [turn for turn in rendered.turns if turn.message in wanted and turn.start < turn.stop]
        if rendered.reasoning_dropped:  # of turns that are only context, inference leaves it out too
            lost = {turn.message for turn in chosen} & {*rendered.reasoning_dropped}
            tally.count("reasoning_swallowed", index, len(lost))
        return chosen

    def _wanted(self, row: Conversation) -> set[int]:
        """Return the assistant messages that policy and the messages' own switches train."""
        assistants = assistant_messages(row)
        first = 0 if self.train_on == "assistant" else row.prompt_messages
        if self.train_on == "last-assistant":
            first = max(assistants, default=0)
        switches = row.trained
        return {
            index for index in assistants if switches[index] or (switches[index] is None and index >= first)
        }


@dataclass(frozen=True, slots=True)
class TextMarkers(Mask):
    """Train what follows response markers, looked for in the text before it is tokenized.

    Attributes:
        response: the marker before each answer.
        instruction: the marker before each question; None to train only what follows the last response
            marker.
    """

    response: str = ""
    instruction: str | None = None

    @property
    def overrules(self) -> str:
        """The response template."""
        return "response-template"

    @property
    def every_turn(self) -> bool:
        """False: markers decide."""
        return False

    def spans(self, row: Row, rendered: RenderedConversation, index: int, tally: Tally) -> Spans:
        """Return what follows the markers; control tokens that data spells are no part of one.

        Raises:
            RowError: the markers are not in the text.
        """
        if isinstance(row, Conversation):
            self._chosen(row, rendered, index, tally)
        marked = find_spans(_blanked(rendered.text, rendered.literal), self.response, self.instruction)
        tally.count("rows_with_repeated_markers", index, marked.repeated)
        size = len(rendered.text.encode())
        # An answer left empty at the end still has its end token to be generated.
        open_end = marked.closed and (not marked.spans or marked.spans[-1][1] < size)
        return Spans(marked.spans + [(size, size)] * open_end, marked.closed)


@dataclass(frozen=True, slots=True)
class IdMarkers(Mask):
    """Train what follows response markers, looked for in the ids.

    The spans of the text still say where it is cut before it is encoded.

    Attributes:
        response, instruction: as in `TextMarkers`, in ids.
    """

    response: tuple[int, ...] = ()
    instruction: tuple[int, ...] | None = None

    @property
    def overrules(self) -> str:
        """The response template."""
        return "response-template"

    def flags(self, tokens: TokenBatch, tally: Tally) -> TokenBatch:
        """Flag what follows the markers; a row without them is lost."""
        found = find_id_spans(tokens.input_ids, tokens.offsets, self.response, self.instruction)
        tally.count_rows("rows_with_repeated_markers", tokens.row[found.repeated])
        keep = np.ones(len(tokens), np.bool_)
        for index, fault in found.faults.items():
            tally.reject(int(tokens.row[index]), fault)
            keep[index] = False
        return self._flagged(tokens, found.trained).select(keep)


@dataclass(frozen=True, slots=True)
class TRL0710(IdMarkers):
    """Train what DataCollatorForCompletionOnlyLM of trl 0.7.10 did, quirks included.

    Attributes:
        pad_id: tokens with this id never have a label.
    """

    pad_id: int = 0

    def flags(self, tokens: TokenBatch, tally: Tally) -> TokenBatch:
        """Flag as the collator did; rows of which it would have warned are counted, and train nothing."""
        found = trl_0_7_10_mask(
            tokens.input_ids, tokens.offsets, self.response, self.instruction, self.pad_id
        )
        tally.count_rows("rows_without_response_marker", tokens.row[found.response_warned])
        tally.count_rows("rows_without_instruction_marker", tokens.row[found.instruction_warned])
        tally.count_rows("rows_masked_without_warning", tokens.row[found.silently_masked])
        return self._flagged(tokens, found.trained)


def choose_mask(config: PrepareConfig, tokenizer: ResolvedTokenizer, never: tuple[int, ...] = ()) -> Mask:
    """Choose what a run trains; nothing decides it later.

    Args:
        config: settings that contradict each other have been refused (acting.py).
        tokenizer: encodes a template that is looked for in ids and given as text, alone, as trl did.
        never: ids that are never trained.
    """
    response, instruction = config.response_template, config.instruction_template
    if response is None:
        return Mask(config.train_on, never=never)
    if config.mask_mode == "trl-0.7.10":
        first, second = (_ids_of(template, tokenizer) for template in (response, instruction))
        return TRL0710(never=never, response=first or (), instruction=second, pad_id=tokenizer.filler_id)
    if isinstance(response, str):
        text = None if instruction is None else str(instruction)
        return TextMarkers(never=never, response=response, instruction=text)
    return IdMarkers(never=never, response=tuple(response), instruction=_ids_of(instruction, tokenizer))


def as_rendered(text: str) -> RenderedConversation:
    """Return raw text as if it were a rendered conversation without turns."""
    return RenderedConversation(text, [], [], [], [])


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


def _ids_of(template: str | tuple[int, ...] | None, tokenizer: ResolvedTokenizer) -> tuple[int, ...] | None:
    if isinstance(template, str):
        return tuple(load_encoder(tokenizer, "tokenizers").encode([template])[0].tolist())
    return template


def _weights(row: Conversation, turns: list[Turn]) -> list[float] | None:
    weights = [row.trained[turn.message] for turn in turns]
    if not any(isinstance(weight, float) for weight in weights):
        return None
    return [1.0 if weight is None else float(weight) for weight in weights]


def _blanked(text: str, literal: Ranges) -> str:
    r"""Blank the control tokens that data spells, byte for byte: they are no part of a marker.

    >>> _blanked("[A]é[A]b", [(4, 7)])
    '[A]é\x00\x00\x00b'
    """
    parts, at = [], 0
    for start, stop in sorted(literal):
        parts += [text[at:start], "\0" * len(text[max(at, start) : stop].encode())]
        at = max(at, stop)
    return "".join([*parts, text[at:]])
