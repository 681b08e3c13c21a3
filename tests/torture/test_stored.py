"""A set built in an object store: the bytes of a folder, one manifest, never half a set, whoever is killed or races."""

from __future__ import annotations

from pathlib import Path

import pytest

import sftdata
from sftdata.config import make_config
from sftdata.parts import Part, prepare
from sftdata.set.manifest import MANIFEST_NAME, decode_manifest
from sftdata.workers import Workers
from tests.object_stores import Bucket, bucket
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
