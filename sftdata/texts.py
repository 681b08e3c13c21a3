"""Texts as they come, encoded and masked as in a set: for training that makes its own data step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32, Ragged, Tally, TextBatch
from sftdata.encode.engine import load_encoder
from sftdata.encode.tokenizer import resolve_tokenizer
from sftdata.masks.tokens import encode_batch


class TextEncoder:
    """Encode texts with one tokenizer.

    Args:
        tokenizer: folder or Hub id.

    Raises:
        UsageError: it cannot be loaded.
    """

    def __init__(self, tokenizer: str) -> None:
        self._encoder = load_encoder(resolve_tokenizer(tokenizer), "tokenizers")

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[Int32, Int32]]:
        """Return input_ids and labels (each int32[T]) of prompts with the answers that follow them.

        An answer and the end token after it are trained; where it is empty, nothing is.
        """
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        spans = [
            [(len(prompt.encode()), len(text.encode()))] if answer else []
            for prompt, answer, text in zip(prompts, answers, texts, strict=True)
        ]
        nothing = Ragged.from_lists([[] for _ in texts])
        rows, closed = np.arange(len(texts)), np.ones(len(texts), np.bool_)
        given = TextBatch(texts, Ragged.from_lists(spans), nothing, rows, True, closed)
        batch = encode_batch(given, self._encoder, Tally())
        labels = np.where(batch.trained, batch.input_ids, IGNORE_INDEX).astype(np.int32)
        edges = zip(batch.offsets[:-1], batch.offsets[1:], strict=True)
        return [(batch.input_ids[start:stop], labels[start:stop]) for start, stop in edges]
