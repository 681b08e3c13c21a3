"""Tokens per second, peak memory and MFU on a GPU: sfttrain, TRL and a bare loop; a 0.5B-shaped Qwen2 in bfloat16.

    python benchmarks/gpu_step.py [--lengths 4096 16384] [--steps 20] [--tflops 989]

Each contender runs in a process of its own, so that peak memory is its alone. MFU counts 6 FLOP per weight and token and
12 * layers * hidden * length for attention, against `--tflops` of dense bfloat16 (989: H100 and H200).
Without a GPU it says so and ends.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, LAYERS, HIDDEN = 151_936, 24, 896
CONTENDERS = ("sfttrain", "trl", "bare")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tflops", type=float, default=989.0)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    if arguments.one:
        print(json.dumps(_measure(arguments.one, arguments.folder, arguments.steps)))
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for length in arguments.lengths:
        with tempfile.TemporaryDirectory() as name:
            _write_inputs(Path(name), length, arguments.steps)
            for contender in CONTENDERS:
                _report(contender, Path(name), length, arguments)


def _report(contender: str, folder: Path, length: int, arguments: argparse.Namespace) -> None:
    command = [
        sys.executable,
        __file__,
        "--one",
        contender,
        "--folder",
        str(folder),
        "--steps",
        str(arguments.steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{length:6} {contender:9} failed: {done.stderr.strip().splitlines()[-1]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    rate = length / found["seconds"]
    flops = rate * (6 * found["weights"] + 12 * LAYERS * HIDDEN * length)
    mfu = flops / (arguments.tflops * 1e12)
    print(
        f"{length:6} {contender:9} {rate:10,.0f} tokens/s  {found['memory'] / 2**30:6.1f} GiB peak  MFU {mfu:.1%}"
    )


def _write_inputs(folder: Path, length: int, steps: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.train_sets import make_set

    make_set(folder / "set", rows=steps + 8, max_length=length, vocabulary=VOCABULARY, shards=1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4864, num_hidden_layers=LAYERS, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")


def _measure(contender: str, folder: Path, steps: int) -> dict[str, float]:
    """Run one contender; return the median seconds of a step, peak bytes and weights outside the embeddings' lookup."""
    import torch
    from transformers import TrainerCallback

    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            moments.append(time.perf_counter())

    model = {"sfttrain": _ours, "trl": _trl, "bare": _bare}[contender](folder, steps, Clock())
    seconds = statistics.median(later - earlier for earlier, later in pairwise(moments[4:]))
    weights = sum(weight.numel() for weight in model.parameters())  # tied: the table counts once, as the head
    return {"seconds": seconds, "memory": torch.cuda.max_memory_allocated(), "weights": weights}


def _settings(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "max_steps": steps, "per_device_train_batch_size": 1, "learning_rate": 1e-5,
        "logging_steps": 5, "save_strategy": "no", "bf16": True, "report_to": "none", "disable_tqdm": True,
        "activation_checkpointing": True,
    }  # fmt: skip


def _ours(folder: Path, steps: int, clock: Any) -> Any:
    from sfttrain import run
    from sfttrain.config import read_settings

    training = _settings(folder, steps)
    flags = {"sets": (folder / "set",), "model": str(folder / "model"), "output": training.pop("output_dir")}
    settings = read_settings(None, [], flags | {"overwrite": True, "training": training})
    return run.train(settings, callbacks=[clock]).model


def _trl(folder: Path, steps: int, clock: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sftdata.set.opened import open_set

    attention = "flash_attention_2" if _has_flash_attention() else "sdpa"
    arguments = SFTConfig(padding_free=True, max_length=None, packing=False, **_settings(folder, steps))
    rows = Dataset(open_set(folder / "set").arrow().select(["input_ids", "labels", "seq_lengths"]))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation=attention
    )
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tokenizer")
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    return trainer.model


def _bare(folder: Path, steps: int, clock: Any) -> Any:
    """Our rows, attention and loss in a hand-written loop: what the trainer adds is the difference."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sftdata.set.opened import open_set
    from sfttrain.attention import FLATTENED, choose_attention, register_attention
    from sfttrain.data import Collator, TrainingRows
    from sfttrain.loss import fuse_loss

    register_attention()
    attention = choose_attention(
        "auto", AutoConfig.from_pretrained(folder / "model"), "cuda", torch.bfloat16
    ).name
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation=attention
    ).cuda()
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    fuse_loss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows, collate = TrainingRows([open_set(folder / "set")]), Collator(attention in FLATTENED)
    model.train()
    for step in range(steps):
        batch = {
            key: value.cuda() if hasattr(value, "cuda") else value
            for key, value in collate([rows[step]]).items()
        }
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.on_step_end(None, None, None)
    return model


def _has_flash_attention() -> bool:
    import importlib.util

    return importlib.util.find_spec("flash_attn") is not None


if __name__ == "__main__":
    main()
