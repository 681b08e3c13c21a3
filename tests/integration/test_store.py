"""Sets built on a real S3 server: the bytes of a folder, whatever is killed, refused or throttled on the way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sftdata
from sftdata import inputs, marking, parts
from sftdata.config import make_config
from sftdata.errors import SftError, UsageError
from sftdata.parts import Part
from sftdata.set import clients, stores
from sftdata.set.manifest import MANIFEST_NAME, decode_manifest
from sftdata.set.shared import StoredBuild
from sftdata.sources.ranges import Sizes
from sftdata.workers import Workers
from tests.picture_sets import asked, write_model, write_pictures, write_rows
from tests.remote_stores import KEYS, Gate, need_packages, s3_server, served
from tests.torture.runs import content, settings, write_chats
from tests.waiting import HANGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_sync"),
    # The clients of fsspec keep their connections for the life of the process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FORKS = multiprocessing.get_context("forkserver")  # this process has threads of the client
FORKS.set_forkserver_preload(["tests.torture.runs", "sftdata.pipeline", "tokenizers", "pyarrow"])
ENDPOINT = "AWS_ENDPOINT_URL"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need_packages("obstore", "moto")
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        url = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=HANGS).close()
        yield url


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the server is; the environment names it."""
    for key, value in (KEYS | {ENDPOINT: endpoint}).items():
        monkeypatch.setenv(key, value)
    stores.connect.cache_clear()
    return endpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "in.jsonl", 20)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "set"
    sftdata.prepare(**settings(data, output))
    return content(output)


def objects(s3: str, name: str) -> dict[str, bytes]:
    """Return the objects below a name, by another client than the one that wrote them."""
    from botocore.session import get_session

    client = get_session().create_client("s3", endpoint_url=s3)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"{name}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    found = {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}
    return {key.removeprefix(f"{name}/"): data for key, data in found.items()}


def left_parts(s3: str) -> list[str]:
    """Return the names of uploads that have begun, and of which the parts lie in the bucket."""
    from botocore.session import get_session

    client = get_session().create_client("s3", endpoint_url=s3)
    return [entry["Key"] for entry in client.list_multipart_uploads(Bucket="bucket").get("Uploads", ())]


def files(s3: str, name: str) -> dict[str, bytes]:
    """Return the files of the set at a name; nothing where there is none."""
    found = objects(s3, name)
    if MANIFEST_NAME not in found:
        return {}
    folder = found[MANIFEST_NAME].decode().partition('"folder":"')[2].partition('"')[0]
    return {key.removeprefix(f"{folder}/"): data for key, data in found.items() if key.startswith(folder)}


