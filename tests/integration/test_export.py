"""Exports: after the other trainer's own reading, the labels are those of the set."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import sftdata
from sftdata import cli
from sftdata.set import export as exports
from sftdata.set.manifest import partial_folder
from tests.exported import files_of, json_of, trained_documents
from tests.train_sets import make_set

EXAMPLES = Path(__file__).parents[2] / "examples"
INPUTS = [EXAMPLES / name for name in ("conversations.jsonl", "instructions.json", "text.txt")]

SETS: dict[str, dict[str, Any]] = {
    "packed": {"max_length": 128},
    "split": {"max_length": 24, "overlong": "split"},
    "wrapped": {"max_length": 40, "packing": "wrapped"},
    "whole": {"max_length": 512, "packing": "none"},
}


@pytest.fixture(scope="module", params=SETS)
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / request.param
    sftdata.prepare(INPUTS, tokenizer=EXAMPLES / "tokenizer", output=folder, **SETS[request.param])
    return folder


@pytest.mark.slow
def test_datasets_loads_what_axolotl_and_llama_factory_read(shards: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    sftdata.export(shards, to="datasets", output=tmp_path / "out")
    dataset = load_from_disk(str(tmp_path / "out"))
    assert [(row["input_ids"], row["labels"]) for row in dataset] == trained_documents(shards)
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in dataset)
    assert set(dataset.column_names) == {"input_ids", "attention_mask", "labels"}
    lengths = sorted({len(row["labels"]) for row in dataset})
    kept = dataset.filter(lambda row: len(row["labels"]) > lengths[0])
    assert 0 < len(kept) < len(dataset), "datasets can go on with it"


def test_token_rows_hold_a_mask_of_zeros_and_ones(shards: Path, tmp_path: Path) -> None:
    sftdata.export(shards, to="token-rows", output=tmp_path / "out")
    rows = [
        row
        for path in files_of(tmp_path / "out", "rows-*.parquet")
        for row in parquet.read_table(path).to_pylist()
    ]
    assert [
        (row["input_ids"], [int(label != -100) for label in labels])
        for row, (_, labels) in zip(rows, trained_documents(shards), strict=True)
    ] == [(row["input_ids"], row["loss_mask"]) for row in rows]
    assert all(row["loss_mask"][0] == 0 and any(row["loss_mask"]) for row in rows)


def test_a_datum_predicts_each_trained_token_from_the_one_before(shards: Path, tmp_path: Path) -> None:
    made = sftdata.export(shards, to="tinker", output=tmp_path / "out")
    lines = b"".join(path.read_bytes() for path in files_of(tmp_path / "out", "datums-*.jsonl")).splitlines()
    datums = [json.loads(line) for line in lines]
    for datum, (ids, labels) in zip(datums, trained_documents(shards), strict=True):
        assert datum["input_tokens"] == ids[:-1]
        assert datum["target_tokens"] == ids[1:]
        assert datum["weights"] == [float(label != -100) for label in labels[1:]]
    assert sum(sum(datum["weights"]) for datum in datums) == made.tokens_trained


def test_a_large_set_becomes_several_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "set", rows=40, shards=5)
    monkeypatch.setattr(exports, "FILE_TOKENS", 48 * 12)
    sftdata.export(tmp_path / "set", to="token-rows", output=tmp_path / "out")
    files = files_of(tmp_path / "out", "rows-*.parquet")
    rows = [row["input_ids"] for path in files for row in parquet.read_table(path).to_pylist()]
    assert len(files) == 3
    assert rows == [ids for ids, _ in trained_documents(tmp_path / "set")]


def collated(row: dict[str, Any], eos: int | None) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Read a row of packed Parquet as Megatron-Bridge's collator documents it.

    Of each sequence the tokens are all but the last, the labels all but the first, and the mask is taken at the
    token's place; where the token is EOS there is no loss. Yields tokens, and (position, label) with loss.
    """
    bounds = [*row["seq_start_id"], len(row["input_ids"])]
    for start, stop in itertools.pairwise(bounds):
        tokens, labels = row["input_ids"][start : stop - 1], row["input_ids"][start + 1 : stop]
        mask = row["loss_mask"][start : stop - 1]
        yield (
            tokens,
            [
                (place, label)
                for place, (token, label, on) in enumerate(zip(tokens, labels, mask, strict=True))
                if on and token != eos
            ],
        )


