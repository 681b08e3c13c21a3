"""Response and instruction markers in running text: which stretch of each text or token row is trained.

A text with markers of its own (`### Human:` ... `### Assistant:` ...) tells where the answers are.
Markers are looked for in the *text*, before any tokenizer, so it does not matter into which ids a tokenizer
turns them there. Markers given as token ids are looked for in the ids instead, with the same rules:

1. Markers are found left to right without overlap; where two begin at one place the longer one counts.
2. Trained is what is between the end of a response marker and the next marker of either kind, or the end of
   the row.
   A marker itself is never trained: at inference it is given, not generated.
3. Without an instruction marker it is unknown where an earlier answer ends and the next question begins,
   so only the stretch after the *last* response marker is trained. `repeated` counts the rows where that left
   answers out.
4. A row without a response marker is a fault (`no-response-marker`). So is a row with several response
   markers and none of the instruction markers that were asked for (`no-instruction-marker`): there, questions
   would be trained as answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int32, Int64, Ranges
from sftdata.errors import Fault, RowError, UsageError
from sftdata.wording import shell_quote

Marker = str | tuple[int, ...]
_HEADERS_SHOWN = 3
_TEXT_SHOWN = 40


class TextAnswers(NamedTuple):
    """The answers in one text.

    Attributes:
        spans: byte ranges (utf-8) to train, ascending, disjoint, none empty.
        closed: the text ends inside an answer (an empty one too), so a trained EOS belongs after it.
        repeated: a response marker follows another with no instruction marker between.
    """

    spans: Ranges
    closed: bool
    repeated: bool


@dataclass(frozen=True, slots=True, eq=False)
class TokenAnswers:
    """The answers in N token rows.

    Attributes:
        trained: bool[T], all False in a faulty row.
        repeated: bool[N], as in `TextAnswers`.
        faults: index of a row -> why it cannot be used.
    """

    trained: Bool
    repeated: Bool
    faults: dict[int, Fault]


def check_markers(response: Marker, instruction: Marker | None) -> None:
    """Refuse markers that cannot tell answers from instructions.

    Raises:
        UsageError: a marker is empty, both are the same, or one is text and the other token ids.
    """
    if len(response) == 0 or (instruction is not None and len(instruction) == 0):
        what = "A response or instruction template is empty; expected text or token ids."
        raise UsageError(what, "leave the option out.")
    if response == instruction:
        what = f"Response and instruction template are both {response!r}."
        raise UsageError(what, "give what begins each kind of turn.")
    if instruction is not None and isinstance(response, str) != isinstance(instruction, str):
        what = f"Response template {response!r} and instruction template {instruction!r} are not of one kind."
        raise UsageError(what, "give both as text, or both as the token ids that `sftdata resolve` prints.")


# ---------------------------------------------------------------------------------------------- text


def find_spans(text: str, response: str, instruction: str | None = None) -> TextAnswers:
    r"""Find the byte ranges of a text that follow its response markers.

    Raises:
        RowError: `no-response-marker` or `no-instruction-marker`; the fix names the nearest variant the text
            holds.
        UsageError: the markers are unusable, see `check_markers`.

    >>> find_spans("Human: hi\nBot: hé\nHuman: bye\nBot: ok", "Bot:", "Human:").spans
    [(14, 19), (34, 37)]
    """
    check_markers(response, instruction)
    data = text.encode("utf-8", "surrogatepass")
    markers = _text_markers(data, response, instruction)
    responses = sum(is_response for _, _, is_response in markers)
    if responses == 0:
        raise RowError("no-response-marker", *describe_missing("response", response, text))
    if instruction is not None and responses == len(markers) > 1:
        raise RowError("no-instruction-marker", *describe_missing("instruction", instruction, text))

    stops = [start for start, _, _ in markers[1:]] + [len(data)]
    answers = [(marker[1], stop) for marker, stop in zip(markers, stops, strict=True) if marker[2]]
    repeated = any(one[2] and two[2] for one, two in pairwise(markers))
    if instruction is None:
        answers = answers[-1:]
    return TextAnswers([span for span in answers if span[0] < span[1]], markers[-1][2], repeated)


def _text_markers(data: bytes, response: str, instruction: str | None) -> list[tuple[int, int, bool]]:
    """Return start, stop and whether it is a response, of all markers in order, without overlap."""
    # utf-8 never matches inside a character, so a byte search finds what a text search finds, byte positions
    # included.
    found = [
        (start, -size, True) for start, size in _find_all(data, response.encode("utf-8", "surrogatepass"))
    ]
    if instruction is not None:
        found += [
            (start, -size, False)
            for start, size in _find_all(data, instruction.encode("utf-8", "surrogatepass"))
        ]
    markers: list[tuple[int, int, bool]] = []
    for start, minus_size, is_response in sorted(found):
        if not markers or start >= markers[-1][1]:
            markers.append((start, start - minus_size, is_response))
    return markers


def _find_all(data: bytes, marker: bytes) -> Iterator[tuple[int, int]]:
    start = data.find(marker)
    while start >= 0:
        yield start, len(marker)
        start = data.find(marker, start + 1)


# --------------------------------------------------------------------------------------------- tokens


def match_ids(input_ids: Int32, offsets: Int64, pattern: Sequence[int]) -> Int64:
    """Return every position where a run of ids begins, overlapping ones included, none across two rows.

    Args:
        input_ids: int32[T], the ids of all rows end to end.
        offsets: int64[N + 1], where rows begin.
        pattern: the ids to look for, at least one.

    >>> match_ids(np.array([7, 7, 7, 7], np.int32), np.array([0, 3, 4]), [7, 7]).tolist()
    [0, 1]
    """
    size = len(pattern)
    starts = np.flatnonzero(input_ids[: max(0, len(input_ids) - size + 1)] == pattern[0])
    for step in range(1, size):
        starts = starts[input_ids[starts + step] == pattern[step]]
    return starts[starts + size <= offsets[_row_of(starts, offsets) + 1]]


def _row_of(positions: Int64, offsets: Int64) -> Int64:
    return np.searchsorted(offsets, positions, side="right") - 1


def find_id_spans(
    input_ids: Int32,
    offsets: Int64,
    response_ids: Sequence[int],
    instruction_ids: Sequence[int] | None = None,
) -> TokenAnswers:
    """Mark the tokens that follow response markers given as ids, the EOS at the end of an answer included.

    Args:
        input_ids: int32[T], the ids of all rows end to end, BOS and EOS included.
        offsets: int64[N + 1], where rows begin.
        response_ids: the marker before each answer, as `sftdata resolve` prints it.
        instruction_ids: the marker before each question.

    Raises:
        UsageError: the markers are unusable, see `check_markers`.

    >>> row = np.array([1, 9, 5, 6, 8, 5, 9, 7, 2], np.int32)
    >>> find_id_spans(row, np.array([0, 9]), [9], [8]).trained.astype(int).tolist()
    [0, 0, 1, 1, 0, 0, 0, 1, 1]
    """
    check_markers(tuple(response_ids), None if instruction_ids is None else tuple(instruction_ids))
    starts, stops, is_response = _id_markers(input_ids, offsets, response_ids, instruction_ids)
    row = _row_of(starts, offsets)
    rows = len(offsets) - 1
    responses = np.bincount(row[is_response], minlength=rows)
    instructions = np.bincount(row[~is_response], minlength=rows)

    # An answer lasts until the next marker of its row, or the end of the row.
    last_in_row = np.append(row[1:] != row[:-1], True)[: len(row)]
    until = np.where(last_in_row, offsets[row + 1], np.append(starts[1:], 0)[: len(row)])
    answers = is_response & (last_in_row if instruction_ids is None else True) & (stops < until)
    faults = _id_faults(responses, instructions, response_ids, instruction_ids)
    answers &= ~np.isin(row, np.fromiter(faults, np.int64, len(faults)))

    # A response that follows another without an instruction between them.
    follows = is_response[1:] & is_response[:-1] & ~last_in_row[:-1]
    repeated = np.bincount(row[1:][follows], minlength=rows) > 0
    return TokenAnswers(_paint(len(input_ids), stops[answers], until[answers]), repeated, faults)


def _id_markers(
    input_ids: Int32, offsets: Int64, response_ids: Sequence[int], instruction_ids: Sequence[int] | None
) -> tuple[Int64, Int64, Bool]:
    """Return starts, stops and kind of all markers in order, without overlap."""
    response = match_ids(input_ids, offsets, response_ids)
    instruction = match_ids(input_ids, offsets, instruction_ids) if instruction_ids else response[:0]
    starts = np.concatenate([response, instruction])
    sizes = np.repeat([len(response_ids), len(instruction_ids or ())], [len(response), len(instruction)])
    order = np.lexsort((-sizes, starts))
    is_response = np.arange(len(starts)) < len(response)
    starts, stops, is_response = starts[order], (starts + sizes)[order], is_response[order]
    if np.all(starts[1:] >= stops[:-1]):
        return starts, stops, is_response
    kept, end = [], 0
    for index, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        if start >= end:
            kept.append(index)
            end = stop
    return starts[kept], stops[kept], is_response[kept]


def _id_faults(
    responses: Int64, instructions: Int64, response_ids: Sequence[int], instruction_ids: Sequence[int] | None
) -> dict[int, Fault]:
    fix = "take the ids that `sftdata resolve` prints for this data, or give the template as text."
    reason = f"the response template {list(response_ids)} does not occur in the row's token ids."
    faults = {int(row): Fault("no-response-marker", reason, fix) for row in np.flatnonzero(responses == 0)}
    if instruction_ids is not None:
        reason = (
            f"the row has several responses, but {list(instruction_ids)}, the instruction template,"
            " is not in its token ids."
        )
        unclear = np.flatnonzero((responses > 1) & (instructions == 0))
        faults |= {int(row): Fault("no-instruction-marker", reason, fix) for row in unclear}
    return dict(sorted(faults.items()))


def _paint(size: int, starts: Int64, stops: Int64) -> Bool:
    """Return bool[size], True inside the ranges, which are disjoint and not empty."""
    steps = np.zeros(size + 1, np.int8)  # +1 where a range starts, -1 where one stops; the sum is 1 inside
    steps[starts] += 1
    steps[stops] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8) > 0


# ------------------------------------------------------------------------------------- a missing marker


def describe_missing(kind: str, marker: str, text: str) -> tuple[str, str]:
    r"""Return reason and fix for a text in which a marker does not occur.

    Args:
        kind: `response` or `instruction`, as in the option's name.
        marker: what was looked for.
        text: where.

    >>> describe_missing("response", "### Assistant:", "### Human: hi\n### assistant : yes")[0]
    "the response template '### Assistant:' does not occur in the text; found '### assistant :'."
    """
    reason = f"the {kind} template {marker!r} does not occur in the text"
    if near := nearest_variant(marker, text):
        return f"{reason}; found {near!r}.", f"--{kind}-template {shell_quote(near)}, or fix the row."
    fix = f"set --{kind}-template to the marker that this text uses, or take the row out."
    if headers := _headers_like(marker, text):
        return f"{reason}; it has {', '.join(map(repr, headers))}.", fix
    return f"{reason}, which begins {text[:_TEXT_SHOWN]!r}.", fix


def nearest_variant(marker: str, text: str) -> str | None:
    r"""Return the first stretch of the text that is the marker but for spacing, case, or colon width.

    A marker typed with a backslash and an n, as shells pass it, is tried as the newline it stands for.

    >>> nearest_variant("\\n### Answer:", "x\n### Answer: y")
    '\n### Answer:'
    """
    unescaped = marker.replace(r"\n", "\n").replace(r"\t", "\t")
    if unescaped in text:
        return unescaped
    pieces = [
        re.escape(piece) if piece not in ":：" else "[:：]" for piece in re.findall(r"\w+|[^\w\s]", unescaped)
    ]
    found = re.search(r"\s*".join(pieces), text, re.IGNORECASE) if pieces else None
    return found.group() if found else None


def _headers_like(marker: str, text: str) -> list[str]:
    """Return the first distinct line starts with the marker's own punctuation (`###`, `<|`, `[`)."""
    lead = re.match(r"\s*([^\w\s]+)", marker)
    if lead is None:
        return []
    header = rf"^[ \t]*({re.escape(lead.group(1))}[^\n:\]>]{{0,24}}[:\]>]?)"
    return list(dict.fromkeys(re.findall(header, text, re.MULTILINE)))[:_HEADERS_SHOWN]


@dataclass(frozen=True, slots=True, eq=False)
class TrlMask:
    """Trained tokens of N rows, and what the collator would have warned of.

    Attributes:
        trained: bool[T].
        response_warned: bool[N], rows with "Could not find response key"; all masked.
        instruction_warned: bool[N], rows with "Could not find instruction key"; all masked.
        silently_masked: bool[N], rows that train nothing although no warning was given.
    """

    trained: Bool
    response_warned: Bool
    instruction_warned: Bool
    silently_masked: Bool


def trl_0_7_10_mask(
    input_ids: Int32,
    offsets: Int64,
    response_ids: Sequence[int],
    instruction_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> TrlMask:
    """Mask rows as the collator did.

    Args:
        input_ids: int32[T], the ids of all rows end to end, BOS and EOS included, no padding.
        offsets: int64[N + 1], where rows begin.
        response_ids: the response template; a text was encoded alone there, without special tokens.
        instruction_ids: the instruction template, likewise.
        pad_token_id: tokens with this id are masked *before* the search: when it is the EOS, no EOS is ever
            trained, and a template that holds it is never found.

    Raises:
        UsageError: a template is empty.
    """
    if len(response_ids) == 0 or (instruction_ids is not None and len(instruction_ids) == 0):
        what = "A response or instruction template has no token ids."
        raise UsageError(what, "give a template, or leave the option out.")
    labels = input_ids
    if pad_token_id is not None:
        labels = np.where(input_ids == pad_token_id, IGNORE_INDEX, input_ids)
    trained = labels != IGNORE_INDEX
    ends = _matches_by_row(labels, offsets, response_ids)
    response_warned = np.array([len(row) == 0 for row in ends], np.bool_)
    instruction_warned = np.zeros(len(ends), np.bool_)
    if instruction_ids is None:
        for row, view in enumerate(_rows(trained, offsets)):
            _mask_until_last(view, (ends[row] + len(response_ids)).tolist())
    else:
        starts = _matches_by_row(labels, offsets, instruction_ids)
        # A row without a response is masked before instructions are looked for, so there both warnings come.
        instruction_warned = response_warned | np.array([len(row) == 0 for row in starts], np.bool_)
        for row, view in enumerate(_rows(trained, offsets)):
            _mask_turns(view, starts[row].tolist(), (ends[row] + len(response_ids)).tolist())

    before = np.concatenate([[0], np.cumsum(trained)])
    nothing_trained = before[offsets[1:]] == before[offsets[:-1]]
    return TrlMask(
        trained, response_warned, instruction_warned, nothing_trained & ~response_warned & ~instruction_warned
    )


def _rows(values: Bool, offsets: Int64) -> list[Bool]:
    """Return one view per row."""
    return [
        values[start:stop] for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


def _matches_by_row(labels: Int32, offsets: Int64, pattern: Sequence[int]) -> list[Int64]:
    """Return for every row where the pattern begins, counted from the row's start."""
    starts = match_ids(labels, offsets, pattern)
    bounds = np.searchsorted(starts, offsets).tolist()
    firsts = offsets[:-1].tolist()
    return [
        starts[low:high] - first for low, high, first in zip(bounds[:-1], bounds[1:], firsts, strict=True)
    ]


def _mask_until_last(trained: Bool, ends: list[int]) -> None:
    """Unmark up to the end of the last response marker; everything, where there is none."""
    trained[: ends[-1] if ends else None] = False


def _mask_turns(trained: Bool, starts: list[int], ends: list[int]) -> None:
    """Unmark from the i-th instruction to the end of the i-th response marker: paired by rank."""
    if not starts or not ends:
        trained[:] = False
        return
    if starts[0] > ends[0]:
        starts = [0, *starts]
    pairs = list(zip(starts, ends, strict=False))
    trained[: pairs[0][1]] = False
    for start, end in pairs[1:]:
        trained[start:end] = False
    if len(ends) < len(starts):
        trained[starts[-1] :] = False
