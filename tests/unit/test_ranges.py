"""A source scanned in ranges is planned as in one pass; rows that are found many at a time are those found one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

import sftdata
from sftdata.errors import InputChangedError, SftError
from sftdata.pipeline import scanned
from sftdata.sources import ranges
from sftdata.sources.borders import grain_of
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.marks import Marks
from sftdata.sources.ranges import Sizes, join, scan, stretches_of
from sftdata.sources.source import open_source, plan_source
from sftdata.workers import Workers
from tests import odd_files

BLOCK = 512
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash blocks so small that small files have many ranges; cut while few grains are known."""
    for module in ("seals", "streams", "ranges"):
        monkeypatch.setattr(f"sftdata.sources.{module}.HASHED_BYTES", BLOCK)
    monkeypatch.setattr("sftdata.sources.cutting._AT_ONCE", 15)
    monkeypatch.setattr("sftdata.sources.ranges._KEPT", 4)


def write(folder: Path, suffix: str, rng: random.Random) -> Path:
    path = folder / f"rows{suffix}"
    path.write_bytes(odd_files.KINDS[suffix](rng))
    return path


def in_ranges(monkeypatch: pytest.MonkeyPatch, folder: Path, case: int) -> tuple[int, int]:
    """Compare the plan in ranges with that in one pass; return ranges, and those whose scan was used."""
    rng = random.Random(case)
    path = write(folder, [*odd_files.KINDS][case % 3], rng)
    chunk, row = rng.choice([1, 100, 2_000, 1 << 20]), rng.choice([200, 5_000, 1 << 26])
    source, range_bytes = open_source(str(path)), BLOCK * rng.choice([1, 2, 3, 8, 20])
    try:
        whole: SourcePlan | str = plan_source(source, 7, chunk, row)
    except SftError as error:
        whole = str(error)
    used = list[object]()
    real = ranges._Join._add_range
    with monkeypatch.context() as patch:
        patch.setattr(
            "sftdata.sources.ranges._Join._add_range", lambda *given: (used.append(given), real(*given))[1]
        )
        for module in ("streams", "arrays"):
            patch.setattr(f"sftdata.sources.{module}.CACHED_BYTES", rng.choice([700, 5_000, 1 << 19]))
        patch.setattr("sftdata.sources.streams.BLOCK_BYTES", rng.choice([300, 5_000, 1 << 20]))
        try:
            found: SourcePlan | str = plan_source(source, 7, chunk, row, range_bytes)
        except SftError as error:
            found = str(error)
    data = path.read_bytes()
    parts = [xxhash.xxh3_128_digest(data[at : at + range_bytes]) for at in range(0, len(data), range_bytes)]
    if isinstance(whole, SourcePlan) and len(parts) > 1 and whole.source.container != "empty":
        whole = replace(whole, xxh3_128=f"{xxhash.xxh3_128_hexdigest(b''.join(parts))}-{len(parts)}")
    assert found == whole
    return len(parts), len(used)


def compare(monkeypatch: pytest.MonkeyPatch, folder: Path, cases: range) -> None:
    found = np.array([in_ranges(monkeypatch, folder, case) for case in cases])
    assert (found[:, 0] > 1).mean() > 0.8
    assert found[:, 1].sum() > len(cases)