def test_megatron_bridge_takes_the_loss_on_the_same_tokens(shards: Path, tmp_path: Path) -> None:
    made = sftdata.export(shards, to="megatron-bridge", output=tmp_path / "out")
    opened = sftdata.open(shards)
    eos, lost = opened.manifest.tokenizer.eos_id, 0
    rows = [
        row
        for path in files_of(tmp_path / "out", "rows-*.idx.parquet")
        for row in parquet.read_table(path).to_pylist()
    ]
    assert len(rows) == len(opened)
    for row, packed in zip(rows, opened, strict=True):
        documents = list(packed.documents())
        assert row["input_ids"] == np.concatenate([each.input_ids for each in documents]).tolist()
        for (tokens, losses), document in zip(collated(row, eos), documents, strict=True):
            ids, labels = document.input_ids.tolist(), document.labels.tolist()
            assert tokens == ids[:-1]
            wanted = [(at - 1, label) for at, label in enumerate(labels) if label != -100]
            lost += sum(ids[place] == eos for place, _ in wanted)
            assert losses == [(place, label) for place, label in wanted if ids[place] != eos]
    assert made.unmarked == lost
    schema = parquet.read_schema(next((tmp_path / "out").glob("*.parquet")))
    assert [str(schema.field(name).type.value_type) for name in ("input_ids", "loss_mask", "seq_start_id")] == [
        "int32", "int8", "int32",
    ]  # fmt: skip


