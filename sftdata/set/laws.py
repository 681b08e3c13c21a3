"""Laws of packed rows: what no row of a set may break, whoever made it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sftdata.batches import IGNORE_INDEX, Bool, Int64, PackedRows, offsets_of, positions_of
from sftdata.errors import ANEW, IntegrityError
from sftdata.set.manifest import Manifest


def broken_laws(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    """Yield what is wrong with packed rows: int64[K], the rows concerned, and what is wrong with them.

    Where the documents do not add up to their rows nothing else is looked at, since nothing else has a place.
    """
    misshapen = False
    for where, what in _shape(rows, manifest):
        misshapen = True
        yield where, what
    if not misshapen:
        yield from _segments(rows, manifest)
        yield from _tokens(rows, manifest)


def _shape(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    summed = offsets_of(rows.seq_lengths)
    width = np.diff(rows.row_offsets)
    yield from _rows(rows.segment_offsets, rows.seq_lengths < 1, "a document has no tokens")
    yield from _finding(
        np.flatnonzero(np.diff(summed[rows.segment_offsets]) != width),
        "seq_lengths do not sum to the length of the row",
    )
    yield from _finding(np.flatnonzero(np.diff(rows.segment_offsets) < 1), "the row holds nothing")
    if manifest.max_length is not None:
        yield from _finding(
            np.flatnonzero(width != manifest.max_length), f"the row is not {manifest.max_length} tokens long"
        )


def refuse_unlawful(path: Path, batches: Iterable[PackedRows], manifest: Manifest) -> None:
    """Refuse a shard whose rows break a law, so that no reader meets an id, label or length that cannot be.

    Raises:
        IntegrityError: naming the first row and what is wrong with it.
    """
    first = 0
    for batch in batches:
        for rows, what in broken_laws(batch, manifest):
            raise IntegrityError(f"{path}: row {first + int(rows[0])}: {what}.", ANEW)
        first += len(batch)


def _segments(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    ids = rows.example_ids
    known = sum(
        source.rows for source in manifest.sources
    )  # read_manifest saw that they share out all ids from 0 on
    padding = ids == -1
    last = np.zeros(len(ids), np.bool_)
    last[rows.segment_offsets[1:] - 1] = True
    yield from _rows(rows.segment_offsets, (ids < -1) | (ids >= known), "an example id belongs to no source")
    yield from _padding_between(rows, manifest.pad_to_multiple_of, padding & ~last)
    first = np.zeros(len(ids), np.bool_)
    first[rows.segment_offsets[:-1]] = True
    yield from _rows(rows.segment_offsets, padding & first, "the row is all padding")
    starts = offsets_of(rows.seq_lengths)
    if manifest.max_length is not None or manifest.format_version > 1:
        trained = rows.labels[starts[:-1]] != IGNORE_INDEX
        yield from _rows(rows.segment_offsets, trained, "the first token of a document is trained")
    if manifest.max_length is None:
        yield from _rows(rows.segment_offsets, padding, "padding in a row that keeps its own length")
        return
    inside = positions_of(starts[:-1][padding], rows.seq_lengths[padding].astype(np.int64))
    yield from _rows_of(rows.row_offsets, inside[rows.labels[inside] != IGNORE_INDEX], "padding is trained")
    pad_id = manifest.tokenizer.pad_id
    yield from _rows_of(
        rows.row_offsets, inside[rows.input_ids[inside] != pad_id], f"padding is not the pad id {pad_id}"
    )


def _padding_between(rows: PackedRows, multiple: int, between: Bool) -> Iterator[tuple[Int64, str]]:
    """Allow padding before a document only as far as it begins at the next multiple."""
    if multiple == 1:
        yield from _rows(rows.segment_offsets, between, "padding stands before a document")
        return
    off = (offsets_of(rows.seq_lengths)[:-1] % multiple != 0) & (rows.example_ids != -1)
    yield from _rows(rows.segment_offsets, off, f"a document does not begin at a multiple of {multiple}")
    more = between & ((rows.seq_lengths >= multiple) | np.append(rows.example_ids[1:] == -1, False))
    yield from _rows(rows.segment_offsets, more, "more padding than needed stands before a document")


def _tokens(rows: PackedRows, manifest: Manifest) -> Iterator[tuple[Int64, str]]:
    # One unsigned comparison finds negative ids too.
    outside = rows.input_ids.view(np.uint32) >= manifest.tokenizer.vocab_size
    other = (rows.labels != IGNORE_INDEX) & (rows.labels != rows.input_ids)
    yield from _rows(
        rows.row_offsets, outside, f"a token id is outside the vocabulary of {manifest.tokenizer.vocab_size}"
    )
    yield from _rows(rows.row_offsets, other, "a label is neither -100 nor the id of its token")
    if manifest.vision is not None:
        drawn = rows.labels == manifest.vision.image_id
        yield from _rows(rows.row_offsets, drawn, "a token that stands for a picture is trained")
    if rows.loss_weights is not None:
        # A weight that is no number is above nothing, and one without end is not finite.
        weighs = (rows.loss_weights > 0) & np.isfinite(rows.loss_weights)
        wrong = np.where(rows.labels != IGNORE_INDEX, ~weighs, rows.loss_weights != 0)
        yield from _rows(
            rows.row_offsets, wrong, "loss_weights are not above 0 and finite where trained, and 0 elsewhere"
        )


def _rows(offsets: Int64, wrong: Bool, what: str) -> Iterator[tuple[Int64, str]]:
    """Say in which rows the items lie that are wrong."""
    if wrong.any():
        yield from _rows_of(offsets, np.flatnonzero(wrong), what)


def _rows_of(offsets: Int64, wrong: Int64, what: str) -> Iterator[tuple[Int64, str]]:
    yield from _finding(np.unique(np.searchsorted(offsets, wrong, side="right") - 1), what)


def _finding(where: Int64, what: str) -> Iterator[tuple[Int64, str]]:
    if len(where):
        yield where, what
