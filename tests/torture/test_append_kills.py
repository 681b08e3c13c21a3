"""kill -9 while a set is brought up to date: readers find the old set whole until the new one is there; the next run ends it."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.torture.faults import Fault
from tests.torture.runs import Command, content, forked, look, prepare, settings, write_chats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of the old rows, the rows as they are now, and the set of these made anew."""
    place = tmp_path_factory.mktemp("append")
    data = write_chats(place / "chats.jsonl", 120)
    prepare(data, place / "old")
    lines = data.read_bytes().splitlines(keepends=True)
    more = write_chats(place / "more.jsonl", 12, seed=9).read_bytes().splitlines(keepends=True)
    data.write_bytes(b"".join([*more[:1], *lines[:40], *lines[43:], *more]))
    prepare(data, place / "anew")
    return place


def killed_update(place: Path, output: Path, fault: Fault) -> int:
    """Kill an update, look as a reader would, and run it again; return the exit code of the killed run."""
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    shutil.copytree(place / "old", output)
    old, new = look(place / "old"), look(place / "anew")
    code = forked(settings(place / "chats.jsonl", output), fault)
    assert look(output) in (old, new)
    prepare(place / "chats.jsonl", output)
    assert content(output) == content(place / "anew"), fault
    assert os.listdir(output.parent) == ["set"], fault
    return code


@pytest.mark.parametrize("step", [150, pytest.param(10, marks=pytest.mark.torture)])
def test_a_kill_before_many_an_operation_of_an_update(step: int, place: Path, tmp_path: Path) -> None:
    rng, nth, kills = random.Random(0), 1, 0
    while killed_update(place, tmp_path / "run" / "set", Fault("kill", nth)) == -9:
        kills += 1
        nth += rng.randint(1, 2 * step)
    assert kills > 1000 // step


def test_kills_at_random_moments_with_workers(place: Path, tmp_path: Path) -> None:
    rng, killed = random.Random(1), 0
    old, new = look(place / "old"), look(place / "anew")
    flags = (
        "--max-length",
        "64",
        "--max-rejects",
        "50%",
        "--set",
        "slice_bytes=2000",
        "--set",
        "engine=tokenizers",
    )
    longest, number = 2.5, 0
    while number < 6 or killed < 2:
        assert number < 40
        output = tmp_path / str(number) / "set"
        output.parent.mkdir()
        shutil.copytree(place / "old", output)
        command = Command(place / "chats.jsonl", output, (1, 2, 4)[number % 3], flags=flags)
        began = time.monotonic()
        until = began + rng.uniform(0.1, longest)
        while command.process.poll() is None and time.monotonic() < until:
            assert look(output) in (old, new)
            time.sleep(0.005)
        if command.process.poll() is not None:
            longest = min(longest, time.monotonic() - began)  # what this machine takes
        killed += command.process.poll() is None
        command.kill()
        command.finish()
        assert look(output) in (old, new)
        code, said = Command(place / "chats.jsonl", output, (4, 1, 2)[number % 3], flags=flags).finish()
        assert code == 0, said
        assert look(output) == new
        assert {path.name for path in output.parent.iterdir()} == {"set"}
        number += 1
