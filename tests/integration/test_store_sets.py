"""Sets in an object store: read where `prepare` built them, pushed there, and what is said where that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import IntegrityError, UsageError
from sftdata.set import local, push, stores
from sftdata.set.opened import open_set
from tests.picture_sets import asked, write_model, write_pictures, write_rows
from tests.remote_stores import KEYS, Counter, need_packages, s3_server
from tests.torture.runs import TOKENIZER, write_chats
from tests.waiting import HANGS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_sync")]
SETTINGS: dict[str, Any] = {
    "tokenizer": TOKENIZER, "max_length": 64, "max_rejects": "50%", "slice_bytes": 100_000, "engine": "tokenizers",
    "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Counter]:
    """A bucket named `bucket`, behind a counter."""
    need_packages("moto", "flask", "obstore", "boto3")
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as port, pytest.MonkeyPatch.context() as patch:
        counter = Counter(port)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{counter.port}"}.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        stores.connect.cache_clear()
        yield counter
        counter.close()
    stores.connect.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    local.stored_sizes.cache_clear()
    local.stored_hashes.cache_clear()
    return tmp_path / "cache" / "sets"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, s3: Counter) -> Path:
    """A set in a folder, and the same one built in the bucket."""
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "a.jsonl", 3000)
    local = sftdata.prepare(folder / "a.jsonl", output=folder / "set", **SETTINGS)
    there = sftdata.prepare(folder / "a.jsonl", output="s3://bucket/built", **SETTINGS)
    assert there.digest == local.digest
    return folder / "set"


def rows_of(place: str | Path) -> list[list[int]]:
    return [row.labels.tolist() for row in open_set(place)]


def test_a_set_that_was_built_in_a_store_is_read_there(s3: Counter, chats: Path, cache: Path) -> None:
    before = s3.sent
    assert rows_of("s3://bucket/built") == rows_of(chats)
    read = sum(path.stat().st_size for path in chats.rglob("*") if path.suffix != ".jsonl" and path.is_file())
    assert s3.sent - before <= 1.05 * read + 40_000, "heads of answers, and the pointer"
    before = s3.sent
    assert open_set("s3://bucket/built")[0].labels.tolist() == rows_of(chats)[0]
    assert s3.sent - before <= 4_000, "a warm start asks for the manifest's place alone"
    assert sftdata.verify("s3://bucket/built").ok
    assert sftdata.verify("s3://bucket/built", quick=True).ok


def test_a_push_is_the_set_and_goes_on_where_it_stopped(
    s3: Counter, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, put, sent = "s3://bucket/pushed", stores.Objects.put, []

    def counted(self: Any, name: str, writer: Any) -> Any:
        sent.append(name)
        if len(sent) == 5:
            raise KeyboardInterrupt
        return put(self, name, writer)

    monkeypatch.setattr(stores.Objects, "put", counted)
    assert main(["push", str(chats), url]) == 130
    with pytest.raises(
        UsageError, match="s3://bucket/pushed: not a finished set, .* still being built, or stopped"
    ):
        open_set(url)
    there = stores.Objects(url).sizes().keys() - {push.MARK}
    assert len(there) >= 1
    assert all(name.endswith(".arrow") for name in there)
    capsys.readouterr()
    assert main(["push", str(chats), url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    files = sum(path.is_file() for path in chats.rglob("*"))
    assert said["files"] == files
    assert said["sent"] == files - len(there)
    assert rows_of(url) == rows_of(chats)
    assert sftdata.verify(url).ok
    assert set(stores.Objects(url).sizes()) == {
        p.relative_to(chats).as_posix() for p in chats.rglob("*") if p.is_file()
    }
    sent.clear()
    assert sftdata.push(chats, url).sent == 0
    assert sent == []


def test_an_object_that_was_replaced_is_told_and_pushed_again(s3: Counter, chats: Path) -> None:
    url = "s3://bucket/mended"
    sftdata.push(chats, url)
    store, name = stores.Objects(url), "shard-00001.arrow"
    before = (chats / name).read_bytes()
    store.put(name, lambda sink: sink.write(before[:-1] + bytes([before[-1] ^ 1])))
    local.stored_hashes.cache_clear()
    for act in (lambda: sftdata.push(chats, url), sftdata.verify(url, quick=True).raise_if_broken):
        with pytest.raises(
            IntegrityError, match=f"{url}/{name}: other bytes, .* Fix: remove the object and push"
        ):
            act()
    store.remove([name])
    assert sftdata.push(chats, url).sent == 1
    assert sftdata.verify(url).ok


def test_a_push_beside_another_set_or_of_a_damaged_one_is_refused(
    s3: Counter, chats: Path, tmp_path: Path
) -> None:
    other = sftdata.prepare(
        chats.parent / "a.jsonl", output=tmp_path / "other", **SETTINGS | {"max_length": 48}
    )
    sftdata.push(chats, "s3://bucket/taken")
    with pytest.raises(UsageError, match="s3://bucket/taken: another set is there"):
        sftdata.push(tmp_path / "other", "s3://bucket/taken")
    with pytest.raises(UsageError, match="s3://bucket/built: another set is there"):
        sftdata.push(tmp_path / "other", "s3://bucket/built")
    stores.Objects("s3://bucket/begun").create(push.MARK, b"of another set")
    with pytest.raises(UsageError, match="s3://bucket/begun: the push of another set was broken off there"):
        sftdata.push(tmp_path / "other", "s3://bucket/begun")
    path = tmp_path / "other" / other.shards[1].name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match=f"{path}: xxh3-128 is"):
        sftdata.push(tmp_path / "other", "s3://bucket/damaged")
    assert stores.Objects("s3://bucket/damaged").find("manifest.json") is None


def test_a_view_by_index_is_pushed_where_its_base_is(s3: Counter, chats: Path, tmp_path: Path) -> None:
    sftdata.view(chats, output=tmp_path / "near", max_length=48)
    with pytest.raises(
        UsageError, match="a view by index, whose tokens lie in sets of this machine. Fix: .*write=True"
    ):
        sftdata.push(tmp_path / "near", "s3://bucket/near")
    sftdata.view("s3://bucket/built", output=tmp_path / "far", max_length=48)
    sftdata.push(tmp_path / "far", "s3://bucket/far")
    assert rows_of("s3://bucket/far") == rows_of(tmp_path / "near")


def test_a_set_that_embeds_its_pictures_is_pushed_with_them(s3: Counter, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "pictures")
    rows = [asked("<image>?", "Red", images=[f"pictures/{name}"]) for name in names]
    given: dict[str, Any] = {"tokenizer": str(write_model(tmp_path / "model")), "workers": 1}
    given["inputs"] = str(write_rows(tmp_path, rows))
    sftdata.prepare(output=tmp_path / "named", **given)
    with pytest.raises(
        UsageError, match="names pictures in folders of this machine. Fix: .*embed_images=True"
    ):
        sftdata.push(tmp_path / "named", "s3://bucket/pictures")
    sftdata.prepare(output=tmp_path / "whole", embed_images=True, **given)
    sftdata.view(tmp_path / "whole", output=tmp_path / "view", write=True, max_length=2048)
    for name in ("whole", "view"):
        sftdata.push(tmp_path / name, f"s3://bucket/pictures-{name}")
        assert sftdata.verify(f"s3://bucket/pictures-{name}").ok
        stored = open_set(f"s3://bucket/pictures-{name}").stored_pictures(0)
        assert stored is not None
        assert {bytes(data) for data in stored.data} == {
            (tmp_path / "pictures" / name).read_bytes() for name in names
        }


FORKS = f"""
import os, signal, sys
from sftdata.errors import UsageError
from sftdata.set.opened import open_set
opened = open_set(sys.argv[1])
first = opened[0].labels.sum()
for other in sys.argv[2:]:
    try:
        open_set(other)
    except UsageError:
        pass
