"""A machine that loses power after any operation: what is found is the old set, the new set, or an unfinished one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from sftdata.set import build as build_module
from tests.torture.conftest import Unbroken
from tests.torture.disk import Disk
from tests.torture.faults import Operation, Tap
from tests.torture.runs import content, look, prepare

pytestmark = pytest.mark.slow


def recorded(small: Unbroken, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """Record a first set and its replacement by another."""
    with Tap(str(place), record=True).installed() as tap, monkeypatch.context() as patch:
        real = build_module.swap_folders

        def swap(one: Path, other: Path) -> None:
            tap.pass_through(Operation("swap", (str(one), str(other))), lambda: real(one, other))

        patch.setattr(build_module, "swap_folders", swap)
        prepare(small.data, place / "set", max_length=32)
        prepare(small.data, place / "set", overwrite=True)
    assert "swap" in [operation.name for operation in tap.operations]
    return tap.operations


@pytest.mark.parametrize("resumed", [4, pytest.param(10**9, marks=pytest.mark.torture)])
def test_every_prefix_of_the_operations_is_the_old_set_or_the_new(
    small: Unbroken, place: Path, monkeypatch: pytest.MonkeyPatch, resumed: int
) -> None:
    (place / "run").mkdir()
    operations = recorded(small, place / "run", monkeypatch)
    first = prepare(small.data, place / "first", max_length=32).digest
    rng, states, seen = random.Random(0), 0, []
    disk = Disk(str(place / "run"))
    for operation in [None, *operations]:
        if operation:
            disk.apply(operation)
        found = set()
        for kept, whole in disk.survivors(rng):
            disk.write_out(place / "found", kept, whole)
            found.add(look(place / "found" / "set"))
            look(
                place / "found" / "set.partial"
            )  # with a manifest it must be whole: the next run puts it in place
            states += 1
            if states % max(len(operations) * 4 // resumed, 1) == 0:
                prepare(small.data, place / "found" / "set", overwrite=True)
                assert content(place / "found" / "set") == small.files
            shutil.rmtree(place / "found")
        assert found <= {None, first, small.digest}
        seen.append(found)
    assert states >= 500
    ends = [number for number, found in enumerate(seen) if found == {first}]
    assert seen[-1] == {small.digest}
    assert all(None not in found for found in seen[ends[0] :]), "once there is a set, there is always one"


def test_the_disk_of_these_tests_loses_what_was_not_synced(tmp_path: Path) -> None:
    root, target = str(tmp_path), tmp_path / "found"
    disk = Disk(root)
    for name, *paths in [("open", "a.tmp"), ("write", "a.tmp"), ("replace", "a.tmp", "a")]:
        disk.apply(Operation(name, tuple(f"{root}/{path}" for path in paths), b"abc"))
    disk.write_out(target, range(len(disk.changes)), True)
    assert content(target) == {"a": b"abc"}
    shutil.rmtree(target)
    disk.write_out(target, range(len(disk.changes)), False)
    assert content(target) == {"a": b""}, "the classic: renamed before it was synced"
    shutil.rmtree(target)
    disk.write_out(target, [], True)
    assert content(target) == {}
    disk.apply(Operation("fsync", (f"{root}/a",)))
    disk.apply(Operation("fsync", (root,)))
    disk.write_out(target, [], False)
    assert content(target) == {"a": b"abc"}
