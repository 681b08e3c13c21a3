"""Sets hold the ids of transformers and the labels of the oracle, for tokenizers made here: no real one needs to be there."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import sftdata
from tests.chats import CHATS
from tests.made_tokenizers import MADE
from tests.oracles.char_masks import Format, trained_spans

EOS = "<｜end▁of▁sentence｜>"
STOPS = {"made-turns": EOS, "made-calls": EOS, "made-prepend": "</s>", "made-strips": "<|end|>"}
CHAT_TEMPLATES = [name for name, (_, config) in MADE.items() if "chat_template" in config]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_set_holds_the_ids_of_inference_and_trains_what_the_oracle_says(
    name: str, home: Path, tmp_path: Path
) -> None:
    folder = home / "tokenizers" / name
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS.values()))
    manifest = sftdata.prepare(
        tmp_path / "chats.jsonl", tokenizer=str(folder), output=tmp_path / "set", packing="none", max_length=4096,
        max_rejects="100%", workers=1,
    )  # fmt: skip
    reference = AutoTokenizer.from_pretrained(folder)
    special = {key: str(value) for key, value in reference.special_tokens_map.items()}
    form = Format(reference.chat_template, [STOPS.get(name, "<|im_end|>")], special)
    chats, different = list(CHATS.values()), 0
    rows = list(sftdata.open(tmp_path / "set"))
    assert len(rows) >= 10
    for row in rows:
        chat = chats[int(row.examples[0])]
        text, spans = (
            form.render(chat["messages"], chat.get("tools")),
            trained_spans(form, chat["messages"], chat.get("tools")),
        )
        ids, labels = row.input_ids.tolist(), row.labels.tolist()
        different += ids != reference(text, add_special_tokens=False)["input_ids"]
        runs = _runs(labels)
        meant = "|".join("".join(text[slice(*span)].split()) for span in spans.values() if span[0] < span[1])
        prompt = reference(text[: min(spans.values())[0]], add_special_tokens=False)["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert runs[0][0] == len(prompt)
        apart = len(runs) == len(spans)  # else an answer follows another without anything between
        assert ("|" if apart else "").join(_spelled(reference, run) for _, run in runs) == (
            meant if apart else meant.replace("|", "")
        )
    assert different <= manifest.ledger.counters.get("boundary_rows", 0) + manifest.ledger.counters.get(
        "literal_rows", 0
    )
    assert different < len(rows) / 2


def _runs(labels: list[int]) -> list[tuple[int, list[int]]]:
    """Trained stretches with where they start."""
    runs = []
    for trained, places in groupby(range(len(labels)), key=lambda place: labels[place] != -100):
        if trained:
            own = list(places)
            runs.append((own[0], [labels[place] for place in own]))
    return runs


def _spelled(reference: Any, ids: list[int]) -> str:
    """The text of some ids without blanks, which SentencePiece invents."""
    return "".join(reference.decode(ids, skip_special_tokens=False).split())