if (child := os.fork()) == 0:
    signal.alarm({HANGS})
    os._exit(int(len(opened[len(opened) - 1].labels)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("others", [(), ("s3://nowhere/set",)], ids=["at once", "after a failure"])
def test_a_forked_process_reads_on(s3: Counter, chats: Path, others: tuple[str, ...]) -> None:
    """As the workers of a data loader do; the client of the store has threads that a child lacks."""
    need_packages("s3fs")
    command = [sys.executable, "-c", FORKS, "s3://bucket/built", *others]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.stdout == "64\n", done.stderr


def test_what_a_store_refuses_is_one_line(
    s3: Counter, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        stores.connect.cache_clear()
        assert main([*arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "s3://bucket/none: no such set: there is no manifest.json" in said("stats", "s3://bucket/none")
    sftdata.push(chats, "s3://bucket/several/one")
    stores.put_bytes(stores.Objects("s3://bucket/rows"), "a.jsonl", b"{}")
    assert "several: holds sets and is none itself: one. Fix: name one, as s3://bucket/several/one" in said(
        "stats", "s3://bucket/several"
    )
    assert "s3://bucket/rows: no such set: there is no manifest.json" in said("stats", "s3://bucket/rows")
    assert "there is no such bucket" in said("stats", "s3://nowhere/set")
    assert "a set is pushed to the Hub or to an object store" in said("push", str(chats), "https://host/set")
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "s3://bucket/built: no credentials. Fix: set AWS_ACCESS_KEY_ID" in said(
        "stats", "s3://bucket/built"
    )
    stores.connect.cache_clear()