def test_ranges_are_planned_as_one_pass(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compare(monkeypatch, tmp_path, range(50))


@pytest.mark.slow
def test_a_thousand_sources_in_ranges_are_planned_as_one_pass(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compare(monkeypatch, tmp_path, range(100, 1100))


# ----------------------------------------------------------------------------------------- rows, one by one


def slow_records(data: bytes, delimiter: int) -> Iterator[bytes]:
    """Yield the records of a table whose fields are all closed, byte by byte."""
    begun, inside, at = 0, False, 0
    while at < len(data):
        byte = data[at]
        if inside and byte == ord('"'):
            inside = data[at + 1 : at + 2] == b'"'
            at += inside
        elif byte == ord('"'):
            inside = at == begun or data[at - 1] == delimiter
        elif byte == ord("\n") and not inside:
            yield data[begun : at + 1]
            begun = at + 1
        at += 1
    if begun < len(data):
        yield data[begun:]


def slow_elements(data: bytes) -> Iterator[tuple[int, int]]:
    text, at = data.decode(), data.decode().index("[") + 1
    while True:
        while text[at] in " \n,":
            at += 1
        if text[at] == "]":
            return
        end = json.JSONDecoder().raw_decode(text, at)[1]
        yield len(text[:at].encode()), len(text[:end].encode())
        at = end


def slow_grains(rows: list[tuple[int, int, bytes, int]], grain: int) -> Marks | SimpleNamespace:
    """Return the boundaries of rows (start, length, text, line), by the rule of borders.py, one by one."""
    places, contents, due = list[tuple[int, int, int]](), list[bytes](), True
    for number, (start, length, text, line) in enumerate(rows):
        if due or start >= places[-1][0] + 4 * grain:
            places.append((start, number, line))
            contents.append(b"")
        first, _, line_there = places[-1]
        contents[-1] += text + b"%d %d %d;" % (start - first, length, line - line_there)
        due = (xxhash.xxh3_64_intdigest(text) >> 40) * grain < length << 24
    return SimpleNamespace(places=places, contents=[xxhash.xxh3_128_digest(content) for content in contents])


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_boundaries_are_those_of_rows_found_one_by_one(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    for case in range(40):
        rng, rows, line = random.Random(case), list[tuple[int, int, bytes, int]](), 2
        data = odd_files.table(rng) if suffix == ".csv" else odd_files.array(rng, sound=True)
        path.write_bytes(data)
        source, chunk = open_source(str(path)), rng.choice([1, 100, 2_000, 30_000])
        if source.container == "csv":
            at = source.body
            for record in slow_records(data[at:], ord(source.delimiter)):
                rows.append((at, len(record), record.removesuffix(b"\n"), line))
                at, line = at + len(record), line + record.count(b"\n")
            if any(record.count(b'"') % 2 for _, _, record, _ in rows):
                continue  # a field that is never closed
        elif source.container == "json":
            rows = [(start, stop - start, data[start:stop], 0) for start, stop in slow_elements(data)]
        marks = scan(Sizes(chunk), stretches_of(source, Sizes(chunk))[0])
        expected = slow_grains(rows, grain_of(chunk))
        assert (marks.total, [content.tobytes() for content in marks.contents]) == (
            len(rows),
            expected.contents,
        )
        found = zip(marks.positions.tolist(), marks.records.tolist(), marks.lines.tolist(), strict=True)
        assert list(found) == expected.places


# ------------------------------------------------------------------------------------------------- the rest


def test_workers_scan_what_one_process_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sftdata.pipeline.WORTH_RANGES", 0)
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "row %d"}\n' % n for n in range(40_000)))
    (tmp_path / "b.csv").write_bytes(b"prompt,completion\nx,y\n")
    sources = [open_source(str(tmp_path / name)) for name in ("a.jsonl", "b.csv")]
    sizes = Sizes(5_000, range=64 << 10)
    stretches = [stretch for source in sources for stretch in stretches_of(source, sizes)]
    assert len(stretches) > 5
    with Workers(2) as workers:
        marks = scanned(workers, sizes, stretches)
        first = join(sources[0], [next(marks) for _ in stretches[1:]], sizes)
        second = join(sources[1], [next(marks)], sizes)
    assert first == replace(plan_source(sources[0], 0, 5_000), xxh3_128=first.xxh3_128)
    assert second == plan_source(sources[1], 0, 5_000)


@pytest.mark.parametrize("what", ["written over", "cut", "gone"])
def test_a_source_that_changes_between_its_ranges_is_named(what: str, tmp_path: Path) -> None:
    path, sizes = tmp_path / "rows.jsonl", Sizes(5_000, range=64 << 10)
    path.write_bytes(b"".join(b'{"text": "row %d"}\n' % n for n in range(20_000)))
    source = open_source(str(path))
    stretches = stretches_of(source, sizes)
    marks = [scan(sizes, stretch) for stretch in stretches]
    if what == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(InputChangedError, match=str(path)):
            scan(sizes, stretches[-1])
    else:
        path.write_bytes(path.read_bytes().upper()) if what == "written over" else path.unlink()
        with pytest.raises(SftError, match=str(path)):
            join(source, marks, sizes)


def test_a_set_of_an_earlier_version_is_up_to_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its sources have one hash each, whatever their size."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((EXAMPLES / "conversations.jsonl").read_bytes() * 20)
    settings = {"tokenizer": EXAMPLES / "tokenizer", "output": tmp_path / "set", "max_length": 256}
    before = sftdata.prepare(rows, **settings, workers=1)
    monkeypatch.setattr("sftdata.inputs.Sizes", partial(Sizes, range=64 << 10))
    after = sftdata.prepare(rows, **settings, workers=1)
    assert after == before
    rows.write_bytes(rows.read_bytes().replace(b"user", b"USER", 1))
    again = sftdata.prepare(rows, **settings, workers=1, map_role={"USER": "user"}, overwrite=True)
    assert again.sources[0].xxh3.endswith(f"-{-(-rows.stat().st_size // (64 << 10))}")
