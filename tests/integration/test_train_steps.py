"""Steps of equal work as they are run: two gloo ranks of the real trainer, and what each computed at each step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.set.opened import open_set
from sftdata.set.steps import stored_steps
from tests.train_runs import Fleet, as_fsdp2, tiny_llama
from tests.view_sets import prepare

pytestmark = pytest.mark.slow

LENGTH, VOCABULARY = 512, 1024
MIXES = {
    "chats": [(40, 0.8, 900)],
    "reasoning": [(40, 0.8, 400), (180, 0.6, 120)],
    "agents": [(40, 0.8, 300), (350, 0.9, 90)],
}


def record(rank: int, log: str) -> None:
    """Let the trainer write down the documents of every micro-batch that it trains on."""
    from sfttrain.trainer import SftTrainer

    train = SftTrainer.training_step

    def training_step(
        self: SftTrainer, model: Any, inputs: dict[str, Any], *more: Any, **options: Any
    ) -> Any:
        ids, positions = inputs["input_ids"].flatten().tolist(), inputs["position_ids"].flatten()
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        documents = [ids[start:stop] for start, stop in pairwise(starts)]
        with open(f"{log}.{rank}", "a", encoding="utf-8") as sink:
            sink.write(json.dumps(documents) + "\n")
        return train(self, model, inputs, *more, **options)

    SftTrainer.training_step = training_step  # type: ignore[method-assign]


def record_in_parts(rank: int, log: str) -> None:
    """Do so where each rank has a part of the weights."""
    as_fsdp2(rank, log)
    record(rank, log)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "model", vocabulary=VOCABULARY)


def _view(folder: Path, mix: str, model: Path, **settings: Any) -> Path:
    """Make a set of documents as long as those of a mix, in miniature, and a view of it."""
    rng, lines = np.random.default_rng(5), []
    for median, spread, count in MIXES[mix]:
        for length in np.clip(rng.lognormal(np.log(median), spread, count), 8, LENGTH).astype(int).tolist():
            ids = rng.integers(5, 200, length).tolist()
            lines.append(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    prepare(folder / "base", [folder / "rows.jsonl"], max_length=LENGTH, slice_bytes=1 << 20)
    more = {"model": model} if "steps_for" in settings else {}
    sftdata.view(folder / "base", output=folder / "view", pack_over="view", **settings, **more)
    return folder / "view"


def _run(
    folder: Path, shards: Path, model: Path, way: Callable[[int, str], None] = record, **settings: Any
) -> tuple[str, list[list[list[list[int]]]]]:
    """Train for an epoch on two ranks; return what was said, and the documents of each micro-batch of each rank."""
    training = {
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 100,
        "learning_rate": 1e-3,
    } | settings
    overrides = [part for key, value in training.items() for part in ("--set", f"{key}={value}")]
    log = folder / "log"
    arguments = ["run", str(shards), "--model", str(model), "-o", str(folder / "run"), *overrides]
    assert Fleet().finish(arguments, 2, log, way) == [0, 0], log.read_text()
    seen = [[json.loads(line) for line in Path(f"{log}.{rank}").read_text().splitlines()] for rank in (0, 1)]
    return log.read_text(), seen


def _work(documents: list[list[int]], token: int, square: int) -> int:
    return sum(token * len(document) + square * len(document) ** 2 for document in documents)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("batch", "accumulation", "way"), [(2, 1, record), (1, 4, record_in_parts)])
def test_two_ranks_do_the_same_work_at_every_step(
    tmp_path: Path, model: Path, mix: str, batch: int, accumulation: int, way: Callable[[int, str], None]
) -> None:
    shards = _view(tmp_path, mix, model, steps_for="2x2")
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    said, seen = _run(tmp_path, shards, model, way, **settings)
    assert "order: the set's own, steps for 2 ranks x 2 rows" in said
    opened = open_set(shards)
    trained = Counter(tuple(document) for rank in seen for micro in rank for document in micro)
    for row in opened:
        for document in row.documents():
            trained[tuple(document.input_ids.tolist())] -= 1
    assert {
        document for document, count in trained.items() if count and any(document)
    } == set()  # every document once
    steps = stored_steps(opened.manifest)
    assert steps is not None
    whole = len(opened) // (2 * batch * accumulation)
    ratios = []
    for step in range(whole):
        here = slice(step * accumulation, (step + 1) * accumulation)
        work = [
            sum(_work(micro, steps.cost.token, steps.cost.square) for micro in rank[here]) for rank in seen
        ]
        ratios.append(max(work) / (sum(work) / 2))
    assert len(ratios) > 8
    print(f"{mix}, {batch} x {accumulation}: {np.mean(ratios):.4f} over {whole} steps")
    assert np.mean(ratios) <= 1.01


def test_steps_that_do_not_fit_are_left_and_it_is_said(tmp_path: Path, model: Path) -> None:
    shards = _view(tmp_path, "chats", model, steps_for="2x2")
    said, _ = _run(tmp_path, shards, model, per_device_train_batch_size=3)
    assert (
        "order: not the set's own, steps for 2 ranks x 2 rows (a step here takes 2 x 3 x 1 = 6 rows, no multiple of 4)"
        in said
    )


def test_padded_documents_have_the_loss_that_they_have_alone(tmp_path: Path, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from sfttrain.data import Collator, TrainingRows

    shards = open_set(_view(tmp_path, "chats", model, pad_to_multiple_of=16))
    rows = TrainingRows([shards])
    batch = Collator(flatten=False, boundaries=False)([rows[0], rows[1]])
    computing = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = computing(**batch, use_cache=False).logits.flatten(0, 1)[:-1].float()
    targets = labels.flatten()[1:]
    packed = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    alone, trained = 0.0, 0
    for row in shards[:2]:
        for document in row.documents():
            ids = torch.from_numpy(document.input_ids.astype("int64"))
            with torch.no_grad():
                found = computing(ids[None], labels=ids[None]).logits[0, :-1].float()
            alone += torch.nn.functional.cross_entropy(found, ids[1:], reduction="sum").item()
            trained += len(ids) - 1
    assert int((targets != -100).sum()) == trained
    assert packed.item() == pytest.approx(alone, rel=1e-5)
