"""Slices of any size, put end to end, are the file: every row once, in order, from the right place."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.batches import Reject, RowBatch
from sftdata.errors import DataError
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.source import open_source, plan_source, read_chunk
from sftdata.sources.streams import close_streams

texts = st.text(st.characters(codec="utf-8"), max_size=12)
rows = st.fixed_dictionaries({"prompt": texts, "completion": texts})
sizes = st.integers(1, 200)
Place = tuple[int, int, int]  # example id, line, byte offset


def read_in_slices(
    data: bytes, slice_bytes: int, name: str
) -> tuple[SourcePlan, list[tuple[RowBatch, list[Reject]]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        plan = plan_source(open_source(str(path)), 1000, slice_bytes)
        read = [read_chunk(piece) for piece in plan.chunks]
        close_streams()
    return plan, read


def flatten(
    read: list[tuple[RowBatch, list[Reject]]],
) -> tuple[list[tuple[Place, Any]], list[tuple[Place, str]]]:
    good = [
        ((int(i), int(line), int(at)), row)
        for batch, _ in read
        for i, line, at, row in zip(
            batch.example_ids, batch.lines, batch.byte_offsets, batch.rows, strict=True
        )
    ]
    return good, [
        ((one.record + 999, one.line or one.record, one.byte_offset), one.row)
        for _, bad in read
        for one in bad
    ]


lines = st.one_of(
    rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode()),
    rows.map(lambda row: json.dumps(row).encode()[:-3]),
    st.sampled_from([b"", b"  ", b"[1]", b"nonsense", b'{"prompt": "\xff"}']),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(lines, max_size=40), sizes, st.booleans(), st.booleans(), st.booleans())
def test_lines_in_slices_are_the_lines_of_the_file(
    body: list[bytes], slice_bytes: int, crlf: bool, final: bool, packed: bool
) -> None:
    good = [
        json.dumps({"prompt": str(n), "completion": ""}).encode() for n in range(len(body) + 2)
    ]  # the most are JSON lines
    newline = b"\r\n" if crlf else b"\n"
    body = [*good, *body]
    data = newline.join(body) + newline * final
    expected: list[tuple[Place, Any]] = []
    refused: list[Place] = []
    offset = 0
    for number, line in enumerate(body):
        place = (1000 + number, number + 1, offset)
        offset += len(line) + len(newline)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError:
            row = None
        if isinstance(row, dict):
            expected.append((place, row))
        else:
            refused.append(place)
    plan, read = read_in_slices(gzip.compress(data) if packed else data, slice_bytes, "a")
    found, bad = flatten(read)
    assert plan.source.container == "jsonl"
    assert found == expected
    assert [place for place, _ in bad] == refused
    assert plan.records == len(data.removesuffix(b"\n").split(b"\n"))


@settings(deadline=None, max_examples=60)
@given(st.lists(rows, min_size=1, max_size=30), sizes, st.sampled_from([None, 0, 2]), st.booleans())
def test_elements_in_slices_are_the_elements_of_the_array(
    array: list[dict[str, str]], slice_bytes: int, indent: int | None, packed: bool
) -> None:
    data = json.dumps(array, indent=indent, ensure_ascii=False).encode()
    plan, read = read_in_slices(gzip.compress(data) if packed else data, slice_bytes, "a")
    found, bad = flatten(read)
    assert [row for _, row in found] == array
    assert bad == []
    assert [place[:2] for place, _ in found] == [(1000 + n, n + 1) for n in range(len(array))]
    decode = json.JSONDecoder().raw_decode
    assert [
        decode(data[place[2] :].decode())[0] for place, _ in found
    ] == array  # the offset is where the element starts
    assert plan.records == len(array)


@settings(deadline=None, max_examples=150)
@given(st.lists(rows, min_size=3, max_size=8), st.data(), sizes, st.sampled_from([None, 1]))
def test_one_byte_lost_inside_an_element_costs_at_most_that_element_or_is_refused(
    array: list[dict[str, str]], data: st.DataObject, slice_bytes: int, indent: int | None
) -> None:
    texts = [json.dumps(row, indent=indent) for row in array]
    victim = data.draw(st.integers(0, len(array) - 1))
    lost = data.draw(st.integers(1, len(texts[victim]) - 1))
    damaged = texts[victim][:lost] + texts[victim][lost + 1 :]
    text = "[\n" + ",\n".join([*texts[:victim], damaged, *texts[victim + 1 :]]) + "\n]"
    try:
        plan, read = read_in_slices(text.encode(), slice_bytes, "a")
    except DataError:
        return  # the elements cannot be told apart, so none is read
    _, whole = read_in_slices(text.encode(), 1 << 20, "a")
    assert flatten(read) == flatten(whole)
    kept = [row for _, row in flatten(read)[0]]
    others = array[:victim] + array[victim + 1 :]
    assert others in (kept, kept[:victim] + kept[victim + 1 :])
    assert plan.records == len(kept) + len(flatten(read)[1])


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=8)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(cells, cells), max_size=30), sizes, st.sampled_from([",", "\t"]), st.booleans())
def test_records_in_slices_are_the_records_that_the_csv_module_reads(
    table: list[tuple[str, str]], slice_bytes: int, delimiter: str, packed: bool
) -> None:
    import csv
    import io

    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(("prompt", "completion"))
    writer.writerows(table)
    data = text.getvalue().encode()
    plan, read = read_in_slices(gzip.compress(data) if packed else data, slice_bytes, "a.csv")
    found, bad = flatten(read)
    oracle = list(csv.DictReader(io.StringIO(data.decode(), newline=""), delimiter=delimiter))
    assert [row for _, row in found] == oracle
    assert bad == []
    assert plan.records == len(table)


@pytest.mark.parametrize("slice_bytes", [1, 7, 64, 4096])
@given(table=st.lists(st.text(max_size=10), max_size=50))
@settings(deadline=None, max_examples=20)
def test_documents_in_slices_are_the_lines_of_the_text(slice_bytes: int, table: list[str]) -> None:
    documents = [
        "prose.",
        *(line.replace("\n", " ").replace("\r", " ").replace("\x00", " ") for line in table),
    ]
    data = "\n".join(documents).encode("utf-8", "replace")
    plan, read = read_in_slices(data, slice_bytes, "a.txt")
    found, bad = flatten(read)
    expected = data.decode().split("\n")
    assert bad == []
    assert [(place[1], row) for place, row in found] == [
        (n, line) for n, line in enumerate(expected, 1) if line.encode().strip()
    ]
    assert plan.records == len(expected) - (expected[-1] == "")
