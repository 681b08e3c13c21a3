"""Turn texts with trained spans into tokens, each with a flag: whether the model must generate it.

    locate ──> cut what straddles an edge ──> flag the tokens inside spans ──> BOS and EOS (raw texts)

All of it is array work over the whole batch; single rows are touched only where a position is in doubt, where
data spells a control token, or where a text must be cut at the edge of a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NoReturn

import numpy as np

from sftdata.batches import (
    IGNORE_INDEX,
    Bool,
    Float32,
    Int32,
    Int64,
    Tally,
    TextBatch,
    TokenBatch,
    Tokens,
    offsets_of,
    positions_of,
)
from sftdata.encode.engine import Encoder
from sftdata.encode.places import Places, cut_rows, edges_of, locate, straddled
from sftdata.encode.tokenizer import ResolvedTokenizer
from sftdata.errors import RowError, UsageError
from sftdata.output import counted
from sftdata.pictures.stretch import ImageRuns, refuse_stray, stretch


def encode_batch(
    batch: TextBatch,
    encoder: Encoder,
    tally: Tally,
    *,
    boundary: Literal["split", "merge"] = "split",
    images: ImageRuns | None = None,
) -> TokenBatch:
    """Encode rendered texts and flag the tokens that lie in trained ranges.

    Args:
        batch: texts with their trained and literal byte ranges.
        encoder: the tokenizer with one of its engines; ids do not depend on which.
        tally: counts what encoding had to do beyond the ordinary: `boundary_splits`, places where a text was
            cut at the edge of a span (with "merge": edges inside a token), and `boundary_rows` with such a
            place; `literal_rows`, whose data spells a control token; `slow_rows`, placed by the reference's
            own offsets; `bos_found`, `eos_found`, raw texts that begin or end with it themselves;
            `eos_added`, raw texts closed.
        boundary: "split" cuts a text where a token would straddle the edge of a range, so that the ids before
            it equal those of the text before it; "merge" keeps the joint encoding and trains every token that
            overlaps a range, as TRL 1.x does.
        images: the pictures in the texts; None in a set without pictures. Such texts are encoded as the
            processor does it, which writes BOS where they have none.

    Raises:
        UsageError: texts must be closed and the tokenizer has no end token.
    """
    raws = [text.encode() for text in batch.texts]
    merge = boundary == "merge"
    nothing_cut = np.zeros(len(raws), np.bool_)
    places, slow = locate(encoder, batch.texts, raws, batch.literal, nothing_cut, reach=merge)
    edges = edges_of(batch.trained, places.base)
    if merge:
        inside = straddled(places, edges)
        splits, rows = int(inside.sum()), len(np.unique(edges.row[inside]))
    else:
        places, splits, rows = cut_rows(places, encoder, edges, raws, batch.literal)
    trained, weights = _trained(places, batch, merge)
    tokens = TokenBatch(places.tokens.ids, trained, places.offsets, batch.row, weights)
    if images is not None:
        tokens = _with_images(tokens, images, encoder.resolved, tally)
    tally.counts["boundary_splits"] += splits
    tally.counts["boundary_rows"] += rows
    tally.counts["literal_rows"] += int((np.diff(batch.literal.offsets) > 0).sum())
    tally.counts["slow_rows"] += slow
    if not batch.reference_ends:
        return tokens
    blank = _blank_behind_end(tokens, batch, encoder.resolved)
    return _with_ends(tokens, encoder, batch.closed, _runs_to_end(batch, places), blank, tally)


def _with_images(
    tokens: TokenBatch, images: ImageRuns, resolved: ResolvedTokenizer, tally: Tally
) -> TokenBatch:
    """Repeat image tokens as often as their runs are long, and train nothing that stands for a picture."""
    ids = {token.content: token.id for token in resolved.added_tokens}
    if images.token not in ids:
        what = f"Tokenizer {resolved.name!r} has no token {images.token!r}, which stands for pictures."
        raise UsageError(what, "use the tokenizer of the model.")
    never = np.isin(tokens.input_ids, [ids[token] for token in images.never_trained if token in ids])
    tokens = replace(tokens, trained=tokens.trained & ~never)
    known = refuse_stray(tokens, ids[images.token], images.counts, images.token, tally)
    kept = np.isin(tokens.row, known.row)
    runs = images.lengths[np.repeat(kept, images.counts)]
    return _with_bos(stretch(known, ids[images.token], runs), resolved)


def _with_bos(tokens: TokenBatch, resolved: ResolvedTokenizer) -> TokenBatch:
    """Write the reference's BOS, never trained, before each example that does not begin with it."""
    prefix, none = np.array(resolved.prefix_ids, np.int32), np.zeros(len(tokens), np.bool_)
    opens = ~_holds(tokens, tokens.offsets[:-1], prefix) & (len(prefix) > 0)
    return _between(tokens, prefix, opens, prefix[:0], none, none) if opens.any() else tokens


