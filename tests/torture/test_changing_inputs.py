"""Files that change while a run reads them: the run ends with a set of one version, or with one line that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sftdata.errors import DataError, IntegrityError, SftError, UsageError
from sftdata.set.manifest import read_manifest, seal, write_manifest
from sftdata.set.verify import verify
from tests.torture.runs import content, prepare, write_chats
from tests.unit.test_unchanged import CHANGES, overwrite

pytestmark = pytest.mark.slow

SLICES = {"slice_bytes": 100_000, "max_length": 256}


def chats(path: Path, rows: int, word: str) -> Path:
    """Rows of one length, whatever the word of five letters."""
    with path.open("w") as lines:
        for number in range(rows):
            turns = [
                {"role": "user", "content": f"{number:05}"},
                {"role": "assistant", "content": f"{word} " * 40},
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_stops_the_run_and_the_next_one_is_right(
    place: Path, at_first_slice: Callable[[Callable[[], object]], None], change: str
) -> None:
    data = chats(place / "rows.jsonl", 2000, "ALPHA")
    old, new = data.read_bytes(), chats(place / "new.jsonl", 2000, "BRAVO").read_bytes()
    wanted = prepare(data, place / "alpha" / "set", **SLICES).digest
    at_first_slice(lambda: CHANGES[change](data, new))
    with pytest.raises(
        DataError, match=f"{data}: changed while it was read; .* Fix: run the same command again"
    ) as caught:
        prepare(data, place / "set", **SLICES)
    assert caught.value.exit_code == 3
    now = data.read_bytes()
    overwrite(data, old)
    done = len(list((place / "set.partial" / "slices").glob("*.json")))
    assert done
    assert prepare(data, place / "set", **SLICES).digest == wanted
    overwrite(data, now)
    other = prepare(data, place / "set", overwrite=True, max_rejects="100%", **SLICES)
    assert other.digest == prepare(data, place / "bravo" / "set", max_rejects="100%", **SLICES).digest
    assert not verify(place / "set").problems


def test_after_a_change_the_same_command_makes_a_set_of_the_new_version(
    place: Path, at_first_slice: Callable[[Callable[[], object]], None]
) -> None:
    data = chats(place / "rows.jsonl", 2000, "ALPHA")
    new = chats(place / "new.jsonl", 2000, "BRAVO").read_bytes()
    at_first_slice(lambda: overwrite(data, new))
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(data, place / "set", **SLICES)
    made = prepare(data, place / "set", **SLICES)  # the advice, followed
    assert made.digest == prepare(data, place / "bravo" / "set", **SLICES).digest
    assert content(place / "set") == content(place / "bravo" / "set")


def test_two_versions_of_a_prompt_template_are_never_mixed(
    place: Path, at_first_slice: Callable[[Callable[[], object]], None]
) -> None:
    data = place / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": f"{n}", "output": "yes " * 40}) + "\n" for n in range(2000))
    )
    template = place / "template.txt"
    template.write_text("ALPHA {instruction}\n{output}")
    more = {"prompt_template": str(template), "kind": "text", "format": "alpaca"} | SLICES
    try:
        wanted = prepare(data, place / "alpha" / "set", **more)
    except UsageError as error:
        pytest.fail(str(error))
    at_first_slice(lambda: template.write_text("BRAVO {instruction}\n{output}"))
    made = prepare(data, place / "set", **more)
    assert made.digest == wanted.digest
    with pytest.raises(UsageError, match="prompt_template_text"):
        prepare(data, place / "set", **more)


def test_rows_and_blank_lines_are_all_that_the_sources_hold(place: Path) -> None:
    data = write_chats(place / "rows.jsonl", 30)
    data.write_bytes(data.read_bytes().replace(b"\n", b"\n\n", 4) + b" \n\n")
    made = prepare(data, place / "set")
    assert (made.ledger.rows_in, made.blank_lines, made.sources[0].rows) == (30, 6, 36)
    assert not verify(place / "set").problems


FORGED: dict[str, Callable[[dict[str, object]], dict[str, object]]] = {
    "more rows in a source": lambda source: source | {"rows": 2**53},
    "fewer rows in a source": lambda source: source | {"rows": 29},
    "ids of no row": lambda source: source | {"first_id": 2**52},
}


@pytest.mark.parametrize("name", FORGED)
def test_sources_that_do_not_hold_the_rows_are_refused_by_every_reader(place: Path, name: str) -> None:
    made = prepare(write_chats(place / "rows.jsonl", 30), place / "set")
    plain = made.to_json()
    plain["sources"] = [FORGED[name](plain["sources"][0])]
    forged = msgspec.convert(plain, type(made), str_keys=True)
    with pytest.raises(IntegrityError, match="the sources"):
        seal(forged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sftdata.set.manifest._check_sources", lambda *_: None)
        write_manifest(place / "set", forged)
    for read in (verify, read_manifest):
        with pytest.raises(SftError, match="the sources") as caught:
            read(place / "set")
        assert caught.value.exit_code == 4


def test_sets_that_do_not_count_blank_lines_are_read_as_before(place: Path) -> None:
    made = prepare(write_chats(place / "rows.jsonl", 30), place / "set")
    before = write_manifest(place / "set", msgspec.structs.replace(made, blank_lines=None))
    assert before.digest == made.digest
    assert b"blank_lines" not in (place / "set" / "manifest.json").read_bytes()
    assert not verify(place / "set").problems


def test_the_state_of_a_file_is_seen_to_change(place: Path) -> None:
    """What the check of columnar files relies on: no write goes by without a new time of change."""
    path = place / "file"
    path.write_bytes(b"a" * 100)
    for _ in range(5):
        from sftdata.sources.seals import states_of

        before = states_of([str(path)])
        overwrite(path, os.urandom(100))
        assert states_of([str(path)]) != before
