"""Typical uses of the public interface, for `make types`; nothing runs this file.

mypy also refuses an `ignore` that is not needed, so the wrong uses at the end stay refused.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

import sftdata
import sfttrain


def prepare_and_look(rows: list[dict[str, object]], notes: list[str]) -> int:
    """Use each function as a notebook would."""
    seen = sftdata.preview("chats.jsonl", tokenizer="tok", number=1, train_on="last-assistant")
    manifest = sftdata.prepare(
        [Path("chats.jsonl"), "more/*.jsonl"],
        tokenizer=Path("tok"),
        output="set",
        formatter=lambda row: [
            {"role": "user", "content": row["q"]},
            {"role": "assistant", "content": row["a"]},
        ],
        on_note=notes.append,
        on_progress=lambda progress: print(progress.done / progress.total),
        max_length=2048,
        packing="wrapped",
        map={"completion": "best"},
        max_rejects=20,
    )
    for row in sftdata.stream(rows, tokenizer="tok", infinite=True, max_length=64, response_template=[7, 8]):
        seen_ids = row["input_ids"].tolist()
        print(seen_ids)
    try:
        report = sftdata.verify("set", sha256=True)
    except (sftdata.UsageError, sftdata.IntegrityError) as error:
        raise SystemExit(error.exit_code) from error
    findings = [finding.code for finding in sftdata.audit("set", against=Path("held"))]
    shards = sftdata.open("set")
    return manifest.ledger.tokens + len(seen.examples) + len(findings) + report.rows + len(shards)


def give_objects(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, table: pa.Table, splits: DatasetDict
) -> None:
    """Prepare what is in memory."""
    sftdata.prepare(rows, tokenizer=tokenizer, output="set")
    sftdata.prepare(table, tokenizer=tokenizer, output="set")
    sftdata.prepare(splits, tokenizer=tokenizer, output="set", split="train")
    sftdata.preview(({"text": str(number)} for number in range(5)), tokenizer=tokenizer)


def look_again() -> int:
    """Make views: one set, and the two sides of a split."""
    whole = sftdata.view("set", output="longer", max_length=8192, mix={"a.jsonl": "70%", "b.jsonl": "30%"})
    train, held_out = sftdata.view(["set"], output="both", eval="5%", dedup="prompt", exclude=[Path("other")])
    found = sftdata.diff("set", Path("longer"), limit=0)
    return whole.ledger.tokens + train.ledger.tokens + held_out.ledger.tokens + found.trained.gain


@sftdata.by_columns
def questions(columns: dict[str, list[str]]) -> list[sftdata.Completion]:
    """Keep the type of a marked function."""
    return [sftdata.Completion(q, a) for q, a in zip(columns["q"], columns["a"], strict=True)]


def train(model: torch.nn.Module, notes: list[str]) -> float:
    """Train by name, with settings of ours and of transformers."""
    made: list[sftdata.Completion] = questions({"q": ["Red?"], "a": ["Beetroot."]})
    trainer = sfttrain.train(
        ["set"], model="m", output="out", lora="r=16", learning_rate=1e-4, on_note=notes.append
    )
    stepwise = sfttrain.IterativeTrainer(model, tokenizer="tok", max_length=512)
    figures = stepwise.step(texts=[made[0].prompt])
    chat: sfttrain.Chat = sfttrain.open_chat("out", system="Be brief.", on_note=notes.append)
    notes.append(chat.ask("Red?"))
    return figures["loss"] + (0.0 if trainer is None else trainer.state.global_step)


def refused(rows: list[str]) -> None:
    """Write what a type checker must not take."""
    sftdata.prepare("a.jsonl", tokenizer="tok", output="set", max_lenght=64)  # type: ignore[call-overload]
    sftdata.prepare("a.jsonl", tokenizer="tok", output="set", packing="best")  # type: ignore[call-overload]
    sftdata.prepare("a.jsonl", "tok", output="set")  # type: ignore[call-overload]
    sftdata.stream(rows, tokenizer="tok", overwrite=True)  # type: ignore[arg-type]
    sftdata.view("set", output="view", max_lenght=64)  # type: ignore[call-overload]
    sftdata.batched  # type: ignore[attr-defined]  # noqa: B018
    sfttrain.train("set", output="out", quantize="int4")  # type: ignore[arg-type]
