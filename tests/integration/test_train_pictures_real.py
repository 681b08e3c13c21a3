"""Pictures where this machine has no part: flash and varlen kernels (`-m gpu`), processors of real checkpoints (`-m network`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sftdata
from sftdata.pictures.families import read_processor
from sftdata.set.opened import open_set
from sfttrain.attention import FLATTENED, STAND_IN, register_attention, unsupported_reason
from sfttrain.proofs import Surroundings, prove
from tests.oracles.picture_steps import chat_inputs
from tests.oracles.pictures import Own
from tests.picture_sets import write_rows
from tests.train_runs import OUR_WARNINGS, train_in_process
from tests.vision_models import (
    inputs_of_folder,
    make_pictured_set,
    pictured_rows,
    small_config,
    write_small_model,
    write_small_processor,
)

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
# Family: a repository of it, whose processor alone is fetched; Gemma's and Mistral's ask for an account.
CHECKPOINTS = {
    "qwen2-vl": "Qwen/Qwen2-VL-2B-Instruct", "qwen2.5-vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-2B-Instruct", "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf", "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "internvl": "OpenGVLab/InternVL3-1B-hf",
    "gemma3": "google/gemma-3-4b-it", "gemma4": "google/gemma-4-e2b-it", "pixtral": "mistral-community/pixtral-12b",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
}  # fmt: skip


@pytest.mark.gpu(seconds=120)
@pytest.mark.feature("pictures")
@pytest.mark.parametrize("attention", sorted(FLATTENED - {STAND_IN}))
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_kernels_of_flattened_rows_keep_pictures_apart(tmp_path: Path, name: str, attention: str) -> None:
    """Forward and backward in bfloat16, as near to float32 as plain attention is."""
    register_attention()
    write_small_processor(tmp_path, name)
    config = small_config(name, tmp_path, hidden_size=256, head_dim=64)
    reason = unsupported_reason(attention, config, "cuda", torch.bfloat16)
    if reason:
        pytest.skip(f"{attention}: {reason}")
    inputs = inputs_of_folder(tmp_path, config.image_token_id)
    proof = prove(config, attention, Surroundings("cuda", torch.bfloat16, pictures=inputs))
    assert proof.rounding is not None
    assert proof.isolated


@pytest.mark.gpu(seconds=120)
@pytest.mark.feature("pictures")
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3"])
def test_steps_on_pictures_are_those_of_the_cpu(tmp_path: Path, name: str) -> None:
    """By default: bfloat16, the fastest attention that is proven; against float32 and sdpa on the CPU."""
    model = write_small_model(tmp_path / "model", name)
    shards = make_pictured_set(model, tmp_path, tmp_path / "set")
    settings = {
        "max_steps": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2,
        "save_strategy": "no", "logging_steps": 1, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    found = []
    for here, more in (("gpu", {}), ("cpu", {"use_cpu": True, "bf16": False})):
        train_in_process(shards, model, tmp_path / here, settings | more, freeze="none")
        lines = (tmp_path / here / "train_log.jsonl").read_text("utf-8").splitlines()
        found.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], rel=2e-2)


@pytest.mark.network
@pytest.mark.feature("pictures")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_rows_are_those_of_the_processor_of_a_real_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing made here but the pictures: its JSON, its tokenizer, its template."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    wanted = ["*.json", "*.jinja", "tokenizer*", "*.txt"]
    try:
        folder = Path(
            snapshot_download(CHECKPOINTS[name], allow_patterns=wanted, local_dir=tmp_path / "model")
        )
    except GatedRepoError as error:
        pytest.skip(f"{CHECKPOINTS[name]} is for accounts that were let in: {error}")
    rows = pictured_rows(tmp_path)
    source = str(write_rows(tmp_path, rows))
    sftdata.prepare(
        source, output=tmp_path / "set", tokenizer=str(folder), max_length=16_384, workers=1, packing="none"
    )
    opened = open_set(tmp_path / "set")
    family = read_processor(folder).family
    template = (opened.folder / "tokenizer" / "chat_template.jinja").read_text("utf-8")
    theirs = [chat_inputs(Own(family, folder), template, row["messages"], row, tmp_path) for row in rows]
    assert [row.input_ids.tolist() for row in opened] == [
        inputs["input_ids"][0].tolist() for inputs in theirs
    ]
