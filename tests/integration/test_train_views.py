"""Training on views to the end: split, train, evaluate, resume; then blame, leave out, train again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.set.opened import open_set
from sftdata.set.verify import verify
from tests.train_runs import OUR_WARNINGS, Fleet, tiny_llama
from tests.view_sets import WORDS, prepare, view

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
BAD = (17, 40, 101, 180)  # lines
RUN = {
    "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 5, "eval_strategy": "epoch",
    "num_train_epochs": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of counting answers, four of which are junk; a split of it; a model."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(5)
    rows = []
    for number in range(1, 241):
        first = rng.randrange(len(WORDS))
        answer = " ".join((WORDS * 3)[first : first + rng.randint(8, 24)])
        junk = "".join(rng.choices("!#%&*+-/<=>?@^_~|$", k=60))
        turns = [("user", f"Go on from {WORDS[first]}."), ("assistant", junk if number in BAD else answer)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "set", [folder / "rows.jsonl"], max_length=128)
    sftdata.view(folder / "set", output=folder / "parts", eval="20%", max_length=256)
    tiny_llama(folder / "model", vocabulary=1024)
    return folder


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return Fleet()


def train(fleet: Fleet, shards: Path, output: Path, folder: Path, *more: str, **settings: Any) -> None:
    given = {**RUN, **settings}
    if "max_steps" in given:
        del given["num_train_epochs"]
    overrides = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    arguments = ["run", str(shards), "--model", str(folder / "model"), "-o", str(output), *overrides, *more]
    log = output.with_name(f"{output.name}.log")
    assert fleet.finish(arguments, 1, log) == [0], log.read_text()


def lines_of(shards: Path) -> set[int]:
    opened = open_set(shards)
    return {opened.origin(document.example_id)[1] for row in opened for document in row.documents()}


@pytest.mark.feature("losses of documents")
def test_a_split_is_trained_evaluated_resumed_blamed_cleaned_and_trained_again(
    folder: Path, fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = folder / "parts"
    held = ["--eval", f"held={parts / 'eval'}", "--log-documents"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(fleet, parts / "train", whole, folder, *held)
    lines = [json.loads(line) for line in (whole / "train_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert [line["eval_held_loss"] for line in lines if "eval_held_loss" in line][-1] < losses[0]
    # A run of ten steps is trained on.
    train(fleet, parts / "train", resumed, folder, *held, max_steps=10)
    train(fleet, parts / "train", resumed, folder, *held)
    assert (resumed / "model.safetensors").exists()
    assert len(list((resumed / "documents").iterdir())) == 2
    from sftdata.blame.log import read_log

    logged = read_log(whole)[1]
    assert read_log(resumed)[1].step.tolist() == logged.step.tolist()
    assert (logged.bytes > 0).all()  # a view knows how its tokens are spelled
    # The junk of the training side is what stands out.
    bad = {line for line in BAD if line in lines_of(parts / "train")}
    assert len(bad) >= 2
    capsys.readouterr()
    listed = tmp_path / "bad.txt"
    assert main(["blame", str(whole), "--worst", str(len(bad)), "-o", str(listed), "--json"]) == 0
    assert {one["line"] for one in json.loads(capsys.readouterr().out)["documents"]} == bad
    clean = tmp_path / "clean"
    view(clean, parts / "train", drop=listed)
    assert verify(clean).ok
    assert lines_of(parts / "train") - lines_of(clean) == bad
    train(fleet, clean, tmp_path / "again", folder, *held)
    page = (whole / "report.html").read_text()
    assert all(f"rows.jsonl:{line}" in page for line in bad)


def test_a_run_that_logged_nothing_is_blamed_once_it_does(
    folder: Path, fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    few = {"num_train_epochs": 1, "eval_strategy": "no"}
    train(fleet, folder / "parts/train", output, folder, **few)
    assert main(["blame", str(output)]) == 2
    assert "train with `sfttrain run ... --log-documents`" in capsys.readouterr().err
    train(fleet, folder / "parts/train", output, folder, "--log-documents", "--overwrite", **few)
    assert main(["blame", str(output)]) == 0
