"""kill -9 at any step of a view, by index, written or split: the next run ends with the bytes of an unbroken one."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import sftdata
from tests.torture.faults import Fault, Tap
from tests.torture.runs import content, forked, look, prepare, write_chats

WAYS: dict[str, dict[str, Any]] = {
    "index": {"max_length": 40},
    "written": {"max_length": 40, "write": True},
    "split": {"max_length": 40, "eval": "30%"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view-kills")
    prepare(write_chats(folder / "chats.jsonl", 60), folder / "base")
    return folder / "base"


def looked_at(output: Path, way: str) -> list[str | None]:
    """Return the digests of what a reader finds: all of it, or nothing."""
    return [look(output / side) for side in ("train", "eval")] if way == "split" else [look(output)]


def kill(base: Path, place: Path, way: str, kills: int, *, replaced: bool) -> int:
    """Kill views before steps drawn at random, and finish each; return how many kills hit."""
    output = place / "run" / "set"
    given = {"sets": base, "output": output, **WAYS[way]}
    with Tap(str(place), record=True).installed() as tap:
        sftdata.view(**given)
    unbroken, digests, steps = content(output), looked_at(output, way), len(tap.operations)
    nothing, rng, hit = [None] * len(digests), random.Random(way), 0
    for _ in range(kills):
        shutil.rmtree(output.parent)
        output.parent.mkdir()
        if replaced:
            sftdata.view(**given | {"max_length": 64})
        before = looked_at(output, way)
        fault = Fault("kill", rng.randrange(1, steps + 1))
        hit += forked(given | {"overwrite": replaced}, fault, "view") == -9
        assert looked_at(output, way) in ((before, digests) if replaced else (nothing, digests))
        sftdata.view(**given, overwrite=replaced)
        assert content(output) == unbroken, fault
        assert os.listdir(output.parent) == ["set"], fault
    return hit


@pytest.mark.parametrize("way", WAYS)
def test_a_view_killed_at_a_random_step_is_finished_by_the_next_run(
    base: Path, tmp_path: Path, way: str
) -> None:
    (tmp_path / "run").mkdir()
    assert kill(base, tmp_path, way, 2, replaced=False)


@pytest.mark.torture
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("way", WAYS)
def test_sixty_kills_change_no_byte_of_a_view(base: Path, tmp_path: Path, way: str, replaced: bool) -> None:
    (tmp_path / "run").mkdir()
    assert kill(base, tmp_path, way, 60, replaced=replaced) >= 50
