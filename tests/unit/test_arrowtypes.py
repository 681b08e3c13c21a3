"""What Arrow holds by type comes out as the JSON data that was meant: documents decoded, maps as objects, no added nulls."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.sources.source import open_source, plan_source, read_chunk

documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8"), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


def stored(values: list[Any]) -> pa.Array:
    """A null document is the JSON text null; Arrow's own null stays apart."""
    return pa.array([json.dumps(value) for value in values], pa.json_())


def in_lists(values: list[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), stored(values))


def in_structs(values: list[Any]) -> pa.Array:
    return pa.StructArray.from_arrays([stored(values), pa.array([1] * len(values))], ["v", "n"])


def in_maps(values: list[Any]) -> pa.Array:
    offsets = pa.array(range(len(values) + 1), pa.int32())
    keys = pa.array(["k"] * len(values))
    return pa.MapArray.from_arrays(offsets, keys, stored(values))


def in_lists_of_structs(values: list[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), in_structs(values))


SHAPES: dict[str, tuple[Callable[[list[Any]], pa.Array], Callable[[Any], Any]]] = {
    "column": (stored, lambda value: value),
    "list": (in_lists, lambda value: [value]),
    "struct": (in_structs, lambda value: {"v": value, "n": 1}),
    "map": (in_maps, lambda value: {"k": value}),
    "list of structs": (in_lists_of_structs, lambda value: [{"v": value, "n": 1}]),
}


def written(table: pa.Table, kind: str, path: Path) -> list[Any]:
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table)
    plan = plan_source(open_source(str(path)), 0, 64)
    return [row for piece in plan.chunks for row in read_chunk(piece)[0].rows]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(documents, min_size=1, max_size=5),
    shape=st.sampled_from(list(SHAPES)),
    kind=st.sampled_from(["parquet", "file", "stream"]),
)
def test_documents_are_decoded_wherever_the_schema_has_them(values: list[Any], shape: str, kind: str) -> None:
    build, expected = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        rows = written(pa.table({"text": build(values)}), kind, Path(folder) / "rows")
    assert rows == [{"text": expected(value)} for value in values]


def test_text_that_looks_like_json_stays_text_where_the_schema_says_text(tmp_path: Path) -> None:
    assert written(pa.table({"text": ['"a"', "{}", "1"]}), "parquet", tmp_path / "rows") == [
        {"text": '"a"'},
        {"text": "{}"},
        {"text": "1"},
    ]


def test_maps_are_objects_with_their_own_nulls_and_structs_lose_those_that_arrow_added(
    tmp_path: Path,
) -> None:
    kind = pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.int64())]))
    table = pa.table({"text": pa.array([[("x", {"a": 1}), ("y", None)], None, []], kind)})
    assert written(table, "parquet", tmp_path / "rows") == [
        {"text": {"x": {"a": 1}, "y": None}},
        {"text": None},
        {"text": {}},
    ]


@pytest.mark.parametrize("null_first", [True, False])
def test_added_nulls_are_left_out_of_every_struct_of_a_list(null_first: bool, tmp_path: Path) -> None:
    structs = [None, {"a": 1}, {"b": 2}]
    table = pa.table({"text": pa.array([structs if null_first else structs[1:]])})
    assert written(table, "stream", tmp_path / "rows") == [{"text": structs if null_first else structs[1:]}]


def test_a_document_that_is_not_json_costs_its_row_alone(tmp_path: Path) -> None:
    storage = pa.array(['{"a": 1}', "{", "2"], pa.string())
    pq.write_table(pa.table({"text": pa.ExtensionArray.from_storage(pa.json_(), storage)}), tmp_path / "rows")
    plan = plan_source(open_source(str(tmp_path / "rows")), 0, 1 << 20)
    batch, bad = read_chunk(plan.chunks[0])
    assert [row["text"] for row in batch.rows] == [{"a": 1}, 2]
    assert [(row.record, row.code) for row in bad] == [(2, "invalid-json")]


def test_saved_datasets_give_what_their_parquet_gives(tmp_path: Path) -> None:
    import datasets

    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "extra": None},
                {"role": "assistant", "content": "b", "extra": 1},
            ]
        },
        {"messages": [{"role": "user", "content": "c", "extra": 2}]},
    ]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "rows.parquet"))
    found = []
    for name in ("saved", "rows.parquet"):
        plan = plan_source(open_source(str(tmp_path / name)), 0, 1 << 20)
        found.append([row for piece in plan.chunks for row in read_chunk(piece)[0].rows])
    assert found[0] == found[1]
    assert "extra" not in found[0][0]["messages"][0]
