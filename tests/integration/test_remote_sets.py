"""Sets behind URLs: read through a bounded cache of this machine that all its processes share."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import IntegrityError, SftError, UsageError
from sftdata.set import local
from sftdata.set.opened import open_set
from sftdata.sources import remote
from tests.remote_stores import Web, arrows, need_packages, serve, served
from tests.torture.runs import TOKENIZER, write_chats
from tests.train_sets import make_set
from tests.waiting import HANGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("no_sync"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of several shards, with rejects and a tokenizer."""
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "a.jsonl", 3000)
    sftdata.prepare(
        folder / "a.jsonl", tokenizer=TOKENIZER, output=folder / "set", max_length=64, max_rejects="50%",
        slice_bytes=100_000, engine="tokenizers", workers=1, overlong="drop",
    )  # fmt: skip
    return folder / "set"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    local._sound.clear()
    local.stored_sizes.cache_clear()
    local.stored_hashes.cache_clear()
    return tmp_path / "cache" / "sets"


@pytest.fixture
def web(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    need_packages("aiohttp")
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0, 0.0))
    with served() as web:
        yield web


def rows_of(place: str | Path) -> list[list[int]]:
    return [row.labels.tolist() for row in open_set(place)]


def shards_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("shard-*.arrow")}


# --------------------------------------------------------------------------------------------------- reading


def test_rows_are_those_of_the_set_and_each_shard_comes_once(web: Web, chats: Path) -> None:
    url = serve(web, chats)
    opened = sftdata.open(url)
    assert opened.manifest == open_set(chats).manifest
    assert not arrows(web), "a shard came before a row was asked for"
    assert rows_of(url) == rows_of(chats)
    assert np.array_equal(
        opened.take([0, len(opened) - 1]).labels, open_set(chats).take([0, len(opened) - 1]).labels
    )
    assert set(arrows(web).values()) == {1}


