"""`sfttrain eval`: the figures of an evaluation during a run, held against documents taken one at a time."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
import torch

import sftdata
from sftdata.set.opened import open_set
from sfttrain import cli
from sfttrain.evaluate import Evaluation, evaluate
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS: dict[str, Any] = {
    "max_steps": 20, "learning_rate": 5e-3, "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "no",
    "per_device_train_batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats of which one answers in a way that no other does, and prompts; the file and line are known."""
    folder = tmp_path_factory.mktemp("data")
    chats = [json.loads(line) for line in (EXAMPLES / "conversations.jsonl").read_text("utf-8").splitlines()]
    chats[7]["messages"][-1]["content"] = "".join(random.Random(1).choices(ascii_letters, k=70))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")
    shutil.copy(EXAMPLES / "completions.jsonl", folder)
    sftdata.prepare(
        [folder / "chats.jsonl", folder / "completions.jsonl"],
        tokenizer=EXAMPLES / "tokenizer", output=folder / "set", max_length=256, workers=1,
    )  # fmt: skip
    return folder / "set"


@pytest.fixture(scope="module")
def trained(held: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen the set, and evaluated on it at its last step."""
    folder = tmp_path_factory.mktemp("runs") / "model"
    config = EXAMPLES / "tiny-model" / "config.json"
    train_in_process(held, None, folder, STEPS, init_from_config=config, eval={"held": held})
    return folder


def _alone(model: Path, shards: Path) -> dict[str, list[tuple[int, float, int]]]:
    """Return line, loss and trained tokens of each document by source: one at a time, with full logits."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: dict[str, list[tuple[int, float, int]]] = {}
    opened = open_set(shards)
    for row in (opened[index] for index in range(len(opened))):
        edges = np.cumsum(row.seq_lengths)
        for start, stop, example in zip(edges - row.seq_lengths, edges, row.examples, strict=True):
            if example < 0:
                continue
            ids = torch.tensor(np.asarray(row.input_ids[start:stop], np.int64))[None]
            labels = torch.tensor(np.asarray(row.labels[start:stop], np.int64))
            with torch.no_grad():
                logits = loaded(input_ids=ids).logits[0]
            kept = labels[1:] != -100
            losses = torch.nn.functional.cross_entropy(logits[:-1][kept], labels[1:][kept], reduction="none")
            source, line = opened.origin(int(example))
            found.setdefault(source, []).append((line, float(losses.sum()), int(kept.sum())))
    return found


def _mean(documents: list[tuple[int, float, int]]) -> float:
    return sum(loss for _, loss, _ in documents) / sum(trained for _, _, trained in documents)


@pytest.fixture(scope="module")
def found(trained: Path, held: Path) -> Evaluation:
    return evaluate(str(trained), held, None, 8, 3)


@pytest.mark.feature("evaluating a model")
def test_the_figures_are_those_of_documents_taken_alone(found: Evaluation, trained: Path, held: Path) -> None:
    wanted = _alone(trained, held)
    everything = [document for documents in wanted.values() for document in documents]
    assert found.whole.loss == pytest.approx(_mean(everything), abs=1e-5)
    assert found.whole.documents == len(everything)
    assert [source.name for source in found.sources] == ["chats.jsonl", "completions.jsonl"]
    for source in found.sources:
        assert source.loss == pytest.approx(_mean(wanted[source.name]), abs=1e-5)
        assert (source.documents, source.trained) == (
            len(wanted[source.name]), sum(trained for _, _, trained in wanted[source.name]),
        )  # fmt: skip


def test_they_are_those_that_the_run_logged(found: Evaluation, trained: Path) -> None:
    *_, logged = (json.loads(line) for line in (trained / "train_log.jsonl").read_text().splitlines())
    assert found.whole.loss == pytest.approx(logged["eval_held_loss"], abs=1e-6)
    for source in found.sources:
        assert source.loss == pytest.approx(logged[f"eval_held_loss_{source.name}"], abs=1e-6)


def test_a_document_that_no_other_is_like_is_named_with_file_and_line(
    found: Evaluation, trained: Path, held: Path
) -> None:
    first = found.worst[0]
    assert (first.source, first.line) == ("chats.jsonl", 8)
    assert "gSNnzxHPebRwNaxL" in first.excerpt
    loss = {line: loss / count for line, loss, count in _alone(trained, held)["chats.jsonl"]}
    assert first.loss == pytest.approx(loss[8], abs=1e-4)
    assert any("chats.jsonl:8  loss" in line for line in found.lines())


def test_a_set_without_sources_of_its_own_or_a_tokenizer_is_measured_too(tmp_path: Path) -> None:
    shards, model = make_set(tmp_path / "set"), tiny_llama(tmp_path / "model")
    found = evaluate(str(model), shards, None, 8, 0)
    assert found.whole.loss == pytest.approx(np.log(128), abs=0.5)
    assert not found.worst


def test_adapters_are_measured_on_their_base(tmp_path: Path) -> None:
    shards, model = make_set(tmp_path / "set"), tiny_llama(tmp_path / "base")
    train_in_process(
        shards, model, tmp_path / "out", STEPS | {"learning_rate": 1e-2}, lora={"r": 4}, eval={"held": shards}
    )
    *_, logged = (json.loads(line) for line in (tmp_path / "out/train_log.jsonl").read_text().splitlines())
    adapted = evaluate(str(tmp_path / "out"), shards, None, 8, 0)
    assert adapted.whole.loss == pytest.approx(logged["eval_held_loss"], abs=1e-5)
    assert evaluate(str(model), shards, None, 8, 0).whole.loss > adapted.whole.loss


def test_the_command_prints_lines_or_json(
    trained: Path, held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(trained), str(held)]
    assert cli.main([*command, "--worst", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:3]] == ["chats.jsonl", "completions.jsonl"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["worst"]) == 10
    assert f"loss {found['loss']:.4f} of {found['trained']:,} trained tokens" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}", "{set}", "--model", "{model}"], "holds no adapters to put on it. Fix: leave --model out"),
        (["{model}", "{model}"], "no finished set|not a finished set|manifest"),
        (["{none}", "{set}"], "none"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], said: str, trained: Path, held: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"model": trained, "set": held, "none": tmp_path / "none"}
    assert cli.main(["eval", *(part.format(**places) for part in arguments)]) != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, error)


def test_a_quantized_model_is_measured_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_set(tmp_path / "set", rows=6)
    whole = tiny_llama(tmp_path / "whole", hidden_size=64, intermediate_size=64)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=quantization, device_map={"": "cpu"}
    )
    quantized.save_pretrained(tmp_path / "nf4")
    found = evaluate(str(tmp_path / "nf4"), tmp_path / "set", None, 2, 0)
    (wanted,) = _alone(tmp_path / "nf4", tmp_path / "set").values()
    assert found.whole.loss == pytest.approx(_mean(wanted), abs=1e-4)
    assert found.whole.loss != pytest.approx(_mean(*_alone(whole, tmp_path / "set").values()), abs=1e-4)