def _trained(places: Places, batch: TextBatch, merge: bool) -> tuple[Bool, Float32 | None]:
    """bool[T], tokens that start inside a range (`merge`: overlap one), and float32[T], their weights."""
    row = np.repeat(np.arange(len(batch)), np.diff(batch.trained.offsets))
    filled = batch.trained.values[:, 1] > batch.trained.values[:, 0]
    row = row[filled]
    span = batch.trained.values[filled] + places.base[row, None]
    tokens = places.tokens
    # Positions ascend over the whole batch, so one search finds the tokens of all spans: from the first that
    # starts inside (`merge`: that ends inside) to the first that starts after the span.
    first = np.searchsorted(tokens.starts, span[:, 0])
    if merge:
        first = np.minimum(first, np.searchsorted(tokens.ends, span[:, 0], "right"))
    stop = np.searchsorted(tokens.starts, span[:, 1])
    # Tokens of no length share a position with the next text: keep each span within its own row.
    first = np.clip(first, places.offsets[row], places.offsets[row + 1])
    stop = np.clip(stop, places.offsets[row], places.offsets[row + 1])
    sizes = np.maximum(stop - first, 0)
    inside = positions_of(first, sizes)
    trained = np.zeros(len(tokens.ids), np.bool_)
    trained[inside] = True
    if batch.loss_weights is None:
        return trained, None
    weights = trained.astype(np.float32)
    weights[inside] = np.repeat(batch.loss_weights[filled], sizes)
    return trained, weights


def _runs_to_end(batch: TextBatch, places: Places) -> Bool:
    """bool[N]: rows whose last trained range reaches the end of the text, even an empty one there."""
    # Shifted by one, index offsets[i + 1] is the last range of row i, or of an earlier row if it has none.
    last = np.append(-1, batch.trained.values[:, 1])[batch.trained.offsets[1:]]
    reaches: Bool = (np.diff(batch.trained.offsets) > 0) & (last == np.diff(places.base))
    return reaches


def _blank_behind_end(tokens: TokenBatch, batch: TextBatch, resolved: ResolvedTokenizer) -> Int64:
    """int64[N], tokens of whitespace after an EOS that ends the text, which it untrains."""
    blank = np.zeros(len(batch), np.int64)
    for index, text in enumerate(batch.texts):
        if (
            not text[-1:].isspace()
            or not batch.closed[index]
            or not text.rstrip().endswith(resolved.eos_token or text)
        ):
            continue
        start, stop = tokens.offsets[index : index + 2].tolist()
        ends = np.flatnonzero(tokens.input_ids[start:stop] == resolved.eos_id)
        if len(ends):
            blank[index] = stop - start - 1 - ends[-1]
            tokens.trained[stop - blank[index] : stop] = False
    return blank


def _with_ends(
    tokens: TokenBatch, encoder: Encoder, closed: Bool, runs_to_end: Bool, blank: Int64, tally: Tally
) -> TokenBatch:
    """Write BOS before and EOS after, as the reference does but never where the text has it already."""
    resolved = encoder.resolved
    prefix, suffix = np.array(resolved.prefix_ids, np.int32), np.array(resolved.closing_ids, np.int32)
    if closed.any() and not len(suffix):
        what = f"Tokenizer {resolved.name!r} names no end token, so texts cannot be closed."
        raise UsageError(what, "--eos-token TOKEN")
    opened = _holds(tokens, tokens.offsets[:-1], prefix)
    ended = closed & (_holds(tokens, tokens.offsets[1:] - len(suffix), suffix) | (blank > 0))
    closes = closed & ~ended & (len(suffix) > 0)
    tally.counts["bos_found"] += int(opened.sum())
    tally.counts["eos_found"] += int(ended.sum())
    tally.counts["eos_added"] += int(closes.sum())
    return _between(tokens, prefix, ~opened, suffix, closes, runs_to_end)


