"""The shards are plain Arrow files: datasets, polars and TRL read them as they are, and TRL trains on them exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftdata.batches import TokenBatch
from sftdata.pack import Strategy, gather, plan_packs
from sftdata.set.shards import shard_name, write_shard

pytestmark = pytest.mark.slow

VOCAB, MAX_LENGTH = 128, 48


def example_tokens(count: int = 40) -> TokenBatch:
    rng = np.random.default_rng(11)
    lengths = rng.integers(2, MAX_LENGTH + 1, count)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    ids = rng.integers(3, VOCAB, offsets[-1]).astype(np.int32)
    return TokenBatch(ids, rng.random(offsets[-1]) < 0.6, offsets, np.arange(count))


def write_shards(folder: Path, strategy: Strategy = "bfd") -> tuple[TokenBatch, list[str]]:
    """Two shards of the same examples' first and second half."""
    tokens, names = example_tokens(), []
    length = None if strategy == "none" else MAX_LENGTH
    for index, part in enumerate(np.array_split(tokens.row, 2)):
        start, stop = tokens.offsets[part[0]], tokens.offsets[part[-1] + 1]
        offsets = tokens.offsets[part[0] : part[-1] + 2] - start
        half = TokenBatch(tokens.input_ids[start:stop], tokens.trained[start:stop], offsets, part)
        rows = gather(half, part, plan_packs(half.lengths, MAX_LENGTH, strategy), length, 0)
        write_shard(folder / shard_name(index), rows, length)
        names.append(str(folder / shard_name(index)))
    return tokens, names


def load_with_datasets(names: list[str], cache: Path) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    return load_dataset("arrow", data_files=names, split="train", cache_dir=str(cache))


@pytest.mark.parametrize("strategy", ["bfd", "wrapped", "none"])
def test_datasets_loads_the_shards_and_sees_every_token(tmp_path: Path, strategy: Strategy) -> None:
    tokens, names = write_shards(tmp_path, strategy)
    dataset = load_with_datasets(names, tmp_path / "cache")
    assert dataset.column_names == ["input_ids", "labels", "seq_lengths", "example_ids"]
    found: dict[int, list[int]] = {}
    for row in dataset:
        assert len(row["labels"]) == len(row["input_ids"]) == sum(row["seq_lengths"])
        at = 0
        for length, example in zip(row["seq_lengths"], row["example_ids"], strict=True):
            found.setdefault(example, []).extend(row["input_ids"][at : at + length])
            at += length
    found.pop(-1, None)
    assert found == {
        i: tokens.input_ids[tokens.offsets[i] : tokens.offsets[i + 1]].tolist() for i in range(len(tokens))
    }


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_polars_scans_the_shards(tmp_path: Path, strategy: Strategy) -> None:
    import polars as pl

    tokens, names = write_shards(tmp_path, strategy)
    frame = pl.scan_ipc(names).collect()
    assert frame["seq_lengths"].list.sum().sum() == sum(len(row) for row in frame["input_ids"])
    assert frame.filter(pl.col("example_ids").list.contains(7)).height == 1
    eager = pl.concat([pl.read_ipc(name) for name in names])
    assert eager.equals(frame)
    assert sorted(i for ids in frame["example_ids"] for i in ids if i >= 0) == list(range(len(tokens)))


# --------------------------------------------------------------------------------------------------------- TRL


@pytest.fixture(scope="module")
def trl_parts() -> tuple[Any, Any]:
    """A tiny random Qwen2, in fp32 on the CPU, and a tokenizer that TRL asks for and pre-tokenized rows do not use."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    words = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t1")),
        unk_token="t1",
        pad_token="t0",
        eos_token="t2",
    )
    return Qwen2ForCausalLM(config).float().eval(), tokenizer


def loss_of_lone_examples(model: Any, tokens: TokenBatch) -> tuple[float, int]:
    """Summed cross entropy of each example on its own, and how many tokens it is over: the slow, obvious way."""
    import torch

    total, count = 0.0, 0
    for index in range(len(tokens)):
        span = slice(tokens.offsets[index], tokens.offsets[index + 1])
        ids, trained = torch.tensor(tokens.input_ids[span]).long(), torch.tensor(tokens.trained[span])
        with torch.no_grad():
            scores = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        for position in range(1, len(ids)):
            if trained[position]:
                total -= float(scores[position - 1, ids[position]])
                count += 1
    return total, count


@pytest.mark.filterwarnings("ignore")  # of transformers, TRL and torch; ours are errors elsewhere
@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_a_trl_step_on_the_shards_has_the_loss_of_the_lone_examples(
    tmp_path: Path, trl_parts: tuple[Any, Any], strategy: Strategy
) -> None:
    import copy

    from trl import SFTConfig, SFTTrainer

    model, tokenizer = trl_parts
    tokens, names = write_shards(tmp_path, strategy)
    total, count = loss_of_lone_examples(model, tokens)
    dataset = load_with_datasets(names, tmp_path / "cache")
    trainer = SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            padding_free=True,
            max_length=None,
            per_device_train_batch_size=len(dataset),
            max_steps=1,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert int((batch["labels"] != -100).sum()) == count
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(total / count, abs=1e-5)
