"""Where a row stands: its file, its number there, and what is numbered."""

from __future__ import annotations

from typing import Literal

Unit = Literal["line", "record", "element", "row"]
"""What a source is counted in: lines of text, records of a CSV, elements of a JSON array, rows of a table; the first is 1."""

UNITS: dict[str, Unit] = {
    "csv": "record",
    "json": "element",
    "parquet": "row",
    "arrow": "row",
    "saved": "row",
    "hub": "row",
}
"""The unit of each container that is not read line by line."""


def place(file: str, number: int, unit: Unit = "line", line: int | None = None) -> str:
    """Return the place of a row in words; `file:line`, which editors follow, wherever the line is known.

    Args:
        number: of the row in its file, in this unit.
        line: where it starts, if rows of this unit are not lines but begin on one.

    >>> place("rows.jsonl", 3), place("rows.parquet", 3, "row"), place("rows.csv", 3, "record", line=6)
    ('rows.jsonl:3', 'rows.parquet, row 3', 'rows.csv:6 (record 3)')
    """
    if unit == "line":
        return f"{file}:{number}"
    return f"{file}, {unit} {number}" if line is None else f"{file}:{line} ({unit} {number})"
