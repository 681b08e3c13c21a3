"""The log of documents: every document of every step once, and together they lost what the step lost."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftdata.blame.log import DocumentLosses, read_log
from sftdata.errors import UsageError
from sftdata.set.opened import open_set
from tests.train_runs import OUR_WARNINGS, Fleet, tiny_llama, train_in_process
from tests.train_sets import make_mixed_set, make_set
from tests.varlen_signatures import SIGNATURES
from tests.view_sets import _weighted, chats, write_lines
from tests.view_sets import prepare as prepare_set

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "logging_steps": 1, "learning_rate": 1e-2,
    "save_strategy": "no", "num_train_epochs": 2,
}  # fmt: skip
FEW = {key: value for key, value in STEPS.items() if key != "num_train_epochs"} | {"max_steps": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows that fill no whole number of steps."""
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=21, trained=0.4)


def _documents(folder: Path, step: int | None = None) -> DocumentLosses:
    losses = read_log(folder)[1]
    return losses if step is None else losses.take(losses.step == step)


def _assert_steps_add_up(folder: Path, within: float = 1e-6) -> None:
    """Hold the documents of each step against the loss that transformers logged of it."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert steps
    for step, loss in steps.items():
        found = _documents(folder, step)
        assert found.loss.sum(dtype=float) / found.weight.sum(dtype=float) == pytest.approx(loss, abs=within)


def _assert_every_document_once_an_epoch(folder: Path, shards: Path, epochs: int) -> None:
    wanted = [
        (int(example), int(length))
        for row in open_set(shards)
        for length, example in zip(row.seq_lengths, row.examples, strict=True)
        if example >= 0
    ] * epochs
    found = _documents(folder)
    assert sorted(zip(found.example_id.tolist(), found.tokens.tolist(), strict=True)) == sorted(wanted)


@pytest.mark.feature("losses of documents")
def test_the_documents_of_a_step_lost_what_the_step_lost(shards: Path, model: Path, tmp_path: Path) -> None:
    train_in_process(shards, model, tmp_path / "out", STEPS, log_documents=True)
    _assert_steps_add_up(tmp_path / "out")
    _assert_every_document_once_an_epoch(tmp_path / "out", shards, epochs=2)
    _assert_alone(tmp_path / "out", shards, model)


def _assert_alone(folder: Path, shards: Path, model: Path) -> None:
    """Compute the documents of step 1 one at a time, with full logits."""
    from transformers import AutoModelForCausalLM

    untrained, opened = AutoModelForCausalLM.from_pretrained(model), open_set(shards)
    found = _documents(folder, 1)
    for index in range(len(found)):
        (document,) = [
            one
            for one in opened[int(found.row[index])].documents()
            if one.example_id == found.example_id[index]
        ]
        ids, labels = (
            torch.from_numpy(part.astype("int64"))[None] for part in (document.input_ids, document.labels)
        )
        with torch.no_grad():
            mean = untrained(input_ids=ids, labels=labels).loss.item()
        assert found.trained[index] == int((labels[0, 1:] != -100).sum()) == found.weight[index]
        assert found.loss[index] / found.weight[index] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "sdpa"}, {"attention": "eager"}, {"packing": "unpack"}, {"loss": "plain"},
        {"loss": "plain", "packing": "unpack"}, {"loss": "chunked"}, {"compile": "loss"}, {"compile": "layers"},
        {"kernels": "none"}, {"lora": "r=4"},
    ],
    ids=str,
)  # fmt: skip
def test_they_do_on_every_path(shards: Path, model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    train_in_process(shards, model, tmp_path / "out", STEPS, log_documents=True, **settings)
    _assert_steps_add_up(tmp_path / "out")
    _assert_every_document_once_an_epoch(tmp_path / "out", shards, epochs=2)
    if "lora" not in settings:
        _assert_alone(tmp_path / "out", shards, model)


@pytest.mark.slow
def test_they_do_where_rows_are_laid_end_to_end(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfttrain.attention.FLATTENED_DEVICES", {"cpu"})
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", SIGNATURES["2.13"])
    wide = tiny_llama(tmp_path / "wide", hidden_size=64, intermediate_size=96)
    settings = {**STEPS, "bf16": True}
    trainer = train_in_process(shards, wide, tmp_path / "out", settings, log_documents=True)
    assert trainer.data_collator.flatten
    _assert_steps_add_up(tmp_path / "out")
    _assert_every_document_once_an_epoch(tmp_path / "out", shards, epochs=2)


@pytest.mark.gpu
def test_they_do_on_a_gpu(tmp_path: Path) -> None:
    """In bf16 with compiled layers, whose losses are copied while the step goes on; float32 sums of many tokens."""
    shards = make_mixed_set(tmp_path / "set", "instructions", rows=24, max_length=2048, vocabulary=1024)
    model = tiny_llama(
        tmp_path / "model",
        vocabulary=1024,
        hidden_size=128,
        intermediate_size=256,
        max_position_embeddings=2048,
    )
    train_in_process(shards, model, tmp_path / "out", STEPS, log_documents=True, compile="layers")
    _assert_steps_add_up(tmp_path / "out", within=1e-5)
    _assert_every_document_once_an_epoch(tmp_path / "out", shards, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_they_do_with_weights_and_however_a_set_is_packed(
    tmp_path: Path, packing: str, weighted: bool
) -> None:
    rows = write_lines(tmp_path / "rows.jsonl", list(_weighted(1) if weighted else chats(40, 1))[:40])
    prepare_set(tmp_path / "set", [rows], packing=packing, max_length=64, overlong="split" if packing == "bfd" else "truncate",
                loss_weights=weighted)  # fmt: skip
    model = tiny_llama(tmp_path / "model", vocabulary=1024)
    train_in_process(tmp_path / "set", model, tmp_path / "out", FEW, log_documents=True)
    _assert_steps_add_up(tmp_path / "out")
    found = _documents(tmp_path / "out")
    assert np.array_equal(found.weight, found.trained.astype(np.float32)) is not weighted


@pytest.mark.slow
def test_an_objective_changes_what_is_trained_and_not_what_is_logged(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    one = FEW | {"max_steps": 1}
    for name, settings in (("nll", {}), ("dft", {"objective": "dft"})):
        train_in_process(shards, model, tmp_path / name, one, log_documents=True, **settings)
    plain, dft = (_documents(tmp_path / name) for name in ("nll", "dft"))
    assert plain.loss.tolist() == dft.loss.tolist()


@pytest.mark.slow
def test_several_sets_are_told_apart_when_a_set_is_seen_twice(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    other = make_set(tmp_path / "other", rows=6, seed=9)
    settings = {**STEPS, "num_train_epochs": 1}
    train_in_process(
        [shards, other], model, tmp_path / "out", settings, log_documents=True, weights=(1.0, 2.0)
    )
    sets, found = read_log(tmp_path / "out")
    assert [one.digest for one in sets] == [open_set(path).manifest.digest for path in (shards, other)]
    for number, (path, times) in enumerate(((shards, 1), (other, 2))):
        counts = np.unique(found.example_id[found.set == number], return_counts=True)[1]
        assert len(counts) == open_set(path).manifest.ledger.documents
        assert set(counts.tolist()) == {times}


@pytest.mark.feature("losses of documents")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_they_do_on_several_ranks(tmp_path: Path, ranks: int) -> None:
    shards = make_set(tmp_path / "set", rows=21, trained=0.4)  # the last step holds fillers
    model, log = tiny_llama(tmp_path / "model"), tmp_path / "log"
    settings = {**STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8 // ranks}
    arguments = _arguments(shards, model, tmp_path / "out", settings)
    assert Fleet().finish(arguments, ranks, log) == [0] * ranks, log.read_text()
    assert len(list((tmp_path / "out/documents").iterdir())) == ranks
    _assert_steps_add_up(tmp_path / "out")
    _assert_every_document_once_an_epoch(tmp_path / "out", shards, epochs=2)


@pytest.mark.feature("losses of documents")
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 4), (2, 4)])
def test_kills_lose_no_document_and_log_none_twice(tmp_path: Path, ranks: int, kills: int) -> None:
    _torture(tmp_path, ranks, kills)


@pytest.mark.torture
@pytest.mark.parametrize("ranks", [1, 2])
def test_thirty_kills_change_no_line(tmp_path: Path, ranks: int) -> None:
    _torture(tmp_path, ranks, 30)


def _torture(folder: Path, ranks: int, kills: int) -> None:
    shards = make_mixed_set(folder / "set", "instructions", rows=24, max_length=96, vocabulary=128, scale=0.1)
    model, log, fleet = tiny_llama(folder / "model"), folder / "log", Fleet()
    settings = {**STEPS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // ranks, "num_train_epochs": 4,
                "save_strategy": "steps", "save_steps": 3}  # fmt: skip
    unbroken = folder / "unbroken"
    assert fleet.finish(_arguments(shards, model, unbroken, settings), ranks, log) == [0] * ranks, (
        log.read_text()
    )
    chance, killed, attempt = random.Random(ranks), 0, 0
    while killed < kills:
        attempt += 1
        output = folder / f"broken-{attempt}"
        while killed < kills and not (output / "run.json").exists():
            processes = fleet.start(_arguments(shards, model, output, settings), ranks, log)
            killed += _kill(processes, output, chance)
        codes = fleet.finish(_arguments(shards, model, output, settings), ranks, log)
        assert codes == [0] * ranks, log.read_text()
        _assert_steps_add_up(output)
        assert _lines(output) == _lines(unbroken)


def _lines(folder: Path) -> list[tuple[float, ...]]:
    """What was logged, as numbers, sorted: ranks write side by side."""
    found = _documents(folder)
    columns = (found.step, found.row, found.example_id, found.tokens, found.trained, found.weight, found.loss)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def _kill(processes: list[Any], output: Path, chance: random.Random) -> bool:
    """Kill at a random moment some steps on; False if the run was done before."""
    path = output / "train_log.jsonl"

    def logged() -> int:
        return path.read_text().count("\n") if path.exists() else 0

    target, wait = logged() + chance.randint(1, 6), chance.uniform(0, 0.05)
    while any(process.is_alive() for process in processes) and logged() < target:
        time.sleep(0.002)
    time.sleep(wait)
    alive = [process for process in processes if process.is_alive()]
    for process in chance.sample(alive, len(alive)):
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return bool(alive)


def _arguments(shards: Path, model: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["run", str(shards), "--model", str(model), "-o", str(output), "--log-documents", *overrides]


def test_what_cannot_be_logged_is_refused_by_name(shards: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='loss="torch" gives no losses of tokens'):
        train_in_process(shards, model, tmp_path / "out", STEPS, log_documents=True, loss="torch")

    import sfttrain

    with pytest.raises(UsageError, match="log_documents: rows of a dataset have no file and line"):
        sfttrain.train([{"input_ids": [1, 2]}], model=model, output=tmp_path / "out", log_documents=True)


def test_a_bound_on_passes_is_refused_of_rows_that_are_no_sets(model: Path, tmp_path: Path) -> None:
    import sfttrain

    with pytest.raises(UsageError, match="passes: bounds how often a set is gone through"):
        sfttrain.train([{"input_ids": [1, 2]}], model=model, output=tmp_path / "out", passes=1.0)
