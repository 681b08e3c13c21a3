"""JSON that holds a table by its columns, as pandas and others write it: told by the row that it would have first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftdata.formats.registry import FORMATS

RowDict = dict[str, Any]

_ROWS = "> rows.jsonl"
_FIXES = {
    "lists": "jq -c '. as $all | range([.[]][0] | length) as $i | $all | map_values(.[$i])' FILE",
    "objects": "jq -c '. as $all | ([.[]][0] | keys_unsorted[]) as $i | $all | map_values(.[$i])' FILE",
    "split": "jq -c '.columns as $names | .data[] | [$names, .] | transpose | map({(.[0]): .[1]}) | add' FILE",
    "index": "jq -c '.[]' FILE",
}
_SHAPES = {
    "lists": "one object holds the whole table by columns: each is a list of its values",
    "objects": "one object holds the whole table by columns: each is an object of its values by row (pandas to_json)",
    "split": "one object holds the whole table as the lists columns and data (pandas orient=split)",
    "index": "one object holds the rows by their number (pandas orient=index)",
}


def shape_of(row: RowDict) -> str | None:
    """Return how an object holds a table; None for one that does not, or whose rows would be in no known format."""
    return next((shape for shape, first in _first_rows(row) if _is_row(first)), None)


def explain_columnwise(rows: Sequence[RowDict]) -> tuple[str, str]:
    """Return the shape and the command that writes its rows as lines."""
    shape = shape_of(rows[0]) or "lists"
    return _SHAPES[shape], f"write it as rows: {_FIXES[shape]} {_ROWS}"


def _first_rows(row: RowDict) -> list[tuple[str, RowDict]]:
    values = list(row.values())
    if values and all(isinstance(value, list) and value and len(value) == len(values[0]) for value in values):
        return [("lists", {name: value[0] for name, value in row.items()})]
    if values and all(
        isinstance(value, dict) and value and value.keys() == values[0].keys() for value in values
    ):
        number = next(iter(values[0]))
        by_column = ("objects", {name: value[number] for name, value in row.items()})
        return [("index", values[0])] if next(iter(row)).isdecimal() else [by_column]
    names, data = row.get("columns"), row.get("data")
    if (
        isinstance(names, list)
        and isinstance(data, list)
        and data
        and isinstance(data[0], list)
        and len(data[0]) == len(names)
    ):
        return [("split", dict(zip(map(str, names), data[0], strict=True)))]
    return []


def _is_row(row: RowDict) -> bool:
    return any(entry.readings(row, {}) for entry in FORMATS.values())
