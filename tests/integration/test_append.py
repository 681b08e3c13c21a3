"""The same command on inputs that changed: every file of the set as preparing anew writes it, and only what changed is made."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sftdata
from sftdata.errors import SftError, UsageError
from sftdata.set.manifest import read_manifest
from sftdata.set.slices import read_slices
from sftdata.set.verify import verify
from tests.torture.runs import TOKENIZER, WORDS, content

Row = dict[str, Any]
Files = dict[str, list[Row]]


def rows_of(rng: random.Random, count: int) -> list[Row]:
    """Chats; some over-long, some with nothing trained, some that are rejected, some that are counted, some blank."""
    found: list[Row] = []
    for _ in range(count):
        kind = rng.choice(["chat"] * 7 + ["long", "untrained", "rejected", "typed", "blank"])
        role = "narrator" if kind == "rejected" else "assistant"
        text = " ".join(rng.choices(WORDS, k=90 if kind == "long" else rng.randint(2, 25)))
        text += "<|im_end|>" if kind == "typed" else ""
        turns = [{"role": "user", "content": text[:60]}, {"role": role, "content": text}]
        turns[1] |= {"train": False} if kind == "untrained" else {}
        found.append({} if kind == "blank" else {"messages": turns})
    return found


def as_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) * bool(row) + "\n" for row in rows).encode()


def as_array(rows: list[Row]) -> bytes:
    return ("[" + ",\n ".join(json.dumps(row) for row in rows if row) + "]\n").encode()


def as_csv(rows: list[Row]) -> bytes:
    out = StringIO()
    writer = csv.writer(out)
    writer.writerow(["prompt", "completion"])
    for row in rows:
        writer.writerow([turn["content"] + '\n"' for turn in row["messages"]] if row else [])
    return out.getvalue().encode()


def as_parquet(rows: list[Row]) -> bytes:
    pairs = [
        dict(zip(("prompt", "completion"), (turn["content"] for turn in row["messages"]), strict=True))
        for row in rows
        if row
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(pairs), sink, row_group_size=40)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    ".jsonl": as_lines,
    ".json": as_array,
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".jsonl.gz": lambda rows: gzip.compress(as_lines(rows), mtime=0),
}


def write(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, rows in files.items():
        (folder / name).write_bytes(WRITERS[name[name.index(".") :]](rows))
    return folder


def prepare(data: Path | list[Path], output: Path, **more: Any) -> list[str]:
    """Prepare, and return what was said."""
    said: list[str] = []
    basic = {
        "max_length": 64,
        "slice_bytes": 4000,
        "max_rejects": "60%",
        "engine": "tokenizers",
        "workers": 1,
    }
    sftdata.prepare(data, tokenizer=TOKENIZER, output=output, on_note=said.append, **basic | more)
    return said


def reused(said: list[str]) -> tuple[int, int]:
    """Return how many slices were reused, and of how many."""
    (line,) = (line for line in said if "the inputs changed" in line)
    found = re.search(r"(\d+) of (\d+) slices? reused, (\d+) made anew", line)
    assert found
    assert int(found[1]) + int(found[3]) == int(found[2])
    return int(found[1]), int(found[2])


def check(folder: Path, files: Files, **more: Any) -> tuple[int, int]:
    """Bring the set up to date; assert that it is the one made anew, to the last byte; return what was reused."""
    said = prepare(write(folder / "rows", files), folder / "set", **more)
    shutil.rmtree(folder / "anew", ignore_errors=True)
    prepare(folder / "rows", folder / "anew", **more)
    assert content(folder / "set") == content(folder / "anew")
    assert {"set.partial", "set.partial.replaced"}.isdisjoint(os.listdir(folder))
    if any("up to date" in line for line in said):
        return -1, -1
    found = reused(said)
    assert found[1] == len(read_slices(folder / "set"))
    return found


# ------------------------------------------------------------------------------------------------- the lines


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("share", [1, 5, 12.5])
def test_appending_makes_the_end_anew(packing: str, share: float, tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = rows_of(rng, 400)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set", packing=packing)
    more = rows_of(rng, int(len(rows) * share / 100))
    kept, slices = check(tmp_path, {"a.jsonl": rows + more}, packing=packing)
    assert slices > 15
    assert slices - kept <= 2 + share * slices / 100


def test_a_line_at_the_top_moves_all_ids_and_makes_at_most_two_slices_anew(tmp_path: Path) -> None:
    rows = rows_of(random.Random(4), 400)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    kept, slices = check(tmp_path, {"a.jsonl": rows_of(random.Random(0), 1) + rows})
    assert slices - kept <= 2
    assert kept > 15
    kept, slices = check(tmp_path, {"a.jsonl": rows})
    assert slices - kept <= 2
    assert verify(tmp_path / "set").ok


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_row_changed_in_the_middle(suffix: str, tmp_path: Path) -> None:
    rows, name = rows_of(random.Random(5), 300), f"a{suffix}"
    prepare(write(tmp_path / "rows", {name: rows}), tmp_path / "set")
    changed = [*rows[:150], *rows_of(random.Random(0), 1), *rows[151:]]
    kept, slices = check(tmp_path, {name: changed})
    assert slices > 4
    assert kept == 0 if suffix == ".parquet" else slices - kept <= 3


def test_a_weight_for_each_token_is_kept_too(tmp_path: Path) -> None:
    rows = rows_of(random.Random(5), 120)
    for number, row in enumerate(rows):
        if row:
            row["messages"][1]["weight"] = number % 4 / 2
    settings = {"loss_weights": True}
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set", **settings)
    kept, _ = check(tmp_path, {"a.jsonl": [*rows_of(random.Random(0), 1), *rows]}, **settings)
    assert kept > 4


# ------------------------------------------------------------------------------------------------- the files


def several() -> Files:
    names = ("a.jsonl", "b.csv", "c.json", "d.parquet", "e.jsonl.gz", "f.jsonl")
    return {name: rows_of(random.Random(name), 90) for name in names}


def test_a_file_put_in_taken_out_or_renamed_among_several(tmp_path: Path) -> None:
    files = several()
    prepare(write(tmp_path / "rows", files), tmp_path / "set")
    everything = len(read_slices(tmp_path / "set"))
    kept, slices = check(tmp_path, {**files, "c2.jsonl": rows_of(random.Random(0), 30)})
    assert kept >= everything - 3
    kept, slices = check(tmp_path, files)
    assert kept >= everything - 3
    renamed = {name.replace("b.csv", "bé.csv").replace("e.j", "e2.j"): rows for name, rows in files.items()}
    kept, slices = check(tmp_path, renamed)
    assert kept == slices
    for name in renamed:
        kept, slices = check(tmp_path, {other: rows for other, rows in renamed.items() if other != name})
        assert kept > everything // 2
    kept, slices = check(tmp_path, files)
    assert kept > everything // 2


def test_a_file_named_in_addition_is_taken_as_growth_and_other_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "rows", several())
    prepare([folder / "a.jsonl"], tmp_path / "set")
    kept, _ = reused(prepare([folder / "a.jsonl", folder / "f.jsonl"], tmp_path / "set"))
    assert kept > 0
    before = content(tmp_path / "set")
    for other in ([folder / "f.jsonl"], [folder / "b.csv"]):
        with pytest.raises(UsageError, match=r"holds a finished set made otherwise \(.*sources differ\)"):
            prepare(other, tmp_path / "set")
    assert content(tmp_path / "set") == before


def test_other_settings_are_refused_also_where_the_inputs_changed(tmp_path: Path) -> None:
    rows = rows_of(random.Random(5), 60)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    write(tmp_path / "rows", {"a.jsonl": rows * 2})
    with pytest.raises(UsageError, match=r"made otherwise \(max_length, sources differ\)"):
        prepare(tmp_path / "rows", tmp_path / "set", max_length=32)
    said = prepare(tmp_path / "rows", tmp_path / "set", max_length=32, overwrite=True)
    assert not any("reused" in line for line in said)


# ------------------------------------------------------------------------------- what must not be taken over


def damaged(folder: Path, kind: str) -> None:
    path = sorted(folder.glob(f"{kind}-*.arrow"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["shard", "rest", "index"])
def test_a_damaged_slice_is_made_anew(kind: str, tmp_path: Path) -> None:
    rows = rows_of(random.Random(6), 200)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "sound")
    grown: Files = {"a.jsonl": [*rows, *rows_of(random.Random(0), 2)]}
    kept, slices = check(tmp_path, grown)
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "sound").rename(tmp_path / "set")
    damaged(tmp_path / "set", kind)
    assert check(tmp_path, grown) == (kept - 1, slices)
    assert verify(tmp_path / "set").ok


@pytest.mark.parametrize("name", ["slices.jsonl", "rejects.jsonl", "dropped.jsonl", "counted.jsonl"])
def test_a_damaged_list_costs_time_alone(name: str, tmp_path: Path) -> None:
    """Files of another size are refused before; these have theirs."""
    rows = rows_of(random.Random(6), 200)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[::-1])
    kept, slices = check(tmp_path, {"a.jsonl": [*rows_of(random.Random(0), 2), *rows]})
    assert kept < slices


def test_a_set_made_by_another_version_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(random.Random(6), 200)
    monkeypatch.setattr("sftdata.plan.software", lambda: {"sftdata": "0.0.1"})
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    monkeypatch.undo()
    assert check(tmp_path, {"a.jsonl": [*rows, *rows_of(random.Random(0), 2)]})[0] == 0


def test_a_csv_with_other_columns_is_made_anew(tmp_path: Path) -> None:
    """The header is none of the bytes of a slice, and says what they mean."""
    folder = write(tmp_path / "rows", {"a.csv": rows_of(random.Random(6), 200)})
    prepare(folder, tmp_path / "set")
    path = folder / "a.csv"
    path.write_bytes(path.read_bytes().replace(b"prompt,completion", b"completion,prompt"))
    assert reused(prepare(folder, tmp_path / "set"))[0] == 0
    prepare(folder, tmp_path / "anew")
    assert content(tmp_path / "set") == content(tmp_path / "anew")


def test_a_formatter_that_changed_is_another_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rows = rows_of(random.Random(6), 30)
    (tmp_path / "mine.py").write_text("def f(row):\n    return row\n")
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set", formatter="mine:f")
    (tmp_path / "mine.py").write_text("def f(row):\n    return {**row}\n")
    write(tmp_path / "rows", {"a.jsonl": rows * 2})
    with pytest.raises(UsageError, match="formatter_sha256"):
        prepare(tmp_path / "rows", tmp_path / "set", formatter="mine:f")


# ----------------------------------------------------------------------------------- readers, and stopped runs


def test_the_old_set_is_whole_until_the_new_one_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(random.Random(7), 150)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    before = content(tmp_path / "set")
    write(tmp_path / "rows", {"a.jsonl": [*rows_of(random.Random(0), 1), *rows]})

    def stopped(*_: object) -> None:
        assert content(tmp_path / "set") == before
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sftdata.run.conclude", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "rows", tmp_path / "set")
    assert content(tmp_path / "set") == before
    said = prepare(tmp_path / "rows", tmp_path / "set")
    assert any(line.startswith("Resuming: ") for line in said)
    assert reused(said)[0] > 3
    prepare(tmp_path / "rows", tmp_path / "anew")
    assert content(tmp_path / "set") == content(tmp_path / "anew")


def test_inputs_that_change_again_after_a_stop_begin_from_the_finished_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(random.Random(7), 150)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    write(tmp_path / "rows", {"a.jsonl": [*rows_of(random.Random(0), 9), *rows]})
    with monkeypatch.context() as patch:
        patch.setattr("sftdata.run.conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "rows", tmp_path / "set")
    kept, _ = check(tmp_path, {"a.jsonl": [*rows, *rows_of(random.Random(1), 9)]})
    assert kept > 3


def test_a_refused_update_leaves_the_old_set(tmp_path: Path) -> None:
    rows = [
        row for row in rows_of(random.Random(7), 100) if row and row["messages"][1]["role"] == "assistant"
    ]
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set", max_rejects="1%")
    before = content(tmp_path / "set")
    write(tmp_path / "rows", {"a.jsonl": rows + [{"messages": []}] * 10})
    with pytest.raises(SftError, match="rows rejected"):
        prepare(tmp_path / "rows", tmp_path / "set", max_rejects="1%")
    assert content(tmp_path / "set") == before
    assert read_manifest(tmp_path / "set").digest
    kept, _ = check(tmp_path, {"a.jsonl": [*rows, *rows[:5]]}, max_rejects="1%")
    assert kept >= 3


def test_links_that_the_file_system_refuses_are_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    rows = rows_of(random.Random(7), 100)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    assert check(tmp_path, {"a.jsonl": [*rows, *rows_of(random.Random(0), 2)]})[0] > 3


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_set(workers: int, tmp_path: Path) -> None:
    rows = rows_of(random.Random(8), 200)
    prepare(write(tmp_path / "rows", {"a.jsonl": rows}), tmp_path / "set")
    write(tmp_path / "rows", {"a.jsonl": [*rows_of(random.Random(0), 1), *rows[:100], *rows[101:]]})
    assert reused(prepare(tmp_path / "rows", tmp_path / "set", workers=workers))[0] > 5
    prepare(tmp_path / "rows", tmp_path / "anew")
    assert content(tmp_path / "set") == content(tmp_path / "anew")


# ---------------------------------------------------------------------------------------------- random edits


def edited(rng: random.Random, files: Files) -> Files:
    """Change some files, or which there are."""
    files = {name: list(rows) for name, rows in files.items()}
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*files])
        rows = files[name]
        place = rng.choice([0, len(rows), rng.randint(0, len(rows))])
        match rng.choice(["put in", "put in", "take out", "change", "move", "rename", "remove", "add"]):
            case "put in":
                rows[place:place] = rows_of(rng, rng.choice([1, 1, 5, 40]))
            case "take out":
                del rows[place : place + rng.choice([1, 1, 20])]
            case "change":
                rows[place : place + 1] = rows_of(rng, 1)
            case "move":
                files[name] = rows[place:] + rows[:place]
            case "rename":
                files = {
                    other if other != name else f"{rng.choice('abcdxyz')}{other}": r
                    for other, r in files.items()
                }
            case "remove" if len(files) > 1:
                del files[name]
            case _:
                files[f"{rng.choice('abcdxyz')}{len(files)}{rng.choice([*WRITERS])}"] = rows_of(rng, 40)
    return {name: rows or rows_of(rng, 3) for name, rows in files.items()}


@pytest.mark.parametrize(
    "seed",
    [
        *range(4),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 100)),
        *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(100, 500)),
    ],
)
def test_after_any_edits_the_set_is_the_one_made_anew(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    files: Files = {f"{name}{rng.choice([*WRITERS])}": rows_of(rng, rng.randint(20, 120)) for name in "abc"}
    more = {
        "packing": rng.choice(["bfd", "wrapped", "none"]),
        "slice_bytes": rng.choice([900, 4000, 20_000]),
        "max_length": rng.choice([24, 64, 300]),
    }
    more |= {"overlong": rng.choice(["truncate", "drop", "split"])} if more["packing"] != "wrapped" else {}
    prepare(write(tmp_path / "rows", files), tmp_path / "set", **more)
    for _ in range(5):
        files = edited(rng, files)
        check(tmp_path, files, **more)
    assert verify(tmp_path / "set").ok
