"""Sets with text in them, written straight from strings in which ⟦ ⟧ holds what is trained; no stage but packing takes part."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sftdata.batches import PackPlan, TokenBatch
from sftdata.pack import Strategy, gather, plan_packs
from sftdata.set.index import Placed, write_slice
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, SourceInfo, TokenizerInfo, write_manifest
from tests.whole_slices import NO_REST

TOKENIZER = Path(__file__).parents[1] / "examples" / "tokenizer"
EOS, PAD = 2, 0

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n⟦{}<|im_end|>⟧\n"


def encode_marked(text: str, folder: Path = TOKENIZER) -> tuple[list[int], list[bool]]:
    """Encode a marked string stretch by stretch; return ids and which of them are trained."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = []
    trained: list[bool] = []
    for part in re.split(r"(⟦.*?⟧)", text, flags=re.DOTALL):
        own = tokenizer.encode(part.strip("⟦⟧"), add_special_tokens=False).ids
        ids += own
        trained += [part.startswith("⟦")] * len(own)
    return ids, trained


def write_set(
    folder: Path, examples: list[str], *, max_length: int = 96, strategy: Strategy = "bfd", tokenizer: Path = TOKENIZER,
    cut: int = 0, **changes: Any,
) -> Path:  # fmt: skip
    """Write a finished set of marked strings, example i from line i + 1 of `data.jsonl`.

    Args:
        cut: tokens that the ledger says were cut.
        changes: `counters`, `settings` and fields of `TokenizerInfo`.
    """
    folder.mkdir(parents=True)
    shutil.copytree(tokenizer, folder / "tokenizer")
    encoded = [encode_marked(text, tokenizer) for text in examples]
    offsets = np.append(0, np.cumsum([len(ids) for ids, _ in encoded])).astype(np.int64)
    tokens = TokenBatch(
        np.array([token for ids, _ in encoded for token in ids], np.int32),
        np.array([flag for _, trained in encoded for flag in trained], np.bool_),
        offsets,
        np.arange(len(examples)),
    )
    packs, ids = plan_packs(tokens.lengths, max_length, strategy), np.arange(len(examples))
    rows = gather(tokens, ids, packs, max_length, PAD)
    placed = Placed(tokens, ids, packs, NO_REST, [])
    if cut:  # behind the last example
        last = np.array([int(tokens.lengths[-1])])
        longer = TokenBatch(
            np.append(tokens.input_ids, np.full(cut, EOS, np.int32)),
            np.append(tokens.trained, np.zeros(cut, np.bool_)),
            np.append(offsets[:-1], offsets[-1] + cut),
            tokens.row,
        )
        placed = Placed(longer, ids, packs, PackPlan(np.arange(2), ids[-1:], last, last + cut), ["truncate"])
    shards, files = write_slice(folder, 0, placed, rows, max_length, None)
    ledger = Ledger(rows_in=len(examples), rows_kept=len(examples), tokens_in=int(offsets[-1]) + cut)
    ledger.tokens_cut = {"truncate": cut} if cut else {}
    ledger.counters = changes.pop("counters", {})
    ledger.count_lengths(tokens.lengths)
    ledger.count_packed(rows, max_length, {"data.jsonl": 0})
    settings = {"max_length": max_length, "packing": strategy, "overlong": "truncate", "train_on": "auto"}
    settings |= changes.pop("settings", {})
    facts = {
        "name": "tiny",
        "sha256": "a" * 64,
        "vocab_size": 1024,
        "eos_id": EOS,
        "pad_id": PAD,
        "bos_id": None,
    } | changes
    manifest = Manifest(
        settings=settings,
        tokenizer=TokenizerInfo(**facts),
        sources=(SourceInfo(name="data.jsonl", bytes=9, xxh3="0" * 32, rows=len(examples), first_id=0),),
        ledger=ledger,
        shards=shards,
        files=files,
    )
    write_manifest(folder, manifest)
    return folder
