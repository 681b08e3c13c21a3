"""Outputs are local paths, whichever flag or setting names them; sets may lie in object stores too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.output import behind_links, local_output, written
from tests.torture.runs import TOKENIZER, prepare, write_chats

STORES = ("s3://bucket/x", "gs://bucket/x", "az://bucket/x", "abfs://box@account/x")
URLS = ("hf://datasets/me/x", "https://host/x", "http://host/x", "file:///tmp/x")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return write_chats(tmp_path / "rows.jsonl", 9)


@pytest.mark.parametrize("url", STORES)
def test_a_set_in_a_store_takes_its_client(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    config = rows.parent / "run.yaml"
    config.write_text(f"inputs: {rows}\ntokenizer: {TOKENIZER}\noutput: {url}\n")
    assert main(["init", str(rows), "-t", TOKENIZER, "-o", url, "-f", "-"]) == 0
    assert f"\noutput: {url}\n" in capsys.readouterr().out
    extra = {"s3": "s3", "gs": "gcs"}.get(url.partition(":")[0], "azure")
    for command in (["prepare", str(rows), "-t", TOKENIZER, "-o", url], ["prepare", str(config)]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is not installed. Fix: pip install 'sftdata[{extra}]'" in line
    assert not list(Path.cwd().iterdir()), "something was written"


@pytest.mark.parametrize(("url", "said"), [
    ("s3://bucket", "a bucket; expected a folder in one. Fix: -o s3://bucket/set"),
    ("s3://me:secret@bucket/set", "-o s3://bucket/set: came with a login or a query. Fix: leave it out"),
    ("s3://bucket/set?sig=secret", "-o s3://bucket/set: came with a login or a query. Fix: leave it out"),
    ("s3://", "no bucket; expected a folder in one. Fix: -o s3://BUCKET/set"),
    ("s3://bucket/a/../b", "-o s3://bucket/a/../b: names no folder. Fix: leave out what is empty, `.`, `..` and"),
    ("s3://bucket/a\tb", "b: names no folder. Fix: leave out what is empty, `.`, `..` and what is not printed."),
])  # fmt: skip
def test_a_set_needs_a_place_in_its_bucket(
    rows: Path, capsys: pytest.CaptureFixture[str], url: str, said: str
) -> None:
    assert main(["prepare", str(rows), "-t", TOKENIZER, "-o", url]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "secret" not in told


def refused(rows: Path, url: str, said: str) -> None:
    scheme = url.partition(":")[0]
    line = said.splitlines()[-1]
    assert len(said.splitlines()) == 1, said
    assert f"is the URL of {scheme}; outputs are written to local paths only. Fix: " in line
    assert not list(Path.cwd().iterdir()), "something was written"


@pytest.mark.parametrize("url", URLS)
def test_a_set_is_not_written_to_a_url(rows: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert main(["prepare", str(rows), "-t", TOKENIZER, "-o", url]) == 2
    refused(rows, url, capsys.readouterr().err)
    with pytest.raises(UsageError, match="is the URL of"):
        sftdata.prepare(rows, tokenizer=TOKENIZER, output=url)
    Path(rows.parent / "run.yaml").write_text(f"inputs: {rows}\ntokenizer: {TOKENIZER}\noutput: {url}\n")
    assert main(["prepare", str(rows.parent / "run.yaml")]) == 2
    refused(rows, url, capsys.readouterr().err)


COMMANDS: dict[str, Callable[[Path, Path, str], list[str]]] = {
    "init": lambda rows, folder, url: ["init", str(rows), "-t", TOKENIZER, "-f", url],
    "stats --html": lambda rows, folder, url: ["stats", str(folder), "--html", url],
    "inspect --html": lambda rows, folder, url: ["inspect", str(folder), "--html", url],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_other_output_is_written_to_a_url(
    rows: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    prepare(rows, rows.parent / "set")
    capsys.readouterr()
    assert main(COMMANDS[name](rows, rows.parent / "set", STORES[0])) == 2
    refused(rows, STORES[0], capsys.readouterr().err)


def test_the_trainer_writes_to_no_url_either(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sfttrain.cli import main as trainer

    for command in (
        ["run", "set", "--model", "m", "-o", STORES[0]],
        ["config", "set", "--model", "m", "-o", STORES[0]],
        ["merge", "adapter", "-o", STORES[0]],
        ["export", "model", "-o", STORES[0], "--set", "set"],
    ):
        assert trainer(command) == 2
        assert (
            "is the URL of s3; outputs are written to local paths only. Fix: "
            in capsys.readouterr().err.splitlines()[-1]
        )
        assert not list(Path.cwd().iterdir()), "something was written"


@pytest.mark.parametrize("name", ["sets/x", "/tmp/x", "x:y", "C:/x", "a b", "ü", "~/x", "../x"])
def test_paths_stay_what_they_are(name: str) -> None:
    assert local_output(name) == Path(name)


def test_an_output_that_no_manifest_can_name_is_refused_at_once(rows: Path) -> None:
    with pytest.raises(UsageError, match=r'output="od\\\\xff/set": the name is not UTF-8. Fix: '):
        local_output("od\udcff/set")


def test_names_are_written_down_as_text() -> None:
    assert written("sur\udcff") == "sur\\xff"
    assert written("ü") == "ü"


def test_links_lead_to_what_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "second").symlink_to("link")
    assert behind_links(tmp_path / "second") == (tmp_path / "real").resolve()
    assert behind_links(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        UsageError, match=r"dangling: a link to .*/nowhere, which is not there. Fix: mkdir -p "
    ):
        behind_links(tmp_path / "dangling")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="loop: a link that leads in a circle"):
        behind_links(tmp_path / "loop")
