"""The manifest and the opened set: sealed, strict with strangers, quick to open."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sftdata.batches import Reject
from sftdata.errors import IntegrityError, UsageError
from sftdata.set import manifest as module
from sftdata.set.ledger import encode_reject
from sftdata.set.manifest import Manifest, SourceInfo, read_manifest, seal, write_manifest
from sftdata.set.opened import open_set
from sftdata.set.shards import ShardInfo
from tests.waiting import steps

Build = Callable[..., Manifest]


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as a forger would, checksum and digest mended where the data still has the shape of a manifest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    try:
        forged = msgspec.convert(data, Manifest, str_keys=True)
        forged = msgspec.structs.replace(forged, digest=module._digest(forged))
        data = msgspec.structs.replace(forged, checksum=module._checksum(forged)).to_json()
    except msgspec.ValidationError:
        pass
    path.write_text(json.dumps(data))


# ------------------------------------------------------------------------------------------------- write and read


def test_a_manifest_reads_back_as_it_was_written(build_set: Build, tmp_path: Path) -> None:
    written = build_set([[5, 9, 20], [3, 3, 31]])
    assert read_manifest(tmp_path / "set").to_json() == written.to_json()
    text = (tmp_path / "set" / "manifest.json").read_text()
    assert text.endswith("}\n")
    assert '\n  "format_version": 2,\n' in text
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_the_same_set_made_elsewhere_or_otherwise_has_the_same_digest(build_set: Build) -> None:
    sealed = build_set([[5, 9, 20]])
    settings = sealed.settings | {
        "inputs": ["/elsewhere/x.jsonl"],
        "output": "other",
        "workers": 8,
        "engine": "tokenizers",
    }
    tokenizer = msgspec.structs.replace(sealed.tokenizer, name="/x")
    moved = msgspec.structs.replace(
        sealed, settings=settings, tokenizer=tokenizer, notes=("a note",), software={"numpy": "9"}
    )
    assert seal(moved).digest == sealed.digest
    assert seal(moved).checksum != sealed.checksum


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"max_length": 33}},
        {"chat_template_sha256": "b" * 64},
        {"sources": (SourceInfo(name="other", bytes=1, xxh3="", rows=3, first_id=0),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_content_has_another_digest(build_set: Build, change: dict[str, Any]) -> None:
    sealed = build_set([[5, 9, 20]])
    assert seal(msgspec.structs.replace(sealed, **change)).digest != sealed.digest


def test_a_manifest_that_does_not_balance_is_never_written(build_set: Build, tmp_path: Path) -> None:
    sealed = build_set([[5, 9, 20]])
    os.remove(tmp_path / "set" / "manifest.json")
    sealed.ledger.tokens_in += 1
    with pytest.raises(IntegrityError, match=r"tokens_in = .* does not hold"):
        write_manifest(tmp_path / "set", sealed)
    sealed.ledger.tokens_in -= 1
    with pytest.raises(IntegrityError, match="the ledger counts rows_packed = 2, its shards hold 0"):
        write_manifest(tmp_path / "set", msgspec.structs.replace(sealed, shards=()))
    assert not (tmp_path / "set" / "manifest.json").exists()


# ------------------------------------------------------------------------------------------------ what is no set


def test_a_folder_without_manifest_is_not_a_finished_set(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"gone: no such folder. Fix: name the folder that `sftdata prepare -o` wrote"
    ):
        read_manifest(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"not a finished set, as it has no manifest.json"):
        read_manifest(tmp_path / "empty")


def test_an_unfinished_run_is_named_with_the_way_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "set.partial").mkdir()
    for folder in (tmp_path / "set", tmp_path / "set.partial"):
        with pytest.raises(
            UsageError,
            match=r"set.partial holds an unfinished run. Fix: repeat the command that began it",
        ):
            read_manifest(folder)


def test_a_newer_format_is_refused_before_anything_else_is_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 7, "unheard": []}')
    with pytest.raises(UsageError, match="format version 7; this sftdata reads versions 1 to 3"):
        read_manifest(tmp_path)


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "parent": lambda data: data["shards"][0].update(name="../shard-00000.arrow"),
    "absolute": lambda data: data["shards"][0].update(name="/etc/passwd"),
    "subfolder": lambda data: data["shards"][0].update(name="x/shard-00000.arrow"),
    "nul": lambda data: data["shards"][0].update(name="shard-00000.arrow\x00"),
    "newline": lambda data: data["shards"][0].update(name="shard-00000.arrow\n"),
    "backslash": lambda data: data["shards"][0].update(name="..\\shard-00000.arrow"),
    "empty name": lambda data: data["shards"][0].update(name=""),
    "device": lambda data: data["shards"][0].update(name="/dev/zero"),
    "file parent": lambda data: data["files"][0].update(name="tokenizer/../../x"),
    "file dot": lambda data: data["files"][0].update(name="./rejects.jsonl"),
    "file hidden": lambda data: data["files"][0].update(name=".ssh/id"),
    "file home": lambda data: data["files"][0].update(name="~/x"),
    "file nul": lambda data: data["files"][0].update(name="a\x00b"),
    "file long": lambda data: data["files"][0].update(name="a" * 5000),
    "negative rows": lambda data: data["shards"][0].update(rows=-1),
    "negative bytes": lambda data: data["shards"][0].update(bytes=-1),
    "huge rows": lambda data: data["shards"][0].update(rows=2**60),
    "float rows": lambda data: data["shards"][0].update(rows=1.5),
    "other rows": lambda data: data["shards"][0].update(rows=data["shards"][0]["rows"] + 1),
    "huge length": lambda data: data["ledger"].update(max_length=2**40),
    "zero length": lambda data: data["ledger"].update(max_length=0),
    "negative count": lambda data: data["ledger"].update(rows_in=-4),
    "negative reject": lambda data: data["ledger"].update(rows_rejected={"x": -1}),
    "leak": lambda data: data["ledger"].update(rows_in=999),
    "negative first id": lambda data: data["sources"][0].update(first_id=-1),
    "hash": lambda data: data["shards"][0].update(xxh3="Z" * 32),
    "twice": lambda data: data["files"].append(data["files"][0]),
    "unknown key": lambda data: data.update(exec="rm"),
    "missing key": lambda data: data.pop("tokenizer"),
    "text version": lambda data: data.update(format_version="1"),
    "vocabulary": lambda data: data["tokenizer"].update(vocab_size=2**40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(build_set: Build, tmp_path: Path, name: str) -> None:
    build_set([[5, 9, 20]])
    rewritten(tmp_path / "set", HOSTILE[name])
    with pytest.raises(IntegrityError) as caught:
        open_set(tmp_path / "set")
    assert str(tmp_path / "set" / "manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format_version":1}', b"NaN"]
)
def test_what_is_not_a_manifest_is_refused_in_one_line(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(IntegrityError, match="not a manifest") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_single_changed_character_is_noticed(build_set: Build, tmp_path: Path) -> None:
    build_set([[5, 9, 20]])
    path = tmp_path / "set" / "manifest.json"
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    content = json.loads(raw)
    for position in rng.permutation(len(raw))[:300].tolist():
        changed = bytearray(raw)
        changed[position] ^= 1 << rng.integers(7)
        path.write_bytes(changed)
        try:
            if json.loads(bytes(changed)) == content:
                continue  # a blank became another blank
        except ValueError:
            pass
        with pytest.raises((IntegrityError, UsageError)):
            read_manifest(tmp_path / "set")


# --------------------------------------------------------------------------------------------------- the opened set


@pytest.mark.parametrize(("strategy", "max_length"), [("bfd", 32), ("wrapped", 32), ("none", 32)])
def test_rows_are_a_sequence_over_all_shards(
    build_set: Build, tmp_path: Path, strategy: str, max_length: int
) -> None:
    manifest = build_set([[5, 9, 20, 31, 7], [3, 3, 31]], max_length, strategy)
    opened = open_set(tmp_path / "set")
    assert len(opened) == manifest.ledger.rows_packed == len(list(opened))
    assert opened[-1].input_ids.tolist() == opened[len(opened) - 1].input_ids.tolist()
    assert [row.examples.tolist() for row in opened[1:3]] == [
        opened[1].examples.tolist(),
        opened[2].examples.tolist(),
    ]
    with pytest.raises(IndexError):
        opened[len(opened)]
    documents = [document for row in opened for document in row.documents()]
    assert len(documents) == manifest.ledger.documents
    assert sum(len(document.input_ids) for document in documents) == manifest.ledger.tokens
    assert {document.example_id for document in documents} == set(range(8))
    assert all(len(row.input_ids) == row.seq_lengths.sum() for row in opened)
    assert sum(len(batch) for batch in opened.batches()) == len(opened)


def test_a_document_is_the_stretch_that_its_length_says(build_set: Build, tmp_path: Path) -> None:
    build_set([[5, 9, 3]], max_length=32)
    row = open_set(tmp_path / "set")[0]
    first, second, third = row.documents()
    assert (first.example_id, second.example_id, third.example_id) == (0, 1, 2)
    assert second.input_ids.tolist() == row.input_ids[5:14].tolist()
    assert second.labels.tolist() == row.labels[5:14].tolist()


def test_an_example_is_traced_to_its_file_and_line(build_set: Build, tmp_path: Path) -> None:
    build_set([[5, 9, 20], [], [3, 3]])
    opened = open_set(tmp_path / "set")
    assert opened.origin(0) == ("part-0.jsonl", 1)
    assert opened.origin(2) == ("part-0.jsonl", 3)
    assert opened.origin(3) == ("part-2.jsonl", 1)
    for unknown in (-1, 5):
        with pytest.raises(KeyError, match=f"no source of .* holds example {unknown}"):
            opened.origin(unknown)


def test_arrow_and_polars_see_the_same_rows(build_set: Build, tmp_path: Path) -> None:
    build_set([[5, 9, 20, 31, 7], [3, 3, 31]])
    opened = open_set(tmp_path / "set")
    ids = [row.input_ids.tolist() for row in opened]
    assert opened.arrow()["input_ids"].to_pylist() == ids
    assert opened.polars()["input_ids"].to_list() == ids


def test_a_set_travels_to_another_process_without_its_maps(build_set: Build, tmp_path: Path) -> None:
    build_set([[31] * 500])
    opened = open_set(tmp_path / "set")
    opened[0]
    raw = pickle.dumps(opened)
    assert len(raw) < 20_000
    assert pickle.loads(raw)[7].input_ids.tolist() == opened[7].input_ids.tolist()
    assert repr(opened).startswith("<ShardSet ")


def test_opening_a_thousand_shards_touches_none_and_takes_few_steps(build_set: Build, tmp_path: Path) -> None:
    sealed = build_set([[31] * 10])
    one, ledger = sealed.shards[0], sealed.ledger
    for name in ("rows_in", "rows_kept", "rows_packed", "documents"):
        setattr(ledger, name, getattr(ledger, name) * 1000)
    for name in ("tokens_in", "tokens_trained", "tokens_context", "tokens_padding"):
        setattr(ledger, name, getattr(ledger, name) * 1000)
    shards: list[ShardInfo] = [msgspec.structs.replace(one, name=f"shard-{i:05d}.arrow") for i in range(1000)]
    sources = (msgspec.structs.replace(sealed.sources[0], rows=ledger.rows_in),)
    index, *others = sealed.files
    files = (*(msgspec.structs.replace(index, name=f"index-{i:05d}.arrow") for i in range(1000)), *others)
    many = msgspec.structs.replace(sealed, shards=tuple(shards), files=files, sources=sources)
    write_manifest(tmp_path / "set", many)
    (tmp_path / "set" / "shard-00000.arrow").unlink()
    assert len(open_set(tmp_path / "set")) == 10_000
    assert steps(lambda: open_set(tmp_path / "set")) < 30_000  # with an index beside each


def test_a_shard_that_is_missing_cut_or_linked_is_refused_when_it_is_read(
    build_set: Build, tmp_path: Path
) -> None:
    build_set([[31] * 10])
    path = tmp_path / "set" / "shard-00000.arrow"
    shutil.copy(path, tmp_path / "kept")
    os.truncate(path, 100)
    with pytest.raises(IntegrityError, match="100 bytes; the manifest says"):
        open_set(tmp_path / "set")[0]
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        open_set(tmp_path / "set")[0]
    path.symlink_to(tmp_path / "kept")
    with pytest.raises(IntegrityError, match="reached through a link"):
        open_set(tmp_path / "set")[0]


def test_a_set_behind_a_linked_folder_opens(build_set: Build, tmp_path: Path) -> None:
    build_set([[31] * 10])
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert len(open_set(tmp_path / "link")[0].input_ids) == 32


# -------------------------------------------------------------------------------------------------------- rejects


def reject(row: object) -> Reject:
    return Reject(
        file="a.jsonl", line=3, record=2, byte_offset=90, code="bad-role", reason="r", fix="f", row=row
    )


def test_rejects_are_json_lines() -> None:
    raw = encode_reject(reject({"b": 1, "a": "é"})) + encode_reject(reject("not json {"))
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [line["row"] for line in lines] == [{"b": 1, "a": "é"}, "not json {"]
    assert list(lines[0]) == ["file", "line", "record", "byte_offset", "code", "reason", "fix", "row"]


@pytest.mark.parametrize("row", ["half \ud800 pair", {"x": "\udfff"}, 10**40, -1e300, {"deep": [[[{}]]]}])
def test_any_row_can_be_rejected(row: object) -> None:
    line = encode_reject(reject(row))
    assert line.count(b"\n") == 1
    assert json.loads(line)["row"] == row