def test_what_a_reader_will_not_train_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A text with its end in the middle, all of it trained: Megatron-Bridge takes no loss after an EOS."""
    source = tmp_path / "rows.jsonl"
    row = {"input_ids": [7, 8, 1, 9, 10, 2], "labels": [7, 8, 1, 9, 10, 2]}
    source.write_text(json.dumps(row) + "\n", encoding="utf-8")
    sftdata.prepare(source, tokenizer=EXAMPLES / "tokenizer", output=tmp_path / "set", max_length=16)
    eos = sftdata.open(tmp_path / "set").manifest.tokenizer.eos_id
    again = {name: [eos if token == 1 else token for token in values] for name, values in row.items()}
    source.write_text(json.dumps(again) + "\n", encoding="utf-8")
    sftdata.prepare(
        source, tokenizer=EXAMPLES / "tokenizer", output=tmp_path / "set", max_length=16, overwrite=True
    )
    capsys.readouterr()
    assert (
        cli.main(["export", str(tmp_path / "set"), "--to", "megatron-bridge", "-o", str(tmp_path / "out")])
        == 0
    )
    said = capsys.readouterr()
    assert "1 row, 6 tokens, 5 of them trained" in said.out
    assert "1 trained token after an EOS: megatron-bridge takes no loss there." in said.err


def test_counts_add_up_and_stretches_without_a_trained_token_are_counted(
    shards: Path, tmp_path: Path
) -> None:
    opened = sftdata.open(shards)
    pieces = [document for row in opened for document in row.documents()]
    untrained = sum(int((piece.labels == -100).all()) for piece in pieces)
    made = sftdata.export(shards, to="token-rows", output=tmp_path / "out")
    assert made.tokens_trained == opened.manifest.ledger.tokens_trained
    assert (made.rows, made.left_out) == (len(pieces) - untrained, untrained)
    assert made.digest == opened.manifest.digest
    assert json_of(tmp_path / "out") == made.to_json()
    if shards.name == "wrapped":
        assert untrained > 0


def test_weights_go_where_they_can_be_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.jsonl"
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two.", "weight": 0.5},
        {"role": "user", "content": "Three?"}, {"role": "assistant", "content": "Four."},
    ]  # fmt: skip
    source.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    sftdata.prepare(
        source, tokenizer=EXAMPLES / "tokenizer", output=tmp_path / "set", max_length=64, loss_weights=True
    )
    command = ["export", str(tmp_path / "set"), "-o", str(tmp_path / "out"), "--to"]
    assert cli.main([*command, "token-rows"]) == 2
    assert "Fix: --to tinker, or prepare it without --loss-weights." in capsys.readouterr().err
    assert cli.main([*command, "tinker"]) == 0
    datum = json.loads((tmp_path / "out" / "datums-00000.jsonl").read_text(encoding="utf-8"))
    row = next(iter(sftdata.open(tmp_path / "set")))
    weights = row.loss_weights
    assert weights is not None
    assert datum["weights"] == weights[1 : len(datum["weights"]) + 1].tolist()
    assert {0.5, 1.0} <= set(datum["weights"])
    messages[1]["weight"] = 1
    source.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    sftdata.prepare(source, tokenizer=EXAMPLES / "tokenizer", output=tmp_path / "plain", max_length=64)
    assert (
        cli.main(["export", str(tmp_path / "plain"), "-o", str(tmp_path / "rows"), "--to", "token-rows"]) == 0
    )


def test_a_view_is_exported_like_any_set(shards: Path, tmp_path: Path) -> None:
    sftdata.view(shards, output=tmp_path / "view", sources=["conversations.jsonl"], max_length=64, packing="bfd",
                 overlong="truncate")  # fmt: skip
    sftdata.export(tmp_path / "view", to="token-rows", output=tmp_path / "out")
    rows = [
        row["input_ids"]
        for path in files_of(tmp_path / "out", "rows-*.parquet")
        for row in parquet.read_table(path).to_pylist()
    ]
    assert rows == [ids for ids, _ in trained_documents(tmp_path / "view")]


@pytest.mark.parametrize("of", ["set", "view"])
def test_a_set_of_other_bytes_is_not_exported(
    of: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sftdata.prepare(INPUTS, tokenizer=EXAMPLES / "tokenizer", output=tmp_path / "set", max_length=128)
    sftdata.view(tmp_path / "set", output=tmp_path / "view", max_length=64)
    shard = tmp_path / "set" / "shard-00000.arrow"
    held = bytearray(shard.read_bytes())
    ids = np.array(sftdata.open(tmp_path / "set")[3].input_ids, np.int32).tobytes()
    held[held.index(ids)] ^= 1  # another token, which breaks no law of rows
    shard.write_bytes(held)
    assert cli.main(["export", str(tmp_path / of), "--to", "tinker", "-o", str(tmp_path / "out")]) == 4
    assert f"{shard}: xxh3-128 is" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "view"]


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x", encoding="utf-8")
    for to, output, said in (
        (
            "nemo",
            tmp_path / "out",
            "Fix: choose one of datasets, token-rows, verl, nemo-rl, tinker, megatron-bridge.",
        ),
        ("tinker", taken, "exists and is not empty. Fix: choose another -o."),
        ("tinker", shards / "new" / "out", f"lies in the set {shards.resolve()}. Fix: choose another -o."),
        ("tinker", "s3://bucket/out", "outputs are written to local paths only."),
    ):
        assert cli.main(["export", str(shards), "--to", to, "-o", str(output)]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    assert cli.main(["export", str(shards), "--to", "tinker", "-o", str(tmp_path / "out")]) == 0


def test_an_export_that_was_broken_off_is_no_export_and_does_not_stand_in_the_way(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, parts: object) -> None:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(exports._FILES, "tinker", fails)
        with pytest.raises(KeyboardInterrupt):
            sftdata.export(shards, to="tinker", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    sftdata.export(shards, to="tinker", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert files_of(tmp_path / "out", "datums-*")


def test_two_exports_at_once_do_not_write_into_each_other(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(shards), "--to", "tinker", "-o", str(tmp_path / "out")]
    codes, write = [], exports._FILES["tinker"]

    def writes(path: Path, parts: Any) -> None:
        codes.append(cli.main(command))
        write(path, parts)

    monkeypatch.setitem(exports._FILES, "tinker", writes)
    assert cli.main(command) == 0
    assert codes == [2]
    error = capsys.readouterr().err
    assert "another command is writing this export. Fix: wait for it, or choose another -o." in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert cli.main([*command[:-1], str(tmp_path / "other")]) == 0  # another -o


def test_labels_of_first_tokens_of_format_version_1_are_in_no_export(tmp_path: Path) -> None:
    old = Path(__file__).parents[1] / "sets" / "version-1-none"
    pieces = [document for row in sftdata.open(old) for document in row.documents()]
    first = sum(int(piece.labels[0] != -100) for piece in pieces)
    assert first > 0
    wanted = [(piece.labels[1:] != -100).astype(float).tolist() for piece in pieces]
    made = sftdata.export(old, to="tinker", output=tmp_path / "out")
    lines = b"".join(path.read_bytes() for path in files_of(tmp_path / "out", "datums-*.jsonl")).splitlines()
    datums = [json.loads(line)["weights"] for line in lines]
    assert datums == [weights for weights in wanted if any(weights)]
    assert (
        made.tokens_trained
        == sum(map(sum, datums))
        == sftdata.open(old).manifest.ledger.tokens_trained - first
    )
    rows = sftdata.export(old, to="token-rows", output=tmp_path / "rows")
    assert rows.tokens_trained == made.tokens_trained


def test_an_export_leaves_an_unfinished_set_of_its_name_alone(shards: Path, tmp_path: Path) -> None:
    begun = partial_folder(tmp_path / "out")
    shutil.copytree(shards, begun)
    sftdata.export(shards, to="tinker", output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    assert {path.name for path in begun.iterdir()} == {path.name for path in shards.iterdir()}
