"""`sftdata init --from` held against LLaMA-Factory and axolotl themselves: ids and labels, document by document.

Neither is installed with the other tests. They run from a folder that SFTDATA_TEST_TOOLS names:
`pip install --no-deps --target FOLDER llamafactory==0.9.5 axolotl==0.19.0`, and likewise what they then miss
(omegaconf, antlr4-python3-runtime, fire, termcolor, addict, art, colorama, loguru, numba, llvmlite, python-dotenv,
pydantic-settings, sentencepiece, requests with what it needs).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

import sftdata
from sftdata.other_tools import carry_over
from sftdata.set.opened import open_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/moving-from-trl.md").read_text("utf-8").splitlines()
LENGTH = 1024
Document = tuple[list[int], list[int]]
Prepared = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Settings of a tool, and in what its documents may differ from ours.

    Attributes:
        but_for: what the page says of the labels that differ.
        theirs: a text of all tokens that it alone trains; None: any.
        ours: a text of all tokens that are trained here alone.
        lost: what the written settings name as not carried over.
        odd: which of its documents may have other ids, by ids and text.
        dropped: documents that it drops, and that are kept here.
    """

    given: dict[str, Any]
    but_for: str = ""
    theirs: str | None = ""
    ours: str = ""
    lost: str = ""
    odd: Callable[[list[int], str], bool] = lambda ids, text: False
    dropped: int = 0


def _cut(ids: list[int], text: str) -> bool:
    return len(ids) == LENGTH


def _system_again(ids: list[int], text: str) -> bool:
    return text.count("Cutting Knowledge Date") > 1


_LF = {
    "model_name_or_path": "qwen", "stage": "sft", "do_train": True, "finetuning_type": "full", "template": "qwen",
    "dataset_dir": "data", "dataset": "sharegpt", "cutoff_len": LENGTH, "output_dir": "out",
}  # fmt: skip
_CHAT = {"path": "data/messages.json", "type": "chat_template"}
_SHAREGPT = {
    "path": "data/sharegpt.json", "type": "chat_template", "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
}  # fmt: skip
_ALPACA = {"path": "data/alpaca.json", "type": "alpaca"}
_TEXT = {"path": "data/text.json", "type": "completion"}
_AX = {
    "base_model": "qwen", "datasets": [_CHAT], "sequence_len": LENGTH, "val_set_size": 0, "micro_batch_size": 1,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "optimizer": "adamw_torch", "num_epochs": 1, "output_dir": "out",
}  # fmt: skip
_LLAMA = {"base_model": "llama", "special_tokens": {"pad_token": "<|finetune_right_pad_id|>"}}
_NEWLINE = ("the newline after a turn", "\n")
_UNSAID = (  # in no turn of the rows: the system message that the chat template of Qwen writes, and headers
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|im_start|>assistant\n"
)
CASES: dict[str, dict[str, Case]] = {
    "LLaMA-Factory": {
        "ShareGPT": Case(_LF, *_NEWLINE, odd=_cut, dropped=1),
        "ShareGPT, `mask_history`": Case(_LF | {"mask_history": True}, *_NEWLINE, odd=_cut, dropped=1),
        "ShareGPT, `train_on_prompt`": Case(_LF | {"train_on_prompt": True}, odd=_cut, dropped=1),
        "Alpaca with systems, `neat_packing`, `val_size: 0.1`": Case(
            _LF | {"dataset": "asked", "packing": True, "neat_packing": True, "val_size": 0.1, "cutoff_len": 512},
            *_NEWLINE,
        ),
        "ShareGPT, Llama 3.2, no `template`": Case(
            _LF | {"model_name_or_path": "llama", "dataset": "system", "template": None}, odd=_system_again, lost="template"
        ),
    },
    "axolotl": {
        "ShareGPT": Case(_AX | {"datasets": [_SHAREGPT]}),
        "messages, `chat_template: chatml`": Case(_AX | {"chat_template": "chatml"}),
        "messages, `sample_packing`, `val_set_size: 0.1`": Case(_AX | {"sample_packing": True, "val_set_size": 0.1}),
        "messages, `excess_length_strategy: truncate`": Case(_AX | {"excess_length_strategy": "truncate"}),
        "messages, Llama 3.2": Case(_AX | _LLAMA),
        "`type: alpaca`, `sequence_len: 128`": Case(_AX | {"datasets": [_ALPACA], "sequence_len": 128}),
        "`type: alpaca`, Llama 3.2": Case(_AX | _LLAMA | {"datasets": [_ALPACA]}),
        "`type: completion`, `sequence_len: 256`": Case(_AX | {"datasets": [_TEXT], "sequence_len": 256}),
        "ShareGPT, `train_on_inputs`": Case(
            _AX | {"datasets": [_SHAREGPT], "train_on_inputs": True}, "headers of turns, the system message of the template",
            ours=_UNSAID, lost="(train_on)",
        ),
        "messages, `train_on_eos: last`": Case(
            _AX | {"datasets": [_CHAT | {"train_on_eos": "last"}]}, "ends of earlier turns", ours="<|im_end|>",
            lost="datasets[1].train_on_eos",
        ),
        "messages, `roles_to_train: [assistant, user]`": Case(
            _AX | {"datasets": [_CHAT | {"roles_to_train": ["assistant", "user"]}]}, "turns of users", theirs=None,
            lost="datasets[1].roles_to_train",
        ),
    },
}  # fmt: skip


