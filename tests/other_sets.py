"""Token rows as other tools write them, with and without defects, and what an audit should say of each.

axolotl's and LLaMA-Factory's layouts are written here by hand, after what their releases leave on disk; TRL's
are made by TRL itself in test_audit_of_others.py.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from tokenizers import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "examples" / "tokenizer"
EOS, END_OF_TEXT = 2, 0
SYSTEM = "<|im_start|>system\nYou answer questions about the garden in one short sentence.<|im_end|>\n"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n⟦{}<|im_end|>⟧\n"
Row = dict[str, Any]


@dataclass
class Example:
    """A document, or several that are in one row."""

    ids: list[int]
    trained: list[bool]
    lengths: list[int] = field(default_factory=list)
    padding: int = 0
    labels: list[int] | None = None


def make_tokenizer(folder: Path, kind: str) -> Path:
    """Copy the example tokenizer; "bos": with BOS, and EOS for a pad token, "plain": with neither."""
    if not folder.exists():
        shutil.copytree(TOKENIZER, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if kind == "bos":
            config |= {"bos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def encode(text: str) -> Example:
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    ids: list[int] = []
    trained: list[bool] = []
    for part in text.replace("⟦", "\0⟦").replace("⟧", "\0").split("\0"):
        own = tokenizer.encode(part.removeprefix("⟦"), add_special_tokens=False).ids
        ids += own
        trained += [part.startswith("⟦")] * len(own)
    return Example(ids, trained)


def chats(count: int, kind: str) -> list[Example]:
    """Conversations of one to three turns, each of its own."""
    made = []
    for number in range(count):
        turns = "".join(
            TURN.format(
                f"What grows in month {number} of year {turn}?", f"Peas and {number} beans, row {turn}."
            )
            for turn in range(1 + number % 3)
        )
        made.append(encode(("<|endoftext|>" if kind == "bos" else "") + SYSTEM + turns))
    return made


# ----------------------------------------------------------------------------------------------- defects


def runs(example: Example) -> list[tuple[int, int]]:
    """First and last token of each answer."""
    edges = [
        at
        for at in range(len(example.ids) + 1)
        if (at < len(example.ids) and example.trained[at]) != (at > 0 and example.trained[at - 1])
    ]
    return [(first, stop - 1) for first, stop in zip(edges[::2], edges[1::2], strict=True)]


def prompt(example: Example) -> None:
    first, _ = runs(example)[0]
    for at in range(first - 9, first - 4):  # the end of the question
        example.trained[at] = True


def nothing(example: Example) -> None:
    example.trained = [False] * len(example.ids)


def no_end(example: Example) -> None:
    for _, last in runs(example):
        example.trained[last] = False


def shifted(example: Example) -> None:
    example.trained = [*example.trained[1:], False]


def labels_shifted(example: Example) -> None:
    labels = [token if flag else -100 for token, flag in zip(example.ids, example.trained, strict=True)]
    example.labels = [*labels[1:], -100]


def header(example: Example) -> None:
    first, _ = runs(example)[0]
    example.trained[first - 3 : first] = [True] * 3


def outside(example: Example) -> None:
    example.ids[3] = 1 << 17


def of_another(example: Example) -> None:
    draw, header = random.Random(5), False
    newline = encode("\n").ids[0]
    for at, token in enumerate(example.ids):
        header = (header and example.ids[at - 1] != newline) or token == 1
        if token > EOS and not header and token != newline:
            example.ids[at] = draw.randrange(300, 1000)


def truncated(example: Example) -> None:
    keep = runs(example)[0][1] - 1
    example.ids, example.trained = example.ids[:keep], example.trained[:keep]


def double_bos(example: Example) -> None:
    example.ids.insert(0, END_OF_TEXT)
    example.trained.insert(0, False)


def other_label(example: Example) -> None:
    labels_shifted(example)
    first, _ = runs(example)[0]
    example.labels = [
        token if flag else -100 for token, flag in zip(example.ids, example.trained, strict=True)
    ]
    example.labels[first + 1] += 1


def padded(example: Example) -> None:
    example.padding = 5


def joined(example: Example) -> None:
    example.ids, example.trained = example.ids * 2, example.trained * 2


DEFECTS: dict[str, tuple[Callable[[Example], None], str]] = {
    "prompt": (prompt, "prompt-trained"),
    "nothing": (nothing, "nothing-trained"),
    "no end": (no_end, "no-trained-end"),
    "header": (header, "header-trained"),
    "outside": (outside, "id-outside-vocabulary"),
    "other tokenizer": (of_another, "other-tokenizer"),
    "truncated": (truncated, "no-trained-end"),
    "padding": (padded, "padding-trained"),
    "joined": (joined, "packed-unmarked"),
    "shifted": (shifted, "mask-shifted"),
}
"""What can be planted in each format, and the code that names it."""
OF_LABELS = {
    "shifted": (labels_shifted, "labels-shifted"),
    "label": (other_label, "label-not-the-id"),
}


# ----------------------------------------------------------------------------------------------- formats


def padded_columns(example: Example, pad: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, labels, mask and attention mask, with the trained padding that was asked for."""
    ids = example.ids + [pad] * example.padding
    mask = [int(flag) for flag in example.trained] + [1] * example.padding
    labels = [token if flag else -100 for token, flag in zip(ids, mask, strict=True)]
    return ids, example.labels or labels, mask, [1] * len(example.ids) + [0] * example.padding


