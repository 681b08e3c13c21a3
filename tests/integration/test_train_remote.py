"""Training on sets behind URLs: the same steps as on a folder, through a cache smaller than the set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sftdata.cli
from sfttrain.cli import main
from tests.remote_stores import Web, arrows, need_packages, serve, served
from tests.train_runs import Fleet, tiny_llama
from tests.train_sets import make_set

pytestmark = pytest.mark.slow
SETTINGS = {
    "per_device_train_batch_size": 1, "logging_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd",
    "learning_rate": 0.1, "window": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("sets") / "set", rows=48, shards=12, max_length=400)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    need_packages("aiohttp")
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    with served() as web:
        yield web


def arguments(place: str | Path, model: Path, output: Path, **settings: object) -> list[str]:
    pairs = [part for key, value in (SETTINGS | settings).items() for part in ("--set", f"{key}={value}")]
    return ["run", str(place), "--model", str(model), "-o", str(output), *pairs]


def losses(output: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_ranks_share_a_cache_smaller_than_the_set_and_a_resumed_run_takes_the_same_steps(
    web: Web, shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, fleet, log = serve(web, shards), Fleet(), tmp_path / "log"
    size = max(path.stat().st_size for path in shards.glob("shard-*"))
    beside = sum(path.stat().st_size for path in shards.iterdir() if path.name[:6] != "shard-")
    monkeypatch.setenv("SFTDATA_CACHE_GB", str((8 * size + beside) / 1e9))
    whole = arguments(shards, model, tmp_path / "local", gradient_accumulation_steps=2, max_steps=36)
    assert fleet.finish(whole, 1, log) == [0], log.read_text()
    for steps in (10, 36):
        far = arguments(url, model, tmp_path / "far", max_steps=steps)
        assert fleet.finish(far, 2, log) == [0, 0], log.read_text()
    assert "order: shuffled in a window of 3 shards that moves through the set" in log.read_text()
    assert [step for step, *_ in losses(tmp_path / "far")] == [*range(1, 37)]
    for mine, expected in zip(losses(tmp_path / "far"), losses(tmp_path / "local"), strict=True):
        assert mine == pytest.approx(expected, rel=1e-5)
    cached = [path for path in (tmp_path / "cache" / "sets").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in cached) <= 8 * size + beside
    assert not [path for path in cached if path.suffix == ".part"]
    # 36 steps of 2 rows are an epoch and a half: each shard comes once in each, one or two when the run resumes again.
    assert max(arrows(web).values()) <= 3
    assert sum(arrows(web).values()) <= 12 + 8 + 2


def test_the_first_step_waits_for_one_shard_and_its_documents_are_named_by_url(
    web: Web, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(web, make_set(tmp_path / "set", rows=300, shards=100))
    run = arguments(url, model, tmp_path / "run", window=64, max_steps=1, save_strategy="no")
    assert main([*run, "--log-documents"]) == 0
    # The first shard, for the tokens that end answers; that of the first batch; and two that are fetched ahead.
    assert len(arrows(web)) <= 1 + 1 + 2
    assert sftdata.cli.main(["blame", str(tmp_path / "run"), "--step", "1", "--json"]) == 0
    assert url in capsys.readouterr().out


def test_a_window_larger_than_the_cache_is_refused(
    web: Web, shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = serve(web, shards)
    monkeypatch.setenv("SFTDATA_CACHE_GB", "0.00005")
    assert main(arguments(url, model, tmp_path / "run", max_steps=1)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        rf"{url}: windows of shards take [0-9,]+ bytes; the cache is bound to 50,000\. Fix: raise SFTDATA_CACHE_GB,",
        said,
    )


def test_a_run_goes_on_in_its_own_window_only(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(arguments(shards, model, run, max_steps=2)) == 0
    assert main(arguments(shards, model, run, max_steps=3, window=5)) == 2
    assert "window was 3, is 5" in capsys.readouterr().err
    assert main(arguments(shards, model, run, max_steps=3, train_sampling_strategy="sequential")) == 2
    assert "window=3: rows are not shuffled" in capsys.readouterr().err
    assert main(arguments(shards, model, run, max_steps=3)) == 0
