"""Rows and tokenizers given as Python objects: the same set as from files, found up to date, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

import sftdata
from sftdata.errors import UsageError
from tests.waiting import HANGS

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = EXAMPLES / "tokenizer"
Row = dict[str, Any]


def _lines(path: str) -> list[Row]:
    return [json.loads(line) for line in (EXAMPLES / path).read_text("utf-8").splitlines() if line]


FORMATS: dict[str, list[Row]] = {
    "conversations": _lines("conversations.jsonl"),
    "completions": _lines("completions.jsonl"),
    "instructions": json.loads((EXAMPLES / "instructions.json").read_text("utf-8")),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that a test sees all that is left in it."""
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _columns(rows: list[Row]) -> Row:
    return {name: [row.get(name) for row in rows] for name in {name: None for row in rows for name in row}}


def _mapped(rows: list[Row], folder: Path) -> datasets.Dataset:
    datasets.Dataset.from_dict(_columns(rows)).save_to_disk(folder / "saved", num_shards=2)
    return datasets.load_from_disk(folder / "saved")


def _filtered(rows: list[Row], folder: Path) -> datasets.Dataset:
    """Rows in order, of a dataset that holds each of them twice, by indices."""
    twice = _mapped([row for row in rows for _ in range(2)], folder)
    return twice.select(range(0, 2 * len(rows), 2))


def _generator(rows: list[Row], _: Path) -> Iterator[Row]:
    yield from rows


KINDS: dict[str, Callable[[list[Row], Path], Any]] = {
    "list": lambda rows, _: rows,
    "generator": _generator,
    "dataset": lambda rows, _: datasets.Dataset.from_dict(_columns(rows)),
    "mapped dataset": _mapped,
    "chosen rows": _filtered,
    "streamed dataset": lambda rows, _: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "arrow": lambda rows, _: pa.table(_columns(rows)),
    "polars": lambda rows, _: pl.DataFrame(rows, infer_schema_length=None),
    "pandas": lambda rows, _: pd.DataFrame(_columns(rows), index=range(5, 5 + len(rows))),
}


def _set(inputs: Any, output: Path, **settings: Any) -> Any:
    return sftdata.prepare(
        inputs, output=output, **({"tokenizer": TOKENIZER, "max_length": 256, "workers": 1} | settings)
    )


def _content(folder: Path) -> list[list[list[int]]]:
    """Return ids, labels and borders of every row."""
    return [
        [np.asarray(getattr(row, name)).tolist() for name in ("input_ids", "labels", "seq_lengths")]
        for row in sftdata.open(folder)
    ]


@pytest.mark.feature("rows as Python objects")
@pytest.mark.parametrize("form", FORMATS)
def test_rows_give_the_ids_and_labels_that_they_give_from_a_file(form: str, tmp_path: Path) -> None:
    rows = FORMATS[form]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    ledger = _set(tmp_path / "rows.jsonl", tmp_path / "file").ledger
    wanted = _content(tmp_path / "file")
    for kind, make in KINDS.items():
        (tmp_path / kind).mkdir()
        made = _set(make(rows, tmp_path / kind), tmp_path / kind / "set")
        assert _content(tmp_path / kind / "set") == wanted, kind
        assert made.ledger.to_json() | {"sources": None} == ledger.to_json() | {"sources": None}, kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_are_up_to_date_and_others_are_not(kind: str, tmp_path: Path) -> None:
    rows, notes = FORMATS["completions"], list[str]()
    folders = [tmp_path / name for name in "abc"]
    for folder, given in zip(folders, (rows, rows, rows[:-1]), strict=True):
        folder.mkdir()
        _set(KINDS[kind](given, folder), tmp_path / "set", on_note=notes.append)
        notes.append("===")
    first, second, third = "\n".join(notes).split("===")[:3]
    assert "up to date" not in first
    assert "up to date" in second
    assert "the inputs changed" in third


def test_the_file_that_rows_go_through_is_named_without_its_folders(tmp_path: Path) -> None:
    notes: list[str] = []
    _set(FORMATS["completions"], tmp_path / "set", on_note=notes.append)
    assert any(note.startswith("rows.jsonl: ") for note in notes)
    seen = sftdata.preview(FORMATS["completions"], tokenizer=TOKENIZER, max_length=256)
    assert any(note.startswith("rows.jsonl: ") for note in seen.notes)
    assert {example.file for example in seen.examples} == {"rows.jsonl"}
    with pytest.raises(UsageError, match=r"^rows\.jsonl: "):
        _set([{"a": 1}], tmp_path / "none")
    with pytest.raises(UsageError, match=r'^rows: split="test"'):
        _set(FORMATS["completions"], tmp_path / "none", split="test")


def test_nothing_of_the_rows_stays_in_the_cache(cache: Path, tmp_path: Path) -> None:
    left = cache / "rows" / f"{os.uname().nodename}~999999999~killed"
    left.mkdir(parents=True)
    other = cache / "rows" / "another-machine~1~x"
    other.mkdir()
    _set(FORMATS["completions"], tmp_path / "set")
    with pytest.raises(sftdata.DataError):
        _set([{"text": "a"}] * 3, tmp_path / "none", max_length=1, overlong="drop")
    assert list((cache / "rows").iterdir()) == [other]


