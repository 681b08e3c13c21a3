"""A set built in an object store: the bytes of a folder, one manifest, never half a set, whoever is killed or races."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest

import sftdata
from sftdata.cli import main
from sftdata.config import make_config
from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.parts import Part, prepare
from sftdata.set import local
from sftdata.set.manifest import MANIFEST_NAME, decode_manifest
from sftdata.set.opened import open_set
from sftdata.sources.marks import Marks
from sftdata.sources.ranges import Sizes, Stretch, scan
from sftdata.workers import Workers
from tests.object_stores import Bucket, Killed, bucket
from tests.torture.runs import content, settings, write_chats

__all__ = ["bucket"]
pytestmark = pytest.mark.usefixtures("no_sync")
SET = "s3://bucket/set"
RANGE = 64 << 10


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


def test_a_set_is_made_where_nothing_may_be_removed(
    data: Path, whole: dict[str, bytes], bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(operation: str, key: str) -> None:
        if operation == "delete":
            raise PermissionError("403 Forbidden")

    bucket.answer = refuse
    for _ in range(2):
        sftdata.prepare(**settings(data, SET))
        assert files(bucket).items() >= whole.items()
        line = f"{SET}: the set is whole; what it does not need stays: {SET}: access is denied"
        assert caplog.text.count(line) == 1
        caplog.clear()
    sftdata.prepare(**settings(data, SET, overwrite=True, max_length=32))
    assert sftdata.verify(SET).problems == []
    sftdata.prepare(**settings(data, tmp_path / "set"))
    sftdata.push(tmp_path / "set", "s3://bucket/pushed")
    assert "s3://bucket/pushed: the set is whole" in caplog.text
    sftdata.prepare(**settings(data, "s3://bucket/pushed", overwrite=True, max_length=32))
    bucket.answer = lambda operation, key: None
    sftdata.prepare(**settings(data, SET, overwrite=True))
    assert files(bucket) == whole


def test_what_others_keep_in_a_folder_called_builds_stays(
    data: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    inner = "s3://bucket/team/builds/chats"
    bucket.objects[f"{SET}/builds/linux/app"] = bucket.objects[f"{SET}/builds/notes.txt"] = b"theirs"
    sftdata.prepare(**settings(data, inner))
    before = dict(bucket.objects)
    for output in (SET, "s3://bucket/team"):
        sftdata.prepare(**settings(data, output))
        sftdata.prepare(**settings(data, output, overwrite=True, max_length=32))
        assert before.items() <= bucket.objects.items()
        assert len(bucket.objects) - len(before) == len(whole) + 1, "what it replaced is gone"
        before = dict(bucket.objects)
    assert sftdata.verify(inner).problems == []


def test_parts_of_other_settings_are_named_by_those_that_wait(data: Path, bucket: Bucket) -> None:
    notes = list[str]()
    assert not run(data, Part(1, 2), max_length=32)
    prepare(make_config(**settings(data, SET)), Workers(1), note=notes.append, part=Part(2, 2))
    assert notes[-1] == f"{SET}: parts made otherwise (max_length differ) lie there; they are not used."


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


def test_a_part_reads_its_own_records_and_who_finishes_reads_all(data: Path, bucket: Bucket) -> None:
    """Each once: of a thousand parts that read all of them, the requests would cost more than the work."""
    read: list[str] = []

    def note(operation: str, key: str) -> None:
        if operation == "get" and "/slices/" in key and key.endswith(".json"):
            read.append(key.rpartition("/")[2])

    bucket.answer = note
    assert not run(data, Part(1, 3))
    assert not run(data, Part(2, 3))
    assert read == []
    assert not run(data, Part(2, 3))
    again = len(read)
    assert again
    assert len(set(read)) == again
    read.clear()
    assert run(data, Part(3, 3))
    assert len(read) == len(set(read)) > again


def test_parts_leave_their_marks_in_the_store_and_scan_each_range_once(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned, marks = list[int](), f"{SET}/builds/marks/"

    def noted(sizes: Sizes, stretch: Stretch) -> Marks:
        scanned.append(stretch.start)
        return scan(sizes, stretch)

    monkeypatch.setattr("sftdata.marking.WORTH_RANGES", 0)
    monkeypatch.setattr("sftdata.marking.scan", noted)
    monkeypatch.setattr("sftdata.inputs.Sizes", partial(Sizes, range=RANGE))
    large, given = write_chats(tmp_path / "large.jsonl", 800), {"slice_bytes": 30_000}
    assert not run(large, Part(2, 3), **given)
    ranges = [*range(0, large.stat().st_size, RANGE)]
    assert len(ranges) > 2
    assert sorted(scanned) == ranges
    left = sorted(bucket.below(marks))
    assert len(left) == len(ranges)
    scanned.clear()
    bucket.objects[marks + left[0]] = bucket.objects[marks + left[0]][:-1]
    del bucket.objects[marks + left[1]]
    assert not run(large, Part(1, 3), **given)
    assert run(large, None, **given)
    assert len(set(scanned)) == len(scanned) == 2
    sftdata.prepare(**settings(large, tmp_path / "set", **given))
    assert is_whole(bucket, content(tmp_path / "set"))


def test_a_set_that_was_pushed_there_goes_when_it_is_replaced(
    data: Path, wholes: dict[int, dict[str, bytes]], bucket: Bucket
) -> None:
    bucket.objects |= {f"{SET}/{name}": text for name, text in wholes[32].items()}
    run(data, overwrite=True)
    assert is_whole(bucket, wholes[64])


def test_a_reader_of_a_set_that_is_replaced_is_told_and_one_that_opens_it_has_the_new_one(
    data: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, max_length=32)
    old = dict(bucket.objects)
    run(data, overwrite=True)
    new, bucket.objects = bucket.objects, old
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path))
    opened = open_set(SET)
    bucket.objects = new
    with pytest.raises(IntegrityError, match=f"^{SET}: replaced while it was in use"):
        opened[0]

    def replace(operation: str, key: str) -> None:
        if key.endswith("/tokenizer.json"):
            bucket.objects = new

    shutil.rmtree(tmp_path / "sets")
    bucket.objects, bucket.answer = old, replace
    assert open_set(SET).manifest.max_length == 64


def test_a_cache_that_is_only_read_serves_what_it_holds(
    data: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    run(data)
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path))
    rows = [row.labels.tolist() for row in open_set(SET)]
    local._sound.clear()  # as in a process of another user
    monkeypatch.setattr(local.os, "utime", refuse)
    assert [row.labels.tolist() for row in open_set(SET)] == rows


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


@pytest.mark.parametrize(
    "seeds",
    [
        range(20),
        *(pytest.param(range(at, at + 100), marks=pytest.mark.torture) for at in range(0, 1000, 100)),
    ],
    ids=str,
)
def test_killed_anywhere_there_is_no_set_or_a_whole_one(
    data: Path, wholes: dict[int, dict[str, bytes]], bucket: Bucket, seeds: range
) -> None:
    for seed in seeds:
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


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_commands_that_make_other_sets_at_once_the_slower_is_refused(
    data: Path, whole: dict[str, bytes], bucket: Bucket, overwrite: bool
) -> None:
    def overtake(operation: str, key: str) -> None:
        if operation == "put" and key == f"{SET}/{MANIFEST_NAME}":
            bucket.answer = lambda operation, key: None
            run(data, overwrite=overwrite)

    if overwrite:
        run(data, max_length=48)
    bucket.answer = overtake
    with pytest.raises(UsageError, match=rf"{SET}: holds a finished set made otherwise \(made meanwhile"):
        run(data, max_length=32, overwrite=overwrite)
    assert files(bucket) == whole


# ------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("ignored", ["create", "swap"])
def test_a_store_that_ignores_conditions_is_refused_before_work(
    data: Path, bucket: Bucket, ignored: str
) -> None:
    if ignored == "swap":  # asked for where a set is replaced
        run(data, max_length=32)
    bucket.ignores = {ignored}
    before = files(bucket)
    with pytest.raises(
        UsageError, match=rf"{SET}: the store replaces .* Fix: choose a store with conditional puts"
    ):
        run(data, overwrite=True)
    assert files(bucket) == before
    assert not [
        key for key in bucket.objects if "shard" in key and key not in {f"{SET}/{name}" for name in before}
    ][len(before) :]


REFUSALS = {  # as obstore 0.12 and its stores say them
    "Error performing PUT in 3ms - Server returned non-2xx status code: 403 Forbidden: <Error><Code>AccessDenied</Code>": (
        UsageError, "access is denied .* Fix: check that AWS_ACCESS_KEY_ID .* may read and write there"),
    "Server returned non-2xx status code: 403 Forbidden: <Error><Code>RequestTimeTooSkewed</Code>": (
        UsageError, "the clock of this machine is wrong .* Fix: set the clock, then run the same command again"),
    "Server returned non-2xx status code: 404 Not Found: <Error><Code>NoSuchBucket</Code>": (
        UsageError, "there is no such bucket .* Fix: create it, or check the URL"),
    "Received redirect without LOCATION, this normally indicates an incorrectly configured region": (
        UsageError, "the bucket is in another region .* Fix: set AWS_REGION"),
    "Server returned non-2xx status code: 503 Service Unavailable: <Error><Code>SlowDown</Code>, after 6 retries": (
        SftError, "failed, several times where that may help .* Fix: check the endpoint, or run the same command again"),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSALS)
@pytest.mark.parametrize("operation", ["get", "put", "list"])
def test_what_a_store_refuses_is_one_line_and_nothing_is_lost(
    data: Path, whole: dict[str, bytes], bucket: Bucket, said: str, operation: str
) -> None:
    kind, line = REFUSALS[said]
    asked: list[str] = []

    def answer(done: str, key: str) -> None:
        asked.append(done)
        if asked.count(operation) > {"get": 1, "put": 9, "list": 0}[operation]:
            raise RuntimeError(f"{said}\n\nDebug source: Generic {{ secret }}")

    bucket.answer = answer
    with pytest.raises(kind, match=line) as caught:
        run(data)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    bucket.answer = lambda operation, key: None
    records = [key for key in bucket.objects if "/slices/" in key]
    notes: list[str] = []
    sftdata.prepare(**settings(data, SET), on_note=notes.append)
    assert any("Resuming: " in note for note in notes) == bool(records)
    assert is_whole(bucket, whole)


@pytest.mark.parametrize("name", [MANIFEST_NAME, "notes.txt"])
def test_what_another_tool_has_put_there_is_refused_and_kept(
    data: Path, whole: dict[str, bytes], bucket: Bucket, name: str
) -> None:
    bucket.objects[f"{SET}/{name}"] = b'{"half'
    with pytest.raises((UsageError, IntegrityError), match=f"{SET}.* Fix: "):
        run(data)
    assert bucket.objects == {f"{SET}/{name}": b'{"half'}
    with pytest.raises((UsageError, IntegrityError), match=f"{SET}.* Fix: "):
        run(data, overwrite=True)
    bucket.objects.clear()
    run(data)
    assert is_whole(bucket, whole)


@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_damaged_object_is_made_again(
    data: Path, whole: dict[str, bytes], bucket: Bucket, damage: str, finished: bool
) -> None:
    """Of an unfinished set one of another size, of a finished one any, where it is to be overwritten."""
    assert run(data, None if finished else Part(1, 2)) == finished
    shard = next(key for key in bucket.objects if "/shard-" in key)
    old = bucket.objects.pop(shard)
    if damage != "gone":
        bucket.objects[shard] = old[:-1] if damage == "cut" else bytes(len(old))
    if finished and damage != "other":
        with pytest.raises(
            IntegrityError,
            match=r"shard-.* Fix: replace the set with overwrite=True, or choose another output",
        ):
            run(data)
    if finished or damage != "other":
        run(data, overwrite=finished)
        assert is_whole(bucket, whole)


def test_a_damaged_record_is_said_with_the_way_out(
    data: Path, whole: dict[str, bytes], bucket: Bucket
) -> None:
    assert not run(data, Part(1, 2))
    record = next(key for key in bucket.objects if "/slices/" in key and key.endswith(".json"))
    bucket.objects[record] = b'{"half'
    with pytest.raises(IntegrityError, match="slices/.*damaged"):
        run(data)
    run(data, overwrite=True)
    assert is_whole(bucket, whole)


def test_too_many_rejects_name_where_they_are(data: Path, bucket: Bucket) -> None:
    with pytest.raises(DataError, match=rf"All are in {SET}/builds/.*/rejects.jsonl"):
        run(data, max_rejects="1")
    assert not files(bucket)


def test_the_command_says_what_it_has_made(
    data: Path, whole: dict[str, bytes], bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(data, Path())
    command = [
        "prepare",
        str(data),
        "-t",
        given["tokenizer"],
        "-o",
        SET,
        "--max-length",
        "64",
        "--max-rejects",
        "50%",
    ]
    command += ["--set", "slice_bytes=2000", "--engine", "tokenizers", "--workers", "1"]
    assert main([*command, "--part", "1/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"part": "1/2", "finished": False}
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{SET}: " in said
    assert said.partition("rejects s3://")[2].partition(": fix")[0] in {
        key[len("s3://") :] for key in bucket.objects
    }
    assert is_whole(bucket, whole)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(whole[MANIFEST_NAME])
