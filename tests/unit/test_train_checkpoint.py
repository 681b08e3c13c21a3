"""A checkpoint is complete or absent."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from sftdata.errors import IntegrityError, UsageError
from sfttrain import checkpoint
from sfttrain.resume import check_unchanged
from tests.torture.disk import Disk
from tests.torture.faults import Tap

RUN = {"sets": ["a"], "global_batch": 8}


def _checkpoint(output: Path, step: int, sealed: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * step)
    (folder / "inner" / "rng").write_bytes(b"state")
    if sealed:
        checkpoint.seal(folder, step, RUN)
    return folder


def test_the_newest_sealed_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        _checkpoint(tmp_path, step)
    found = checkpoint.newest_complete(tmp_path)
    assert found is not None
    assert found[0].name == "checkpoint-100"
    assert (found[1].step, found[1].run) == (100, RUN)


def test_one_without_a_seal_does_not_count(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    _checkpoint(tmp_path, 10, sealed=False)
    found = checkpoint.newest_complete(tmp_path)
    assert found is not None
    assert found[1].step == 5


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest_complete(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("model.safetensors", "inner/rng")
        for damage in ("flip", "truncate", "remove")
    ]
    + [(checkpoint.SEAL, "truncate"), (checkpoint.SEAL, "remove")],
)
def test_any_damage_sends_the_run_to_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    _checkpoint(tmp_path, 5)
    path = _checkpoint(tmp_path, 10) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    found = checkpoint.newest_complete(tmp_path)
    assert found is not None
    assert found[1].step == 5


def test_unsealed_newer_folders_are_removed_by_name(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    _checkpoint(tmp_path, 10, sealed=False)
    assert checkpoint.remove_after(tmp_path, 5) == ["checkpoint-10"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_changed_run_is_refused_with_both_values(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"global_batch .* was 8, is 16.*Fix: .*overwrite=True"):
        check_unchanged(RUN, RUN | {"global_batch": 16}, tmp_path)
    check_unchanged(RUN, dict(RUN), tmp_path)


def test_too_little_room_is_said_before_the_start(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UsageError, match=r"GB free; a checkpoint .* needs .*Fix: free some space"):
        checkpoint.require_space(tmp_path, free * 2)
    checkpoint.require_space(tmp_path, 1)


def test_a_checkpoint_with_a_seal_is_whole_whenever_the_power_fails(tmp_path: Path) -> None:
    output, found = tmp_path / "output", tmp_path / "found"
    output.mkdir()
    with Tap(str(output), record=True).installed() as tap:
        _save(output / "checkpoint-5")
        checkpoint.seal(output / "checkpoint-5", 5, RUN)
    assert {os.path.basename(operation.paths[-1]) for operation in tap.operations} >= {
        "weights",
        "rng",
        checkpoint.SEAL,
    }
    disk, rng, sealed = Disk(str(output)), random.Random(0), []
    for operation in tap.operations:
        disk.apply(operation)
        for kept, whole in disk.survivors(rng):
            disk.write_out(found, kept, whole)
            sealed.append(checkpoint.read_seal(found / "checkpoint-5") is not None)
            assert (checkpoint.newest_complete(found) is not None) == sealed[-1], operation
            shutil.rmtree(found)
    assert sealed[-4:] == [True] * 4, "when the seal returns, the checkpoint is safe"
    assert not all(sealed)


def _save(folder: Path) -> None:
    """Write what a trainer writes: into the page cache, and no further."""
    for inner in (folder, folder / "inner"):
        os.mkdir(inner)
    for path in (folder / "weights", folder / "inner" / "rng"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"state of " + path.name.encode())
        os.close(descriptor)


def test_a_seal_and_a_state_of_two_steps_are_refused(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, 35, sealed=False)
    (folder / checkpoint.STATE).write_text('{"global_step": 5}')
    (folder / "optimizer.pt").write_bytes(b"state")
    checkpoint.seal(folder, 35, RUN)
    with pytest.raises(IntegrityError, match=r"is of step 35, trainer_state.json of step 5.*Fix: remove"):
        checkpoint.newest_complete(tmp_path)
    (folder / checkpoint.STATE).write_text('{"global_step": 35}')
    checkpoint.seal(folder, 35, RUN)
    assert checkpoint.newest_complete(tmp_path) is not None


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, 5, sealed=False)
    (folder / checkpoint.STATE).write_text('{"global_step": 5}')
    checkpoint.seal(folder, 5, RUN)
    with pytest.raises(UsageError, match="holds weights alone"):
        checkpoint.newest_complete(tmp_path)


def test_of_a_checkpoint_that_lies_elsewhere_the_link_is_removed(tmp_path: Path) -> None:
    elsewhere = _checkpoint(tmp_path / "elsewhere", 5)
    output = tmp_path / "out"
    output.mkdir()
    (output / "checkpoint-5").symlink_to(elsewhere)
    assert checkpoint.remove_after(output, 0) == ["checkpoint-5"]
    (output / "checkpoint-5").symlink_to(elsewhere)
    checkpoint.clear(output)
    assert not list(output.iterdir())
    assert (elsewhere / "model.safetensors").exists()