def _between(
    tokens: TokenBatch, prefix: Int32, opens: Bool, suffix: Int32, closes: Bool, trained: Bool
) -> TokenBatch:
    """Write ids before the examples of `opens`, bool[N], never trained, and after those of `closes`.

    Args:
        trained: bool[N], whether what is written after an example is trained.
    """
    before, after = opens * len(prefix), closes * len(suffix)
    offsets = offsets_of(tokens.lengths + before + after)
    ids, flags = np.empty(offsets[-1], np.int32), np.zeros(offsets[-1], np.bool_)
    weights = None if tokens.loss_weights is None else np.zeros(offsets[-1], np.float32)
    target = positions_of(offsets[:-1] + before, tokens.lengths)
    ids[target], flags[target] = tokens.input_ids, tokens.trained
    if weights is not None:
        weights[target] = tokens.weights()
    for column, value in enumerate(prefix):
        ids[offsets[:-1][opens] + column] = value
    for column, value in enumerate(suffix, start=-len(suffix)):
        tails = offsets[1:][closes] + column
        ids[tails], flags[tails] = value, trained[closes]
    return TokenBatch(ids, flags, offsets, tokens.row, weights)


def _holds(tokens: TokenBatch, starts: Int64, pattern: Int32) -> Bool:
    """bool[N]: examples that hold a pattern, from these places on; none holds one of no ids."""
    found = tokens.lengths >= max(len(pattern), 1)
    for column, value in enumerate(pattern):
        found[found] = tokens.input_ids[starts[found] + column] == value
    return found & (len(pattern) > 0)


def read_given(rows: Sequence[Tokens], row: Int64, resolved: ResolvedTokenizer, tally: Tally) -> TokenBatch:
    """Turn pre-tokenized rows into a batch; a token is trained where its label is its own id.

    Args:
        rows: ids with labels.
        row: int64[N], index of each into the RowBatch.
        resolved: the tokenizer whose ids they should be.
        tally: takes the rows that are not such.
    """
    ids, trained, kept = [], [], []
    for index, item in zip(row.tolist(), rows, strict=True):
        try:
            row_ids, row_trained = check_tokens(item, resolved)
        except RowError as error:
            tally.reject(index, error.fault)
            continue
        ids.append(row_ids)
        trained.append(row_trained)
        kept.append(index)
    return TokenBatch(
        np.concatenate([np.zeros(0, np.int32), *ids]),
        np.concatenate([np.zeros(0, np.bool_), *trained]),
        offsets_of(np.array(list(map(len, ids)), np.int64)),
        np.array(kept, np.int64),
    )


def check_tokens(item: Tokens, resolved: ResolvedTokenizer) -> tuple[Int32, Bool]:
    """Return the ids of a pre-tokenized row, int32[T], and which are trained, bool[T].

    Raises:
        RowError: ids that the tokenizer does not have, or labels that are not those of the ids.
    """
    if len(item.input_ids) != len(item.labels):
        found = f"{len(item.input_ids)} input_ids but {counted(len(item.labels), 'label')}"
        raise RowError("lengths-differ", found, "give one label per token, -100 where it is not trained")
    ids, labels = _integers("input_ids", item.input_ids), _integers("labels", item.labels)
    outside = np.flatnonzero((ids < 0) | (ids >= resolved.vocab_size))
    if len(outside):
        known = f"0..{resolved.vocab_size - 1} of tokenizer {resolved.name!r}"
        found = f"token id {ids[outside[0]]} is outside {known}"
        raise RowError("id-outside-vocabulary", found, "use the tokenizer that made the ids (-t)")
    trained = labels != IGNORE_INDEX
    other = np.flatnonzero(trained & (labels != ids))
    if len(other):
        _refuse_labels(ids, labels, other)
    return ids.astype(np.int32), trained


def _refuse_labels(ids: Int64, labels: Int64, other: Int64) -> NoReturn:
    """Refuse labels that are not the ids at their places, int64[K]."""
    first = int(other[0])
    found = f"labels[{first}] is {labels[first]}, input_ids[{first}] is {ids[first]}"
    fix = "give unshifted labels: the id itself where trained, -100 elsewhere"
    for step in (1, -1):
        there = other[(other + step >= 0) & (other + step < len(ids))]
        if len(there) > 1 and (labels[there] == ids[there + step]).all():
            found += f"; labels are the ids of the tokens {'after' if step > 0 else 'before'} them"
            raise RowError("labels-shifted", found, fix)
    raise RowError("label-not-the-id", found, fix)


def _integers(name: str, values: list[int]) -> Int64:
    array = np.array(values or np.zeros(0, np.int64))
    if array.dtype != np.int64 or array.ndim != 1:
        found = f"{name} holds something else than integers: {str(values)[:60]}"
        raise RowError("not-token-ids", found, "give a flat list of integers")
    return array
