"""The same shards, seed and order give TRL's losses and gradient norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_runs import tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.mark.filterwarnings("default")  # TRL and peft warn about what they will remove
def test_twenty_steps_equal_trl(tmp_path: Path) -> None:
    shards = make_set(tmp_path / "set", rows=64)
    model = tiny_llama(tmp_path / "model")
    settings = {
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
    }
    settings |= {
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "gradient_accumulation_steps": 2,
    }
    theirs = _train_with_trl(shards, model, tmp_path / "trl", settings)
    train_in_process(shards, model, tmp_path / "ours", settings)
    ours = [json.loads(line) for line in (tmp_path / "ours/train_log.jsonl").read_text().splitlines()]
    assert len(ours) == len(theirs) == STEPS
    for mine, his in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(his["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(his["grad_norm"], abs=1e-5)


def _train_with_trl(
    shards: Path, model: Path, output: Path, settings: dict[str, Any]
) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from sftdata.set.opened import open_set

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "tokenizer")
    arguments = SFTConfig(
        output_dir=str(output), padding_free=True, max_length=None, packing=False, report_to="none", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = Dataset(open_set(shards).arrow().select(["input_ids", "labels", "seq_lengths"]))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    trainer = SFTTrainer(network, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
