"""A set of some documents, made in parts: whoever finds all documents chooses, and it is the set of one process."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata import selected
from sftdata.config import make_config
from sftdata.errors import DataError, UsageError
from sftdata.parts import read_part
from sftdata.set.manifest import MANIFEST_NAME
from sftdata.workers import Workers
from tests.integration.test_chosen_stored import found, is_all
from tests.killed import killed_at
from tests.object_stores import Bucket, Killed, bucket
from tests.torture.runs import content, settings
from tests.view_sets import Settings, chats, write_lines
from tests.waiting import HANGS

__all__ = ["bucket"]
pytestmark = pytest.mark.usefixtures("no_sync")
SET = "s3://bucket/set"
SPLIT: Settings = {"eval": "30%", "dedup": "row"}
CHOICES: list[Settings] = [SPLIT, {"cap": {"*": "30 rows"}, "seed": 3}, {"mix": {"a*": 1, "b*": 2}}]
NAMES = ("replace", "rename", "unlink", "rmdir", "link", "mkdir")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [write_lines(folder / f"{name}.jsonl", chats(60, ord(name), 40)) for name in "ab"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def split(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    return at_once(tmp_path_factory.mktemp("whole") / "set", inputs, SPLIT)


def at_once(output: Path, inputs: list[Path], chosen: Settings) -> dict[str, dict[str, bytes]]:
    sftdata.prepare(**settings(inputs, output, **chosen))  # type: ignore[arg-type]
    return in_folder(output)


def in_folder(output: Path) -> dict[str, dict[str, bytes]]:
    """Return the files of a set, or of each side of a split."""
    if (output / MANIFEST_NAME).is_file():
        return {"": content(output)}
    return {side.name: content(side) for side in output.iterdir()}


def run(inputs: list[Path], output: str | Path, part: str | None, **more: Any) -> bool:
    """Make a part; say whether it finished the set."""
    config = make_config(**settings(inputs, output, **more))  # type: ignore[arg-type]
    one = None if part is None else read_part(part)
    return selected.prepare(config, Workers(1), part=one) != ()


def is_whole(output: Path, whole: dict[str, dict[str, bytes]]) -> bool:
    """Hold sets against those made at once, and look for what was left behind."""
    assert in_folder(output) == whole
    return [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_parts_in_any_order_make_the_choice(
    inputs: list[Path], bucket: Bucket, tmp_path: Path, parts: int, chosen: Settings
) -> None:
    whole = at_once(tmp_path / "whole" / "set", inputs, chosen)
    order = random.Random(parts).sample(range(1, parts + 1), parts)
    for output in (tmp_path / "parts" / "set", SET):
        Path(tmp_path / "parts").mkdir(exist_ok=True)
        finished = [run(inputs, output, f"{number}/{parts}", **chosen) for number in order]
        assert finished == [False] * (parts - 1) + [True]
        assert run(inputs, output, f"1/{parts}", **chosen), "it is up to date"
    assert is_whole(tmp_path / "parts" / "set", whole)
    assert is_all(bucket, whole)


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 60), marks=pytest.mark.torture)], ids=str)
def test_each_part_killed_at_random_and_any_one_last(
    inputs: list[Path], split: dict[str, dict[str, bytes]], tmp_path: Path, seeds: range
) -> None:
    for seed in seeds:
        rng, output = random.Random(seed), tmp_path / str(seed) / "set"
        output.parent.mkdir()
        for number in rng.sample((1, 2, 3), 3):
            killed_at(partial(run, inputs, output, f"{number}/3", **SPLIT), rng.randint(1, 60), NAMES)
        for number in rng.sample((1, 2, 3), 3):
            run(inputs, output, f"{number}/3" if seed % 3 else None, **SPLIT)
        assert is_whole(output, split)


@pytest.mark.torture
def test_killed_at_every_change_of_a_name(
    inputs: list[Path], split: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    number = 0
    while True:
        number += 1
        output = tmp_path / str(number) / "set"
        output.parent.mkdir()
        run(inputs, output, "1/2", **SPLIT)
        code = killed_at(partial(run, inputs, output, "2/2", **SPLIT), number, NAMES)
        assert run(inputs, output, "2/2" if number % 2 else None, **SPLIT)
        assert is_whole(output, split)
        if code != -signal.SIGKILL:
            break
    assert number > 40


def _race(inputs: list[Path], output: Path, part: str | None, ready: Any) -> None:
    ready.wait()
    run(inputs, output, part, **SPLIT)


@pytest.mark.parametrize("rounds", [1, pytest.param(16, marks=pytest.mark.torture)])
def test_racing_parts_make_one_choice(
    inputs: list[Path], split: dict[str, dict[str, bytes]], tmp_path: Path, rounds: int
) -> None:
    """Each part twice at once, and the plain command beside them."""
    fork = multiprocessing.get_context("fork")
    for number in range(rounds):
        output = tmp_path / str(number) / "set"
        output.parent.mkdir()
        run(inputs, output, "2/3", **SPLIT)
        tries = ("1/3", "1/3", "3/3", "3/3", None)
        ready = fork.Barrier(len(tries))
        crew = [fork.Process(target=_race, args=(inputs, output, part, ready)) for part in tries]
        for one in crew:
            one.start()
        for one in crew:
            one.join(HANGS)
        assert [one.exitcode for one in crew] == [0] * len(crew)
        for left in ("1/3", None):  # of an attempt that began as the set was finished
            run(inputs, output, left, **SPLIT)
        assert is_whole(output, split)


@pytest.mark.parametrize("stored", [False, True])
def test_one_whose_documents_are_removed_as_it_chooses_finds_the_set(
    inputs: list[Path], split: dict[str, dict[str, bytes]], bucket: Bucket, tmp_path: Path, stored: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output: str | Path = SET if stored else tmp_path / "set"
    assert not run(inputs, output, "1/2", **SPLIT)
    made, others = selected.make_view, list[bool]()

    def meanwhile(*given: Any, **more: Any) -> Any:
        if not others:
            others.append(False)
            others[0] = run(inputs, output, None, **SPLIT)
        return made(*given, **more)

    monkeypatch.setattr(selected, "make_view", meanwhile)
    assert run(inputs, output, "2/2", **SPLIT)
    assert others == [True]
    assert is_all(bucket, split) if stored else in_folder(tmp_path / "set") == split


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.torture)], ids=str)
def test_killed_anywhere_in_a_store_there_is_the_old_split_none_or_the_new_one(
    inputs: list[Path], split: dict[str, dict[str, bytes]], bucket: Bucket, tmp_path: Path, seeds: range
) -> None:
    sftdata.prepare(**settings(inputs[:1], SET, **SPLIT))  # type: ignore[arg-type]
    standing, old = dict(bucket.objects), found(bucket)

    def look(operation: str, key: str) -> None:
        assert found(bucket) in allowed

    bucket.answer = look
    for seed in seeds:
        chance = random.Random(seed)
        bucket.objects = dict(standing) if seed % 2 else {}
        allowed = [old if seed % 2 else {}, split]
        given = SPLIT | {"overwrite": bool(seed % 2)}
        for _ in range(chance.randint(1, 4)):
            bucket.revive(chance.randint(1, 90), after=chance.random() < 0.5)
            with contextlib.suppress(Killed):
                run(inputs, SET, f"{chance.randint(1, 2)}/2", **given)
        bucket.revive()
        for part in chance.sample((1, 2), 2):
            run(inputs, SET, f"{part}/2", **given)
        assert is_all(bucket, split)


def test_several_that_choose_at_once_in_a_store_make_one_split(
    inputs: list[Path], split: dict[str, dict[str, bytes]], bucket: Bucket
) -> None:
    ready, results = threading.Barrier(6), []

    def wait(operation: str, key: str) -> None:
        if operation == "put" and key == f"{SET}/{MANIFEST_NAME}":
            ready.wait(HANGS)

    assert not run(inputs, SET, "1/2", **SPLIT)
    bucket.answer = wait
    crew = [
        threading.Thread(target=lambda: results.append(run(inputs, SET, "2/2", **SPLIT))) for _ in range(6)
    ]
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    assert results == [True] * 6
    bucket.answer = lambda operation, key: None
    run(inputs, SET, None, **SPLIT)  # what the late ones left
    assert is_all(bucket, split)


def test_a_choice_that_cannot_be_met_keeps_what_was_tokenized(inputs: list[Path], tmp_path: Path) -> None:
    output, notes = tmp_path / "set", list[str]()
    assert not run(inputs, output, "1/2", eval="0.0001%")
    with pytest.raises(DataError, match="no document is left"):
        run(inputs, output, "2/2", eval="0.0001%")
    config = make_config(**settings(inputs, output, **SPLIT))  # type: ignore[arg-type]
    assert selected.prepare(config, Workers(1), note=notes.append, part=read_part("1/2"))
    assert not any(note.startswith("Part 1/2: ") for note in notes), "nothing was tokenized again"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_another_command_began_is_not_discarded(inputs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "set"
    killed_at(partial(run, inputs, output, None, **SPLIT), 20, NAMES)
    with pytest.raises(UsageError, match="an unfinished set that is not made in parts. Fix: finish it with"):
        run(inputs, output, "1/2", **SPLIT)
    assert run(inputs, output, None, **SPLIT)
    assert run(inputs, output, "1/2", **SPLIT), "it is up to date"
