"""Outputs through links, names that are not UTF-8, absolute paths, and rows of nothing but padding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sftdata
from sftdata.cli import main
from sftdata.errors import UsageError
from sftdata.set.manifest import read_manifest
from sftdata.set.verify import verify
from tests.torture.runs import TOKENIZER, content, prepare, write_chats

pytestmark = pytest.mark.slow


@pytest.fixture
def data(place: Path) -> Path:
    return write_chats(place / "rows.jsonl", 30)


@pytest.mark.parametrize("inside", [False, True], ids=["beside", "elsewhere"])
def test_a_set_goes_where_a_link_leads_and_the_link_stays(data: Path, place: Path, inside: bool) -> None:
    wanted = prepare(data, place / "plain" / "set").digest
    real = place / "disk" / "out" if inside else place / "real"
    real.mkdir(parents=True)
    link = place / "link"
    link.symlink_to(real)
    beside = sorted(os.listdir(place))
    assert prepare(data, link).digest == wanted
    assert prepare(data, link).digest == wanted
    for max_length in (32, 64, 32):
        prepare(data, link, overwrite=True, max_length=max_length)
        assert read_manifest(real).max_length == read_manifest(link).max_length == max_length
    assert link.is_symlink()
    assert sorted(os.listdir(place)) == beside
    assert not verify(link).problems
    assert os.listdir(real.parent) == ["out"] if inside else True


def test_what_an_older_version_left_beside_a_link_is_no_obstacle(data: Path, place: Path) -> None:
    prepare(data, place / "set")
    (place / "set.partial.replaced").symlink_to(place / "set")
    prepare(data, place / "set", overwrite=True, max_length=32)
    assert sorted(os.listdir(place)) == ["rows.jsonl", "set"]
    prepare(data, place / "set", overwrite=True)
    assert sorted(os.listdir(place)) == ["rows.jsonl", "set"]


@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "loop"])
def test_a_link_that_leads_nowhere_is_refused_before_anything_is_read(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (place / "link").symlink_to(place / target)
    monkeypatch.setattr("sftdata.run.make_plan", lambda *_: pytest.fail("the input was read"))
    with pytest.raises(UsageError, match="link: a link "):
        prepare(data, place / "link")


def test_files_whose_names_are_not_utf8_are_read_like_any_other(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = place / "data"
    folder.mkdir()
    write_chats(folder / "rows.jsonl", 30)
    rows = [
        json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines() if '"bot"' not in line
    ]
    odd = os.fsencode(folder) + b"/sur\xff."
    for number, kind in enumerate((b"jsonl", b"csv", b"json")):
        with open(odd + kind, "w") as file:
            file.write(
                "prompt,completion\na,b\n"
                if number == 1
                else json.dumps(rows)
                if number == 2
                else json.dumps(rows[0])
            )
    with open(odd + b"parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    with (
        pa.OSFile(str(folder / "x"), "wb") as sink,
        pa.ipc.new_file(sink, (table := pa.Table.from_pylist(rows)).schema) as writer,
    ):
        writer.write_table(table)
    os.rename(folder / "x", odd + b"arrow")
    made = prepare(folder, place / "set")
    names = [source.name for source in made.sources]
    assert names == [
        "rows.jsonl",
        *(f"sur\\xff.{kind}" for kind in ("arrow", "csv", "json", "jsonl", "parquet")),
    ]
    assert not verify(place / "set").problems
    assert sftdata.open(place / "set").view(0)
    commands = [
        ["detect", str(folder)],
        ["detect", str(folder), "--json"],
        ["preview", str(folder), "-t", TOKENIZER],
    ]
    commands += [[name, str(place / "set")] for name in ("stats", "audit", "inspect", "verify")]
    commands.append(
        ["prepare", os.fsdecode(odd + b"jsonl"), "-t", TOKENIZER, "-o", str(place / "one"), "--workers", "2"]
    )
    for command in commands:
        assert main(command) == 0, command
    assert "sur" in "".join(capfd.readouterr())


def test_a_tokenizer_or_output_whose_name_is_not_utf8_is_refused_at_once(
    data: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(os.fsencode(place) + b"/tok\xff")
    for more in (["-t", odd, "-o", str(place / "set")], ["-t", TOKENIZER, "-o", odd]):
        assert main(["prepare", str(data), *more]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1, said
        assert "tok\\xff: the name is not UTF-8. Fix: " in said
    assert os.listdir(place) == ["rows.jsonl"]


def test_a_set_tells_nothing_of_the_folders_of_the_machine(data: Path, place: Path) -> None:
    made = prepare(data, place / "set")
    for name, raw in content(place / "set").items():
        assert str(place).encode() not in raw, name
        assert os.path.dirname(TOKENIZER).encode() not in raw, name
    assert made.settings["inputs"] == ["rows.jsonl"]
    assert made.tokenizer.name == "tokenizer"


def test_rows_that_are_mostly_padding_are_said_to_be(
    data: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "prepare",
        str(data),
        "-t",
        TOKENIZER,
        "-o",
        str(place / "set"),
        "--max-rejects",
        "50%",
        "--max-length",
    ]
    assert main([*command, str(1 << 24)]) == 0
    assert "0.1 GB of rows that are padding for the most part" in capsys.readouterr().err
