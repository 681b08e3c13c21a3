"""The embedded examples: the tokenizer is what its script builds, and the model fits it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANGS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def build_tokenizer(folder: Path, hash_seed: str) -> None:
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": hash_seed}
    subprocess.run(
        [sys.executable, str(EXAMPLES / "build_tokenizer.py"), str(folder)],
        check=True,
        env=env,
        timeout=HANGS,
    )


def test_the_committed_tokenizer_is_what_its_script_builds(tmp_path: Path) -> None:
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        build_tokenizer(folder, hash_seed)
        for file in sorted(folder.iterdir()):
            assert file.read_bytes() == (EXAMPLES / "tokenizer" / file.name).read_bytes()


def test_the_tokenizer_loads_and_renders_every_conversation() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tokenizer")
    for line in (EXAMPLES / "conversations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        assert text.count("<|im_start|>") == text.count("<|im_end|>") >= 2
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert all(message["content"] in text for message in row["messages"])


def test_the_tiny_model_fits_the_tokenizer() -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(EXAMPLES / "tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tokenizer")
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config.max_position_embeddings == tokenizer.model_max_length


def test_the_corpus_holds_every_format_family() -> None:
    conversations = [
        json.loads(line)
        for line in (EXAMPLES / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    messages = [message for row in conversations for message in row["messages"]]
    assert {message["role"] for message in messages} == {"system", "user", "assistant", "tool"}
    assert any("tool_calls" in message for message in messages)
    assert any(message.get("weight") == 0 for message in messages)
    instructions = json.loads((EXAMPLES / "instructions.json").read_text(encoding="utf-8"))
    assert all(set(row) == {"instruction", "input", "output"} for row in instructions)
    completions = [
        json.loads(line) for line in (EXAMPLES / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(set(row) == {"prompt", "completion"} for row in completions)
    texts = (EXAMPLES / "text.txt").read_text(encoding="utf-8").splitlines()
    assert len(conversations) == len(instructions) == len(completions) == len(texts) == 40
