"""Seconds per training step on CPU: TRL, a plain transformers loop, a bare loop with our loss, and our trainer.

    python benchmarks/train_step.py [--steps N] [--rounds N] [--startup]

All four train the same Qwen2 (4 layers, hidden 256, vocabulary 50,000) on the same set: 512 tokens x 4 rows, three
quarters of them supervised. Steps are taken in turn, round after round in one process, so that a noisy machine slows all
alike; the median of the rounds counts. `--startup` measures process start to the end of the first step instead: of TRL in
a script as its users write it, of `sfttrain run`, and of `sfttrain run` where the proof of the model is in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
    parser.add_argument("--first-step", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_step:
        _first_step(*arguments.first_step)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_inputs(folder)
        if arguments.startup:
            _report_startup(folder, arguments.rounds)
        else:
            _report_steps(folder, arguments.steps, arguments.rounds)


def _report_steps(folder: Path, steps: int, rounds: int) -> None:
    """Interleave the four loops and print their medians and ratios."""
    import torch

    contenders: dict[str, Iterator[float]] = {
        "TRL": _trainer_steps(
            lambda callback: _trl(folder / "trl", callback, SETTINGS, folder / "set", folder / "model")
        ),
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


def _report_startup(folder: Path, rounds: int) -> None:
    """Start each as a process of its own, in turn, until its first step is done."""
    names = {"TRL": "trl", "sfttrain": "sfttrain", "sfttrain, proven before": "sfttrain"}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for name, which in names.items():
            given = {"settings": SETTINGS, "set": folder / "set", "model": folder / "model"}
            seconds[name].append(seconds_to_first_step(which, folder=folder, cache=folder / "cache", **given))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"process start to first step: {name} {value:.1f} s, {value / medians['TRL']:.2f} of TRL's")


def seconds_to_first_step(
    which: str, *, settings: dict[str, Any], set: Path, model: Path, folder: Path, cache: Path
) -> float:
    """Return the seconds from the start of a process to the end of its first step; then it is killed.

    Args:
        which: "sfttrain" for the command, "trl" for a script as its users write it.
        settings: of both.
        cache: where sfttrain keeps its proofs.
    """
    steps = settings | {"max_steps": 20}  # too few for auto to compile
    if which == "trl":
        given = [json.dumps(steps), str(set), str(model), str(folder / "trl")]
        command = [sys.executable, __file__, "--first-step", *given]
    else:
        output = tempfile.mkdtemp(dir=folder)
        pairs = [part for key, value in steps.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = [
            sys.executable,
            "-m",
            "sfttrain",
            "run",
            str(set),
            "--model",
            str(model),
            "-o",
            output,
            *pairs,
        ]
    environment = {
        **os.environ,
        "SFTTRAIN_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    began, said = time.perf_counter(), list[str]()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(f"{time.perf_counter() - began:6.2f} {line}")
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - began
                process.kill()
                print("".join(line for line in said if not line[7:].startswith(" ")), end="", file=sys.stderr)
                return round(seconds, 2)
    raise RuntimeError(f"{which} took no step: {''.join(said)[-2_000:]}")


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


def _trl(folder: Path, callback: Any, settings: dict[str, Any], rows: Path, base: Path) -> None:
    """Train with TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sftdata.set.opened import open_set

    given = {"max_steps": 10_000, "gradient_checkpointing": False} | settings
    arguments = SFTConfig(output_dir=str(folder), padding_free=True, max_length=None, packing=False, **given)
    dataset = Dataset(open_set(rows).arrow().select(["input_ids", "labels", "seq_lengths"]))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()


def _ours(folder: Path, callback: Any) -> None:
    """Train with `sfttrain run`, preflight and all."""
    from sfttrain import run
    from sfttrain.config import read_settings

    flags = {"sets": (folder / "set",), "model": str(folder / "model"), "output": folder / "ours"}
    settings = read_settings(None, [], flags | {"training": SETTINGS | {"max_steps": 10_000}})
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


def _first_step(settings: str, rows: str, model: str, folder: str) -> None:
    import torch
    from transformers import TrainerCallback

    class Say(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            print(f"step {state.global_step}/", flush=True)

    _trl(Path(folder), Say(), json.loads(settings), Path(rows), Path(model))


if __name__ == "__main__":
    main()