def test_the_first_rows_take_one_shard(web: Web, tmp_path: Path) -> None:
    url = serve(web, make_set(tmp_path / "set", rows=60, shards=30))
    open_set(url).take([0, 1])
    assert len(arrows(web)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "SET", "--json"], ["stats", "SET", "--json"], ["audit", "SET", "--json"],
        ["verify", "SET", "--json"], ["verify", "SET", "--quick", "--json"], ["diff", "SET", "OTHER", "--json"],
        ["inspect", "SET", "--example", "7", "--json"],
    ],
    ids=lambda arguments: " ".join(arguments[:3:2]),
)  # fmt: skip
def test_commands_say_of_a_url_what_they_say_of_the_folder(
    web: Web, chats: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    url, said = serve(web, chats), []
    for place in (str(chats), url):
        code = main([{"SET": place, "OTHER": str(chats)}.get(word, word) for word in arguments])
        said.append((code, capsys.readouterr().out.replace(place, "SET").replace(str(chats), "SET")))
    assert said[1] == said[0]
    assert said[0][0] == (2 if "--example" in arguments else 0)  # row 7 was rejected: the list is read, too
    if "--quick" in arguments:
        assert not arrows(web), "quick reads no tokens"


def test_an_export_of_a_url_is_that_of_the_folder(web: Web, chats: Path, tmp_path: Path) -> None:
    url = serve(web, chats)
    for place, name in ((chats, "one"), (url, "other")):
        sftdata.export(place, to="tinker", output=tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_view_names_its_base_by_url_and_reads_it_there(web: Web, chats: Path, tmp_path: Path) -> None:
    url = serve(web, chats)
    there = sftdata.view(chats, output=tmp_path / "there", max_length=48)
    here = sftdata.view(url, output=tmp_path / "here", max_length=48)
    assert here.digest == there.digest
    assert [base.path for base in here.bases] == [url]
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")
    assert sftdata.verify(tmp_path / "here").ok
    assert sftdata.view(url, output=tmp_path / "written", max_length=48, write=True).digest
    del web.files["set/manifest.json"]
    with pytest.raises(IntegrityError, match=f"a view by index of {url} .* cannot be read: .* no such set"):
        open_set(tmp_path / "here")[0]


def test_a_view_of_more_than_the_cache_holds_is_refused(
    web: Web, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(web, chats)
    sftdata.view(url, output=tmp_path / "view", max_length=48)
    monkeypatch.setenv("SFTDATA_CACHE_GB", "1e-4")
    said = "reads [0-9,]+ bytes of sets behind URLs; the cache is bound to 100,000.*write=True"
    with pytest.raises(UsageError, match=said):
        open_set(tmp_path / "view")[0]
    monkeypatch.setenv("SFTDATA_CACHE_GB", "0.01")
    assert len(open_set(tmp_path / "view")[0].labels) == 48


# ----------------------------------------------------------------------------------------------------- damage


def test_an_object_that_is_damaged_for_good_is_named(
    web: Web, chats: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, name = serve(web, chats), "set/shard-00002.arrow"
    web.files[name] = web.files[name][:-1] + b"?"
    with pytest.raises(
        IntegrityError, match=rf"^{url}/shard-00002.arrow: xxh3-128 is \w+; .*, twice\. Fix: "
    ) as caught:
        rows_of(url)
    assert "\n" not in str(caught.value)
    assert arrows(web)["shard-00002.arrow"] == 2
    assert f"{url}/shard-00002.arrow: xxh3-128 is" in caplog.text
    report = sftdata.verify(url)
    assert [line.split(":")[2] for line in report.problems] == [f"{web.url.split(':')[2]}/{name}"]


def test_an_object_that_came_damaged_once_is_fetched_again(web: Web, chats: Path) -> None:
    url, name = serve(web, chats), "set/shard-00001.arrow"
    sound = web.files[name]

    def heal(asked: str, times: int) -> None:
        if asked == name:  # the answer to this request is taken already
            web.files[name] = sound

    web.answer = heal
    web.files[name] = b"?" + sound[1:]
    assert rows_of(url) == rows_of(chats)
    assert arrows(web)["shard-00001.arrow"] == 2


def test_a_byte_that_flips_in_the_cache_is_noticed(
    web: Web, chats: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = serve(web, chats)
    rows_of(url)
    (path,) = cache.rglob("shard-00001.arrow")
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    local._sound.clear()  # as in another process
    assert rows_of(url) == rows_of(chats)
    assert f"{path}: damaged in the cache; fetched again." in caplog.text
    assert arrows(web) == {name: 1 + (name == "shard-00001.arrow") for name in arrows(web)}


def test_a_cache_that_cannot_be_made_is_one_line_whose_advice_works(
    web: Web, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "file"))
    said = f"{tmp_path}/file/sets: the cache cannot be written: Not a directory. Fix: set SFTDATA_CACHE to"
    with pytest.raises(SftError, match=said):
        rows_of(url := serve(web, chats))
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    assert rows_of(url) == rows_of(chats)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "manifest.json", "README.md"])
@pytest.mark.parametrize("left", [0, 0.5, 1])
def test_a_small_file_that_is_damaged_in_the_cache_is_fetched_again(
    web: Web, chats: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str, left: float
) -> None:
    url = serve(web, chats)
    rows_of(url)
    (path,) = cache.rglob(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * left)] if left < 1 else whole.replace(b"1", b"2", 1) + b" ")
    local._sound.clear()  # as in another process
    local._listed.cache_clear()
    assert rows_of(url) == rows_of(chats)
    assert path.read_bytes() == whole
    assert f"{path}: damaged in the cache; fetched again." in caplog.text
    assert set(arrows(web).values()) == {1}


def test_a_set_that_is_replaced_never_mixes_with_the_old_one(web: Web, chats: Path, tmp_path: Path) -> None:
    url = serve(web, chats)
    opened = open_set(url)
    first = opened[0].labels.tolist()
    other = make_set(tmp_path / "other", rows=len(opened), shards=12, max_length=64)
    for name in [name for name in web.files if name.startswith("set/")]:
        del web.files[name]
    serve(web, other)
    assert opened[0].labels.tolist() == first
    with pytest.raises(IntegrityError, match=f"{url}: replaced while it was in use"):
        opened[len(opened) - 1]
    assert rows_of(url) == rows_of(other)


