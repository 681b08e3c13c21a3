"""kill -9 at any moment: the next run ends with the bytes of an unbroken one, and no reader ever accepts half a set."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.torture.conftest import Unbroken
from tests.torture.faults import Fault, Tap
from tests.torture.runs import (
    Command,
    content,
    forked,
    look,
    prepare,
    settings,
    slices_done,
    watch,
    write_chats,
)

pytestmark = pytest.mark.slow

# The places where the commit protocol takes a step, each killed just before and just after.
FAILPOINTS = [
    ("write", "*/.plan.json.*.tmp"),
    ("replace", "*/plan.json"),
    ("write", "*/.shard-00001.arrow.*.tmp"),
    ("fsync", "*/.shard-00001.arrow.*.tmp"),
    ("replace", "*/shard-00001.arrow"),
    ("replace", "*/00001.lists"),
    ("replace", "*/slices/00001.json"),
    ("fsync", "*/slices"),
    ("replace", "*/set.partial/rejects.jsonl"),
    ("mkdir", "*/tokenizer"),
    ("replace", "*/tokenizer/tokenizer.json"),
    ("fsync", "*/.manifest.json.*.tmp"),
    ("replace", "*/manifest.json"),
    ("unlink", "*/slices/00001.json"),
    ("unlink", "*/00001.json"),
    ("rmdir", "*/slices"),
    ("unlink", "*/plan.json"),
    ("rename", "*/set"),
    ("fsync", "*/torture-*"),
    ("rename", "*/set.partial.replaced"),
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 400)


@pytest.fixture(scope="module")
def unbroken(chats: Path) -> dict[str, bytes]:
    assert Command(chats, chats.parent / "set", 1).finish()[0] == 0
    return content(chats.parent / "set")


def kill_and_resume(small: Unbroken, place: Path, fault: Fault, **more: object) -> int:
    """Kill a run, look as a reader would, run again; return the exit code of the killed run."""
    output = place / "run" / "set"
    output.parent.mkdir()
    if more:
        prepare(small.data, output, max_length=32)
    old = look(output)
    code = forked(settings(small.data, output, **more), fault)
    assert look(output) in (old, small.digest)
    prepare(small.data, output, **more)
    assert content(output) == small.files, fault
    assert os.listdir(output.parent) == ["set"], fault
    shutil.rmtree(output.parent)
    return code


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "gone"])
def test_a_resume_makes_a_shard_anew_that_is_not_as_it_was_left(
    small: Unbroken, place: Path, damage: str
) -> None:
    given = settings(small.data, place / "set")
    assert forked(given, Fault("kill", name="replace", path="*/slices/00001.json", after=True)) == -9
    shard = next((place / "set.partial").glob("shard-*.arrow"))  # the longest tasks come first
    whole = shard.read_bytes()
    shard.unlink()
    if damage != "gone":
        shard.write_bytes({"cut": whole[:-1], "empty": b"", "longer": whole + b"\0"}[damage])
    prepare(small.data, place / "set")
    assert content(place / "set") == small.files


def kill_everywhere(small: Unbroken, place: Path, step: int, **more: object) -> int:
    """Kill a run before its n-th operation, for every n; return how many kills hit."""
    kills = 0
    nth = 1
    while (code := kill_and_resume(small, place, Fault("kill", nth), **more)) == -9:
        kills += 1
        nth += step
    assert code == 0
    return kills


def kill_at_random(
    chats: Path, unbroken: dict[str, bytes], place: Path, workers: int, kills: int, seed: int
) -> int:
    """Kill whole groups at random moments, begin anew when a set is finished; return how often a set was finished."""
    rng, finished, output, accepted = random.Random(seed), 0, place / "set", set()
    for _ in range(kills):
        command = Command(chats, output, workers)
        accepted |= watch(command, output, slices_done(output) + rng.randint(0, 4))
        time.sleep(rng.uniform(0, 0.1))  # to hit any place between two slices
        command.kill()
        command.process.communicate()
        if look(output) is not None:
            finished += 1
            assert content(output) == unbroken
            shutil.rmtree(output)
    assert Command(chats, output, workers).finish()[0] == 0
    assert content(output) == unbroken
    assert accepted <= {None, look(output)}
    return finished


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_at_any_step_of_the_protocol_resumes_to_the_same_bytes(
    small: Unbroken, place: Path, after: bool
) -> None:
    hit = [
        kill_and_resume(small, place, Fault("kill", name=name, path=path, after=after))
        for name, path in FAILPOINTS[:-1][after::2]
    ]
    assert hit.count(-9) >= len(hit) - 1


@pytest.mark.parametrize("workers", [2, 4])
def test_runs_killed_at_random_moments_resume_to_the_same_bytes(
    chats: Path, unbroken: dict[str, bytes], place: Path, workers: int
) -> None:
    kill_at_random(chats, unbroken, place, workers, kills=2, seed=workers)


@pytest.mark.torture
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "path"), FAILPOINTS)
def test_every_named_step(small: Unbroken, place: Path, name: str, path: str, after: bool) -> None:
    more = {"overwrite": True} if "replaced" in path else {}
    assert kill_and_resume(small, place, Fault("kill", name=name, path=path, after=after), **more) == -9


@pytest.mark.torture
@pytest.mark.parametrize("more", [{}, {"overwrite": True}], ids=["new", "replaced"])
def test_every_operation(small: Unbroken, place: Path, more: dict[str, object]) -> None:
    assert kill_everywhere(small, place, 1, **more) > 60


@pytest.mark.torture
@pytest.mark.parametrize(("workers", "kills"), [(1, 70), (2, 70), (4, 60)])
def test_two_hundred_random_moments(
    chats: Path, unbroken: dict[str, bytes], place: Path, workers: int, kills: int
) -> None:
    kill_at_random(chats, unbroken, place, workers, kills, seed=workers)


def test_the_tap_sees_every_operation(small: Unbroken, place: Path) -> None:
    with Tap(str(place), record=True).installed() as tap:
        prepare(small.data, place / "set")
    names = {operation.name for operation in tap.operations}
    assert names == {"open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"}
    written: dict[str, int] = {}
    for operation in tap.operations:
        if operation.name == "write":
            written[operation.paths[0]] = written.get(operation.paths[0], 0) + len(operation.data)
    (shard,) = [name for name in written if Path(name).name.startswith(".shard-00000.arrow.")]
    assert written[shard] == (place / "set" / "shard-00000.arrow").stat().st_size
