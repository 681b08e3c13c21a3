"""A set built in an object store: the bytes of a folder, one manifest, never half a set, whoever is killed or races."""

from __future__ import annotations

import contextlib
import random
import threading
from pathlib import Path

import pytest

import sftdata
from sftdata.config import make_config
from sftdata.errors import UsageError
from sftdata.parts import Part, prepare
from sftdata.set.manifest import MANIFEST_NAME, decode_manifest
from sftdata.workers import Workers
from tests.object_stores import Bucket, Killed, bucket
from tests.torture.runs import content, settings, write_chats

__all__ = ["bucket"]
pytestmark = pytest.mark.usefixtures("no_sync")
SET = "s3://bucket/set"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "in.jsonl", 60)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the set in a folder."""
    output = tmp_path_factory.mktemp("whole") / "set"
    prepare(make_config(**settings(data, output)), Workers(1))
    return content(output)


def run(data: Path, part: Part | None = None, **more: object) -> bool:
    """Make a part; say whether it finished the set."""
    return prepare(make_config(**settings(data, SET, **more)), Workers(1), part=part) is not None


def files(bucket: Bucket) -> dict[str, bytes]:
    """Return what a reader finds: the files of the build that is the set."""
    if (found := bucket.objects.get(f"{SET}/{MANIFEST_NAME}")) is None:
        return {}
    folder = found.decode().partition('"folder":"')[2].partition('"')[0]
    return bucket.below(f"{SET}/{folder}/")


def is_whole(bucket: Bucket, whole: dict[str, bytes]) -> bool:
    """Hold the set against that of a folder, and look for what was left behind."""
    assert files(bucket) == whole
    assert len(bucket.objects) == len(whole) + 1, sorted(bucket.objects)
    return True


def test_a_set_in_a_store_has_the_bytes_of_one_in_a_folder(
    data: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    notes: list[str] = []
    made = sftdata.prepare(**settings(data, SET), on_note=notes.append)
    assert made == decode_manifest(whole[MANIFEST_NAME], "")
    assert is_whole(bucket, whole)
    bucket.changes.clear()
    sftdata.prepare(**settings(data, SET), on_note=notes.append)
    assert notes[-1] == f"{SET} is up to date: same data, same settings."
    assert not bucket.changes


def test_other_settings_replace_it_only_if_asked(data: Path, whole: dict[str, bytes], bucket: Bucket) -> None:
    run(data, max_length=32)
    old = dict(bucket.objects)
    with pytest.raises(
        UsageError, match=rf"{SET}: holds a finished set made otherwise \(max_length differ\)"
    ):
        run(data)
    assert bucket.objects == old
    run(data, overwrite=True)
    assert is_whole(bucket, whole)


@pytest.mark.parametrize("parts", [1, 2, 7, pytest.param(64, marks=pytest.mark.slow)])
def test_parts_in_any_order_each_killed_make_the_set(
    data: Path, whole: dict[str, bytes], bucket: Bucket, parts: int
) -> None:
    """Any one is last; each is killed at a random change, and started again."""
    chance = random.Random(parts)
    made = []
    for number in chance.sample(range(1, parts + 1), parts):
        bucket.revive(chance.randint(1, 8), after=bool(number % 2))
        try:
            finished = run(data, Part(number, parts))
        except Killed:
            bucket.revive()
            finished = run(data, Part(number, parts))
        made.append(finished)
        assert finished == bool(files(bucket))
    assert made == sorted(made)
    assert made[-1]
    assert is_whole(bucket, whole)


def point(seed: int, data: Path, bucket: Bucket, wholes: dict[int, dict[str, bytes]]) -> None:
    """Kill a run, of a set or of its replacement, alone or in parts, and perhaps the next; then let one finish."""
    chance = random.Random(seed)
    bucket.objects.clear()
    bucket.revive()
    replaces = seed % 3 == 2
    given = {"overwrite": True} if replaces else {}
    allowed = [{}, wholes[64]]
    if replaces:
        run(data, max_length=32)
        allowed[0] = wholes[32]
    for _ in range(chance.randint(1, 3)):
        bucket.revive(chance.randint(1, 75), after=chance.random() < 0.5)
        with contextlib.suppress(Killed):
            run(data, Part(chance.randint(1, 2), 2) if seed % 2 else None, **given)
        found = files(bucket)
        without = {
            name: text for name, text in found.items() if not name.startswith(("slices/", "plan.json"))
        }
        assert without in allowed, sorted(without)
    bucket.revive()
    run(data, **given)
    assert is_whole(bucket, wholes[64])


@pytest.fixture(scope="module")
def wholes(
    data: Path, whole: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, bytes]]:
    output = tmp_path_factory.mktemp("shorter") / "set"
    prepare(make_config(**settings(data, output, max_length=32)), Workers(1))
    return {64: whole, 32: content(output)}


def test_killed_anywhere_there_is_no_set_or_a_whole_one(
    data: Path, wholes: dict[int, dict[str, bytes]], bucket: Bucket
) -> None:
    for seed in range(40):
        point(seed, data, bucket, wholes)


@pytest.mark.torture
def test_killed_at_a_thousand_points_there_is_no_set_or_a_whole_one(
    data: Path, wholes: dict[int, dict[str, bytes]], bucket: Bucket
) -> None:
    for seed in range(1000):
        point(seed, data, bucket, wholes)


def test_of_sixteen_that_finish_at_once_one_makes_the_manifest(
    data: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    """All have found every slice before the first puts the set in place."""
    ready, results = threading.Barrier(16), []

    def wait(operation: str, key: str) -> None:
        if operation == "put" and key.endswith(f"/{MANIFEST_NAME}") and "/builds/" not in key:
            ready.wait(60)

    for number in (1, 2):
        assert not run(data, Part(number, 3))
    bucket.answer = wait
    crew = [threading.Thread(target=lambda: results.append(run(data, Part(3, 3)))) for _ in range(16)]
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    assert results == [True] * 16
    assert [key for operation, key in bucket.changes if key == f"{SET}/{MANIFEST_NAME}"] == [
        f"{SET}/{MANIFEST_NAME}"
    ] * 16
    bucket.answer = lambda operation, key: None
    run(data)  # what the late ones left
    assert is_whole(bucket, whole)
