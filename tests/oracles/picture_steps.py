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
        frozen: "vision", the tower, "vision+projector", all that is not the language model, or "none".
    """

    def __init__(
        self, family: str, folder: Path, rows: Iterable[Json], place: Path, frozen: str = "none"
    ) -> None:
        self._own, self._place = Own(family, folder), place
        self._template = (folder / "chat_template.jinja").read_text("utf-8")
        made = [self._inputs(row) for row in rows]
        self._rows = {tuple(inputs["input_ids"][0].tolist()): inputs for inputs in made}
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(not _is_frozen(name, frozen))

    def take(self, steps: Iterable[Sequence[Sequence[int]]], rate: float, most: float) -> list[float]:
        """Return the loss of each step, the mean over its trained tokens.

        Args:
            steps: the ids of the rows of each.
            most: to which norm gradients are cut.
        """
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
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
        given, said = (self._own, self._template), row["messages"]
        question = chat_inputs(*given, said[:-1], row, self._place, add_generation_prompt=True)
        inputs = chat_inputs(*given, said, row, self._place)
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        begin = question["input_ids"].shape[1]
        labels[:, begin:-1] = ids[:, begin:-1]  # without the newline behind the mark
        return {**inputs, "labels": labels}


def chat_inputs(own: Own, template: str, said: list[Json], row: Json, place: Path, **settings: bool) -> Json:
    """Return what a processor makes of messages, with the pictures of their row, below `place`."""
    pictures = [Image.open(place / name) for name in row.get("images", ())]
    messages = [{"role": one["role"], "content": _parts(one["content"])} for one in said]
    text = own.processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **settings
    )
    return own.processor(text=[text], images=pictures or None, return_tensors="pt")


def _is_frozen(name: str, frozen: str) -> bool:
    """Say so by the names of transformers: the tower is all that sees without being a way into the language model."""
    parts = name.split(".")
    sees = bool({"visual", "vision_tower", "vision_model"} & set(parts))
    leads = bool(
        {"merger", "deepstack_merger_list", "connector", "multi_modal_projector", "embed_vision"} & set(parts)
    )
    return (frozen != "none" and sees and not leads) or (frozen == "vision+projector" and leads)


def _parts(content: str) -> list[Json]:
    first, *others = content.split("<image>")
    parts = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
    return parts
