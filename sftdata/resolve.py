"""Which token ids a marker really has in the user's texts: the work behind `sftdata resolve`.

A tokenizer may give a marker other ids inside a text than alone: a Llama-2-like one writes `### Assistant:`
with a leading space mark at the start of a text and without it after a newline, and any BPE may join its edge
with what is beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from sftdata.batches import Int64, Ranges, Tally
from sftdata.config import PrepareConfig
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import DataError, UsageError
from sftdata.formats.convert import convert_rows
from sftdata.masks.markers import check_markers
from sftdata.masks.texts import render_rows
from sftdata.pipeline import Stages
from sftdata.plan import make_plan
from sftdata.sources.source import read_chunk

Encoded = tuple[list[int], Ranges]
"""Ids of one text, and the (start, stop) characters of each token."""
EncodeWithOffsets = Callable[[Sequence[str]], list[Encoded]]

_TEXTS_AT_ONCE = 256
_CONTEXT_SHOWN = 24


@dataclass(frozen=True, slots=True)
class MarkerIds:
    """One id sequence that a marker has in the texts.

    Attributes:
        ids: the shortest run of tokens that covers the marker.
        starts_inside, ends_inside: the first token begins before the marker, the last one ends after it.
        count: occurrences with these ids.
        row: index of the first text with them; `before` and `after`: the text around the marker there.
    """

    ids: tuple[int, ...]
    starts_inside: bool
    ends_inside: bool
    count: int
    row: int
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """A marker in context.

    Attributes:
        marker: the text looked for.
        texts, texts_with_marker, occurrences: how many there are.
        alone: the ids of the marker encoded by itself, which is all that TRL's collators look for.
        alone_count: occurrences that have exactly those ids.
        sequences: every distinct id sequence, the most frequent first.
    """

    marker: str
    texts: int
    texts_with_marker: int
    occurrences: int
    alone: tuple[int, ...]
    alone_count: int
    sequences: tuple[MarkerIds, ...]


def resolve_markers(config: PrepareConfig, rows: int) -> list[Resolution]:
    """Find out which token ids the response and instruction templates have in the texts of up to `rows` rows.

    Raises:
        UsageError: no template is given, or one is given as ids.
        DataError: no row can be rendered.
    """
    markers = [
        marker for marker in (config.response_template, config.instruction_template) if marker is not None
    ]
    if not markers or not all(isinstance(marker, str) for marker in markers):
        raise UsageError(
            "No marker is given as text, so there is nothing to resolve.",
            "--response-template '### Assistant:'",
        )
    plan = make_plan(
        config.model_copy(
            update={"response_template": None, "instruction_template": None, "engine": "tokenizers"}
        )
    )
    stages = Stages(plan.job)
    texts: list[str] = []
    for number, source in enumerate(plan.sources):
        for chunk in source.chunks:
            batch = read_chunk(chunk, config.max_line_bytes)[0]
            tally = Tally(batch)
            converted = convert_rows(batch, plan.job.formats[number], plan.job.options_of(number), tally)
            rendered = render_rows(converted.rows, converted.row, stages.renderer, tally)
            texts += [
                text
                for part in (rendered.conversations, rendered.raw)
                if part is not None
                for text in part.texts
            ]
            if len(texts) >= rows:
                break
    if not texts:
        raise DataError("No row could be rendered.", "see `sftdata preview` for the reasons.")
    return [
        resolve_marker(texts[:rows], str(marker), partial(_encode, plan.job.tokenizer)) for marker in markers
    ]


def resolve_marker(texts: Sequence[str], marker: str, encode: EncodeWithOffsets) -> Resolution:
    """Find every token id sequence that a marker has in the texts.

    Args:
        texts: rendered texts.
        marker: the text of a response or instruction template.
        encode: ids and character offsets (start, stop) of every token, for a list of texts.

    Raises:
        UsageError: the marker is empty.

    >>> letters = lambda text: ([ord(char) for char in text], [(i, i + 1) for i in range(len(text))])
    >>> resolve_marker(["a>b", "c"], ">", lambda texts: list(map(letters, texts))).sequences[0].ids
    (62,)
    """
    check_markers(marker, None)
    found: dict[tuple[tuple[int, ...], bool, bool], MarkerIds] = {}
    with_marker = [row for row, text in enumerate(texts) if marker in text]
    for row, (ids, offsets) in _encode_in_parts(texts, with_marker, encode):
        for one in _occurrences(texts[row], marker, row, ids, offsets):
            key = (one.ids, one.starts_inside, one.ends_inside)
            known = found.get(key)
            found[key] = one if known is None else replace(known, count=known.count + 1)

    alone = next(_occurrences(marker, marker, 0, *encode([marker])[0])).ids
    sequences = sorted(
        found.values(), key=lambda one: (-one.count, one.ids, one.starts_inside, one.ends_inside)
    )
    return Resolution(
        marker=marker,
        texts=len(texts),
        texts_with_marker=len(with_marker),
        occurrences=sum(one.count for one in sequences),
        alone=alone,
        alone_count=sum(one.count for one in sequences if one.ids == alone),
        sequences=tuple(sequences),
    )


def _encode(resolved: ResolvedTokenizer, texts: Sequence[str]) -> list[Encoded]:
    """EncodeWithOffsets texts with the reference."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(resolved.folder / "tokenizer.json"))
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [(encoding.ids, encoding.offsets) for encoding in encodings]


def _encode_in_parts(
    texts: Sequence[str], rows: list[int], encode: EncodeWithOffsets
) -> Iterator[tuple[int, Encoded]]:
    # Offsets as Python tuples weigh much more than the text: hold those of a few texts at a time.
    for first in range(0, len(rows), _TEXTS_AT_ONCE):
        part = rows[first : first + _TEXTS_AT_ONCE]
        yield from zip(part, encode([texts[row] for row in part]), strict=True)


def _occurrences(text: str, marker: str, row: int, ids: list[int], offsets: Ranges) -> Iterator[MarkerIds]:
    """Yield the covering run of tokens for every occurrence of the marker, with a count of 1."""
    positions, starts, stops = _territories(offsets)
    for match in re.finditer(re.escape(marker), text):
        start, stop = match.span()
        first = int(np.searchsorted(stops, start, side="right"))
        last = int(np.searchsorted(starts, stop, side="left")) - 1
        covered = first <= last
        yield MarkerIds(
            ids=tuple(ids[positions[first] : positions[last] + 1]) if covered else (),
            starts_inside=bool(covered and starts[first] < start),
            ends_inside=bool(covered and stops[last] > stop),
            count=1,
            row=row,
            before=text[max(0, start - _CONTEXT_SHOWN) : start],
            after=text[stop : stop + _CONTEXT_SHOWN],
        )


def _territories(offsets: Ranges) -> tuple[Int64, Int64, Int64]:
    """Return index, start and stop of the tokens that stand for characters (BOS and EOS stand for none).

    Characters no token claims, as the spaces of a tokenizer that trims its offsets, belong to the token after
    them.
    """
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    positions = np.flatnonzero(pairs[:, 1] > pairs[:, 0])
    starts, stops = pairs[positions].T
    stops = np.maximum.accumulate(stops)
    claimed = np.concatenate([[0], stops])[: len(stops)]
    return positions, np.minimum(starts, claimed), stops
