"""Seconds per training step on CPU: TRL, a plain transformers loop, a bare loop with our loss, and our trainer.

    python benchmarks/train_step.py [--steps N] [--rounds N] [--startup]

All four train the same Qwen2 (4 layers, hidden 256, vocabulary 50,000) on the same set: 512 tokens x 4 rows, three
quarters of them supervised. Steps are taken in turn, round after round in one process, so that a noisy machine slows all
alike; the median of the rounds counts. `--startup` measures process start to the end of the first step instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, LENGTH, BATCH = 50_000, 512, 4
SETTINGS = {
    "per_device_train_batch_size": BATCH, "learning_rate": 1e-4, "logging_steps": 10, "save_strategy": "no",
    "train_sampling_strategy": "sequential", "bf16": False, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 1.0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--first-step", choices=["trl", "sfttrain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_step:
        _first_step(arguments.first_step, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_inputs(folder)
        if arguments.startup:
            _report_startup(folder)
        else:
            _report_steps(folder, arguments.steps, arguments.rounds)


def _report_steps(folder: Path, steps: int, rounds: int) -> None:
    """Interleave the four loops and print their medians and ratios."""
    import torch

    contenders: dict[str, Iterator[float]] = {
        "TRL": _trainer_steps(lambda callback: _trl(folder, callback)),
        "plain loop": _loop_steps(folder, fused=False),
        "bare loop, our loss": _loop_steps(folder, fused=True),
        "sfttrain": _trainer_steps(lambda callback: _ours(folder, callback)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for steps_of in contenders.values():
        next(steps_of)  # warm
    for _ in range(rounds):
        for name, steps_of in contenders.items():
            seconds[name] += [next(steps_of) for _ in range(steps)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(seconds['TRL'])} steps each")
    for name, value in medians.items():
        print(
            f"{name:20} {value:7.3f} s/step  (fastest {min(seconds[name]):.3f})  {value / medians['sfttrain']:.2f}x sfttrain"
        )
    print(
        f"overhead over the bare loop: {100 * (medians['sfttrain'] / medians['bare loop, our loss'] - 1):+.1f}%"
    )


def _report_startup(folder: Path) -> None:
    """Start each as a process of its own, three times in turn, until its first step is done."""
    seconds: dict[str, list[float]] = {"trl": [], "sfttrain": []}
    preparation: list[float] = []
    for _ in range(3):
        for name, values in seconds.items():
            began = time.perf_counter()
            command = [sys.executable, __file__, "--first-step", name, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            values.append(time.perf_counter() - began)
            if name == "trl":
                preparation.append(float(done.stdout.splitlines()[-1]))
    trl, ours, prepared = (statistics.median(values) for values in (*seconds.values(), preparation))
    print(
        f"process start to first step: TRL {trl:.1f} s ({prepared:.1f} s of it preparation), sfttrain {ours:.1f} s"
    )
    print(f"sfttrain takes {ours / (trl - prepared):.2f} of TRL's time, preparation excluded")


def _write_inputs(folder: Path) -> None:
    """Write the set and the model that all contenders share."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.train_sets import make_set

    make_set(folder / "set", rows=256, max_length=LENGTH, vocabulary=VOCABULARY, trained=0.75, shards=4)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")


def _trl(folder: Path, callback: Any, max_steps: int = 10_000) -> float:
    """Train with TRL; return the seconds that its own preparation of the rows took."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sftdata.set.opened import open_set

    options = SETTINGS | {
        "output_dir": str(folder / "trl"),
        "max_steps": max_steps,
        "gradient_checkpointing": False,
    }
    arguments = SFTConfig(padding_free=True, max_length=None, packing=False, **options)
    rows = Dataset(open_set(folder / "set").arrow().select(["input_ids", "labels", "seq_lengths"]))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")
    spent = [0.0]
    own = SFTTrainer._prepare_dataset

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = own(*args, **kwargs)
        spent[0] += time.perf_counter() - began
        return result

    SFTTrainer._prepare_dataset = timed
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    return spent[0]


def _ours(folder: Path, callback: Any, max_steps: int = 10_000) -> None:
    """Train with `sfttrain run`, preflight and all."""
    from sfttrain import run
    from sfttrain.config import read_settings

    flags = {"sets": (folder / "set",), "model": str(folder / "model"), "output": folder / "ours"}
    settings = read_settings(None, [], flags | {"training": SETTINGS | {"max_steps": max_steps}})
    run.train(settings, callbacks=[callback])


def _trainer_steps(train: Callable[[Any], Any]) -> Iterator[float]:
    """Yield the seconds of each step of a trainer that runs in a thread and waits for its turn."""
    import threading

    from transformers import TrainerCallback

    turn, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            done.release()
            turn.acquire()

    threading.Thread(target=train, args=(Turns(),), daemon=True).start()
    done.acquire()
    while True:
        began = time.perf_counter()
        turn.release()
        done.acquire()
        yield time.perf_counter() - began


def _loop_steps(folder: Path, fused: bool) -> Iterator[float]:
    """Yield the seconds of each step of a hand-written loop: forward, backward, clip, AdamW, schedule."""
    import torch
    from transformers import AutoModelForCausalLM

    from sftdata.set.opened import open_set
    from sfttrain.data import Collator, TrainingRows
    from sfttrain.loss import fuse_loss

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    if fused:
        fuse_loss(model)
    extra = {"skip_logits": True} if fused else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    rows, collate = TrainingRows([open_set(folder / "set")]), Collator(flatten=False)
    model.train()
    first = 0
    while True:
        began = time.perf_counter()
        batch = collate([rows[(first + index) % len(rows)] for index in range(BATCH)])
        first += BATCH
        model(**batch, **extra).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - began


def _first_step(name: str, folder: Path) -> None:
    from transformers import TrainerCallback

    if name == "sfttrain":
        from sfttrain.cli import main as command

        overrides = [
            part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")
        ]
        output = tempfile.mkdtemp(dir=folder)
        places = [str(folder / "set"), "--model", str(folder / "model"), "-o", output]
        sys.exit(command(["run", *places, "--max-steps", "1", *overrides]))
    print(_trl(folder, TrainerCallback(), max_steps=1))


if __name__ == "__main__":
    main()
