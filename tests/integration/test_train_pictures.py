"""Runs on sets with pictures: every family learns from them, resumes, spreads over ranks, and refuses by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train_runs import OUR_WARNINGS, train_in_process
from tests.vision_models import SMALL, make_pictured_set, write_small_model

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK = {
    "learning_rate": 5e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "save_strategy": "no",
    "logging_steps": 1, "dataloader_num_workers": 0, "max_grad_norm": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which the gate remembers processors."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(folder / "cache"))
        yield folder


def family(place: Path, name: str) -> tuple[Path, Path]:
    """Return a model and a set of a family."""
    if not (place / name).is_dir():
        write_small_model(place / name / "model", name)
        make_pictured_set(place / name / "model", place / name, place / name / "set")
    return place / name / "model", place / name / "set"


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


LONG = [pytest.param(name, 700, 0.3, marks=pytest.mark.slow) for name in SMALL]


@pytest.mark.feature("pictures")
@pytest.mark.parametrize(("name", "steps", "least"), [("llava", 160, 0.6), ("qwen2.5-vl", 320, 0.95), *LONG])
def test_a_tiny_model_of_the_family_learns_what_only_pictures_tell(
    place: Path, tmp_path: Path, name: str, steps: int, least: float
) -> None:
    """Who sees no picture stays above 1.1: of two tokens each, sixteen answers of twenty are told by nothing else."""
    model, shards = family(place, name)
    train_in_process(shards, model, tmp_path / "run", QUICK | {"max_steps": steps}, freeze="none")
    last = losses(tmp_path / "run")[-20:]
    assert sum(last) / 20 < least
    assert (tmp_path / "run/preprocessor_config.json").is_file()
