"""A row that is not in the shards is listed with place and reason, and a set is read as a dataset by the name of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sftdata
from sftdata.set.verify import verify
from sftdata.show.audit import audit
from tests.integration.test_prepare import TOKENIZER

pytestmark = pytest.mark.slow

LONG, SHORT = "word " * 200, "a short answer"


def chat(answer: str, **switches: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": answer, **switches}]
    }


def leave_out(row: dict[str, Any]) -> dict[str, Any] | None:
    """Leave a row out by its answer: a formatter."""
    return None if row["messages"][-1]["content"] == "leave" else row


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


ROWS = [
    chat(SHORT),
    chat(SHORT, train=False),
    chat("leave"),
    chat(LONG),
    chat(SHORT),
    chat("leave"),
    chat(LONG, train=False),
]
REASONS = {2: "nothing-trained", 3: "formatter", 4: "over-long", 6: "formatter", 7: "nothing-trained"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("slice_bytes", [1 << 20, 200])
def test_dropped_and_filtered_rows_are_listed_with_place_reason_and_tokens(
    suffix: str, slice_bytes: int, tmp_path: Path
) -> None:
    manifest = sftdata.prepare(
        write(tmp_path / f"rows{suffix}", ROWS), tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, overlong="drop",
        formatter=leave_out, slice_bytes=slice_bytes,
    )  # fmt: skip
    found = listed(tmp_path / "set")
    assert {row["record"]: row["reason"] for row in found} == REASONS
    assert [row["record"] for row in found] == sorted(REASONS)
    assert [row["line"] for row in found] == [row["record"] if suffix == ".jsonl" else None for row in found]
    assert all(row["file"] == f"rows{suffix}" for row in found)
    ledger = manifest.ledger
    assert sum(row["tokens"] or 0 for row in found) == ledger.tokens_in_dropped_rows
    assert [row["tokens"] is None for row in found] == [row["reason"] == "formatter" for row in found]
    assert (
        len(found)
        == sum((ledger.rows_dropped | ledger.rows_filtered).values())
        == ledger.rows_in - ledger.rows_kept
    )
    assert verify(tmp_path / "set").problems == []
    (tmp_path / "set" / "dropped.jsonl").write_bytes(b"")
    assert "dropped.jsonl" in verify(tmp_path / "set").problems[0]


def test_a_row_that_lost_its_trained_tokens_to_the_cut_is_listed_with_the_line_of_its_file(
    tmp_path: Path,
) -> None:
    table = f'question,answer\n"two\nlines",{SHORT}\n"{LONG}",{SHORT}\n'
    (tmp_path / "rows.csv").write_text(table)
    sftdata.prepare(tmp_path / "rows.csv", tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64)
    (row,) = listed(tmp_path / "set")
    assert (row["line"], row["record"], row["reason"]) == (4, 2, "no-trained-tokens")
    assert row["tokens"] > 64


def test_a_reject_of_a_csv_is_named_by_its_line_and_its_record(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('question,answer\n"two\nlines",a\nb\n"two\nlines",c\n')
    with pytest.raises(sftdata.errors.DataError, match=r"rows\.csv:4 \(record 2\): 1 fields"):  # type: ignore[attr-defined]
        sftdata.prepare(tmp_path / "rows.csv", tokenizer=TOKENIZER, output=tmp_path / "set", max_rejects="0")


@pytest.mark.parametrize(
    ("suffix", "place"), [(".json", r"rows\.json, element 2"), (".parquet", r"rows\.parquet, row 2")]
)
def test_a_reject_of_what_is_not_read_by_lines_is_named_by_its_number(
    suffix: str, place: str, tmp_path: Path
) -> None:
    bad = {"messages": [{"role": "user", "content": "Q?"}, {"role": "narrator", "content": "A."}]}
    path = write(tmp_path / f"rows{suffix}", [chat(SHORT), bad, chat(SHORT), chat(SHORT)])
    with pytest.raises(sftdata.errors.DataError, match=place + ": "):  # type: ignore[attr-defined]
        sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_rejects="0")


def test_audit_names_every_place_on_request(tmp_path: Path) -> None:
    rows = [chat(SHORT) if index % 3 else chat("an answer with <|im_end|> in it") for index in range(30)]
    path = write(tmp_path / "rows.jsonl", rows)
    sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64, slice_bytes=500)
    first = {finding.code: finding for finding in audit(tmp_path / "set")}
    every = {finding.code: finding for finding in audit(tmp_path / "set", every=True)}
    assert len(first["control-token-in-data"].examples) == 3
    assert every["control-token-in-data"].examples == tuple(f"rows.jsonl:{line}" for line in range(1, 31, 3))
    for code, finding in every.items():
        if finding.of == "example":
            assert len(finding.examples) == finding.count, code
            assert finding.examples[:3] == first[code].examples


def test_a_set_is_a_dataset_by_the_name_of_its_folder(tmp_path: Path) -> None:
    import datasets

    path = write(tmp_path / "rows.jsonl", [chat(f"{SHORT} {index}") for index in range(40)])
    manifest = sftdata.prepare(path, tokenizer=TOKENIZER, output=tmp_path / "set", max_length=64)
    loaded = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert loaded["train"]["input_ids"] == [row.input_ids.tolist() for row in sftdata.open(tmp_path / "set")]
    assert "README.md" in {file.name for file in manifest.files}
    assert verify(tmp_path / "set").problems == []


def test_the_same_command_is_up_to_date_though_its_set_lies_in_the_input(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "rows.jsonl", [chat(SHORT)])
    first = sftdata.prepare(
        tmp_path / "in", tokenizer=TOKENIZER, output=tmp_path / "in" / "set", max_length=64
    )
    again = sftdata.prepare(
        tmp_path / "in", tokenizer=TOKENIZER, output=tmp_path / "in" / "set", max_length=64
    )
    assert again.digest == first.digest
    assert again.ledger.rows_in == 1
