"""Runs on sets with pictures: every family learns from them, resumes, spreads over ranks, and refuses by name."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from sftdata.errors import IntegrityError, SftError, UsageError
from sftdata.pictures.families import read_processor
from sftdata.set.opened import open_set
from sftdata.set.verify import verify
from sfttrain.adapters import merge
from sfttrain.config import read_settings
from sfttrain.data import Batch, Collator, Row
from sfttrain.export import calibration_rows
from sfttrain.training import plan_run
from tests.made_pictures import make, saved
from tests.picture_sets import asked, write_rows
from tests.remote_stores import need_packages, serve, served
from tests.train_runs import OUR_WARNINGS, Fleet, tiny_llama, train_in_process
from tests.train_sets import make_set
from tests.vision_models import SMALL, make_pictured_set, pictured_rows, write_small_model

pytestmark = pytest.mark.filterwarnings(OUR_WARNINGS)
QUICK: dict[str, Any] = {
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


LONG = [pytest.param(name, 90 if name == "gemma4" else 125, 0.05, marks=pytest.mark.slow) for name in SMALL]


@pytest.mark.feature("pictures")
@pytest.mark.parametrize(("name", "steps", "least"), [("qwen3-vl", 80, 0.1), ("qwen2.5-vl", 80, 0.1), *LONG])
def test_a_tiny_model_of_the_family_learns_what_only_pictures_tell(
    place: Path, tmp_path: Path, name: str, steps: int, least: float
) -> None:
    """Who sees no picture stays above 1.1: of two tokens each, sixteen answers of twenty are told by nothing else.

    Every step has all rows: with two packed ones a step, at this rate, some families waver for hundreds of steps.
    """
    model, shards = family(place, name)
    whole = QUICK | {"max_steps": steps, "per_device_train_batch_size": 20}
    train_in_process(shards, model, tmp_path / "run", whole, freeze="none")
    assert losses(tmp_path / "run")[-1] < least
    assert read_processor(tmp_path / "run").sha256 == read_processor(model).sha256


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
        assert str(error.value).endswith(
            "Fix: restore the file, or prepare the set again with overwrite=True."
        )
    file.write_bytes(before)
    train_in_process(shards, model, tmp_path / "run", QUICK | {"max_steps": 1}, overwrite=True)
    assert len(losses(tmp_path / "run")) == 1
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "run/README.md").read_text("utf-8")


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
    with pytest.raises(UsageError, match="set: a set with pictures, which GPTQ is not shown"):
        calibration_rows(open_set(shards), 4)
    text, words = tiny_llama(tmp_path / "text"), make_set(tmp_path / "words", rows=4)
    with pytest.raises(UsageError, match='freeze="none": the sets have no pictures, on which it acts'):
        train_in_process(words, text, tmp_path / "run", {"max_steps": 1}, freeze="none")


def test_a_run_on_pictures_is_planned(place: Path, tmp_path: Path) -> None:
    model, shards = family(place, "llava")
    given = {"sets": (shards,), "model": str(model), "output": tmp_path, "training": QUICK | {"max_steps": 3}}
    planned = plan_run(read_settings(None, [], given))
    assert planned[0].startswith("data: 3 steps of 2 rows")
    assert any(line.startswith("memory: ") for line in planned)


def test_adapters_go_into_the_language_model_alone_and_text_only_steps_train(
    place: Path, tmp_path: Path
) -> None:
    """Batches of text alone come between the others; what is frozen stays as it was, to the bit."""
    model, shards = family(place, "llava")
    settings = QUICK | {"max_steps": 12, "per_device_train_batch_size": 1, "save_strategy": "no"}
    trainer = train_in_process(shards, model, tmp_path / "lora", settings, lora="r=4,alpha=8")
    adapted = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert adapted
    assert all(".language_model." in name for name in adapted)
    merge(tmp_path / "lora", tmp_path / "merged")
    assert read_processor(tmp_path / "merged").sha256 == read_processor(model).sha256
    everywhere = train_in_process(
        shards, model, tmp_path / "all", settings | {"max_steps": 1}, lora="r=4,alpha=8", freeze="none"
    )
    adapted = {name for name, weight in everywhere.model.named_parameters() if weight.requires_grad}
    for part in (".language_model.", ".vision_tower.", ".multi_modal_projector."):
        assert any(part in name for name in adapted)
    train_in_process(shards, model, tmp_path / "full", settings)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "full"))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("vision_tower" in name), name


@pytest.mark.slow
@pytest.mark.feature("several GPUs")
def test_two_ranks_with_and_without_pictures_take_the_steps_of_one(place: Path, tmp_path: Path) -> None:
    """A rank has text alone while the other one has pictures; towers and projectors are trained, and nobody waits."""
    for name in ("llava", "qwen2.5-vl", "gemma3"):
        model, _ = family(place, name)
        shards = make_pictured_set(model, tmp_path / name, tmp_path / name / "set", 15, packing="none")
        fleet, found = Fleet(), {}
        for ranks, accumulation in ((1, 2), (2, 1)):
            settings = {
                "per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 8,
                "optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0, "logging_steps": 1,
                "save_strategy": "no", "lr_scheduler_type": "constant", "dataloader_num_workers": 1,
            }  # fmt: skip
            overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
            output, log = tmp_path / name / f"run{ranks}", tmp_path / name / f"log{ranks}"
            arguments = [
                "run",
                str(shards),
                "--model",
                str(model),
                "-o",
                str(output),
                "--freeze",
                "none",
                *overrides,
            ]
            assert fleet.finish(arguments, ranks, log) == [0] * ranks, log.read_text()
            found[ranks] = losses(output), load_file(output / "model.safetensors")
        assert found[2][0] == pytest.approx(found[1][0], abs=1e-5)
        for key, weight in found[1][1].items():
            torch.testing.assert_close(found[2][1][key], weight, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_set_behind_a_url_is_trained_on_if_it_holds_its_pictures(place: Path, tmp_path: Path) -> None:
    need_packages("aiohttp")
    model, named = family(place, "llava")
    held = make_pictured_set(model, tmp_path, tmp_path / "set", embed_images=True)
    settings = QUICK | {"max_steps": 3, "dataloader_num_workers": 1}
    with served() as web:
        far = serve(web, held)
        for name, shards in (("near", held), ("far", Path(far))):
            train_in_process(shards, model, tmp_path / name, settings, window=64)
        assert losses(tmp_path / "far") == losses(tmp_path / "near")
        elsewhere = serve(web, named, "named")
        assert (
            "they are not fetched from there. Fix: prepare it with embed_images=True."
            in verify(elsewhere).problems[0]
        )
        with pytest.raises(
            UsageError, match=f"{elsewhere}: names pictures in a folder beside it.*embed_images=True"
        ):
            train_in_process(
                Path(elsewhere), model, tmp_path / "none", settings | {"dataloader_num_workers": 0}
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3", "smolvlm"])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(place: Path, tmp_path: Path, name: str) -> None:
    """Plain positions, three-dimensional ones, masks of pictures, tiles; with the pictures of its steps, made by workers."""
    model, shards = family(place, name)
    settings = QUICK | {
        "save_strategy": "steps",
        "save_steps": 2,
        "dataloader_num_workers": 2,
        "max_steps": 10,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    whole, broken, log, fleet = tmp_path / "whole", tmp_path / "broken", tmp_path / "log", Fleet()
    arguments = ["run", str(shards), "--model", str(model), "--freeze", "none", *overrides, "-o"]
    assert fleet.finish([*arguments, str(whole)], 1, log) == [0], log.read_text()
    for step in (2, 6):
        (process,) = fleet.start([*arguments, str(broken)], 1, log)
        while process.is_alive() and not (broken / f"checkpoint-{step}" / "complete.json").exists():
            time.sleep(0.005)
        assert process.is_alive(), log.read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert fleet.finish([*arguments, str(broken)], 1, log) == [0], log.read_text()
    kept, found = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(weight, found[key]) for key, weight in kept.items())


def test_a_model_that_is_shown_pictures_in_evaluation_alone_keeps_its_processor(
    place: Path, tmp_path: Path
) -> None:
    import sftdata

    model, shards = family(place, "qwen2.5-vl")
    rows = str(write_rows(tmp_path, [asked(f"Say {number}", "A") for number in range(6)]))
    sftdata.prepare(rows, output=tmp_path / "text", tokenizer=str(model), max_length=64, workers=1)
    settings = QUICK | {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    train_in_process(tmp_path / "text", model, tmp_path / "run", settings, eval={"held": shards})
    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-1"):
        assert read_processor(folder).sha256 == read_processor(model).sha256
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "run/README.md").read_text("utf-8")


class InWorkers(Collator):
    """A collator that refuses to decode pictures in the process of the model."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        assert get_worker_info() is not None
        return super().__call__(rows)


@pytest.mark.slow
def test_a_model_is_evaluated_on_pictures_and_loads_with_what_lies_beside_it(
    place: Path, tmp_path: Path
) -> None:
    from sfttrain.evaluate import evaluate

    model, shards = family(place, "idefics3")
    settings = QUICK | {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    train_in_process(shards, model, tmp_path / "run", settings, eval={"held": shards})
    lines = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text("utf-8").splitlines()]
    logged = next(line["eval_held_loss"] for line in lines if "eval_held_loss" in line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfttrain.evaluate.Collator", InWorkers)
        found = evaluate(str(tmp_path / "run"), shards, None, 2, 3)
    assert found.whole.loss == pytest.approx(logged, abs=1e-5)
    assert read_processor(tmp_path / "run").sha256 == read_processor(model).sha256
