"""What a run has seen, against a count of every document of every row that its batches held."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sftdata.errors import IntegrityError, UsageError
from sftdata.set.opened import ShardSet, open_set
from sfttrain.data import TrainingRows, read_contents
from sfttrain.schedule import FILLER, Mixture, Order, Passes
from sfttrain.seen import LINES_NAME, SEEN_NAME, Account, Seen, read_account
from tests.train_sets import make_set
from tests.view_sets import chats, prepare, view, write_lines

OLD = Path(__file__).parents[1] / "sets"
Place = tuple[str, str, int]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """Sets that hold the same sources in several ways, and others."""
    folder = tmp_path_factory.mktemp("sets")
    files = [write_lines(folder / f"{name}.jsonl", chats(40, ord(name), 30)) for name in "ab"]
    prepare(folder / "both", files, max_length=128)
    prepare(folder / "split", files[:1], max_length=64, overlong="split")
    prepare(folder / "stream", files[1:], max_length=64, packing="wrapped")
    view(
        folder / "view",
        folder / "both",
        mix={"a.jsonl": 3, "b.jsonl": 1},
        passes=2.5,
        max_length=96,
        write=False,
    )
    view(
        folder / "written",
        folder / "both",
        mix={"a.jsonl": 3, "b.jsonl": 1},
        passes=2.5,
        max_length=96,
        write=True,
    )
    view(folder / "by-row", folder / "both", packing="none", max_length=100)
    make_set(folder / "drawn", rows=9, sources=2)
    made = {name: folder / name for name in ("both", "split", "stream", "view", "written", "by-row", "drawn")}
    made |= {name: OLD / name for name in ("version-1-packed", "version-1-none")}
    return {name: open_set(place) for name, place in made.items()}


class Walk:
    """The slow way: take every batch of every rank, and look into its rows."""

    def __init__(self) -> None:
        self.shown: Counter[Place] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.trained: Counter[tuple[str, str]] = Counter()

    def step(self, sets: list[ShardSet], rows: list[int]) -> None:
        for row in rows:
            if row == FILLER:
                continue
            which = 0
            while row >= len(sets[which]):
                row -= len(sets[which])
                which += 1
            opened = sets[which]
            for document in opened[row].documents():
                name, line = opened.origin(document.example_id)
                (source,) = (part for part in opened.manifest.sources if part.name == name)
                key = re.sub(r"#\d+$", "", name.split("/")[-1]), source.xxh3
                self.shown[*key, line] += 1
                self.tokens[key] += len(document.input_ids)
                self.trained[key] += int((document.labels[1:] != -100).sum())

    def agrees(self, seen: Seen, folder: Path) -> None:
        lines = read_account(folder)[1]
        found = {
            (*key, line + 1): int(part.times[line])
            for key, part in lines.items()
            for line in np.flatnonzero(part.times).tolist()
        }
        assert found == dict(self.shown)
        for source in seen.sources:
            key = source.name, source.xxh3
            assert (source.tokens, source.trained) == (self.tokens[key], self.trained[key])
            own = Counter(count for place, count in self.shown.items() if place[:2] == key)
            assert source.documents == dict(own)


def _order(sets: list[ShardSet], kind: str, first_step: int, rank: int, ranks: int) -> Order:
    contents = [read_contents(opened) for opened in sets]
    sizes = [part.rows for part in contents]
    assert sizes == [len(opened) for opened in sets]
    schedule: Passes | Mixture = Passes(sizes, [1.0, 0.6, 2.0][: len(sizes)], seed=3)
    if kind != "passes":
        amounts = [part.amounts(kind) for part in contents]
        schedule = Mixture(amounts, [5, 2, 3][: len(sizes)], seed=3)
    order = Order(schedule, batch_size=2, accumulation=2 // ranks, rank=rank, ranks=ranks)
    order.begin_at(first_step)
    return order


def _steps(sets: list[ShardSet], kind: str, first_step: int, ranks: int, wanted: range) -> list[list[int]]:
    """Rows of the steps, gathered from the batches of all ranks."""
    orders = [_order(sets, kind, first_step, rank, ranks) for rank in range(ranks)]
    length, taken = orders[0].steps_per_epoch, []
    for epoch in range(wanted.stop // length + 1):
        for order in orders:
            order.set_epoch(epoch)
        dealt = [list(order) for order in orders]
        per = len(dealt[0]) // length
        for start in range(0, length * per, per):
            taken += [[row for part in dealt for batch in part[start : start + per] for row in batch]]
    return [taken[step] for step in wanted]


LEGS = [
    (("both", "drawn"), "trained"),
    (("view",), "passes"),
    (("split", "view", "stream"), "rows"),
    (("by-row", "version-1-packed", "drawn"), "tokens"),
    (("version-1-none", "both"), "passes"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_account_is_that_of_every_row_over_legs_and_kills(
    sets: dict[str, ShardSet], tmp_path: Path, ranks: int
) -> None:
    walk, rng, step, begun = Walk(), np.random.default_rng(ranks), 0, None
    for names, kind in LEGS:
        first, chosen = step, [sets[name] for name in names]
        for _ in range(3):  # each time a new process, which begins at the last checkpoint
            order = _order(chosen, kind, first, 0, ranks)
            account = Account(
                chosen, [read_contents(opened) for opened in chosen], order,
                measure="trained" if kind == "passes" else kind, shares=() if kind == "passes" else [5, 2, 3][: len(names)],
            )  # fmt: skip
            if begun is not None:
                account.go_on(begun, step)
            stop = step + int(rng.integers(1, 30))
            account.at(stop + 17)  # what it was asked about a step that a kill took back leaves no trace
            for rows in _steps(chosen, kind, first, ranks, range(step, stop)):
                walk.step(chosen, rows)
            step, begun = stop, tmp_path / f"checkpoint-{stop}"
            begun.mkdir()
            account.write(begun, step)
            seen = account.at(step)
            walk.agrees(seen, begun)
            assert read_account(begun)[0] == seen
    assert [leg.first_step + leg.steps for leg in seen.legs] == [leg.first_step for leg in seen.legs[1:]] + [
        step
    ]
    assert [len(leg.sets) for leg in seen.legs] == [len(names) for names, _ in LEGS]
    for leg, (names, _) in zip(seen.legs, LEGS, strict=True):
        assert [part.digest for part in leg.sets] == [sets[name].manifest.digest for name in names]
        assert sum(part.rows for part in leg.sets) <= leg.steps * 4
        assert sum(part.share for part in leg.sets) == pytest.approx(1)
    assert sum(part.trained for leg in seen.legs for part in leg.sets) == sum(walk.trained.values())


@pytest.mark.parametrize(
    "name", ["both", "split", "stream", "view", "written", "by-row", "version-1-packed", "version-1-none"]
)
@pytest.mark.parametrize("unpack", [False, True])
def test_contents_are_those_of_the_rows_that_are_trained(
    sets: dict[str, ShardSet], name: str, unpack: bool
) -> None:
    opened = sets[name]
    contents, rows = read_contents(opened, unpack), TrainingRows([opened], unpack)
    assert contents.rows == len(rows)
    tokens, trained = contents.amounts("tokens"), contents.amounts("trained")
    for number in range(len(rows)):
        row = rows[number]
        inside = np.concatenate([np.arange(length) > 0 for length in row.seq_lengths])
        assert trained[number] == ((row.labels != -100) & inside).sum()
        real = (
            row.input_ids.size if unpack else sum(len(part.input_ids) for part in opened[number].documents())
        )
        assert tokens[number] == real
    assert contents.amounts("rows").tolist() == [1] * len(rows)
    assert contents.trained.sum() == opened.manifest.ledger.tokens_trained or name.startswith("version-1")


def test_a_view_by_index_counts_for_what_its_written_form_does(sets: dict[str, ShardSet]) -> None:
    assert (sets["view"].manifest.by_index, sets["written"].manifest.by_index) == (True, False)
    for one, other in zip(
        *(
            [part.row, part.example, part.tokens, part.trained]
            for part in map(read_contents, (sets["view"], sets["written"]))
        ),
        strict=True,
    ):
        assert one.tolist() == other.tolist()


def test_an_account_that_is_missing_or_damaged_is_refused_by_name(
    sets: dict[str, ShardSet], tmp_path: Path
) -> None:
    chosen = [sets["both"]]
    contents, first, other = (
        read_contents(chosen[0]),
        _order(chosen, "passes", 0, 0, 1),
        _order(chosen, "passes", 5, 0, 1),
    )
    Account(chosen, [contents], first, measure="trained").go_on(tmp_path, 5)  # of an earlier version
    with pytest.raises(UsageError, match="holds no account of what was seen"):
        Account(chosen, [contents], other, measure="trained").go_on(tmp_path, 5)
    Account(chosen, [contents], first, measure="trained").write(tmp_path, 5)
    (tmp_path / LINES_NAME).write_bytes(b"ARROW1 nothing")
    with pytest.raises(IntegrityError, match=f"{SEEN_NAME} or {LINES_NAME} is damaged"):
        Account(chosen, [contents], other, measure="trained").go_on(tmp_path, 5)


def test_the_lines_are_a_table_that_anything_reads(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    chosen = [sets["both"]]
    Account(chosen, [read_contents(chosen[0])], _order(chosen, "passes", 0, 0, 1), measure="trained").write(
        tmp_path, 4
    )
    with pa.ipc.open_file(tmp_path / LINES_NAME) as file:
        table = file.read_all().to_pydict()
    assert table["name"] == ["a.jsonl", "b.jsonl"]
    assert [len(times) for times in table["times"]] == [source.rows for source in chosen[0].manifest.sources]