def write_labels(path: Path, examples: list[Example], pad: int) -> Path:
    """TRL's and axolotl's: a saved dataset of input_ids, attention_mask, labels."""
    from datasets import Dataset

    rows = []
    for example in examples:
        ids, labels, _, attention = padded_columns(example, pad)
        positions = [*range(len(ids))]
        row = {"input_ids": ids, "attention_mask": attention, "labels": labels, "position_ids": positions}
        rows.append(row | {"length": len(ids)})
    Dataset.from_list(rows).save_to_disk(path / "prepared")
    return path / "prepared"


def write_loss_mask(path: Path, examples: list[Example], pad: int) -> Path:
    """SkyRL's and Akka's: Parquet of input_ids and loss_mask, and no attention mask."""
    rows = [
        dict(zip(("input_ids", "loss_mask"), padded_columns(one, pad)[::2], strict=True)) for one in examples
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")
    return path / "rows.parquet"


def write_completion_mask(path: Path, examples: list[Example], pad: int) -> Path:
    """TRL's before it folds the mask in: JSON lines of input_ids and completion_mask."""
    lines = []
    for example in examples:
        ids, _, mask, attention = padded_columns(example, pad)
        lines.append(json.dumps({"input_ids": ids, "completion_mask": mask, "attention_mask": attention}))
    (path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return path / "rows.jsonl"


def write_packed(path: Path, examples: list[Example], pad: int) -> Path:
    """Each document in a row with a clean one before it, told apart by seq_lengths and position_ids."""
    rows = []
    for number, example in enumerate(examples):
        ids, labels, _, _ = padded_columns(example, pad)
        kind = "bos" if ids[0] == END_OF_TEXT else "plain"
        clean = encode_clean(number, kind)
        lengths = [len(clean.ids), len(example.ids), *([example.padding] if example.padding else [])]
        row = {
            "input_ids": clean.ids + ids,
            "labels": padded_columns(clean, pad)[1] + labels,
            "seq_lengths": lengths,
            "position_ids": [at for length in lengths for at in range(length)],
        }
        rows.append(row)
    parquet.write_table(pa.Table.from_pylist(rows), path / "packed.parquet")
    return path / "packed.parquet"


def encode_clean(number: int, kind: str) -> Example:
    return encode(
        ("<|endoftext|>" if kind == "bos" else "")
        + SYSTEM
        + TURN.format(f"And {number}?", f"Kale, {number}.")
    )


def write_megatron(path: Path, examples: list[Example], pad: int) -> Path:
    """Megatron-Bridge's: packed Parquet, seq_start_id, the mask one token early."""
    rows = []
    for number, example in enumerate(examples):
        clean = encode_clean(number, "bos" if example.ids[0] == END_OF_TEXT else "plain")
        ids, trained = clean.ids + example.ids, clean.trained + example.trained
        mask = [int(flag) for flag in trained[1:]] + [0]
        rows.append({"input_ids": ids, "loss_mask": mask, "seq_start_id": [0, len(clean.ids)]})
    parquet.write_table(pa.Table.from_pylist(rows), path / "rows-00000.idx.parquet")
    return path / "rows-00000.idx.parquet"


FORMATS: dict[str, Callable[[Path, list[Example], int], Path]] = {
    "labels": write_labels,
    "loss-mask": write_loss_mask,
    "completion-mask": write_completion_mask,
    "packed": write_packed,
    "megatron": write_megatron,
}


def write_llama_factory(path: Path, examples: list[Example]) -> Path:
    """LLaMA-Factory's neat packing, by hand: attention_mask numbers the documents, and is 0 behind them."""
    from datasets import Dataset

    rows = []
    for one, two in zip(examples[::2], examples[1::2], strict=True):
        padding = 400 - len(one.ids) - len(two.ids)
        trained = one.trained + two.trained + [False] * padding
        ids = one.ids + two.ids + [END_OF_TEXT] * padding
        row = {
            "input_ids": ids,
            "labels": [token if flag else -100 for token, flag in zip(ids, trained, strict=True)],
            "attention_mask": [1] * len(one.ids) + [2] * len(two.ids) + [0] * padding,
            "position_ids": [*range(len(one.ids)), *range(len(two.ids)), *([0] * padding)],
        }
        rows.append(row | {"packing_params": {"sequence_boundaries": [0, len(one.ids)]}})
    Dataset.from_list(rows).save_to_disk(path / "packed")
    return path / "packed"
