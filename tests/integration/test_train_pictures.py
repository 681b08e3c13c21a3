"""Runs on sets with pictures: every family learns from them, resumes, spreads over ranks, and refuses by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sftdata.errors import IntegrityError, SftError, UsageError
from tests.made_pictures import make, saved
from tests.picture_sets import asked, write_rows
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set
from tests.vision_models import SMALL, make_pictured_set, pictured_rows, write_small_model

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK = {
    "learning_rate": 5e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "save_strategy": "no",
    "logging_steps": 1, "dataloader_num_workers": 0, "max_grad_norm": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache in which the gate remembers processors."""
    folder = tmp_path_factory.mktemp("pictures")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps are so small that threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFTDATA_CACHE", str(folder / "cache"))
        yield folder
    torch.set_num_threads(threads)


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
@pytest.mark.parametrize(("name", "steps", "least"), [("llava", 160, 0.6), ("qwen2.5-vl", 260, 1.05), *LONG])
def test_a_tiny_model_of_the_family_learns_what_only_pictures_tell(
    place: Path, tmp_path: Path, name: str, steps: int, least: float
) -> None:
    """Who sees no picture stays above 1.1: of two tokens each, sixteen answers of twenty are told by nothing else."""
    model, shards = family(place, name)
    train_in_process(shards, model, tmp_path / "run", QUICK | {"max_steps": steps}, freeze="none")
    last = losses(tmp_path / "run")[-20:]
    assert sum(last) / 20 < least
    assert (tmp_path / "run/preprocessor_config.json").is_file()


def test_a_changed_picture_is_named_by_a_worker(place: Path, tmp_path: Path) -> None:
    """Row and file, in one line, whoever found it; once the file is back, the same command trains."""
    model, _ = family(place, "llava")
    shards = make_pictured_set(model, tmp_path / "own", tmp_path / "own/set", 5)
    file = tmp_path / "own/pictures/1.png"
    before = file.read_bytes()
    file.write_bytes(saved(make(56, 56, seed=7), "PNG"))
    for workers in (0, 1):
        with pytest.raises(
            IntegrityError, match=r"set: row 0, picture pictures/1.png: another picture by now"
        ) as error:
            train_in_process(
                shards, model, tmp_path / "run", QUICK | {"max_steps": 1, "dataloader_num_workers": workers}, overwrite=True
            )  # fmt: skip
        assert "\n" not in error.value.message
        assert str(error.value).endswith("Fix: restore the file, or prepare the set again with --overwrite.")
    file.write_bytes(before)
    train_in_process(shards, model, tmp_path / "run", QUICK | {"max_steps": 1}, overwrite=True)
    assert len(losses(tmp_path / "run")) == 1


def test_broken_pixels_are_left_out_by_check_pixels(place: Path, tmp_path: Path) -> None:
    import sftdata

    model, _ = family(place, "llava")
    rows = [*pictured_rows(tmp_path, 5), asked("<image>?", "Z", images=["pictures/broken.png"])]
    whole = saved(make(56, 56), "PNG")
    middle = whole.index(b"IDAT") + 40
    (tmp_path / "pictures/broken.png").write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    given = {"tokenizer": str(model), "max_length": 64, "workers": 1, "max_rejects": "1"}
    source = str(write_rows(tmp_path, rows))
    sftdata.prepare(source, output=tmp_path / "set", **given)
    with pytest.raises(SftError, match=r"row \d+, picture pictures/broken.png: its pixels cannot be decoded"):
        train_in_process(tmp_path / "set", model, tmp_path / "run", QUICK | {"num_train_epochs": 1})
    sftdata.prepare(source, output=tmp_path / "checked", check_pixels=True, **given)
    train_in_process(tmp_path / "checked", model, tmp_path / "run", QUICK | {"max_steps": 1}, overwrite=True)


def test_what_cannot_act_on_pictures_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    model, shards = family(place, "llava")
    (tmp_path / "few.jsonl").write_text('{"prompt": "Hello"}\n')
    for settings, message in (
        ({"sample": tmp_path / "few.jsonl"}, "asks in text alone, and the sets have pictures"),
        ({"sequence_parallel": 2}, "a picture is not cut into slices"),
    ):
        with pytest.raises(UsageError, match=message):
            train_in_process(shards, model, tmp_path / "run", {"max_steps": 1}, **settings)
    text, words = tiny_llama(tmp_path / "text"), make_set(tmp_path / "words", rows=4)
    with pytest.raises(UsageError, match="freeze=none: the sets have no pictures, on which it acts"):
        train_in_process(words, text, tmp_path / "run", {"max_steps": 1}, freeze="none")
