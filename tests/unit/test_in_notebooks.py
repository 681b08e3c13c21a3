"""What a notebook gives and shows: opened sets, paths that come one by one, mistakes, completion, short texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sftdata
import sfttrain
from tests.advice import ROOT

TOKENIZER = ROOT / "examples/tokenizer"


def prepare(output: Path, inputs: Any, **settings: Any) -> Any:
    given = {"tokenizer": TOKENIZER, "max_length": 64, "workers": 1} | settings
    return sftdata.prepare(inputs, output=output, **given)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with two files of chats."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in "ab":
        chat = [{"role": "user", "content": name}, {"role": "assistant", "content": "A"}]
        (folder / f"{name}.jsonl").write_text(json.dumps({"messages": chat}) + "\n", encoding="utf-8")
    return folder


def test_an_opened_set_is_taken_wherever_a_folder_is(rows: Path, tmp_path: Path) -> None:
    made = prepare(tmp_path / "set", rows)
    opened = sftdata.open(tmp_path / "set")
    assert sftdata.verify(opened).ok
    assert sftdata.diff(opened, tmp_path / "set").equal
    assert sftdata.audit(opened) == sftdata.audit(tmp_path / "set")
    assert sftdata.export(opened, to="datasets", output=tmp_path / "out").digest == made.digest
    assert sftdata.view(opened, output=tmp_path / "a", max_length=32).max_length == 32
    assert sftdata.view([opened], output=tmp_path / "b", max_length=32).max_length == 32
    assert sftdata.open(opened).manifest == made


def test_paths_may_come_one_by_one(rows: Path, tmp_path: Path) -> None:
    paths = sorted(rows.glob("*.jsonl"))
    listed = prepare(tmp_path / "listed", paths)
    assert prepare(tmp_path / "each", iter(paths)).digest == listed.digest
    lines = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    assert prepare(tmp_path / "objects", lines).ledger.rows_in == 2


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no set": (lambda _: sftdata.open(None), "found NoneType; expected the folder"),  # type: ignore[arg-type]
    "no other set": (lambda set: sftdata.diff(set, 5), "found int; expected the folder"),  # type: ignore[arg-type]
    "no function": (
        lambda _: sftdata.preview("x", tokenizer=TOKENIZER, formatter=5),  # type: ignore[arg-type]
        "formatter: found int; expected a function, or its name",
    ),
    "nothing to preview": (
        lambda _: sftdata.preview([{"text": "a"}], tokenizer=TOKENIZER, number=0),
        "number: found 0; expected 1 or more",
    ),
    "a file as a stream": (lambda _: sftdata.stream(Path("x"), tokenizer=TOKENIZER), "expected rows"),  # type: ignore[arg-type]
    "nothing as a stream": (lambda _: sftdata.stream(None, tokenizer=TOKENIZER), "found NoneType"),  # type: ignore[arg-type]
    "no rows at a time": (
        lambda _: sftdata.stream([], tokenizer=TOKENIZER, buffer_rows=0),
        "buffer_rows: found 0; expected 1 or more",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_argument_is_one_line(mistake: str, rows: Path, tmp_path: Path) -> None:
    call, said = MISTAKES[mistake]
    prepare(tmp_path / "set", rows)
    with pytest.raises(sftdata.UsageError, match=said) as caught:
        call(tmp_path / "set")
    assert caught.value.fix


def test_a_row_that_there_is_not_is_named_with_the_set(rows: Path, tmp_path: Path) -> None:
    made = prepare(tmp_path / "set", rows)
    opened = sftdata.open(tmp_path / "set")
    with pytest.raises(IndexError, match="set: no row 9; the set has 1"):
        opened[9]
    with pytest.raises(TypeError, match="set: found 'input_ids'; expected the number of a row"):
        opened["input_ids"]  # type: ignore[call-overload]
    assert opened[-1].number == 0
    shown = f"<Manifest {made.digest[:12]}: 1 row, 2 documents, {made.ledger.tokens} tokens, "
    assert repr(made).startswith(shown)


def test_completion_offers_what_is_public_and_nothing_else() -> None:
    for package in (sftdata, sfttrain):
        assert dir(package) == sorted(package.__all__)
        assert all(getattr(package, name) is not None for name in sftdata.__all__ if package is sftdata)