def _write_data(folder: Path, source: Path) -> None:
    """Write 200 chats of three layouts, 200 instructions and as many texts, all of them people's."""
    with (source / "sharegpt/sharegpt_zh_1k.jsonl").open(encoding="utf-8") as lines:
        chats = [json.loads(line)["conversations"] for line in lines]
    chats = [chat for chat in chats if sum(len(turn["value"]) for turn in chat) < 2500][:200]
    roles = {"human": "user", "gpt": "assistant"}
    alpaca = json.loads((source / "instruction/alpaca_5000.json").read_text("utf-8"))[:200]
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    turns = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    with_system = turns | {"columns": {"messages": "conversations", "system": "system"}}
    files = {
        "sharegpt": [{"conversations": chat} for chat in chats],
        "messages": [
            {"messages": [{"role": roles[turn["from"]], "content": turn["value"]} for turn in chat]} for chat in chats
        ],
        "system": json.loads((source / "sharegpt/fastchat_dummy_with_system.json").read_text("utf-8"))[:200],
        "alpaca": alpaca,
        "asked": [row | {"system": f"You are helper {number % 7}."} for number, row in enumerate(alpaca)],
        "text": [
            {"text": row["instruction"] + " " + row["output"] * (1 + number % 9)} for number, row in enumerate(alpaca)
        ],
        "dataset_info": {
            "sharegpt": {"file_name": "sharegpt.json"} | turns,
            "asked": {"file_name": "asked.json", "columns": columns},
            "system": {"file_name": "system.json"} | with_system,
        },
    }  # fmt: skip
    (folder / "data").mkdir()
    for name, value in files.items():
        (folder / f"data/{name}.json").write_text(json.dumps(value), "utf-8")


def _write_models(folder: Path, source: Path) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | dict.fromkeys(sizes, 8)
    for name, tokenizer in (("qwen", "qwen2.5-instruct"), ("llama", "llama-3.2-instruct")):
        (folder / name).mkdir()
        for path in (source / tokenizer).glob("*.json"):
            shutil.copyfile(path, folder / name / path.name)
        (folder / name / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tools")
    _write_data(made, shared_data / "datasets")
    _write_models(made, shared_data / "tokenizers")
    return made


@pytest.fixture(scope="module")
def prepare(folder: Path) -> Callable[[str], Prepared]:
    """Return what a tool makes of all its cases, by their names, and the day; it runs once."""
    return cache(partial(_prepare, folder))


def _prepare(folder: Path, tool: str) -> Prepared:
    package, there = tool.replace("-", "").lower(), os.environ.get("SFTDATA_TEST_TOOLS", "")
    if not (Path(there, package).is_dir() if there else find_spec(package)):
        pytest.skip(f"{tool} is not installed; the head of {Path(__file__).name} says how it runs")
    files = {name: f"{package}-{number}.yaml" for number, name in enumerate(CASES[tool])}
    for name, file in files.items():
        place = {"dataset_prepared_path": f"prepared-{file}"} if tool == "axolotl" else {}
        (folder / file).write_text(yaml.safe_dump(CASES[tool][name].given | place, sort_keys=False))
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests/run_other_tools.py"), tool, "made.json", *files.values()],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": there, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = json.loads((folder / "made.json").read_text())
    return {name: made[file] for name, file in files.items()} | {"date": made["date"]}


def _ours(made: Path) -> Iterator[Document]:
    parts = [made / part for part in ("train", "eval")] if (made / "train").exists() else [made]
    for opened in map(open_set, parts):
        for number in range(len(opened)):
            row = opened[number]
            starts = np.cumsum([0, *row.seq_lengths])
            for start, length, example in zip(starts, row.seq_lengths, row.examples, strict=False):
                if example >= 0:
                    kept = slice(start, start + length)
                    yield row.input_ids[kept].tolist(), np.asarray(row.labels)[kept].tolist()


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, cases in CASES.items() for name in cases])
def test_ids_and_labels_are_those_of_the_tool(
    tool: str,
    name: str,
    prepare: Callable[[str], Prepared],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, made = CASES[tool][name], prepare(tool)
    monkeypatch.chdir(folder)
    (folder / "given.yaml").write_text(yaml.safe_dump(case.given, sort_keys=False))
    found = carry_over(folder / "given.yaml", str(tmp_path / "set"))
    assert not case.lost or case.lost in found.lost
    model = case.given.get("base_model") or case.given["model_name_or_path"]
    chats = found.data.get("kind") != "completion"
    today = (
        {"date": made["date"]} if model == "llama" and chats else {}
    )  # which the tools have templates write
    sftdata.prepare(**found.data, workers=1, **today)
    ours, theirs = list(_ours(tmp_path / "set")), [*made[name]["train"], *made[name]["eval"]]
    left: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for ids, labels in ours:
        left[tuple(ids)].append(labels)
    words = AutoTokenizer.from_pretrained(model)
    same = equal = 0
    trained_there, trained_here = set[int](), set[int]()
    for ids, labels in theirs:
        if not left[tuple(ids)]:
            assert case.odd(ids, words.decode(ids))
            continue
        same, mine = same + 1, left[tuple(ids)].pop()
        labels[0] = -100  # which nothing predicts
        equal += mine == labels
        for token, own, other in zip(ids, mine, labels, strict=True):
            assert {own, other} <= {token, -100}
            if own != other:
                (trained_there if own == -100 else trained_here).add(token)
    assert trained_here == set(words.encode(case.ours, add_special_tokens=False))
    assert case.theirs is None or trained_there == set(words.encode(case.theirs, add_special_tokens=False))
    assert len(ours) - len(theirs) == case.dropped
    assert f"| {tool} | {name} | {len(theirs)} | {same} | {equal} | {case.but_for or 'nothing'} |" in PAGE
