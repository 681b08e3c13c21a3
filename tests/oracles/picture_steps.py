"""Training on rows with pictures as a user of transformers alone would: one row at a time, nothing packed, nothing of ours.

The family's own processor makes the inputs, the family's own model its own loss, and a loop of torch takes the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.oracles.pictures import Own

Json = dict[str, Any]


class OwnSteps:
    """A model of a family and its processor, from one folder.

    Args:
        rows: with `messages`, one question and one answer each, and `images` below `place`.
    """

    def __init__(self, family: str, folder: Path, rows: Iterable[Json], place: Path) -> None:
        self._own, self._place = Own(family, folder), place
        self._template = (folder / "chat_template.jinja").read_text("utf-8")
        made = [self._inputs(row) for row in rows]
        self._rows = {tuple(inputs["input_ids"][0].tolist()): inputs for inputs in made}
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()

    def take(self, steps: Iterable[Sequence[Sequence[int]]], rate: float, most: float) -> list[float]:
        """Return the loss of each step, the mean over its trained tokens.

        Args:
            steps: the ids of the rows of each.
            most: to which norm gradients are cut.
        """
        trained = list(self.model.parameters())
        adam, found = torch.optim.AdamW(trained, rate, weight_decay=0), []
        for step in steps:
            for (
                weight
            ) in trained:  # a batch without pictures gives the tower no gradient; that is zero, not none
                weight.grad = torch.zeros_like(weight)
            rows = [self._rows[tuple(ids)] for ids in step]
            counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
            loss = 0.0
            for row, count in zip(rows, counts, strict=True):
                share = self.model(**row).loss * count / sum(counts)
                share.backward()
                loss += share.item()
            torch.nn.utils.clip_grad_norm_(trained, most)
            adam.step()
            found.append(loss)
        return found

    def _inputs(self, row: Json) -> Json:
        """Return what the processor makes of a row, with labels on the answer and the mark that ends it."""
        pictures = [Image.open(self._place / name) for name in row.get("images", ())]
        messages = [{"role": said["role"], "content": _parts(said["content"])} for said in row["messages"]]
        question = self._made(messages[:-1], pictures, add_generation_prompt=True)["input_ids"].shape[1]
        inputs = self._made(messages, pictures)
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[:, question:-1] = ids[:, question:-1]  # without the newline behind the mark
        return {**inputs, "labels": labels}

    def _made(self, messages: list[Json], pictures: list[Image.Image], **settings: bool) -> Json:
        text = self._own.processor.tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, **settings
        )
        return self._own.processor(text=[text], images=pictures or None, return_tensors="pt")


def _parts(content: str) -> list[Json]:
    first, *others = content.split("<image>")
    parts = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts
