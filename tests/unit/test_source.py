"""Containers are recognised by content, read in slices of any size, and a bad row never takes a good one with it."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import pickle
import random
import re
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash

from sftdata.batches import Reject
from sftdata.errors import DataError, IntegrityError, UsageError
from sftdata.sources import streams
from sftdata.sources.chunks import Source
from sftdata.sources.inputs import expand_inputs
from sftdata.sources.planning import plan_sources
from sftdata.sources.ranges import Sizes
from sftdata.sources.source import open_source, plan_source, read_chunk
from tests.compressed import zstd

ROWS: list[dict[str, Any]] = [
    {
        "instruction": f"Count to {n}.",
        "input": "",
        "output": 'one, "two"\nthree → 三' if n % 3 else "\\ }{][ \u2028",
    }
    for n in range(40)
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "zstd": partial(zstd.compress, options={zstd.CompressionParameter.checksum_flag: True}),
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


@pytest.fixture(autouse=True)
def _no_stream_is_left_open() -> Iterator[None]:
    yield
    streams.close_streams()


def read_all(
    path: Path | str, slice_bytes: int = 1 << 20, limit: int = 1 << 20
) -> tuple[list[Any], list[Reject], str]:
    """Return the rows, the unreadable rows and the container of a file."""
    source = open_source(str(path))
    rows: list[Any] = []
    bad: list[Reject] = []
    for piece in plan_source(source, 0, slice_bytes, limit).chunks:
        batch, unreadable = read_chunk(piece, limit)
        rows += batch.rows
        bad += unreadable
    return rows, bad, source.container


def as_lines(rows: list[Any], newline: str = "\n") -> bytes:
    return newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    import io

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


TEXTS = {
    "lines": (as_lines(ROWS), "jsonl"),
    "lines with CRLF": (as_lines(ROWS, "\r\n"), "jsonl"),
    "lines with a byte order mark": (b"\xef\xbb\xbf" + as_lines(ROWS), "jsonl"),
    "array on one line": (json.dumps(ROWS).encode(), "json"),
    "array, indented": (json.dumps(ROWS, indent=2, ensure_ascii=False).encode(), "json"),
    "array, flush left": (json.dumps(ROWS, indent=0).encode(), "json"),
    "array, one element a line": (
        b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
        "json",
    ),
    "array with a byte order mark": (b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), "json"),
    "objects, indented, one after another": (
        b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
        "json",
    ),
    "CSV": (as_csv(ROWS, ","), "csv"),
    "TSV": (as_csv(ROWS, "\t"), "csv"),
    "CSV with semicolons": (as_csv(ROWS, ";"), "csv"),
    "CSV with a byte order mark": (b"\xef\xbb\xbf" + as_csv(ROWS, ","), "csv"),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("shape", TEXTS)
def test_container_is_recognised_by_content_whatever_its_name(
    shape: str, compression: str, tmp_path: Path
) -> None:
    data, container = TEXTS[shape]
    for name in ("rows.jsonl", "rows.json", "rows"):
        path = tmp_path / name
        path.write_bytes(COMPRESS[compression](data))
        rows, bad, found = read_all(path, slice_bytes=300)
        assert (found, bad) == (container, [])
        assert rows == ROWS
        assert open_source(str(path)).compression == compression


@pytest.mark.parametrize("indent", [None, 1])
def test_a_single_object_is_one_row(indent: int | None, tmp_path: Path) -> None:
    conversation = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "one.json").write_text(json.dumps(conversation, indent=indent))
    assert read_all(tmp_path / "one.json")[0] == [conversation]


def test_text_is_one_document_a_line_even_when_a_line_is_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("1234567890\nEins, zwei\r\n\n \nπ, \x00 [1]".encode())
    rows, bad, container = read_all(tmp_path / "a.txt", slice_bytes=1)
    assert (rows, bad, container) == (["1234567890", "Eins, zwei", "π, \x00 [1]"], [], "text")


def test_prose_with_commas_is_text_unless_it_is_named_as_a_table(tmp_path: Path) -> None:
    prose = "Hello, world\nGood, evening\n"
    (tmp_path / "a.txt").write_text(prose)
    (tmp_path / "a.csv").write_text(prose)
    assert read_all(tmp_path / "a.txt")[0] == ["Hello, world", "Good, evening"]
    assert (
        read_all(tmp_path / "a.csv")[2] == "csv"
    )  # a file that is named so is a table, whatever its header holds
    (tmp_path / "b.csv").write_text("greeting,whom\nHello,world\n")
    assert read_all(tmp_path / "b.csv")[0] == [{"greeting": "Hello", "whom": "world"}]


# ------------------------------------------------------------------------------------------------------- columnar


def test_parquet_arrow_file_and_arrow_stream_round_trip(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.bin", row_group_size=7)
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    for name, container in (("rows.bin", "parquet"), ("rows.arrow", "arrow"), ("stream.arrow", "arrow")):
        for slice_bytes in (1, 500, 1 << 20):
            rows, bad, found = read_all(tmp_path / name, slice_bytes)
            assert (rows, bad, found) == (ROWS, [], container)


def test_nulls_that_arrow_put_into_structs_are_left_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, call]},
        {
            "messages": [
                {"role": "assistant", "content": "b", "tool_calls": [{"name": "g", "arguments": {"y": "2"}}]}
            ]
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_all(tmp_path / "rows.parquet")[0] == rows


def test_saved_datasets_are_read_by_split_and_a_missing_split_names_the_others(tmp_path: Path) -> None:
    import datasets

    half = {"train": datasets.Dataset.from_list(ROWS[:25]), "test": datasets.Dataset.from_list(ROWS[25:])}
    datasets.DatasetDict(half).save_to_disk(str(tmp_path / "both"))
    half["train"].save_to_disk(str(tmp_path / "one"), num_shards=2)
    for folder, split, expected in (
        ("both", "train", ROWS[:25]),
        ("both", "test", ROWS[25:]),
        ("one", "train", ROWS[:25]),
    ):
        source = open_source(str(tmp_path / folder), split=split)
        plan = plan_source(source, 0, 200)
        assert source.container == "saved"
        assert [row for piece in plan.chunks for row in read_chunk(piece)[0].rows] == expected
    with pytest.raises(UsageError, match=r'split="valid": .*found test, train.*split="test"'):
        plan_source(open_source(str(tmp_path / "both"), split="valid"), 0, 200)
    with pytest.raises(UsageError, match=r'holds the splits train, test.*split="train"'):
        plan_source(open_source(str(tmp_path / "both")), 0, 200)
    with pytest.raises(
        UsageError, match=r'split="test": .*found train'
    ):  # a dataset of one split has that one
        plan_source(open_source(str(tmp_path / "one"), split="test"), 0, 200)


def test_hub_ids_go_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert open_source("owner/name").container == "hub"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(as_lines(ROWS))
    source = Source(str(tmp_path / "data"), "hub")  # a folder stands in for the Hub: the same call loads it
    rows = [row for piece in plan_source(source, 0, 500).chunks for row in read_chunk(piece)[0].rows]
    assert rows == ROWS


def test_a_hub_dataset_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        plan_source(open_source("no-such-owner/no-such-dataset"), 0, 100)
    assert "no-such-owner/no-such-dataset: cannot be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- plans


def test_plan_records_size_hash_and_where_every_example_came_from(tmp_path: Path) -> None:
    data = gzip.compress(as_lines(ROWS))
    (tmp_path / "a.gz").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"x\n\ny\n")
    first, second = plan_sources(
        [open_source(str(tmp_path / name)) for name in ("a.gz", "b.txt")], Sizes(100)
    )
    assert [{chunk.number for chunk in plan.chunks} for plan in (first, second)] == [{0}, {1}]
    assert (first.raw_bytes, first.xxh3_128, first.records) == (
        len(data),
        xxhash.xxh3_128_hexdigest(data),
        40,
    )
    assert (second.base_id, second.records) == (40, 3)
    (piece,) = second.chunks
    batch, _ = read_chunk(piece)
    assert batch.example_ids.tolist() == [40, 42]  # the blank line uses up an id
    assert batch.lines.tolist() == [1, 3]
    assert batch.byte_offsets.tolist() == [0, 3]
    assert second.locate(42) == (str(tmp_path / "b.txt"), 3)


def test_slices_are_of_about_the_size_asked_for_and_small_to_send(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"text": f"row {n} " * 20} for n in range(2000)]))
    plan = plan_source(open_source(str(tmp_path / "a.jsonl")), 0, 10_000)
    assert plan.chunks[0].start == 0
    assert [piece.stop for piece in plan.chunks[:-1]] == [piece.start for piece in plan.chunks[1:]]
    sizes = [piece.stop - piece.start for piece in plan.chunks]
    assert all(4_000 < size < 21_000 for size in sizes[1:-1])
    assert 8_000 < sum(sizes) / len(sizes) < 12_000
    assert len(pickle.dumps(plan.chunks[1])) < 500
    assert pickle.loads(pickle.dumps(plan.chunks)) == plan.chunks


def test_samples_reach_from_the_first_row_to_the_last(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines([{"text": f"row {n} " * 100} for n in range(5000)]))
    plan = plan_source(open_source(str(tmp_path / "a.jsonl")), 0, 32 << 20)
    assert len(plan.samples) == 32
    assert plan.samples[0].first_record == 0
    assert plan.samples[-1].stop == plan.chunks[-1].stop


def test_a_worker_decompresses_a_file_once_for_slices_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS * 50)))
    plan = plan_source(open_source(str(tmp_path / "a.jsonl.gz")), 0, 5_000)
    opened = []
    real = streams.open_raw
    monkeypatch.setattr(streams, "open_raw", lambda *of: (opened.append(of), real(*of))[1])
    rows = [row for piece in plan.chunks[::2] for row in read_chunk(piece)[0].rows]
    assert len(opened) == 1
    assert len(plan.chunks) > 10
    assert rows[0] == ROWS[0]
    again, _ = read_chunk(plan.chunks[0])  # going back starts anew
    assert again.rows[0] == ROWS[0]
    assert len(opened) == 2


def test_an_empty_file_has_no_rows_and_says_so(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b""), ("b.json", b" \n\n"), ("c.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(data)
        plan = plan_source(open_source(str(tmp_path / name)), 0, 100)
        assert (plan.chunks, plan.samples, plan.records) == ((), (), 0)
        assert plan.notes == (f"{tmp_path / name}: the file is empty.",)


def test_an_empty_array_and_a_header_alone_have_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[ ]")
    (tmp_path / "b.csv").write_bytes(b"prompt,completion\n")
    for name in ("a.json", "b.csv"):
        assert plan_source(open_source(str(tmp_path / name)), 0, 100).records == 0


def test_urls_are_read_through_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://folder/rows.jsonl", "wb") as stream:
        stream.write(as_lines(ROWS))
    with fsspec.open("memory://folder/rows.zst", "wb") as stream:
        stream.write(COMPRESS["zstd"](json.dumps(ROWS).encode()))
    assert read_all("memory://folder/rows.jsonl", 100)[0] == ROWS
    assert read_all("memory://folder/rows.zst", 100)[0] == ROWS
    with pytest.raises(UsageError, match=r"memory://folder/none\.jsonl: not there"):
        read_all("memory://folder/none.jsonl")


# ----------------------------------------------------------------------------------------------------- bad rows

GOOD = b'{"text": "good"}'
BAD_LINES = {
    "cut off": (b'{"text": "half', "invalid-json"),
    "not JSON": (b"hello there", "invalid-json"),
    "single quotes": (b"{'text': 'a'}", "invalid-json"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "invalid-json"),
    "NaN": (b'{"text": "a", "score": NaN}', "invalid-json"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "invalid-json"),
    "a number of 5000 digits": (b'{"n": ' + b"7" * 5000 + b"}", "invalid-json"),
    "an array": (b"[1, 2]", "not-an-object"),
    "a string": (b'"text"', "not-an-object"),
    "null": (b"null", "not-an-object"),
    "a Latin-1 byte": (b'{"text": "caf\xe9"}', "invalid-utf8"),
    "a Latin-1 byte in a key": (b'{"caf\xe9": "a"}', "invalid-utf8"),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "invalid-utf8"),
    "half a surrogate pair": (b'{"text": "a\\ud83d b"}', "lone-surrogate"),
    "the other half": (b'{"text": "a\\ude00 b"}', "lone-surrogate"),
    "300 levels": (b'{"a":' * 300 + b"1" + b"}" * 300, "too-deep"),
    "100000 levels": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too-deep"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_line_is_one_fault_and_its_neighbours_stay(kind: str, last: bool, tmp_path: Path) -> None:
    line, code = BAD_LINES[kind]
    lines = [GOOD, line] if last else [GOOD, b"", line, GOOD]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD] * 20 + lines))
    for slice_bytes in (1, 1 << 20):
        rows, bad, container = read_all(path, slice_bytes)
        assert container == "jsonl"
        assert len(rows) == 20 + lines.count(GOOD)
        assert [(one.code, one.line or one.record, one.record - 1) for one in bad] == [
            (code, *((22, 21) if last else (23, 22)))
        ]
        start = bad[0].byte_offset
        assert path.read_bytes()[start - 1 : start + len(line)] == b"\n" + line
        assert bad[0].reason
        assert bad[0].fix


def test_the_reason_shows_the_place() -> None:
    from sftdata.errors import Fault
    from sftdata.sources.jsonrows import parse_row

    fault = parse_row(b'{"score": NaN}')
    assert isinstance(fault, Fault)
    assert "byte 10" in fault.reason
    assert "NaN" in fault.reason
    fault = parse_row('{"a": "né'.encode() + b'\xe9"}')
    assert isinstance(fault, Fault)
    assert "0xe9 at byte 10" in fault.reason


@pytest.mark.parametrize("depth", [255, 256, 257])
def test_nesting_is_decided_alike_from_any_depth_of_calls(depth: int) -> None:
    from sftdata.errors import Fault
    from sftdata.sources.jsonrows import parse_row

    line = b'{"a":' * depth + b"1" + b"}" * depth

    def from_below(frames: int) -> Any:
        return parse_row(line) if frames == 0 else from_below(frames - 1)

    assert isinstance(from_below(0), Fault) == isinstance(from_below(400), Fault) == (depth > 256)


def test_a_line_too_long_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(GOOD + b"\n" + b'{"text": "')
        for _ in range(40):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    rows, bad, _ = read_all(path, limit=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 2
    assert [(one.code, one.line or one.record) for one in bad] == [("line-too-long", 2)]
    assert bad[0].row.startswith('{"text": "xxx')
    assert len(bad[0].row) <= 1000
    assert peak < 12 << 20


def test_a_line_at_the_limit_is_kept_and_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD + b" \n" + GOOD)
    rows, bad, _ = read_all(tmp_path / "a.jsonl", limit=len(GOOD))
    assert (len(rows), [one.line or one.record for one in bad]) == (2, [2])


ENDLESS = {
    "array": (
        b"[%s, %s, %s]",
        b'{"text": ["x", %s1]}',
        b'{"a": [1, "it says ]} and \\\\\\" for some time"]}, ',
    ),
    "array, indented": (
        b"[\n  %s,\n  %s,\n  %s\n]\n",
        b'{"text":\n "%s"}',
        b"\\\\ it says ]}, { for some time",
    ),
    "objects, indented": (b"%s\n%s\n%s\n", b'{\n "text": "%s"\n}', b"\\n[[[[[[[[[[[[[[[["),
    "array of deep arrays": (b"[%s, %s, %s]", b"[%s 1]", b"[[[[]]]],"),
}


@pytest.mark.parametrize("compression", ["none", pytest.param("gzip", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ENDLESS)
def test_an_element_too_long_is_never_held_in_memory(shape: str, compression: str, tmp_path: Path) -> None:
    around, element, inside = ENDLESS[shape]
    good = b'{\n "text": "good"\n}'
    endless = element % (inside * (8_000_000 // len(inside)))
    data = around % (good, endless, good)
    (tmp_path / "a").write_bytes(COMPRESS[compression](data))
    start, length = data.index(endless), len(endless)
    del endless, data
    tracemalloc.start()
    rows, bad, container = read_all(tmp_path / "a", limit=1 << 17)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert container == "json"
    assert rows == [{"text": "good"}] * 2
    assert [(one.code, one.line or one.record, one.byte_offset) for one in bad] == [
        ("line-too-long", 2, start)
    ]
    assert f"takes {length} bytes" in bad[0].reason
    assert len(bad[0].row) <= 1000
    assert peak < 7 << 20


BAD_CSV = {
    "a field too many": (b"a,b,c", "wrong-field-count"),
    "a field too few": (b"a", "wrong-field-count"),
    "a Latin-1 byte": (b"caf\xe9,b", "invalid-utf8"),
    "text after a closing quote": (b'"a"b,c', "invalid-csv"),
    "a quote that never closes": (b'"a,b', "invalid-csv"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_record_is_one_fault_and_its_neighbours_stay(kind: str, tmp_path: Path) -> None:
    line, code = BAD_CSV[kind]
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n1,x\n2,"y\ny"\n' + line + b"\n3,z\n4,zz\n")
    for slice_bytes in (1, 1 << 20):
        rows, bad, _ = read_all(tmp_path / "a.csv", slice_bytes)
        assert [row["prompt"] for row in rows] == ["1", "2", "3", "4"]
        assert [(one.code, one.line or one.record) for one in bad] == [(code, 5)]


def test_a_quoted_field_too_long_to_hold_is_one_fault_and_its_neighbours_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.sources.lines.RECORD_LIMIT", 1000)
    inside = 'looks,like a row\n"",""\n' * 200
    (tmp_path / "a.csv").write_text(f'prompt,completion\n1,x\n2,"{inside}"\n3,"z\nz"\n')
    for slice_bytes in (1, 1 << 20):
        rows, bad, _ = read_all(tmp_path / "a.csv", slice_bytes)
        assert [row["prompt"] for row in rows] == ["1", "3"]
        assert [(one.code, one.line or one.record, one.byte_offset) for one in bad] == [
            ("line-too-long", 3, 22)
        ]
        assert bad[0].fix == "split the row, or write it as a line of JSON."


def test_a_quote_that_never_closes_costs_its_line_alone_however_far_the_end_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftdata.sources.lines.RECORD_LIMIT", 1000)
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\n1,x\n2,"y\n' + b"3,z\n" * 1000)
    for slice_bytes in (1, 1 << 20):
        rows, bad, _ = read_all(tmp_path / "a.csv", slice_bytes)
        assert len(rows) == 1001
        assert [(one.code, one.line or one.record) for one in bad] == [("invalid-csv", 3)]


def elements(*texts: str, before: str = "[", after: str = "]", between: str = ", ") -> bytes:
    return (before + between.join(texts) + after).encode()


A, B, C = '{"id": "a", "t": [{"id": 1}, {"k": "x"}]}', '{"id": "b", "t": []}', '{"id": "c"}'
# What is wrong in an element whose quotes and brackets match, or between elements: rejects.
DAMAGED = {
    "NaN": (elements(A, '{"id": NaN}', B, C), 1),
    "a comma too many in an object": (elements(A, '{"id": 1,}', B, C), 1),
    "a comma is missing between elements": (elements(A + " " + B, C), 0),
    "a comma too many at the end": (elements(A, B, C, after=",]"), 0),
    "a word between elements": (elements(A, "oops", B, C), 1),
    "numbers between objects": (elements(A, "1", "[2]", B, '"s"', C), 3),
    "cut off between elements": (elements(A, B, C, after=","), 0),
}
# Where the end of an element cannot be told: the element, and what stands after the last one.
HOPELESS = {
    "a quote is missing": ('{"id": "x, "t": []}', "]"),
    "the opening quote is missing": ('{"id": x", "t": "y"}', "]"),
    "a brace is missing": ('{"id": "x", "t": []', "]"),
    "a bracket is missing": ('{"id": "x", "t": [{"k": 1}}', "]"),
    "a bracket too many": ('{"id": "x", "t": 1]}', "]"),
    "a comma is missing inside": ('{"id": "x" "t": 1}', "]"),
    "a raw newline in a string": ('{"id": "x\ny"}', "]"),
    "the inside is lost": ('{"t": [{"k": "x"},: 1}]}', "]"),
    "cut off inside an element": ('{"id": "x', ""),
    "cut off inside a string": ('{"id": "x", "t": "it says ]}', ""),
    "text after the end": ('{"id": "x"}', "] trailing"),
    "a second array": ('{"id": "x"}', "] [1]"),
}


@pytest.mark.parametrize("slice_bytes", [1, 25, 1 << 20])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_array_keeps_its_good_elements(kind: str, slice_bytes: int, tmp_path: Path) -> None:
    data, faults = DAMAGED[kind]
    (tmp_path / "a.json").write_bytes(data)
    rows, bad, container = read_all(tmp_path / "a.json", slice_bytes)
    assert container == "json"
    assert rows == [json.loads(text) for text in (A, B, C)]
    assert len(bad) == faults
    assert all(one.row.encode() in data for one in bad)


@pytest.mark.parametrize("kind", DAMAGED)
def test_an_element_too_long_in_a_damaged_array_leaves_the_others(kind: str, tmp_path: Path) -> None:
    data, faults = DAMAGED[kind]
    endless = elements('{"id": "%s"}' % ("it says ]} " * 9000), before="", after=", ")
    (tmp_path / "a.json").write_bytes(data[:1] + endless + data[1:])
    for slice_bytes in (1, 1 << 20):
        rows, bad, _ = read_all(tmp_path / "a.json", slice_bytes, limit=1000)
        assert rows == [json.loads(text) for text in (A, B, C)]
        assert [one.code for one in bad].count("line-too-long") == 1
        assert len(bad) == faults + 1


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", HOPELESS)
def test_an_array_whose_elements_cannot_be_told_apart_is_refused_with_the_place(
    kind: str, last: bool, tmp_path: Path
) -> None:
    element, after = HOPELESS[kind]
    last = last or after != "]"
    data = elements(A, B, element, after=after) if last else elements(A, element, B, C, after=after)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / "a.json")
    said = re.search(r"a\.json: .*\bbyte (\d+)", str(caught.value))
    assert said, caught.value
    start = data.index(element.encode())
    assert start <= int(said[1]) <= start + len(element) + len(B)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['"%s"', "%s"])
def test_a_value_beyond_the_limit_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f"[{A}, {text % ('1' * 2000)}]")
    with pytest.raises(DataError, match=f"damaged at byte {len(A) + 3}: a value that is no object"):
        read_all(tmp_path / "a.json", limit=1000)


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("kind", [*DAMAGED, *HOPELESS, *(shape for shape in TEXTS if "array" in shape)])
def test_elements_do_not_depend_on_how_the_stream_comes(
    kind: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = DAMAGED | TEXTS
    data = known[kind][0] if kind in known else elements(A, HOPELESS[kind][0], after=HOPELESS[kind][1])
    (tmp_path / "a.json").write_bytes(data)

    def read() -> tuple[list[Any], list[Reject]] | None:
        try:
            return read_all(tmp_path / "a.json", 50, limit=70)[:2]
        except DataError:
            return None

    whole = read()
    monkeypatch.setattr("sftdata.sources.streams.BLOCK_BYTES", block)
    for module in ("streams", "arrays"):
        monkeypatch.setattr(f"sftdata.sources.{module}.CACHED_BYTES", block)
    assert read() == whole


@pytest.mark.parametrize(
    "text", ['{"a": [-1.5e+10, true, null, "\\ud83d\\ude00 \\" é"], "b": {}}', "[[], {}]", "[false]"]
)
def test_an_element_that_a_block_cuts_is_never_taken_for_damage(text: str) -> None:
    from sftdata.sources.arrays import Elements

    for cut in range(1, len(text.encode())):
        parts = iter([b"[ " + text.encode()[:cut], text.encode()[cut:] + b" , 1]"])
        first, second = Elements("a.json", parts, 0, 1000, whole=True)
        assert (first.text, second.text) == (text.encode(), b"1")


def test_an_array_without_its_end_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(elements(A, B, after=""))
    plan = plan_source(open_source(str(tmp_path / "a.json")), 0, 100)
    assert "never closed" in plan.notes[0]


# --------------------------------------------------------------------------------------------- damaged and foreign


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bz2"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_stream_is_one_line_that_names_the_file(
    compression: str, damage: str, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(50_000).hex().encode()
    text = b"\n".join(b'{"text": "' + data[i : i + 100] + b'"}' for i in range(0, len(data), 100))
    packed = bytearray(COMPRESS[compression](text))
    if damage == "cut":
        packed = packed[: len(packed) - len(packed) // 3]
    else:
        packed[len(packed) // 2] ^= 0x40
    path = tmp_path / "a.jsonl"
    path.write_bytes(packed)
    with pytest.raises(IntegrityError) as caught:
        plan_source(open_source(str(path)), 0, 1000)
    assert str(caught.value).startswith(f"{path}: the {compression} stream is damaged after ")


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bz2"])
def test_compressed_members_one_after_another_are_one_stream(compression: str, tmp_path: Path) -> None:
    pack = COMPRESS[compression]
    (tmp_path / "a").write_bytes(pack(as_lines(ROWS[:20]) + b"\n") + pack(as_lines(ROWS[20:])))
    assert read_all(tmp_path / "a", 500)[0] == ROWS


@pytest.mark.parametrize("compression", ["gzip", "zstd", "xz", "bz2"])
def test_no_compression_gives_more_than_a_block_at_once(compression: Any) -> None:
    zeros = b"\0" * (24 << 20)
    blocks = list(streams.decompress([COMPRESS[compression](zeros)], compression))
    assert b"".join(blocks) == zeros
    assert max(map(len, blocks)) <= streams.BLOCK_BYTES


def test_a_zstd_stream_with_a_longer_window_than_most_decoders_take_is_read() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    packed = compressor.compress(b"text " * 1000) + compressor.flush()
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(packed)
    assert b"".join(streams.decompress([packed], "zstd")) == b"text " * 1000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_refused_with_the_command_that_converts_it(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "hello"}\n' * 9, encoding=encoding)
    with pytest.raises(UsageError, match=r"a\.jsonl: the text is UTF-16.*Fix: iconv -f UTF-16") as caught:
        open_source(str(path))
    subprocess.run(caught.value.fix, shell=True, cwd=tmp_path, check=True)
    rows, bad, _ = read_all(tmp_path / "utf8-a.jsonl")
    assert (len(rows), bad) == (9, [])


def test_lines_that_end_in_cr_alone_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\ra,b\rc,d\r")
    with pytest.raises(UsageError, match="lines end in CR alone") as caught:
        open_source(str(tmp_path / "a.csv"))
    subprocess.run(caught.value.fix, shell=True, cwd=tmp_path, check=True)
    assert len(read_all(tmp_path / "lines.txt")[0]) == 2


FOREIGN = {
    "zip": b"PK\x03\x04rest",
    "pickle": b"\x80\x04\x95rest",
    "binary": bytes(200) + bytes(range(256)) * 9,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_that_hold_no_rows_are_refused_by_name(what: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(FOREIGN[what])
    with pytest.raises(UsageError, match=what):
        open_source(str(tmp_path / "a.json"))


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(UsageError, match=r"a\.parquet: damaged parquet file"):
        plan_source(open_source(str(tmp_path / "a.parquet")), 0, 100)


# -------------------------------------------------------------------------------------------------------- rejects


def test_a_file_of_rejects_is_accepted_as_input(tmp_path: Path) -> None:
    def envelope(row: Any, code: str) -> dict[str, Any]:
        return {"file": "a", "line": 1, "byte_offset": 0, "code": code, "reason": "r", "fix": "f", "row": row}

    rejects = [
        envelope({"text": "mended"}, "empty-text"),
        envelope('{"text": "mended too"}', "invalid-json"),
        envelope('{"text": "still bad', "invalid-json"),
        envelope("a line of plain text", "no-response-template"),
        {"row": 1, "file": "these columns are the user's own"},
    ]
    (tmp_path / "rejects.jsonl").write_bytes(as_lines(rejects))
    rows, bad, _ = read_all(tmp_path / "rejects.jsonl")
    assert rows == [{"text": "mended"}, {"text": "mended too"}, "a line of plain text", rejects[4]]
    assert [(one.line or one.record, one.code) for one in bad] == [(3, "invalid-json")]


# --------------------------------------------------------------------------------------------------------- inputs


def test_folders_and_globs_are_sorted_by_name_and_say_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json.gz", "README.md", ".hidden.jsonl", "sub/c.csv", "sub/.git/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    paths, notes = expand_inputs([str(tmp_path)])
    assert [Path(path).relative_to(tmp_path).as_posix() for path in paths] == [
        "a.json.gz",
        "b.jsonl",
        "sub/c.csv",
    ]
    assert [note.removeprefix(str(tmp_path)) for note in notes] == [
        ": left out (hidden): .hidden.jsonl, sub/.git.",
        "/README.md: left out (not named as data; name a file itself to read it).",
    ]
    assert expand_inputs([str(tmp_path / "*.json*")])[0] == [
        str(tmp_path / "a.json.gz"),
        str(tmp_path / "b.jsonl"),
    ]
    assert expand_inputs([str(tmp_path / "README.md")])[0] == [
        str(tmp_path / "README.md")
    ]  # named outright: read


def test_inputs_keep_the_order_given(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}")
    given = [str(tmp_path / "b.jsonl"), "https://example.org/x.jsonl", str(tmp_path / "a.jsonl")]
    assert expand_inputs(given)[0] == given


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(
        UsageError, match=r"trian\.jsonl: no such file or folder.*did you mean .*/train\.jsonl"
    ):
        expand_inputs([str(tmp_path / "trian.jsonl")])
    with pytest.raises(UsageError, match="the nearest folder that exists is"):
        expand_inputs([str(tmp_path / "data" / "deep" / "train.jsonl")])
    with pytest.raises(UsageError, match="no file matches"):
        expand_inputs([str(tmp_path / "*.parquet")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no data file here"):
        expand_inputs([str(tmp_path / "empty")])


def test_owner_and_name_is_a_hub_id_only_where_no_such_path_can_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand_inputs(["owner/name"])[0] == ["owner/name"]
    (tmp_path / "owner").mkdir()
    with pytest.raises(UsageError, match="owner/name: no such file"):
        expand_inputs(["owner/name"])
    with pytest.raises(UsageError, match="no such file"):
        expand_inputs(["other/rows.jsonl"])


def test_reading_imports_no_heavy_library() -> None:
    import sys

    heavy = "{'datasets', 'transformers', 'pyarrow', 'fsspec', 'backports'}"
    code = f"import sys, sftdata.formats.detect; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
