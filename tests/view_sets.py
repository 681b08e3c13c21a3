"""Inputs and sets to make views of: small, seeded, and of every kind that `prepare` reads."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sftdata
from sftdata.set.manifest import Manifest
from sftdata.views.recipe import ViewConfig
from sftdata.views.write import make_view

TOKENIZER = str(Path(__file__).parents[1] / "examples" / "tokenizer")
WORDS = ("quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "bright", "stars", "look", "on")
KINDS = ("chats", "weighted", "texts", "table", "array", "rejects", "filtered", "tokens")
PACKINGS = ("bfd", "wrapped", "none")
POLICIES = ("truncate", "truncate-left", "drop", "split")
Settings = dict[str, Any]


def layouts(*lengths: int) -> list[Settings]:
    """Return every way to limit and pack that `prepare` offers; one cut stream has room for any row."""
    return [
        {"packing": packing, "overlong": overlong, "max_length": length}
        for packing in PACKINGS
        for overlong in POLICIES
        for length in lengths
        if packing != "wrapped" or overlong == "truncate"
    ]


def words(rng: random.Random, longest: int) -> str:
    """Draw a text."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def chats(rows: int, seed: int, longest: int = 60) -> Iterator[dict[str, Any]]:
    """Yield chats, long and short, some without an answer to train, some equal."""
    rng = random.Random(seed)
    for number in range(rows):
        turns = [
            {"role": role, "content": words(rng, longest)}
            for _ in range(rng.randint(1, 3))
            for role in ("user", "assistant")
        ]
        if number % 11 == 3:
            turns = [turn | {"weight": 0} for turn in turns]
        if number % 13 == 5:
            turns = [{"role": "user", "content": "what is there?"}, {"role": "assistant", "content": "stars"}]
        yield {"messages": turns}


def write_lines(path: Path, rows: Iterator[Any] | list[Any]) -> Path:
    """Write JSON lines with a blank one here and there."""
    lines = [json.dumps(row) + "\n" * (1 + (number % 29 == 7)) for number, row in enumerate(rows)]
    path.write_text("".join(lines))
    return path


def _weighted(seed: int) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(chats(80, seed)):
        row["messages"][-1]["weight"] = (0.25, 0.5, 2.0, 1)[number % 4]
        yield row


def _tokens(seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows tokenized elsewhere, many with a label on their very first token."""
    rng = random.Random(seed)
    for _ in range(90):
        ids = [rng.randint(5, 200) for _ in range(rng.randint(1, 300))]
        yield {"input_ids": ids, "labels": [token if rng.random() < 0.4 else -100 for token in ids]}


def write_inputs(folder: Path) -> dict[str, tuple[list[Path], Settings]]:
    """Write inputs of eight kinds; return the files and settings of each, by its name."""
    rng = random.Random(3)
    texts = folder / "texts.txt"
    texts.write_text("\n".join(words(rng, 200) for _ in range(80)))
    table = folder / "table.csv"
    with table.open("w", newline="") as sink:
        rows = csv.writer(sink)
        rows.writerow(["prompt", "completion"])
        rows.writerows([[f"{words(rng, 20)}\nand?", words(rng, 90)] for _ in range(80)])
    array = folder / "array.json"
    array.write_text(json.dumps(list(chats(60, 5))))
    bad = write_lines(
        folder / "bad.jsonl", [*chats(70, 6), {"messages": [{"role": "nobody"}]}, {"messages": 3}]
    )
    return {
        "chats": ([write_lines(folder / f"{name}.jsonl", chats(50, ord(name))) for name in "abc"], {}),
        "weighted": ([write_lines(folder / "weighted.jsonl", _weighted(1))], {"loss_weights": True}),
        "texts": ([texts], {}),
        "table": ([table], {}),
        "array": ([array], {}),
        "rejects": ([bad], {"max_rejects": "50%"}),
        "filtered": (
            [write_lines(folder / "filtered.jsonl", chats(90, 8))],
            {"formatter": "tests.odd_turns:odd_only"},
        ),
        "tokens": ([write_lines(folder / "tokens.jsonl", _tokens(9))], {}),
    }


def prepare(output: Path, inputs: list[Path], **settings: Any) -> Manifest:
    """Prepare a set of several slices."""
    options = {"max_length": 256, "slice_bytes": 30_000, "workers": 1} | settings
    return sftdata.prepare(inputs, tokenizer=TOKENIZER, output=output, **options)


def view(output: Path, *sets: Path, **settings: Any) -> Manifest:
    """Make a view of sets that stands alone, unless `write` is False; one that is not split."""
    return split(output, *sets, **{"write": True} | settings)[0]


def split(output: Path, *sets: Path, **settings: Any) -> tuple[Manifest, ...]:
    """Make a view by index unless `write` is True, or both of a split; return the manifest of each."""
    return make_view(ViewConfig(sets=tuple(map(str, sets)), output=output, **settings))


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a set says of documents: shards, indexes, what is beside them, and the lists of rows.

    But for the lines of the dropped rows of a table, which only its text knows.
    """
    names = ("*-*.arrow", "rejects.jsonl", "dropped.jsonl", "counted.jsonl")
    found = {path.name: path.read_bytes() for name in names for path in sorted(folder.glob(name))}
    found["dropped.jsonl"] = re.sub(rb'("table.csv","line":)\d+', rb"\1null", found["dropped.jsonl"])
    return found
