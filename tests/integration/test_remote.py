"""Inputs behind URLs: the same set as from the disk, each byte fetched once, and nothing of a login kept or shown."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import sftdata
from sftdata import marking, parts
from sftdata.cli import main
from sftdata.config import make_config
from sftdata.errors import DataError, InputChangedError, SftError, UsageError
from sftdata.sources import remote
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.inputs import expand_inputs
from sftdata.sources.ranges import Sizes
from sftdata.sources.source import close_sources, open_source, plan_source, read_chunk
from sftdata.workers import Workers
from tests.remote_stores import KEYS, Counter, Web, need_packages, s3_server, served
from tests.torture.runs import TOKENIZER, write_chats
from tests.waiting import HANGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_sync"),
    # The clients of fsspec keep their connections for the life of the process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TARGET = 1.05  # bytes fetched for each byte of input
ROWS = 3000
PARTS = 4
RANGE = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in the containers that are read in different ways."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("files")
    write_chats(folder / "a.jsonl", ROWS)
    lines = (folder / "a.jsonl").read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    rows = [json.loads(line) for line in lines.splitlines()]
    (folder / "c.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=500)
    return folder


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    need_packages("aiohttp")
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    with served() as web:
        yield web


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, files: Path) -> Iterator[Counter]:
    """A bucket named `bucket` with the files, behind a counter."""
    need_packages("moto", "flask", "s3fs")
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as port, pytest.MonkeyPatch.context() as patch:
        counter = Counter(port)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{counter.port}"}.items():
            patch.setenv(name, value)
        import s3fs

        store = s3fs.S3FileSystem()
        store.mkdir("bucket")
        for path in files.iterdir():
            store.pipe_file(f"bucket/data/{path.name}", path.read_bytes())
        store.pipe_file("bucket/data/README.md", b"not data")
        store.pipe_file("bucket/data/.hidden.jsonl", b"{}")
        yield counter
        counter.close()


def build(inputs: object, output: Path, workers: int = 1) -> str:
    made = sftdata.prepare(
        inputs, tokenizer=TOKENIZER, output=output, max_length=64, max_rejects="50%", slice_bytes=100_000,
        engine="tokenizers", workers=workers,
    )  # fmt: skip
    assert sftdata.verify(output).ok
    return str(made.digest)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"])
def test_a_web_file_gives_the_local_set_and_is_fetched_once(
    web: Web, files: Path, tmp_path: Path, name: str
) -> None:
    web.files[name] = (files / name).read_bytes()
    local = build(files / name, tmp_path / "local")
    assert build(f"{web.url}/{name}", tmp_path / "set", workers=2) == local
    assert web.total <= TARGET * len(web.files[name])
    assert not os.listdir(remote._folder()), "a copy was left"


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet"])
def test_an_object_gives_the_local_set_and_is_fetched_once(
    bucket: Counter, files: Path, tmp_path: Path, name: str
) -> None:
    local = build(files / name, tmp_path / "local")
    before = bucket.sent
    assert build(f"s3://bucket/data/{name}", tmp_path / "set", workers=2) == local
    small = 20_000  # heads of answers, on a file of a few hundred kilobytes
    assert bucket.sent - before <= TARGET * (files / name).stat().st_size + small


@pytest.mark.parametrize("inputs", ["s3://bucket/data", "s3://bucket/data/", "s3://bucket/data/*.json*"])
def test_folders_and_patterns_of_objects(bucket: Counter, inputs: str) -> None:
    found, notes = expand_inputs([inputs])
    names = ["a.jsonl", "b.jsonl.gz", "c.json"] + ["d.parquet"] * ("*" not in inputs)
    assert found == [f"s3://bucket/data/{name}" for name in names]
    assert ".hidden.jsonl: left out (hidden)." in notes
    assert any("README.md: left out (not named as data" in note for note in notes) == ("*" not in inputs)


def test_a_folder_of_objects_gives_the_set_of_the_folder(
    bucket: Counter, files: Path, tmp_path: Path
) -> None:
    assert build("s3://bucket/data", tmp_path / "set") == build(files, tmp_path / "local")


def test_a_finished_set_in_a_bucket_is_no_input(bucket: Counter, files: Path, tmp_path: Path) -> None:
    import s3fs

    build(files / "a.jsonl", tmp_path / "set")
    store = s3fs.S3FileSystem()
    for path in (tmp_path / "set").iterdir():
        if path.is_file():
            store.pipe_file(f"bucket/sets/one/{path.name}", path.read_bytes())
    with pytest.raises(UsageError, match="s3://bucket/sets/one: a finished set, not rows"):
        expand_inputs(["s3://bucket/sets/one"])
    with pytest.raises(UsageError, match="no data file here"):
        expand_inputs(["s3://bucket/sets"])


def test_sets_built_in_a_bucket_are_left_out_aloud(bucket: Counter, files: Path) -> None:
    import s3fs

    need_packages("obstore")
    more = {"tokenizer": TOKENIZER, "max_length": 64, "max_rejects": "50%", "workers": 1}
    for name, how in (("one", {}), ("two", {"eval": "30%"})):
        sftdata.prepare(files / "a.jsonl", output=f"s3://bucket/mixed/{name}", **how, **more)
    config = make_config(
        inputs=[files / "a.jsonl"], output="s3://bucket/mixed/three", slice_bytes=5_000, **more
    )
    parts.prepare(config, Workers(1), part=parts.Part(1, 9))
    store = s3fs.S3FileSystem()
    store.pipe_file("bucket/mixed/rows.jsonl", b"{}")
    store.pipe_file("bucket/mixed//twice.jsonl", b"{}")
    store.pipe_file("bucket/mixed/own/manifest.json", b"{}")
    names = [f"s3://bucket/mixed/{name}" for name in ("/twice.jsonl", "own/manifest.json", "rows.jsonl")]
    for pattern, kept in (
        ("", names),
        ("/*", names[1:]),
        ("/**", names),
        ("/**/*.json", names[1:2]),
        ("/**/*.jsonl", names[2:]),
    ):
        found, notes = expand_inputs([f"s3://bucket/mixed{pattern}"])
        assert sorted(found) == kept, pattern
        assert any("(of a finished set)" in note for note in notes)
    with pytest.raises(UsageError, match=r"one\*/\*: matches no data; .*\(of a finished set\)"):
        expand_inputs(["s3://bucket/mixed/one*/*"])
    for name, what in (
        ("one", "a finished"),
        ("two", "a finished"),
        ("three", "an unfinished"),
    ):
        with pytest.raises(UsageError, match=f"s3://bucket/mixed/{name}: .*{what} set"):
            expand_inputs([f"s3://bucket/mixed/{name}"])


def _part(number: int, url: str, output: Path, step: Barrier) -> None:
    """Make a part, in step with the others: each scans one range, then the next."""

    def in_step(*given: Any) -> None:
        step.wait(HANGS)
        leave(*given)

    leave, marking._leave = marking._leave, in_step
    given = {"max_length": 64, "max_rejects": "50%", "engine": "tokenizers", "slice_bytes": 100_000}
    config = make_config(inputs=[url], tokenizer=TOKENIZER, output=output, **given)
    parts.prepare(config, Workers(1), part=parts.Part(number, PARTS))


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded:DeprecationWarning"
)  # of the server, which no child uses
def test_parts_that_start_at_once_fetch_what_they_make(
    web: Web, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte by the part that scans it and makes its rows; besides, by each, what all look at and a few borders."""
    block, ranges = remote.HELD_BYTES, 2 * PARTS
    monkeypatch.setattr("sftdata.inputs.Sizes", partial(Sizes, range=RANGE))
    monkeypatch.setattr("sftdata.sources.streams.RANGE_BYTES", RANGE)
    monkeypatch.setattr("sftdata.sources.cutting.SAMPLES", 2)
    lines = (files / "a.jsonl").read_bytes()
    size = ranges * RANGE
    web.files["a.jsonl"] = (lines * (1 + size // len(lines)))[:size].rpartition(b"\n")[0] + b"\n"
    fork = multiprocessing.get_context("fork")
    step = fork.Barrier(PARTS)
    crew = [
        fork.Process(target=_part, args=(number, f"{web.url}/a.jsonl", tmp_path / "set", step))
        for number in range(1, PARTS + 1)
    ]
    for one in crew:
        one.start()
    for one in crew:
        one.join(HANGS)
    assert [one.exitcode for one in crew] == [0] * PARTS
    assert sftdata.verify(tmp_path / "set").ok
    head, samples, borders, share = 4, 2 * 2, 3 * ranges, 2 * 2
    assert web.total <= size + PARTS * block * (head + samples + borders + share)


# ------------------------------------------------------------------------------------ without room for a copy


def rows_of(plan: SourcePlan) -> list[object]:
    return [row for chunk in plan.chunks for row in read_chunk(chunk)[0].rows]


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_room", lambda folder: 0)


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("name", ["a.jsonl", "c.json", "d.parquet"])
def test_ranges_are_read_and_no_more(web: Web, files: Path, tmp_path: Path, name: str) -> None:
    step = 50_000 if name == "d.parquet" else 200_000
    web.files[name] = (files / name).read_bytes()
    plan = plan_source(open_source(f"{web.url}/{name}"), 0, step)
    assert len(plan.chunks) > 1
    close_sources()
    before = web.total
    rows = rows_of(plan)
    # A Parquet file ends in what says where its columns are, which is read as well; here that is much of it.
    footer = 60_000 if name == "d.parquet" else 0
    assert web.total - before <= TARGET * len(web.files[name]) + footer
    assert rows == rows_of(plan_source(open_source(str(files / name)), 0, step))


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize("name", ["a.jsonl", "d.parquet"])
def test_the_set_is_the_same_and_a_change_is_noticed(
    web: Web, files: Path, tmp_path: Path, name: str
) -> None:
    web.files[name] = (files / name).read_bytes()
    assert build(f"{web.url}/{name}", tmp_path / "set") == build(files / name, tmp_path / "local")
    plan = plan_source(open_source(f"{web.url}/{name}"), 0, 200_000)
    close_sources()
    web.files[name] = web.files[name].replace(b"bright", b"BRIGHT")
    with pytest.raises(InputChangedError, match=f"{name}: changed while it was read"):
        rows_of(plan)


@pytest.mark.usefixtures("no_room")
def test_a_compressed_file_without_room_is_refused(web: Web, files: Path) -> None:
    web.files["b.jsonl.gz"] = (files / "b.jsonl.gz").read_bytes()
    with pytest.raises(UsageError, match="read from a copy, as it is compressed; .* Fix: set TMPDIR"):
        open_source(f"{web.url}/b.jsonl.gz")


def test_another_machine_reads_ranges(web: Web, files: Path, tmp_path: Path) -> None:
    """A plan that was sent elsewhere names a copy that is not there."""
    for name in ("a.jsonl", "b.jsonl.gz", "d.parquet"):
        web.files[name] = (files / name).read_bytes()
        plan = plan_source(open_source(f"{web.url}/{name}"), 0, 200_000)
        sent = pickle.loads(pickle.dumps(plan))
        assert Path(plan.source.copy).exists()
        rows = rows_of(plan)
        close_sources()
        del plan
        assert not Path(sent.source.copy).exists()
        assert rows == rows_of(sent)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = """
        import os, signal
        from pathlib import Path
        from sftdata.sources import remote
        print(remote._folder(), flush=True)
        Path(remote._folder(), "copy").write_bytes(b"1")
        if input() == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    env = os.environ | {"TMPDIR": str(tmp_path)}

    def run(word: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", dedent(code)], input=word, env=env, capture_output=True, text=True
        )
        return done.stdout.strip()

    left = run("killed")
    assert [str(path) for path in tmp_path.iterdir()] == [left]
    run("ended")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_throttled_read_is_repeated_and_then_named(web: Web, files: Path, tmp_path: Path) -> None:
    web.files["a.jsonl"] = (files / "a.jsonl").read_bytes()
    web.answer = lambda name, times: 503 if times <= 2 else None
    assert build(f"{web.url}/a.jsonl", tmp_path / "set") == build(files / "a.jsonl", tmp_path / "local")
    web.answer = lambda name, times: 503
    with pytest.raises(
        SftError, match=r"a\.jsonl: cannot be read; 4 attempts failed .*503.* Fix: .* again later"
    ) as raised:
        build(f"{web.url}/a.jsonl", tmp_path / "set2")
    assert raised.value.exit_code == 1
    assert not (tmp_path / "set2").exists()


@pytest.mark.parametrize(
    ("status", "said"), [(404, "not there"), (403, "access is denied"), (401, "access is denied")]
)
def test_what_cannot_succeed_is_not_repeated(web: Web, status: int, said: str) -> None:
    web.files["a.jsonl"] = b"{}"
    web.answer = lambda name, times: status if name == "a.jsonl" else None
    with pytest.raises(UsageError, match=said):
        open_source(f"{web.url}/a.jsonl")
    assert web.asked["a.jsonl"] == 1
    with pytest.raises(UsageError, match="not there"):
        open_source(f"{web.url}/none.jsonl")


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    need_packages("aiohttp")
    monkeypatch.setattr(remote, "_WAITS", ())
    with pytest.raises(SftError, match="cannot be read; 1 attempts failed"):
        open_source("http://127.0.0.1:9/a.jsonl")


def test_an_object_that_changes_while_it_is_fetched(web: Web, files: Path) -> None:
    web.files["a.jsonl"] = (files / "a.jsonl").read_bytes()

    def change(name: str, times: int) -> None:
        web.files[name] = web.files[name].replace(b"bright", b"BRIGHT")

    web.answer = change
    with pytest.raises(DataError, match="changed while it was read"):
        open_source(f"{web.url}/a.jsonl")
    assert not os.listdir(remote._folder())


def test_a_server_without_ranges_serves_a_copy(
    web: Web, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["a.jsonl"], web.ranges = (files / "a.jsonl").read_bytes(), False
    assert build(f"{web.url}/a.jsonl", tmp_path / "set") == build(files / "a.jsonl", tmp_path / "local")
    monkeypatch.setattr(remote, "_room", lambda folder: 0)
    monkeypatch.setattr(remote, "RANGE_BYTES", 1000)
    with pytest.raises(UsageError, match="sends the whole file for a range"):
        open_source(f"{web.url}/a.jsonl")


def test_web_addresses_are_not_listed() -> None:
    for url in ("https://example.org/*.jsonl", "https://example.org/data/"):
        with pytest.raises(UsageError, match="cannot be listed"):
            expand_inputs([url])


def test_no_credentials_no_bucket_no_object(bucket: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setattr(remote, "_WAITS", ())
    with pytest.raises(UsageError, match="s3://nowhere/a.jsonl: not there"):
        open_source("s3://nowhere/a.jsonl")
    with pytest.raises(UsageError, match="s3://bucket/none.jsonl: not there"):
        open_source("s3://bucket/none.jsonl")
    with pytest.raises(UsageError, match="s3://nowhere/folder: not there"):
        open_source(*expand_inputs(["s3://nowhere/folder"])[0])
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UsageError, match="no credentials .* Fix: set AWS_ACCESS_KEY_ID"):
        open_source("s3://bucket/data/a.jsonl")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    open_source("s3://bucket/data/a.jsonl")  # the advice helps in the same process


def test_a_wrong_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3 answers it; moto takes any region."""
    need_packages("s3fs")
    import s3fs

    with served() as web:
        web.wrong_region = True
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": web.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "_WAITS", ())
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(SftError, match="s3://bucket/a.jsonl: .*Fix: .*region"):
            open_source("s3://bucket/a.jsonl")


@pytest.mark.parametrize("package", ["s3fs", "gcsfs", "adlfs"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    scheme, extra = {"s3fs": ("s3", "s3"), "gcsfs": ("gs", "gcs"), "adlfs": ("az", "azure")}[package]
    monkeypatch.setitem(sys.modules, package, None)
    import fsspec  # noqa: F401  its registry is asked for by name, which a variable of the package hides

    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'sftdata\[{extra}\]'"):
        open_source(f"{scheme}://bucket/a.jsonl")


# -------------------------------------------------------------------------------------------------- nothing kept


def test_logins_and_signatures_are_neither_kept_nor_shown(
    web: Web, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.files["a.jsonl"] = (files / "a.jsonl").read_bytes()
    signed = f"{web.url.replace('://', '://the-user:pass-word@')}/a.jsonl?X-Amz-Signature=5ec2e7&n=1"
    settings = ["-t", TOKENIZER, "--max-length", "64", "--max-rejects", "50%", "--engine", "tokenizers"]
    assert main(["prepare", signed, *settings, "-o", str(tmp_path / "set")]) == 0
    assert main(["prepare", signed, *settings, "-o", str(tmp_path / "set")]) == 0
    assert (
        main(["prepare", signed.replace("a.jsonl", "none.jsonl"), *settings, "-o", str(tmp_path / "none")])
        == 2
    )
    assert main(["detect", signed, "--json"]) == 0
    assert main(["preview", signed, "-t", TOKENIZER, "--json"]) == 0
    assert (
        main(["prepare", signed, *settings[:-4], "--max-rejects", "0", "-o", str(tmp_path / "rejected")]) == 3
    )
    shown = capsys.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in ("pass-word", "the-user", "5ec2e7", "X-Amz"):
        assert secret not in shown.out + shown.err
        assert secret.encode() not in kept
    source = json.loads((tmp_path / "set" / "manifest.json").read_bytes())["sources"][0]
    assert source["name"] == "a.jsonl"


def test_keys_of_a_store_are_not_kept(
    bucket: Counter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("s3://bucket/data/a.jsonl", tmp_path / "set")
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in kept
    assert b"s3://bucket/data/a.jsonl" in kept
