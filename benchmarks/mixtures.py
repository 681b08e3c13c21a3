"""What mixtures cost and how near they come: twenty recipes from one store, by rows, tokens and trained tokens.

    python benchmarks/mixtures.py [--recipes 20] [--json]

The store is made of six real sources of SFTDATA_TEST_DATA, 18 million tokens; without that folder, of four seeded ones. Each
recipe is one `sftdata view` command, a process of its own: its wall-clock and processor time, the bytes that it wrote beside
the tokens that its rows hold, and by how much the share of any source misses what was asked, in points. The same shares
in `sfttrain`, by rows of 2,048 tokens, once every set has given a million tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import sftdata
from sftdata.set.manifest import read_manifest
from sfttrain.data import read_contents
from sfttrain.schedule import Mixture

ROOT = Path(__file__).parents[1]
FILES = (
    "prompt_completion/t0_train.jsonl.gz", "prompt_completion/gsm8k_train.jsonl", "sharegpt/sharegpt_zh_1k.jsonl",
    "instruction/gpteacher_toolformer.json", "text/c4_demo.jsonl", "text/multilingual.txt",
)  # fmt: skip
MIXED = 4  # of these files, the first
LENGTH = 2048
ENOUGH = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = make_store(Path(folder))
        found = measure_views(Path(folder), names, options.recipes) | measure_trainer(Path(folder), names)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{k:44}{v}" for k, v in found.items()))


def make_store(folder: Path) -> list[str]:
    """Prepare the store; return the names of the sources that are mixed."""
    data = os.environ.get("SFTDATA_TEST_DATA")
    if data:
        inputs = [Path(data) / "datasets" / name for name in FILES]
        tokenizer = Path(data) / "tokenizers/qwen2.5-instruct"
    else:
        inputs, tokenizer = (
            [write_rows(folder / f"made-{n}.jsonl", n) for n in range(MIXED)],
            ROOT / "examples/tokenizer",
        )
    sftdata.prepare(inputs, tokenizer=tokenizer, output=folder / "store", max_length=LENGTH, workers=1)
    return [path.name for path in inputs[:MIXED]]


def write_rows(path: Path, seed: int) -> Path:
    """Write seeded chats, of another length in each file."""
    rng = random.Random(seed)
    words = [str(number) for number in range(1000)]
    with path.open("w") as sink:
        for _ in range(4_000):
            turns = [
                {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(5, 60 * (seed + 1))))}
                for role in ("user", "assistant")
            ]
            sink.write(json.dumps({"messages": turns}) + "\n")
    return path


def measure_views(folder: Path, names: list[str], recipes: int) -> dict[str, Any]:
    """Make the views, one command after the other."""
    seconds, spent, copied, missed, of_a_million, tokens = [], [], 0, [], 0, 0
    for number in range(recipes):
        shares = np.random.default_rng(number).dirichlet(np.full(len(names), 5.0))
        out, unit = folder / f"view-{number}", ("trained", "tokens", "rows")[number % 3]
        mix = [
            part
            for name, share in zip(names, shares, strict=True)
            for part in ("--mix", f"*{name}={share:.6f}")
        ]
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "sftdata", "view", folder / "store", "-o", out, *mix, "--mix-by", unit, "--passes", "4"],
            check=True, capture_output=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        copied += sum(path.stat().st_size for path in out.glob("*.arrow"))
        manifest = read_manifest(out)
        tokens += manifest.ledger.tokens
        whole = sum(getattr(share, unit) for share in manifest.shares)
        for share in manifest.shares:
            if share.tokens >= ENOUGH:
                of_a_million += 1
                missed.append(abs(getattr(share, unit) / whole - share.asked))
    return {
        "recipes": recipes,
        "seconds each, median and most": f"{np.median(seconds):.2f}, {max(seconds):.2f}",
        "processor seconds each, median and most": f"{np.median(spent):.2f}, {max(spent):.2f}",
        "bytes written for each token of the rows": round(copied / tokens, 2),
        "sources of a million tokens and more": of_a_million,
        "share missed by at most, points": f"{max(missed):.4%}",
    }


def measure_trainer(folder: Path, names: list[str]) -> dict[str, Any]:
    """Mix a set of each source by rows, as the trainer does."""
    for number, name in enumerate(names):
        sftdata.view(folder / "store", output=folder / f"set-{number}", sources=[f"*{name}"])
    begin = time.process_time()
    contents = [read_contents(sftdata.open(folder / f"set-{number}")) for number in range(len(names))]
    read = time.process_time() - begin
    worst, spent = 0.0, []
    for seed in range(20):
        shares = np.random.default_rng(seed).dirichlet(np.full(len(names), 5.0))
        amounts = [part.amounts("trained") for part in contents]
        begin = time.process_time()
        mixture = Mixture(amounts, shares.tolist(), seed=seed)
        mixture.rows(0, mixture.steps_per_epoch(64), 64)
        spent.append(time.process_time() - begin)
        steps = 0
        while True:
            steps += 10
            times = mixture.seen(steps, 64)
            if (
                min(int(taken @ part.amounts("tokens")) for taken, part in zip(times, contents, strict=True))
                >= ENOUGH
            ):
                break
        got = np.array([int(taken @ part) for taken, part in zip(times, amounts, strict=True)])
        worst = max(worst, float(np.abs(got / got.sum() - shares).max()))
    return {
        "trainer: share missed by at most, points": f"{worst:.4%}",
        "trainer: contents of the sets, processor s": round(read, 3),
        "trainer: the order of an epoch, processor s": round(float(np.median(spent)), 4),
    }


if __name__ == "__main__":
    main()
