"""A formatter is its code: other code makes another set, is never resumed with, and is never mixed in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sftdata
from sftdata.errors import DataError, UsageError
from sftdata.formats.formatter import code_sha256, formatter_sha256, load_formatter, read_code
from sftdata.set.verify import verify
from tests.torture.runs import Command, prepare, settings, write_chats

pytestmark = pytest.mark.slow

KEEP = "def f(row):\n    return row\n"
DROP = "def f(row):\n    return {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'BRAVO'}]}\n"


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, whose modules are found."""
    monkeypatch.chdir(place)
    paths = list(sys.path)
    yield place
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(place)):
            del sys.modules[name]
    sys.path[:] = paths
    load_formatter.cache_clear()


def test_a_finished_set_of_other_code_is_not_up_to_date(here: Path) -> None:
    data = write_chats(here / "rows.jsonl", 30)
    (here / "forms.py").write_text(KEEP)
    made = prepare(data, here / "set", formatter="forms:f")
    assert prepare(data, here / "set", formatter="forms:f").digest == made.digest
    (here / "forms.py").write_text(DROP)
    with pytest.raises(UsageError, match=r"\(formatter_sha256 differ\)"):
        prepare(data, here / "set", formatter="forms:f")
    other = prepare(data, here / "set", formatter="forms:f", overwrite=True)
    assert other.digest != made.digest
    assert other.ledger.rows_rejected == {}


def test_an_unfinished_run_of_other_code_is_not_resumed(
    here: Path, at_first_slice: Callable[..., None]
) -> None:
    data = write_chats(here / "rows.jsonl", 60)
    (here / "forms.py").write_text(KEEP)

    def stop() -> None:
        raise KeyboardInterrupt

    at_first_slice(stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, here / "set", formatter="forms:f")
    (here / "forms.py").write_text(DROP)
    with pytest.raises(UsageError, match=r"an unfinished set made with other settings \(formatter_sha256: "):
        prepare(data, here / "set", formatter="forms:f")
    (here / "forms.py").write_text(KEEP)
    resumed = prepare(data, here / "set", formatter="forms:f")
    assert resumed.digest == prepare(data, here / "whole" / "set", formatter="forms:f").digest


@pytest.mark.parametrize("workers", [1, 2])
def test_code_that_changes_while_a_run_begins_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Between planning and the first row of a worker."""
    data = write_chats(here / "rows.jsonl", 60)
    (here / "forms.py").write_text(KEEP)
    from sftdata import run

    real = run.run_tasks

    def change(*arguments: object) -> object:
        (here / "forms.py").write_text(DROP)
        load_formatter.cache_clear()
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "run_tasks", change)
    with pytest.raises(DataError, match='formatter="forms:f": its code changed while it was in use'):
        sftdata.prepare(**settings(data, here / "set", formatter="forms:f", workers=workers))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    made = prepare(data, here / "set", formatter="forms:f")  # the advice, followed
    assert made.digest == prepare(data, here / "whole" / "set", formatter="forms:f").digest


def test_code_that_changes_later_does_not_reach_a_run(
    here: Path, at_first_slice: Callable[..., None]
) -> None:
    data = write_chats(here / "rows.jsonl", 60)
    (here / "forms.py").write_text(KEEP)
    whole = prepare(data, here / "whole" / "set", formatter="forms:f")
    at_first_slice(lambda: (here / "forms.py").write_text(DROP))
    assert prepare(data, here / "set", formatter="forms:f").digest == whole.digest
    assert not verify(here / "set").problems


PACKAGE = {
    "forms.py": "import beside\nfrom package import inner\nimport json\ndef f(row):\n    return inner.g(beside.h(row))\n",
    "beside.py": "def h(row):\n    import later\n    return later.i(row)\n",
    "later.py": "def i(row):\n    return row\n",
    "package/__init__.py": "",
    "package/inner.py": "from .deep import j\ndef g(row):\n    return j(row)\n",
    "package/deep.py": "def j(row):\n    return row\n",
    "unrelated.py": "x = 1\n",
    "json.py.txt": "",
}


@pytest.fixture
def package(here: Path) -> Path:
    for name, text in PACKAGE.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)
    return here


@pytest.mark.parametrize("name", PACKAGE)
def test_what_a_formatter_imports_from_beside_it_is_its_code_too(package: Path, name: str) -> None:
    row = {"a": 1}
    before = formatter_sha256("forms:f")
    assert load_formatter("forms:f", before)(row) == row
    (package / name).write_text(PACKAGE[name] + "# changed\n")
    assert (formatter_sha256("forms:f") != before) == (name not in ("unrelated.py", "json.py.txt"))


def test_changed_code_runs_in_the_same_process_and_second(package: Path) -> None:
    """Python's own cache of compiled modules would not see a change of the same length within one second."""
    for number in range(1, 6):
        (package / "beside.py").write_text(f"def h(row):\n    return {number}\n")
        assert load_formatter("forms:f", formatter_sha256("forms:f"))({}) == number


def test_the_callers_own_modules_stay_as_they_are(package: Path) -> None:
    sys.path.insert(0, str(package))
    beside = importlib.import_module("beside")
    load_formatter("forms:f", formatter_sha256("forms:f"))
    assert sys.modules["beside"] is beside


def test_modules_of_a_package_and_without_source_are_found(package: Path) -> None:
    sys.path.insert(0, str(package))
    assert set(read_code("package.inner")) == {"package", "package.deep", "package.inner"}
    assert read_code("math") == {}
    assert read_code("no_such_module") == {}
    assert load_formatter("math:floor", formatter_sha256("math:floor"))(1.5) == 1
    assert code_sha256({"a": b"b"}) != code_sha256({"ab": b""})


def test_what_is_installed_is_not_followed() -> None:
    assert all(name.partition(".")[0] == "msgspec" for name in read_code("msgspec.json"))


def test_a_formatter_that_cannot_be_run_is_refused_before_anything_is_read(here: Path) -> None:
    data = write_chats(here / "rows.jsonl", 60)
    (here / "broken.py").write_text("def f(row:\n")
    for spec in ("broken:f", "missing:f", "json:missing", "nonsense"):
        code, said = Command(data, here / "set", 1, flags=["--formatter", spec]).finish()
        assert code == 2
        assert len(said.splitlines()) == 1, said
        assert said.startswith(f"--formatter {spec}: ")
    assert not (here / "set.partial").exists()
