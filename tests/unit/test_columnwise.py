"""JSON that holds a table by columns is named as such, and the command in the advice gives its rows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sftdata.errors import UsageError
from sftdata.formats.detect import detect
from sftdata.sources.source import open_source, plan_source

TABLES = {
    "alpaca": [{"instruction": f"Do {n}", "output": f"Done {n}."} for n in range(12)],
    "chats": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}], "id": n}
        for n in range(3)
    ],
    "one row": [{"question": "Q", "answer": "A"}],
}
SHAPES = {
    "lists": (lambda rows: {name: [row[name] for row in rows] for name in rows[0]}, "by columns"),
    "objects": (
        lambda rows: {name: {str(n): row[name] for n, row in enumerate(rows)} for name in rows[0]},
        "by columns",
    ),
    "split": (
        lambda rows: {"columns": list(rows[0]), "index": [0], "data": [list(row.values()) for row in rows]},
        "orient=split",
    ),
    "index": (lambda rows: {str(n): row for n, row in enumerate(rows)}, "orient=index"),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_table_by_columns_is_named_and_the_advice_gives_its_rows(
    table: str, shape: str, indent: int | None, tmp_path: Path
) -> None:
    build, said = SHAPES[shape]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(build(TABLES[table]), indent=indent))
    with pytest.raises(UsageError, match=said) as refused:
        detect([plan_source(open_source(str(path)), 0, 1 << 20)])
    assert shutil.which("jq"), "the advice is tried with jq: apt-get install jq"
    command = (
        refused.value.fix.partition(": ")[2]
        .replace("FILE", str(path))
        .replace("rows.jsonl", str(tmp_path / "rows.jsonl"))
    )
    subprocess.run(command, shell=True, check=True)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == TABLES[table]


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": [{}, {}],
        },
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_a_row_whose_columns_are_lists_stays_a_row(row: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(row))
    assert detect([plan_source(open_source(str(tmp_path / "rows.json")), 0, 1 << 20)]).matched == 1
