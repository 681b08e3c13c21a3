"""Show on a GPU that the default path works: `python benchmarks/gpu_default.py [proofs|run|all]`, about three minutes.

proofs: what the proof says of each attention and family, in bfloat16.
run: a model of 0.5B weights, three steps with activation checkpointing; memory of the trial step against that of a step,
    and the loss of the first step against every document alone in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))
FAMILIES = ("qwen2", "mistral", "qwen3_moe", "gemma2", "phi3", "lfm2")
SMALL = {"lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4}}
LEAVES_OUT = {
    ("gemma2", "sdpa")
}  # the cap on attention logits, in transformers before 5.23; from then on it raises
ATTENTIONS = ("varlen", "flex_attention", "sdpa", "eager")


def proofs() -> bool:
    """Print a line for each proof; return whether they are as they should be."""
    from transformers import AutoConfig

    from sfttrain.attention import choose_attention, register_attention
    from sfttrain.isolation import Surroundings, prove

    register_attention()
    right = True
    for family in FAMILIES:
        config = AutoConfig.for_model(family, **SMALL.get(family, {}))
        choice = choose_attention("auto", config, "cuda", torch.bfloat16)
        for attention in ATTENTIONS if family in ("qwen2", "mistral") else ("varlen", "sdpa", "eager"):
            if attention not in (choice.name, *choice.others):
                continue
            began = time.perf_counter()
            expected = family != "lfm2" and (family, attention) not in LEAVES_OUT
            try:
                proof = prove(config, attention, Surroundings("cuda", torch.bfloat16, rows=2, reach=None))
                rounding = "-" if proof.rounding is None else f"{proof.rounding:.2f}"
                found = f"isolated={proof.isolated} difference={proof.difference:.1e} leak={proof.leak:.1e} rounding={rounding}"
                found += f" fuses={proof.fuses} boundaries={proof.boundaries}"
                right &= proof.isolated == expected
            except Exception as error:
                found, right = f"{type(error).__name__}: {str(error)[:150]}", right and not expected
            print(f"{family:10} {attention:15} {found} ({time.perf_counter() - began:.1f} s)", flush=True)
    return right


def run() -> bool:
    """Train three steps of a 0.5B Qwen2 by default settings; compare memory and the first loss."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sfttrain import preflight
    from tests.train_runs import train_in_process
    from tests.train_sets import make_set

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = make_set(folder / "set", rows=16, max_length=4096, vocabulary=151_936)
        torch.manual_seed(0)
        shape = {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
        }
        config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
        peaks: dict[str, float] = {}
        own = preflight.try_step

        def try_step(*given: Any) -> float:
            torch.cuda.reset_peak_memory_stats()
            seconds = own(*given)
            peaks["trial step"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
            return seconds

        preflight.try_step = try_step
        steps = {
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-5,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
        }
        trainer = train_in_process(
            shards, folder / "model", folder / "out", {**steps, "activation_checkpointing": True}
        )
        peaks["training"] = torch.cuda.max_memory_allocated() / 2**30
        log = [json.loads(line) for line in (folder / "out" / "train_log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in log if "loss" in line]
        alone = _first_loss_alone(folder, trainer)
        print(f"losses {losses}; first step, each document alone in float32: {alone:.4f}")
        print("peaks in GiB: " + ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items()))
        attention = trainer.model.config._attn_implementation
        print(f"attention {attention}, flattened {trainer.data_collator.flatten}, fused {trainer.fused}")
        close = abs(losses[0] - alone) < 0.01 * alone
        return close and attention == "varlen" and peaks["trial step"] <= peaks["training"]


def _first_loss_alone(folder: Path, trainer: Any) -> float:
    """Mean loss over the trained tokens of the first global batch."""
    from transformers import AutoModelForCausalLM

    from sftdata.set.opened import open_set

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).cuda()
    total, count = 0.0, 0
    for row in trainer.order.rows(0)[:4].tolist():
        for document in open_set(folder / "set")[row].documents():
            ids, labels = (
                torch.from_numpy(part.astype(np.int64)).cuda()
                for part in (document.input_ids, document.labels)
            )
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            total += float(cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100))
            count += int((labels[1:] != -100).sum())
    return total / count


if __name__ == "__main__":
    import transformers

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name()}"
    )
    chosen = sys.argv[1] if len(sys.argv) > 1 else "all"
    parts = [part for name, part in (("run", run), ("proofs", proofs)) if chosen in (name, "all")]
    results = {part.__name__: part() for part in parts}
    print("; ".join(f"{name}: {'ok' if right else 'WRONG'}" for name, right in results.items()))
    sys.exit(0 if all(results.values()) else 1)
