"""What `--log-documents` costs: processor time of all it does, beside that of the steps it is done in.

    python benchmarks/document_log.py [--steps N]

A small Qwen2 (4 layers, hidden 256, vocabulary 50,000) trains on this machine's CPU with the log; every call that the log
adds (where rows come from, what a batch holds, copying, summing, writing) is timed on the way. Then the same calls alone, for
a step of one row of 16,384 tokens as a GPU takes it: what they cost the host.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spent, whole = _train(folder, steps)
        print(
            f"share of a step: {spent / whole:.4%} ({spent / steps * 1e3:.2f} of {whole / steps * 1e3:,.0f} ms)"
        )
        documents, alone = _alone(folder)
        print(f"a step of 16,384 tokens, {documents} documents: {alone * 1e3:.2f} ms of the host")


def _train(folder: Path, steps: int) -> tuple[float, float]:
    """Return processor seconds of the log, and of all steps."""
    from transformers import TrainerCallback

    import sfttrain
    from sfttrain import data, documents
    from tests.train_sets import make_mixed_set

    shards = make_mixed_set(folder / "set", "instructions", rows=64, max_length=512, vocabulary=VOCABULARY)
    _give_tokenizer(shards)
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any, **options: Any) -> Any:
            began = time.process_time()
            result = call(*inputs, **options)
            spent[0] += time.process_time() - began
            return result

        return run

    data._documents_of = timed(data._documents_of)
    data._trained_bytes = timed(data._trained_bytes)
    for name in ("add", "flush"):
        setattr(documents.DocumentLog, name, timed(getattr(documents.DocumentLog, name)))
    training = {
        "per_device_train_batch_size": 4,
        "logging_steps": 10,
        "save_strategy": "no",
        "max_steps": steps,
    }
    steps_began: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps_began or steps_began.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            steps_began.append(time.process_time())

    config = _config(folder)
    sfttrain.train(
        shards,
        init_from_config=config,
        output=folder / "out",
        log_documents=True,
        callbacks=[Clock()],
        **training,
    )
    return spent[0], steps_began[-1] - steps_began[0]


def _config(folder: Path) -> Path:
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder / "config")
    return folder / "config" / "config.json"


def _give_tokenizer(shards: Path) -> None:
    import shutil

    shutil.copytree(ROOT / "examples" / "tokenizer", shards / "tokenizer")


def _alone(folder: Path) -> tuple[int, float]:
    """Return the documents of a step, and the seconds that all calls of the log take in one."""
    import torch

    from sftdata.set.opened import open_set
    from sfttrain.data import Collator, TrainingRows
    from sfttrain.documents import DocumentLog
    from tests.train_sets import make_mixed_set

    shards = make_mixed_set(folder / "long", "instructions", rows=8, max_length=16_384, vocabulary=VOCABULARY)
    _give_tokenizer(shards)
    opened = open_set(shards)
    plain, placed = TrainingRows([opened]), TrainingRows([opened], places=True)
    collate, log = Collator(flatten=True), DocumentLog(folder / "run", [opened], 0)
    (folder / "run").mkdir()
    times: list[float] = []
    for step in range(1, 41):
        row = step % len(opened)
        began = time.process_time()
        collate([plain[row]])
        without = time.process_time()
        batch = collate([placed[row]])
        documents = batch["documents"]
        log.add(step, documents, torch.rand(int(documents.trained.sum())))
        if step % 10 == 0:
            log.flush()
        times.append((time.process_time() - without) - (without - began))
    log.close()
    return len(documents.tokens), sum(times[10:]) / len(times[10:])


if __name__ == "__main__":
    main()
