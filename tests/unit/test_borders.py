"""Borders between slices: set by content, whatever the size of blocks, and moved by a change only near it."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.sources.borders import LineBoundaries, content_borders
from sftdata.sources.chunks import Chunks, SourcePlan
from sftdata.sources.planning import numbered
from sftdata.sources.source import open_source, plan_source
from sftdata.sources.streams import skip_bytes
from sftdata.tasks import cut_tasks

CHUNK, SLICE = 2_000, 8_000


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))} for _ in range(count)]


WORDS = [
    "the",
    "of",
    "and",
    "ink",
    "river",
    "stone",
    "a",
    "walks",
    "over",
    "under",
    "seven",
    "nine",
    "slow",
    "quick",
    "green",
]


def as_lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows: list[dict[str, str]]) -> bytes:
    return ("[" + ",\n".join(map(json.dumps, rows)) + "]").encode()


def as_csv(rows: list[dict[str, str]]) -> bytes:
    out = StringIO()
    writer = csv.writer(out)
    writer.writerows([["text", "kind"], *([row["text"] + '"\n', "a"] for row in rows)])
    return out.getvalue().encode()


def plans(folder: Path, *files: bytes, suffix: str = ".jsonl") -> list[SourcePlan]:
    found = []
    for number, data in enumerate(files):
        path = folder / f"{number:03d}{suffix}"
        path.write_bytes(data)
        found.append(plan_source(open_source(str(path)), 0, CHUNK))
    return numbered(found)


def contents(sources: list[SourcePlan]) -> list[tuple[bytes, ...]]:
    """Return what each slice is made of, in words that do not depend on its place."""
    return [tuple(chunk.content for chunk in task.chunks) for task in cut_tasks(sources, SLICE)]


# ------------------------------------------------------------------------------------ boundaries of lines


def noted(blocks: Iterator[bytes], start: int, grain: int) -> tuple[list[int], list[int], bytes, int]:
    found = LineBoundaries(grain, start)
    for block in skip_bytes(blocks, start):
        found.add(block)
    found.end_at(found.end)
    return found.positions, found.records, found.digests().tobytes(), found.total


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boundaries_do_not_depend_on_the_blocks(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 14, 15, 16, 40, 90, 400, 70_000]), max_size=30))
    rng = random.Random(len(lengths))
    text = b"\n".join(bytes(rng.choices(b"abcdefgh", k=length)) for length in lengths)
    text += data.draw(st.sampled_from([b"", b"\n"]))
    start, grain = data.draw(st.sampled_from([0, 3])), data.draw(st.sampled_from([1, 50, 600, 65536]))
    text = b"\xef\xbb\xbf"[:start] + text
    whole = noted(iter([text]), start, grain)
    cuts = sorted(data.draw(st.lists(st.integers(start, len(text)), max_size=8)))
    parts = [text[first:last] for first, last in pairwise([0, *cuts, len(text)])]
    assert noted(iter(parts), start, grain) == whole
    for position, record in zip(whole[0], whole[1], strict=True):
        assert position == start or text[position - 1 : position] == b"\n"
        assert text[start:position].count(b"\n") == record
    assert whole[3] == text[start:].count(b"\n") + (not text.endswith(b"\n") and len(text) > start)


@pytest.mark.parametrize("line", [b'{"text": "the same again"}\n', b"\n", b"short\n"])
def test_lines_that_are_all_alike_are_cut_at_fixed_distances(line: bytes) -> None:
    positions, *_ = noted(iter([line * 5000]), 0, 1000)
    assert all(gap < 4 * 1000 + 2 * len(line) for gap in np.diff(positions))
    assert len(positions) > len(line) * 5000 // 4000 - 3


# ------------------------------------------------------------------------------------------------ the choice


def slow_borders(starts: list[int], ranks: list[int], end: int, size: int) -> set[int]:
    """Return the natural borders: the first of the largest within reach on both sides."""
    reach, found = size * 5 // 8, {0}
    for index, start in enumerate(starts):
        near = [other for other, place in enumerate(starts) if abs(place - start) <= reach]
        best = max(ranks[other] for other in near)
        if near[0] > 0 and index == next(other for other in near if ranks[other] == best):
            found.add(index)
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=60), st.integers(1, 90)
)
def test_borders_are_the_largest_around_and_parts_are_no_longer_than_two_sizes(
    pieces: list[tuple[int, int]], size: int
) -> None:
    lengths, ranks = [length for length, _ in pieces], [rank for _, rank in pieces]
    starts, end = [0, *np.cumsum(lengths)[:-1].tolist()], sum(lengths)
    sizes = np.full(len(starts), size, np.int64)
    found = content_borders(np.array(starts), np.array(ranks, np.uint64), end, sizes).tolist()
    natural = slow_borders(starts, ranks, end, size)
    assert found == sorted(set(found))
    assert natural <= set(found)
    edges = [*(starts[index] for index in found), end]
    for index, (first, last) in zip(found, pairwise(edges), strict=True):
        if last - first > 2 * size:  # then no piece begins between half a size and the last of the part
            inside = [start for start in starts if first + (size + 1) // 2 <= start < last]
            assert not inside, (first, last, index)
    for index in set(found) - natural:  # cut again only where it was too long
        before = max(other for other in natural if other < index)
        behind = min((starts[other] for other in natural if other > index), default=end)
        assert behind - starts[before] > 2 * size


def test_no_pieces_have_no_borders() -> None:
    none = np.zeros(0, np.int64)
    assert len(content_borders(none, none.astype(np.uint64), 0, none)) == 0
    assert cut_tasks([], 1000) == ()


# ------------------------------------------------------------------------------------------ a change is local


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".jsonl", as_lines), (".json", as_array), (".csv", as_csv)],
    ids=["lines", "json", "csv"],
)
def test_a_row_put_in_or_taken_out_anywhere_makes_few_slices_anew(
    suffix: str, write: Callable[[list[dict[str, str]]], bytes], tmp_path: Path
) -> None:
    before = rows(1000)
    old = contents(plans(tmp_path, write(before), suffix=suffix))
    assert len(old) > 8
    anew = []
    for place in [0, 1, *range(7, 1000, 83), 999, 1000]:
        for changed in (
            [*before[:place], {"text": f"put in at {place}"}, *before[place:]],
            before[:place] + before[place + 1 :],
        ):
            now = contents(plans(tmp_path, write(changed), suffix=suffix))
            anew.append(len(set(now) - set(old)))
    assert max(anew) <= 3
    assert sum(anew) / len(anew) < 1.6


def test_what_is_appended_leaves_all_slices_but_the_last(tmp_path: Path) -> None:
    before = as_lines(rows(1000))
    old = contents(plans(tmp_path, before))
    for share in (1, 5, 12.5, 100):
        now = contents(plans(tmp_path, before + as_lines(rows(int(10 * share), seed=1))))
        assert now[: len(old) - 2] == old[:-2]


def test_files_put_in_taken_out_or_renamed_leave_the_slices_of_the_others(tmp_path: Path) -> None:
    files = [as_lines(rows(rng, seed=rng)) for rng in (300, 5, 280, 40, 310, 8, 290)]
    old = contents(plans(tmp_path, *files))
    for number in range(len(files)):
        now = contents(plans(tmp_path, *files[:number], as_lines(rows(30, seed=99)), *files[number:]))
        assert len(set(now) - set(old)) <= 4
        now = contents(plans(tmp_path, *files[:number], *files[number + 1 :]))
        assert len(set(now) - set(old)) <= 3


def test_compression_does_not_move_borders(tmp_path: Path) -> None:
    data = as_lines(rows(500))
    assert contents(plans(tmp_path, data)) == contents(
        plans(tmp_path, gzip.compress(data), suffix=".jsonl.gz")
    )


def test_the_same_rows_at_another_place_or_line_break_are_told_apart(tmp_path: Path) -> None:
    """The hash of a chunk covers all that decides its rows and the places of its rejects."""
    for suffix, write, old, new in (
        (".jsonl", as_lines, b"}\n", b"}\r\n"),
        (".json", as_array, b"},\n", b"},\n "),
        (".csv", as_csv, b"a\r\n", b"a\n"),
    ):
        data = write(rows(30))
        changed = data.replace(old, new)
        assert changed != data
        assert contents(plans(tmp_path, data, suffix=suffix)) != contents(
            plans(tmp_path, changed, suffix=suffix)
        )


def test_slices_are_small_at_first_and_of_the_size_asked_for_then(tmp_path: Path) -> None:
    source = plans(tmp_path, as_lines(rows(3)))[0]
    places = np.arange(1024)
    ranks = np.random.default_rng(0).integers(0, 1 << 63, 1024, np.uint64)
    edges = places << 20
    chunks = Chunks(source.source, edges, edges + (1 << 20), places, places * 0 + 1, ranks=ranks)
    tasks = cut_tasks([replace(source, chunks=chunks)], 8 << 20)
    sizes = [len(task.chunks) for task in tasks]
    assert sum(sizes) == 1024
    assert max(sizes) <= 16
    assert sizes[:3] < [3, 3, 3]
    assert 7 < sum(sizes[10:]) / len(sizes[10:]) < 11
    assert 95 < len(tasks) < 140
    for until in (4, 8, 16, 64, 300):
        fewer = cut_tasks([replace(source, chunks=chunks[:until])], 8 << 20)
        assert [len(task.chunks) for task in fewer[:-2]] == sizes[: len(fewer) - 2]
