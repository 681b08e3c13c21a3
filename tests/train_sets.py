"""Sets for the trainer's tests: written straight from packed rows, without text or tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sftdata.batches import PackedRows, TokenBatch
from sftdata.pack import gather, plan_packs
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, SourceInfo, TokenizerInfo, write_manifest
from tests.whole_slices import NOTHING, Written, write_rows, write_whole

EOS = 2


def make_set(
    folder: Path, *, rows: int = 32, max_length: int = 48, vocabulary: int = 128, packed: bool = True, shards: int = 2,
    trained: float = 0.75, seed: int = 0, tokens_added: int = 0, sources: int = 1, tokenizer: str = "0",
) -> Path:  # fmt: skip
    """Write a set whose documents count upwards from a random start, so that a model can learn it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    (infos, files), ledger, example = NOTHING, Ledger(max_length=max_length if packed else None), 0
    for index, part in enumerate(np.array_split(np.arange(rows), shards)):
        drawn = [_row(rng, max_length, vocabulary, packed, trained) for _ in part]
        columns, example = _columns(drawn, example)
        made, beside = write_rows(folder, index, columns, max_length if packed else None)
        infos, files = infos + made, files + beside
        ledger.count_packed(columns, max_length if packed else None)
    manifest = _manifest(ledger, (infos, files), example, packed, max_length, vocabulary, sources, seed)
    added = tuple(f"<added-{n}>" for n in range(tokens_added))
    named = msgspec.structs.replace(manifest.tokenizer, sha256=tokenizer * 64, tokens_added=added)
    write_manifest(folder, msgspec.structs.replace(manifest, tokenizer=named))
    return folder


# Median tokens of a document, spread of their logarithms, share that is trained: chats, long reasoning, whole books.
MIXES = {"instructions": (220, 1.0, 0.6), "reasoning": (3_500, 0.8, 0.9), "books": (16_000, 0.8, 0.9)}


def make_mixed_set(
    folder: Path, mix: str, *, rows: int, max_length: int, vocabulary: int, scale: float = 1.0, seed: int = 0
) -> Path:
    """Write a set packed by the product from documents as long as those of real data.

    Args:
        mix: one of `MIXES`.
        scale: of the documents' lengths, for rows in miniature.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    median, spread, trained = MIXES[mix]
    mean = median * scale * np.exp(spread**2 / 2)
    drawn = rng.lognormal(np.log(median * scale), spread, int(1.3 * rows * max_length / mean) + 8)
    lengths = np.clip(drawn, 4, max_length).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), rows * max_length)) + 1]
    offsets = np.append(0, np.cumsum(lengths))
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    ids = (np.repeat(rng.integers(3, vocabulary, len(lengths)), lengths) + place - 3) % (vocabulary - 3) + 3
    ids[offsets[1:] - 1] = EOS
    answers = place >= np.repeat(np.maximum(1, np.rint(lengths * (1 - trained))), lengths)
    tokens = TokenBatch(ids.astype(np.int32), answers, offsets, np.arange(len(lengths)))
    example_ids, packs = np.arange(len(lengths)), plan_packs(lengths, max_length)
    columns = gather(tokens, example_ids, packs, max_length, 0)
    ledger = Ledger(max_length=max_length)
    ledger.count_packed(columns, max_length)
    written = write_whole(folder, 0, tokens, example_ids, packs, columns, max_length)
    write_manifest(folder, _manifest(ledger, written, len(lengths), True, max_length, vocabulary, 1, seed))
    return folder


def _manifest(
    ledger: Ledger, written: Written, examples: int, packed: bool, max_length: int, vocabulary: int, sources: int, seed: int
) -> Manifest:  # fmt: skip
    ledger.tokens_in, ledger.rows_in, ledger.rows_kept = ledger.tokens, examples, examples
    return Manifest(
        settings={"packing": "bfd" if packed else "none", "max_length": max_length},
        tokenizer=TokenizerInfo(
            name="counting", sha256="0" * 64, vocab_size=vocabulary, eos_id=EOS, pad_id=0, bos_id=None, tokens_added=(),
        ),
        sources=tuple(
            SourceInfo(name=f"drawn{n or ''}", bytes=None, xxh3=str(seed), rows=len(part), first_id=int(part[0]))
            for n, part in enumerate(np.array_split(np.arange(examples), sources))
        ),
        ledger=ledger,
        shards=written[0],
        files=written[1],
    )  # fmt: skip


def _row(rng: np.random.Generator, max_length: int, vocabulary: int, packed: bool, trained: float) -> Any:
    """Draw one row: a list of (ids, labels) documents, and its padding."""
    documents, room = [], max_length - int(rng.integers(0, 4)) if packed else int(rng.integers(6, max_length))
    while room >= 4:
        length = min(room, int(rng.integers(4, max_length // 2))) if packed else room
        ids = (rng.integers(3, vocabulary) + np.arange(length) - 3) % (vocabulary - 3) + 3
        ids[-1] = EOS
        labels = np.where(np.arange(length) >= max(1, round(length * (1 - trained))), ids, -100)
        documents.append((ids, labels))
        room -= length
    total = sum(len(ids) for ids, _ in documents)
    return documents, (max_length - total if packed else 0)


def _columns(drawn: list[Any], example: int) -> tuple[PackedRows, int]:
    ids, labels, lengths, examples, row_ends, segment_ends = [], [], [], [], [0], [0]
    for documents, padding in drawn:
        for document_ids, document_labels in documents:
            ids.append(document_ids)
            labels.append(document_labels)
            lengths.append(len(document_ids))
            examples.append(example)
            example += 1
        if padding:
            ids.append(np.zeros(padding, np.int64))
            labels.append(np.full(padding, -100))
            lengths.append(padding)
            examples.append(-1)
        row_ends.append(row_ends[-1] + sum(lengths[segment_ends[-1] :]))
        segment_ends.append(len(lengths))
    columns = PackedRows(
        np.concatenate(ids).astype(np.int32), np.concatenate(labels).astype(np.int32), np.array(row_ends, np.int64),
        np.array(lengths, np.int32), np.array(examples, np.int64), np.array(segment_ends, np.int64),
    )  # fmt: skip
    return columns, example