# ------------------------------------------------------------------------------------------------------ bound


def test_a_cache_smaller_than_the_set_keeps_what_was_used_last(
    web: Web, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_set(tmp_path / "set", rows=200, shards=10, max_length=256)
    url, size = serve(web, folder), (folder / "shard-00000.arrow").stat().st_size
    small = sum(path.stat().st_size for path in folder.iterdir() if path.name[:5] not in ("shard", "index"))
    monkeypatch.setenv("SFTDATA_CACHE_GB", str((3.5 * size + small) / 1e9))
    opened = open_set(url)
    for row in range(len(opened)):
        opened[row]
        opened[0]  # is in use all the time
        assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= 3.5 * size + small
    assert arrows(web) == {f"shard-{number:05}.arrow": 1 for number in range(10)}
    assert "shard-00000.arrow" in shards_in(cache)
    assert len(shards_in(cache)) == 3
    assert len(opened._mapped) == 3, "what made room stays mapped"
    assert rows_of(url) == rows_of(folder)
    assert sftdata.verify(url).ok, "which reads everything, and some of it twice"


def test_a_bound_below_one_shard_is_refused(web: Web, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_set(serve(web, chats))
    for text, said in {
        "1e-6": "the cache .* is bound to 1,000",
        "much": "SFTDATA_CACHE_GB=much: expected gigabytes",
    }.items():
        monkeypatch.setenv("SFTDATA_CACHE_GB", text)
        with pytest.raises(UsageError, match=said):
            opened[0]


def test_a_full_disk_is_one_line(web: Web, chats: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    opened = open_set(serve(web, chats))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local, "_download", full)
    with pytest.raises(
        SftError, match=f"{cache}: the cache cannot be written: No space left on device. Fix: free"
    ):
        opened[0]
    monkeypatch.undo()
    assert not [*cache.rglob("*.part")]


# -------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_set_is_refused_in_one_line(
    web: Web, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web.files["bad/manifest.json"] = b"{}?"
    for place, said in {
        f"{web.url}/none": "no such set: there is no manifest.json. Fix: name the URL",
        f"{web.url}/bad": "not a manifest",
        f"{web.url}/set?token=1": "a login or a query; a set is many files. Fix: give the login by",
        "ftp://host/set": "ftp://host/set: sets are not read from there. Fix: use one of s3,",
        "s3://bucket/../set": "names no folder",
    }.items():
        assert main(["stats", place]) in (2, 4)
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


# -------------------------------------------------------------------------------------------- many processes

READ_ALL = (
    "import sys; from sftdata.set.opened import open_set; [row.labels for row in open_set(sys.argv[1])]"
)


def test_processes_of_one_machine_fetch_each_shard_once(web: Web, chats: Path) -> None:
    url = serve(web, chats)
    command = [sys.executable, "-c", READ_ALL, url]
    readers = [subprocess.Popen(command) for _ in range(3)]
    assert [reader.wait(HANGS) for reader in readers] == [0, 0, 0]
    assert set(arrows(web).values()) == {1}


def test_a_reader_killed_in_mid_download_leaves_nothing_half(web: Web, chats: Path, cache: Path) -> None:
    url, name = serve(web, chats), "set/shard-00001.arrow"
    sound, begun, over = web.files[name], threading.Event(), threading.Event()

    def stall(asked: str, times: int) -> None:
        if asked == name and times == 1:
            begun.set()
            over.wait(HANGS)

    web.answer = stall
    reader = subprocess.Popen([sys.executable, "-c", READ_ALL, url])
    assert begun.wait(HANGS)
    waiting = subprocess.Popen([sys.executable, "-c", READ_ALL, url])  # for the other's download
    reader.kill()
    reader.wait(HANGS)
    assert waiting.wait(HANGS) == 0
    over.set()
    assert shards_in(cache) == {path.name for path in chats.glob("shard-*")}
    assert not [*cache.rglob("*.part")]
    assert next(cache.rglob("shard-00001.arrow")).read_bytes() == sound
