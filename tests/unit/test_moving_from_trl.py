"""The page for who comes from TRL names every argument of four versions, and only flags and settings that there are."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from sftdata.config import PrepareConfig
from sfttrain.config import TrainConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "moving-from-trl.md").read_text(encoding="utf-8")
TRAINING = {field.name for field in dataclasses.fields(TrainingArguments)}

# Arguments of `SFTTrainer.__init__` and own fields of `SFTConfig`, as released.
OLD_TRAINER = (
    "model args data_collator train_dataset eval_dataset tokenizer model_init compute_metrics callbacks optimizers"
    " preprocess_logits_for_metrics peft_config formatting_func"
)
ARGUMENTS = {
    "0.7": f"{OLD_TRAINER} dataset_text_field packing max_seq_length infinite num_of_sequences chars_per_token dataset_num_proc"
    " dataset_batch_size neftune_noise_alpha model_init_kwargs dataset_kwargs",
    "0.11": f"{OLD_TRAINER} dataset_text_field packing max_seq_length dataset_num_proc dataset_batch_size neftune_noise_alpha"
    " model_init_kwargs dataset_kwargs eval_packing num_of_sequences chars_per_token use_liger infinite",
    "0.19": "model args data_collator train_dataset eval_dataset processing_class compute_loss_func compute_metrics callbacks"
    " optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics peft_config formatting_func model_init_kwargs"
    " chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token pad_token max_length packing"
    " packing_strategy padding_free pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss"
    " activation_offloading max_seq_length",
    "1.16": " ".join(
        [*list(inspect.signature(SFTTrainer.__init__).parameters)[1:]]
        + [field.name for field in dataclasses.fields(SFTConfig) if field.name not in TRAINING]
    ),
}


def rows() -> dict[str, tuple[str, str]]:
    """Return argument -> (versions, what it is here) from the tables."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 3:
            for name in re.findall(r"`(\w+)`", cells[0]):
                found[name] = (cells[1], cells[2])
    return found


@pytest.mark.parametrize("version", ARGUMENTS)
def test_every_argument_of_the_version_is_named(version: str) -> None:
    table = rows()
    missing = [name for name in ARGUMENTS[version].split() if name not in table]
    unmarked = [
        name
        for name in ARGUMENTS[version].split()
        if name in table and version not in versions_of(table[name][0])
    ]
    assert not missing
    assert not unmarked


def test_no_argument_is_ascribed_to_a_version_without_it() -> None:
    wrong = [
        (name, version)
        for name, (versions, _) in rows().items()
        for version in versions_of(versions)
        if name not in ARGUMENTS[version].split()
    ]
    assert not wrong


def versions_of(cell: str) -> list[str]:
    return list(ARGUMENTS) if cell == "all" else cell.split(", ")


def test_every_flag_and_setting_that_the_page_names_exists() -> None:
    flags = set(re.findall(r"--[a-z][a-z-]+", (DOCS / "cli.md").read_text(encoding="utf-8")))
    settings = {*PrepareConfig.model_fields, *TrainConfig.model_fields, *TRAINING, "name"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= flags
    assert set(re.findall(r"--set '?(\w+)", PAGE)) <= settings
