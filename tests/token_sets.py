"""Sets of given ids and labels, written as `prepare` lays them out, in milliseconds; nothing is tokenized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftdata.batches import TokenBatch, offsets_of
from sftdata.limit import Policy, choose_pieces, left_over
from sftdata.pack import Strategy, gather, plan_packs
from sftdata.set.index import Placed, write_slice
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, SourceInfo, TokenizerInfo, write_manifest

TOKENIZER = Path(__file__).parents[1] / "examples" / "tokenizer"
PAD = 0


class Row(NamedTuple):
    """A document: its ids, and which of them are labelled."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


class Layout(NamedTuple):
    """How documents are cut and packed."""

    max_length: int = 16
    packing: Strategy = "bfd"
    overlong: Policy = "truncate"


Sources = Mapping[str, Sequence[Row | None]]
"""Rows by the name of their source; None is a line that holds no row."""


def write_tokens(
    folder: Path, sources: Sources, layout: Layout, slices: int = 2, **settings: Any
) -> Manifest:
    """Write a set of these rows, in so many slices."""
    folder.mkdir(parents=True)
    (folder / "tokenizer").symlink_to(TOKENIZER)
    lines = [row for rows in sources.values() for row in rows]
    infos, first = [], 0
    for name, rows in sources.items():
        infos.append(SourceInfo(name=name, bytes=9, xxh3="0" * 32, rows=len(rows), first_id=first))
        first += len(rows)
    ledger, shards, files = Ledger(), [], []
    row_length = None if layout.packing == "none" else layout.max_length
    firsts = {info.name: info.first_id for info in infos}
    for number, part in enumerate(np.array_split([i for i, row in enumerate(lines) if row], slices)):
        rows = [row for index in part if (row := lines[index])]
        documents = TokenBatch(
            np.array([token for row in rows for token in row.ids], np.int32),
            np.array([flag for row in rows for flag in row.trained], np.bool_),
            offsets_of([len(row.ids) for row in rows]),
            np.arange(len(rows)),
        )
        limit = 1 << 20 if layout.packing == "wrapped" else layout.max_length
        pieces = choose_pieces(documents, limit, layout.overlong)
        kept = pieces.kept()
        packs = plan_packs(kept.lengths, layout.max_length, layout.packing).within(kept.example, kept.start)
        rest, reasons = left_over(documents.lengths, pieces, layout.overlong)
        ids = np.asarray(part, np.int64)
        packed = gather(documents, ids, packs, row_length, PAD)
        placed = Placed(documents, ids, packs, rest, reasons)
        written = write_slice(folder, number, placed, packed, row_length, None)
        shards += written[0]
        files += written[1]
        ledger.count_packed(packed, row_length, firsts)
        dropped = len(rows) - len(np.unique(kept.example))
        gone = ~np.isin(np.arange(len(rows)), kept.example)
        cut = int(documents.lengths[~gone].sum() - kept.lengths.sum())
        lost = int(documents.lengths[gone].sum())
        reason = {"nothing-trained": dropped} if dropped else {}
        ledger.merge(Ledger(
            rows_in=len(rows), rows_kept=len(rows) - dropped, rows_dropped=reason,
            tokens_in=int(documents.offsets[-1]), tokens_cut={layout.overlong: cut} if cut else {},
            tokens_in_dropped_rows=lost,
        ))  # fmt: skip
    manifest = Manifest(
        settings={**layout._asdict(), **settings},
        tokenizer=TokenizerInfo(
            name="tiny", sha256="a" * 64, vocab_size=1024, eos_id=2, pad_id=PAD, bos_id=None
        ),
        sources=tuple(infos),
        ledger=ledger,
        shards=tuple(shards),
        files=tuple(files),
    )
    return write_manifest(folder, manifest)