def test_a_mapped_dataset_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sftdata import objects

    def refuse(*_: object) -> None:
        raise AssertionError("rows were written")

    whole = _mapped(FORMATS["completions"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(objects, "_write_arrow", refuse)
        _set(whole, tmp_path / "set")
        _set(datasets.concatenate_datasets([whole, whole]), tmp_path / "twice")
    assert len(_content(tmp_path / "twice")) >= len(_content(tmp_path / "set"))


ROWS = [{"prompt": f"Say {n}.", "completion": f" {n}"} for n in range(30)]
CHANGES: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "cut": lambda rows: rows.select(range(5, 20)),
    "shuffled": lambda rows: rows.shuffle(seed=1),
    "renamed": lambda rows: rows.rename_columns({"prompt": "completion", "completion": "prompt"}),
    "replaced": lambda rows: rows.remove_columns("completion").add_column("completion", [" no"] * 30),
    "in part": lambda rows: datasets.concatenate_datasets([rows.select(range(3)), rows]),
    "filtered": lambda rows: rows.filter(lambda row: "7" in row["prompt"]),
    "mapped": lambda rows: rows.map(lambda row: {"completion": row["completion"] + "!"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_a_dataset_since_it_was_mapped_is_in_the_set(change: str, tmp_path: Path) -> None:
    given = CHANGES[change](_mapped(ROWS, tmp_path))
    _set(given, tmp_path / "set", packing="none")
    _set([dict(row) for row in given], tmp_path / "wanted", packing="none")
    assert _content(tmp_path / "set") == _content(tmp_path / "wanted")


class TestSplits:
    """A dataset with splits is read as a folder of files named after splits is."""

    rows = datasets.DatasetDict({
        "train_sft": datasets.Dataset.from_list(ROWS[:20]),
        "test_sft": datasets.Dataset.from_list(ROWS[20:]),
    })  # fmt: skip

    def test_one_of_several_is_asked_for(self, tmp_path: Path) -> None:
        with pytest.raises(
            UsageError, match=r'DatasetDict: holds the splits train_sft, test_sft.*split="train_sft"'
        ):
            _set(self.rows, tmp_path / "set")
        with pytest.raises(UsageError, match=r"no split 'train'; found test_sft, train_sft"):
            _set(self.rows, tmp_path / "set", split="train")

    @pytest.mark.parametrize(
        ("split", "rows"),
        [
            ("test_sft", ROWS[20:]),
            ("train_sft[:50%]", ROWS[:10]),
            ("test_sft+train_sft", [*ROWS[20:], *ROWS[:20]]),
        ],
    )
    def test_the_one_that_is_named_is_read(self, split: str, rows: list[Row], tmp_path: Path) -> None:
        _set(self.rows, tmp_path / "set", split=split, packing="none")
        _set(rows, tmp_path / "wanted", packing="none")
        assert _content(tmp_path / "set") == _content(tmp_path / "wanted")

    def test_a_part_of_a_dataset_is_cut_as_of_a_file(self, tmp_path: Path) -> None:
        _set(self.rows["train_sft"], tmp_path / "set", split="train[:5]", packing="none")
        _set(ROWS[:5], tmp_path / "wanted", packing="none")
        assert _content(tmp_path / "set") == _content(tmp_path / "wanted")


class TestTokenizers:
    """A tokenizer as it is now stands for its folder."""

    def test_the_set_is_that_of_the_folder(self, tmp_path: Path) -> None:
        loaded = AutoTokenizer.from_pretrained(TOKENIZER)
        by_name = _set(FORMATS["conversations"], tmp_path / "set")
        loaded(
            ["a", "b c d"], padding="max_length", truncation=True, max_length=2
        )  # leaves its mark on the object
        notes: list[str] = []
        by_object = _set(FORMATS["conversations"], tmp_path / "set", tokenizer=loaded, on_note=notes.append)
        assert by_object.digest == by_name.digest
        assert any("up to date" in note for note in notes)
        assert by_object.tokenizer.name == "tokenizer"

    def test_what_was_changed_on_it_counts(self, tmp_path: Path) -> None:
        loaded = AutoTokenizer.from_pretrained(TOKENIZER)
        loaded.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        rows = [row for row in FORMATS["conversations"] if len(row["messages"]) > 1]
        seen = sftdata.preview(rows, tokenizer=loaded, max_length=256, train_on="all", number=1)
        assert "assistant: " in loaded.decode(seen.examples[0].input_ids)

    def test_stop_tokens_beside_it_are_kept(self, tmp_path: Path) -> None:
        from sftdata.encode.tokenizer import resolve_tokenizer
        from sftdata.objects import tokenizer_folder

        folder = tmp_path / "model"
        shutil.copytree(TOKENIZER, folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
        named = resolve_tokenizer(str(folder))
        given = resolve_tokenizer(str(tokenizer_folder(AutoTokenizer.from_pretrained(folder))))
        assert len(named.stop_tokens) > 1
        assert given.stop_tokens == named.stop_tokens

    def test_a_stream_takes_it_too(self) -> None:
        loaded = AutoTokenizer.from_pretrained(TOKENIZER)
        by_object = list(sftdata.stream(ROWS, tokenizer=loaded, max_length=64))
        by_name = list(sftdata.stream(ROWS, tokenizer=TOKENIZER, max_length=64))
        assert [row["input_ids"].tolist() for row in by_object] == [
            row["input_ids"].tolist() for row in by_name
        ]


class TestRefusals:
    """What holds no rows is named, and what to give instead."""

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            ([{"text": "a"}, 5], r"inputs: row 2 is a int; expected a dict\. Fix: give rows as"),
            (["rows.jsonl", {"text": "a"}], r"inputs: found a dict; expected paths.*or rows"),
            ({"train": [{"text": "a"}]}, r"inputs: found a dict"),
            (5, r"inputs: found a int"),
            ([], r"inputs"),
            ([{"text": object()}], r"row 1 is no JSON data \(it holds a object\)"),
            ([{"text": "\udcff"}], r"row 1 is no JSON data"),
            ([{"text": "a"}, {"text": b"a"}], r"row 2 holds bytes under 'text'; expected text.*\.decode\(\)"),
            ([{"messages": [{"role": "user", "content": b"a"}]}], r"row 1 holds bytes under 'content'"),
            (pd.DataFrame({"text": ["a", 5]}), r"the DataFrame has no Arrow form.*values of one type"),
            (pd.DataFrame({"prompt": ["a"], "completion": [b"b"]}), r'row\["completion"\]\.decode\(\)'),
            (iter(()), r"no rows"),
            ([datasets.Dataset.from_list(ROWS)], r"row 1 is a Dataset.*one dataset"),
        ],
    )  # fmt: skip
    def test_in_one_line(self, inputs: Any, said: str, tmp_path: Path) -> None:
        with pytest.raises(sftdata.SftError) as error:
            _set(inputs, tmp_path / "set")
        assert "\n" not in str(error.value)
        assert error.match(said)

    def test_the_advice_for_a_bare_tokenizer_works(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        bare: Any = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
        with pytest.raises(
            UsageError, match=r"found a Tokenizer.*PreTrainedTokenizerFast\(tokenizer_object="
        ):
            _set(ROWS, tmp_path / "set", tokenizer=bare)
        _set(
            ROWS,
            tmp_path / "set",
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=bare),
            eos_token="<|im_end|>",
        )


MEASURED = """
import resource, sys
import sftdata
from sftdata.objects import named
rows = ({"prompt": f"Question {n}: " + "why " * 20, "completion": f" answer {n}"} for n in range(int(sys.argv[1])))
with named({"inputs": rows, "tokenizer": "tok"}):
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_generator_takes_no_more_memory_for_more_rows() -> None:
    def memory(rows: int) -> int:
        run = [sys.executable, "-c", MEASURED, str(rows)]
        return int(subprocess.run(run, capture_output=True, text=True, timeout=HANGS, check=True).stdout)

    assert memory(1_000_000) - memory(1_000) < 30_000  # KB; the rows are 140 MB


@pytest.mark.parametrize("given", [list, pd.DataFrame], ids=["dicts", "frame"])
def test_a_full_disk_is_told_of_in_one_line(
    given: Callable[[list[Row]], Any], cache: Path, tmp_path: Path
) -> None:
    rows = given([{"text": "a" * 1000}] * 3000)
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    try:
        with pytest.raises(
            UsageError, match=f"Cache folder {cache}/rows cannot be written .* set SFTDATA_CACHE"
        ):
            sftdata.prepare(rows, tokenizer=TOKENIZER, output=tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert not any((cache / "rows").iterdir())


def test_a_fault_of_what_the_rows_are_read_from_stays_what_it_is(cache: Path, tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield {"text": "a"}
        raise PermissionError(13, "Permission denied", "mine.jsonl")

    with pytest.raises(PermissionError, match="mine.jsonl"):
        sftdata.prepare(rows(), tokenizer=TOKENIZER, output=tmp_path / "set")


def test_a_dict_of_columns_is_refused_by_its_kind(tmp_path: Path) -> None:
    columns = {"text": [f"Number {n} is here." for n in range(40)]}  # as text, longer than a name may be
    with pytest.raises(
        UsageError, match=r"inputs: found a dict; .* Fix: from Python, give rows as one dataset"
    ):
        sftdata.prepare(columns, tokenizer="examples/tokenizer", output=tmp_path / "set")


def test_a_cache_that_is_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be written .Not a directory.* set SFTDATA_CACHE"):
        sftdata.prepare([{"text": "a"}], tokenizer=TOKENIZER, output=tmp_path / "set")
