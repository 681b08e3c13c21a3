"""A file that is named .csv or .tsv is a table or an error in words, and each record is found on the line that is named."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.errors import UsageError
from sftdata.sources.source import open_source, plan_source, read_chunk
from sftdata.sources.streams import close_streams

NAMES = ("question", "answer", "Notes (ü), 2", "id")
DELIMITERS = {".csv": ",;|\t", ".tsv": ",;|\t"}


def quoted(text: str, delimiter: str, always: bool) -> str:
    """RFC 4180 by hand, apart from the csv module."""
    if always or any(mark in text for mark in (delimiter, '"', "\n", "\r")) or text != text.strip():
        return '"' + text.replace('"', '""') + '"'
    return text


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=9)


@settings(deadline=None, max_examples=150)
@given(
    columns=st.lists(st.sampled_from(NAMES), min_size=2, max_size=4, unique=True),
    table=st.lists(st.lists(cells, min_size=4, max_size=4), min_size=1, max_size=9),
    delimiter=st.sampled_from(",;|\t"),
    suffix=st.sampled_from([".csv", ".tsv"]),
    index=st.booleans(),
    trailing=st.booleans(),
    directive=st.booleans(),
    mark=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    always=st.booleans(),
    slice_bytes=st.integers(1, 80),
    packed=st.booleans(),
)
def test_a_named_table_is_read_with_the_true_line_of_every_record(
    tmp_path_factory: pytest.TempPathFactory, columns: list[str], table: list[list[str]], delimiter: str, suffix: str,
    index: bool, trailing: bool, directive: bool, mark: bool, newline: str, always: bool, slice_bytes: int, packed: bool,
) -> None:  # fmt: skip
    def line_of(fields: list[str]) -> str:
        shown = [quoted(field, delimiter, always) for field in fields]
        return delimiter.join(shown + [""] * trailing) + newline

    text = f"sep={delimiter}{newline}" if directive else ""
    text += line_of([""] * index + columns)
    wanted = []
    for number, values in enumerate(table):
        row = dict(zip(columns, values, strict=False))
        wanted.append((row, text.count("\n") + 1, number + 1))
        text += line_of([str(number)] * index + list(row.values()))
    folder = tmp_path_factory.mktemp("t")
    path = folder / (f"rows{suffix}.gz" if packed else f"rows{suffix}")
    data = b"\xef\xbb\xbf" * mark + text.encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    source = open_source(str(path))
    assert (source.container, source.delimiter) == ("csv", delimiter)
    found = []
    for piece in plan_source(source, 7, slice_bytes).chunks:
        batch, bad = read_chunk(piece)
        assert bad == []
        for row, line, example in zip(
            batch.rows, batch.lines.tolist(), batch.example_ids.tolist(), strict=True
        ):
            read = {name: value for name, value in row.items() if not name.startswith("Unnamed: ")}
            found.append((read, line, piece.record_of(example)))
    close_streams()
    assert found == wanted


def test_one_column_is_a_table_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\nHello\n"Good,\nday"\n')
    source = open_source(str(tmp_path / "a.csv"))
    assert source.columns == ("text",)


REFUSED = {
    "a doubled name": ("a,b,a\n1,2,3\n", "names the column 'a' twice"),
    "no name at all": (",,\n1,2,3\n", "no column of the header has a name"),
    "an open quote": ('a,"b\n1,2\n', "not the header of a table"),
    "not UTF-8": (b"caf\xe9,b\n1,2\n", "not the header of a table"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["rows.csv", "rows.CSV", "rows.tsv"])
def test_a_named_table_without_a_header_is_refused_in_words(kind: str, name: str, tmp_path: Path) -> None:
    data, said = REFUSED[kind]
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    if name.endswith(".tsv") and isinstance(data, str):
        (tmp_path / name).write_text(data.replace(",", "\t"))
    with pytest.raises(UsageError, match=said):
        open_source(str(tmp_path / name))


def test_the_same_bytes_named_as_text_stay_text(tmp_path: Path) -> None:
    for number, text in enumerate([",one,two\n0,a,b\n", "one|two\na|b\n", "sep=;\na;b\n", "a,b,a\n1,2,3\n"]):
        (tmp_path / f"{number}.txt").write_text(text)
        assert open_source(str(tmp_path / f"{number}.txt")).container == "text"


def test_spreadsheets_are_answered_with_what_can_be_read(tmp_path: Path) -> None:
    import zipfile

    for inside, said in (("xl/workbook.xml", "CSV"), ("word/document.xml", r"\.txt"), ("a.jsonl", "unpack")):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(inside, "x")
        (tmp_path / "rows").write_bytes(packed.getvalue())
        with pytest.raises(UsageError, match=said):
            open_source(str(tmp_path / "rows"))