@pytest.mark.parametrize("workers", [1, 2])
def test_inputs_from_anywhere_make_the_same_set_in_a_store(
    s3: str, data: Path, whole: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    need_packages("aiohttp", "s3fs")
    stores.put_bytes(stores.Objects("s3://bucket/inputs"), data.name, data.read_bytes())
    with served() as web:
        web.files[data.name] = data.read_bytes()
        for kind, path in (
            ("disk", data),
            ("http", f"{web.url}/{data.name}"),
            ("s3", f"s3://bucket/inputs/{data.name}"),
        ):
            name = f"same-{workers}-{kind}"
            notes: list[str] = []
            sftdata.prepare(**settings(path, f"s3://bucket/{name}", workers=workers), on_note=notes.append)
            found = files(s3, name)
            assert (
                sftdata.open(tmp_of(found, tmp_path / name)).manifest.digest in whole[MANIFEST_NAME].decode()
            )
            assert {key: text for key, text in found.items() if key != MANIFEST_NAME} == {
                key: text for key, text in whole.items() if key != MANIFEST_NAME
            }


def test_an_endpoint_without_a_scheme_and_an_odd_neighbour_are_one_line(
    s3: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.session import get_session

    sftdata.prepare(**settings(data, "s3://bucket/near"))
    client = get_session().create_client("s3", endpoint_url=s3)
    client.put_object(Bucket="bucket", Key="near/builds//x", Body=b"")
    with pytest.raises(
        UsageError, match=r"has a name that no file can have .*InvalidPath.* Fix: remove it, or"
    ):
        sftdata.prepare(**settings(data, "s3://bucket/near"))
    client.delete_object(Bucket="bucket", Key="near/builds//x")
    sftdata.prepare(**settings(data, "s3://bucket/near"))
    bare = s3.partition("://")[2]
    monkeypatch.setenv(ENDPOINT, bare)
    stores.connect.cache_clear()
    with pytest.raises(
        UsageError, match=f"bucket/near/.*: the endpoint {bare} is no URL. Fix: begin it with https"
    ):
        sftdata.prepare(**settings(data, "s3://bucket/near"))
    monkeypatch.setenv(ENDPOINT, f"http://{bare}")
    sftdata.prepare(**settings(data, "s3://bucket/near"))


def test_a_key_holds_any_character(s3: str, data: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    odd, plain = "odd/a#b/p%20c é+[1]", ("odd/a", "odd/a#b/p c é+[1]")
    sftdata.prepare(**settings(data, f"s3://bucket/{odd}"))
    assert files(s3, odd) == whole
    assert not any(objects(s3, name) for name in plain)
    sftdata.push(f"s3://bucket/{odd}", f"s3://bucket/{odd}%23")
    assert sftdata.open(f"s3://bucket/{odd}%23").manifest.digest in whole[MANIFEST_NAME].decode()
    assert len(objects(s3, f"{odd}%23")) == len(whole)


def tmp_of(found: dict[str, bytes], folder: Path) -> Path:
    """Write files as a folder."""
    for name, text in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def test_what_is_huge_goes_in_parts_and_is_there_whole_or_not_at_all(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_ONE_PUT", 1 << 20)
    monkeypatch.setitem(stores._PARTS, "chunk_size", 5 << 20)
    store, blocks = stores.Objects("s3://bucket/huge"), [os.urandom(700_001) for _ in range(30)]

    def write(sink: Any, broken: BaseException | None = None) -> None:
        for number, block in enumerate(blocks):
            sink.write(block)
            if broken is not None and number == 25:
                raise broken

    for broken in (ValueError("killed"), KeyboardInterrupt("killed")):
        with pytest.raises(type(broken), match="killed"):
            store.put("broken", partial(write, broken=broken))
    assert not left_parts(s3), "the parts of what failed stay in the bucket, where nothing lists them"
    digest = store.put("whole", write)
    assert not left_parts(s3)
    assert objects(s3, "huge") == {"whole": b"".join(blocks)}
    assert digest.sha256 == hashlib.sha256(b"".join(blocks)).hexdigest()


def test_what_is_huge_ends_in_one_line_where_the_store_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(client: object, name: str, parts: Iterator[bytes], **_: object) -> None:
        next(parts)
        raise OSError("gone")

    monkeypatch.setattr(stores, "_ONE_PUT", 10)
    monkeypatch.setattr(stores, "library", lambda url: SimpleNamespace(put=give_up))
    monkeypatch.setattr(stores, "connect", lambda url: None)
    for times in (1, 9):  # found out at the end, and while more is given
        with pytest.raises(SftError, match=r"s3://bucket/huge/name: failed, .*OSError: gone"):
            stores.Objects("s3://bucket/huge").put(
                "name", lambda sink, times=times: [sink.write(bytes(17 << 20)) for _ in range(times)]
            )


def test_both_sides_of_a_split_with_pictures_are_there_at_once(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the one put that makes both, there is neither; the same command goes on from there."""
    names = [f"pictures/{name}" for name in write_pictures(tmp_path / "pictures", 12)]
    rows = write_rows(
        tmp_path, [asked(f"<image>{'What? ' * 9}{name}", "Red", images=[name]) for name in names]
    )
    given = {
        "inputs": rows,
        "tokenizer": str(write_model(tmp_path / "model")),
        "embed_images": True,
        "eval": "30%",
    }
    given |= {"max_length": 128, "slice_bytes": 512, "workers": 1}
    sftdata.prepare(output=tmp_path / "set", **given)
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    url = "s3://bucket/split"
    with monkeypatch.context() as patch:
        patch.setattr(StoredBuild, "put_in_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sftdata.prepare(output=url, **given)
    for side in ("", "/train", "/eval"):
        with pytest.raises(UsageError, match="no such set|not a finished set"):
            sftdata.open(f"{url}{side}")
    sftdata.prepare(output=url, **given)
    found = files(s3, "split")
    for side in ("train", "eval"):
        start = f"{side}/"
        there = {name.removeprefix(start): text for name, text in found.items() if name.startswith(start)}
        assert there == content(tmp_path / "set" / side)
        assert sftdata.verify(f"{url}/{side}").problems == []
    assert len(objects(s3, "split")) == len(found) + 1


def elsewhere(folder: str) -> None:
    os.environ["SFTDATA_CACHE"] = folder


def test_workers_of_other_machines_fetch_the_tokenizer(
    s3: str, data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their cache is empty, and the planner's is out of their reach."""
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, initializer=elsewhere, initargs=(str(tmp_path / "theirs"),)) as pool:

        class Away(ProcessPoolExecutor):
            def __init__(self) -> None:
                pass

            def submit(self, function: Any, /, *task: Any, **_: Any) -> Future[Any]:
                (tmp_path / "mine").rename(tmp_path / "out of reach")
                wait([done := pool.submit(function, *task)])
                (tmp_path / "out of reach").rename(tmp_path / "mine")
                return done

        sftdata.prepare(**settings(data, "s3://bucket/hired") | {"workers": Away()})
    assert files(s3, "hired") == whole
    assert any((tmp_path / "theirs" / "tokenizers").iterdir())


# ------------------------------------------------------------------------------------------------- kills


def _make(given: dict[str, Any], endpoint: str, part: Part | None) -> None:
    os.environ |= KEYS | {ENDPOINT: endpoint}
    if part is not None:  # as if its ranges were worth sharing
        marking.WORTH_RANGES, inputs.Sizes = 0, partial(Sizes, range=64 << 10)  # type: ignore[misc]
    parts.prepare(make_config(**given), Workers(1), part=part)


def made(given: dict[str, Any], endpoint: str, gate: Gate | None = None, part: Part | None = None) -> int:
    """Make a set, or a part of it, in a process of its own; return its exit code."""
    process = FORKS.Process(target=_make, args=(given, endpoint, part))
    if gate is not None:
        gate.kill = lambda: os.kill(process.pid or 0, signal.SIGKILL)
    process.start()
    process.join(HANGS)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def killed_and_resumed(s3: str, data: Path, whole: dict[str, bytes], numbers: list[int]) -> int:
    gate, kills = Gate(int(s3.rpartition(":")[2])), 0
    for number in numbers:
        for moment in ("before", "middle", "after"):
            name = f"killed-{len(numbers)}-{number}-{moment}"
            gate.arm(number, moment)
            code = made(settings(data, f"s3://bucket/{name}"), f"http://127.0.0.1:{gate.port}", gate)
            kills += code == -signal.SIGKILL
            found = {
                key: text
                for key, text in files(s3, name).items()
                if not key.startswith(("slices/", "plan.json"))
            }
            assert found in ({}, whole), name
            assert made(settings(data, f"s3://bucket/{name}"), s3) == 0
            assert files(s3, name) == whole, name
            assert len(objects(s3, name)) == len(whole) + 1, name
    gate.close()
    return kills


PUTS = [[9, 20], *(pytest.param([*range(at, at + 4)], marks=pytest.mark.torture) for at in range(1, 21, 4))]


@pytest.mark.parametrize("puts", PUTS, ids=str)
def test_a_run_killed_at_a_put_resumes_to_the_same_bytes(
    s3: str, data: Path, whole: dict[str, bytes], puts: list[int]
) -> None:
    """Three moments of each; 60 points in the long form."""
    assert killed_and_resumed(s3, data, whole, puts) == 3 * len(puts)


@pytest.mark.parametrize(
    "of", [2, *(pytest.param(number, marks=pytest.mark.torture) for number in (1, 7, 64))]
)
def test_parts_that_are_killed_make_the_set_in_any_order(s3: str, tmp_path: Path, of: int) -> None:
    """Each at a random put, of marks, slices or what ends the set; then all again, and any one is last."""
    chance, name = random.Random(of), f"killed-parts-{of}"
    given = settings(write_chats(tmp_path / "in.jsonl", 400), f"s3://bucket/{name}", slice_bytes=10_000)
    numbers, gate, kills, marks = range(1, of + 1), Gate(int(s3.rpartition(":")[2])), 0, 0
    for number in chance.sample(numbers, of):
        gate.arm(chance.randint(5, 20), chance.choice(["before", "middle", "after"]))
        code = made(given, f"http://127.0.0.1:{gate.port}", gate, Part(number, of))
        kills += code == -signal.SIGKILL
        marks = max(marks, sum("builds/marks/" in key for key in objects(s3, name)))
    gate.close()
    for number in chance.sample(numbers, of):
        assert made(given, s3, part=Part(number, of)) == 0
    assert kills
    assert marks > 1
    assert made(given | {"output": tmp_path / "set"}, s3, part=Part(1, 1)) == 0  # in the same ranges
    assert files(s3, name) == content(tmp_path / "set")
    assert len(objects(s3, name)) == len(content(tmp_path / "set")) + 1


def test_parts_that_are_processes_make_a_set_that_is_read_back(
    s3: str, data: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "sftdata", "prepare", str(data), "-o", "s3://bucket/parts"]
    for key, value in settings(data, Path()).items():
        if key not in ("inputs", "output"):
            command += (
                ["--set", f"{key}={value}"]
                if key == "slice_bytes"
                else [f"--{key.replace('_', '-')}", str(value)]
            )
    crew = [
        subprocess.Popen([*command, "--part", f"{number}/2"], stderr=subprocess.PIPE, text=True)
        for number in (2, 1)
    ]
    for one in crew:
        assert one.wait(HANGS) == 0, one.stderr and one.stderr.read()
        assert one.stderr
        one.stderr.close()
    assert files(s3, "parts") == whole
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path))
    assert sftdata.verify("s3://bucket/parts").ok
    assert sftdata.open("s3://bucket/parts").manifest == decode_manifest(whole[MANIFEST_NAME], "")


def test_a_store_that_throttles_is_asked_again_and_then_given_up_until_the_next_run(
    s3: str, data: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=10), "base": 2}
    monkeypatch.setattr(
        clients, "_RETRIES", {"max_retries": 3, "backoff": quick, "retry_timeout": timedelta(minutes=1)}
    )
    gate = Gate(int(s3.rpartition(":")[2]))
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{gate.port}")
    gate.slow = lambda number: number % 3 == 0
    sftdata.prepare(**settings(data, "s3://bucket/throttled"))
    assert files(s3, "throttled") == whole
    gate.requests, gate.slow = 0, lambda number: number > 25
    assert "503 Service Unavailable" in refusal(data, "s3://bucket/given-up")
    gate.slow = lambda number: False
    notes: list[str] = []
    sftdata.prepare(**settings(data, "s3://bucket/given-up"), on_note=notes.append)
    assert any(note.startswith("Resuming: ") for note in notes)
    assert files(s3, "given-up") == whole
    gate.close()


# ---------------------------------------------------------------------------------------- what is refused


def refusal(data: Path, url: str = "s3://bucket/refused") -> str:
    stores.connect.cache_clear()
    with pytest.raises(SftError) as caught:
        sftdata.prepare(**settings(data, url))
    said = str(caught.value)
    assert "\n" not in said
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in said
    return said


def test_what_is_wrong_with_a_store_is_said(
    s3: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no such bucket" in refusal(data, "s3://other/set")
    quick = clients._RETRIES | {"max_retries": 1, "backoff": {}}
    monkeypatch.setattr(clients, "_RETRIES", quick)
    with served() as web:
        monkeypatch.setenv(ENDPOINT, web.url)
        web.wrong_region = True
        assert "the bucket is in another region" in refusal(data)
        assert "Fix: set AWS_REGION" in refusal(data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{port}")
    assert "Fix: check the endpoint, or run the same command again" in refusal(data)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "no credentials. Fix: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal(data)
