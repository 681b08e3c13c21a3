"""A view with other packs for each epoch: every document once in each, counted so often, and walked so by the trainer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.errors import UsageError
from sftdata.set.verify import verify
from sfttrain.order import Epochs
from sfttrain.schedule import FILLER, Order
from tests.view_sets import Settings, chats, prepare, view, write_lines

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("epochs")
    files = [write_lines(folder / f"{name}.jsonl", chats(70, ord(name), 30)) for name in "ab"]
    prepare(folder / "base", files, max_length=128)
    return folder / "base"


def documents(
    folder: Path, epoch: int, epochs: int
) -> tuple[Counter[tuple[Any, ...]], list[list[tuple[int, ...]]]]:
    """Return what an epoch holds: ids and labels of every document, and the documents of each row."""
    rows = sftdata.open(folder)
    size = len(rows) // epochs
    held, together = Counter[tuple[Any, ...]](), []
    for number in range(epoch * size, (epoch + 1) * size):
        found = list(rows[number].documents())
        held.update((tuple(part.input_ids.tolist()), tuple(part.labels.tolist())) for part in found)
        together.append([tuple(part.input_ids.tolist()) for part in found])
    return held, together


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "bfd"},
        {"packing": "none"},
        {"overlong": "split", "max_length": 64},
        {"order": "shuffled", "seed": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("write", [False, True])
def test_every_document_is_once_in_each_epoch_with_other_neighbours(
    base: Path, tmp_path: Path, settings: Settings, write: bool
) -> None:
    made = view(tmp_path / "view", base, epochs=3, write=write, **settings)
    plain = view(tmp_path / "plain", base, pack_over="view", **{"order": "as-is"} | settings, write=write)
    assert made.ledger.rows_packed == 3 * plain.ledger.rows_packed
    assert (
        made.ledger.documents_repeated
        == made.ledger.rows_kept // 3 * 2 + sum(made.ledger.rows_dropped.values()) // 3 * 2
    )
    assert made.ledger.documents == 3 * plain.ledger.documents
    expected = documents(tmp_path / "plain", 0, 1)[0]
    rows = []
    for epoch in range(3):
        held, together = documents(tmp_path / "view", epoch, 3)
        assert held == expected
        rows.append(together)
    assert rows[0] != rows[1] != rows[2] != rows[0]
    assert not verify(tmp_path / "view").problems


def test_one_cut_stream_is_cut_elsewhere_in_each_epoch(base: Path, tmp_path: Path) -> None:
    made = view(tmp_path / "view", base, epochs=2, packing="wrapped", max_length=100, write=False)
    assert made.ledger.rows_packed % 2 == 0
    tokens = [
        Counter(np.concatenate([row.input_ids for row in sftdata.open(tmp_path / "view")][part]).tolist())
        for part in (slice(0, made.ledger.rows_packed // 2), slice(made.ledger.rows_packed // 2, None))
    ]
    assert tokens[0] == tokens[1]
    assert not verify(tmp_path / "view").problems


def test_a_view_of_epochs_counts_what_is_there_again(base: Path, tmp_path: Path) -> None:
    made = view(tmp_path / "view", base, epochs=3, write=False)
    again = view(tmp_path / "again", tmp_path / "view")
    assert again.ledger.documents_repeated == made.ledger.documents_repeated > 0
    assert again.ledger.rows_in == made.ledger.rows_in
    assert view(tmp_path / "two", tmp_path / "view", base).ledger.documents_repeated == (
        made.ledger.documents_repeated
    )
    assert not view(tmp_path / "once", tmp_path / "view", dedup="row").ledger.documents_repeated


@pytest.mark.parametrize(
    "settings", [{}, {"packing": "none", "order": "shuffled"}, {"overlong": "split"}], ids=str
)
@pytest.mark.parametrize("write", [False, True])
def test_every_epoch_holds_the_mixture(base: Path, tmp_path: Path, settings: Settings, write: bool) -> None:
    mix: Settings = {"mix": {"a.jsonl": 5, "b.jsonl": 2}, "passes": 2.5, "max_length": 64, **settings}
    once = view(tmp_path / "once", base, **{**mix, "order": "as-is"})
    made = view(tmp_path / "view", base, epochs=3, write=write, **mix)
    expected = documents(tmp_path / "once", 0, 1)[0]
    assert max(expected.values()) > 1
    rows = []
    for epoch in range(3):
        held, together = documents(tmp_path / "view", epoch, 3)
        assert held == expected
        rows.append(together)
    assert rows[0] != rows[1] != rows[2] != rows[0]
    for one, three in zip(once.shares, made.shares, strict=True):
        assert (three.rows, three.tokens, three.trained) == (3 * one.rows, 3 * one.tokens, 3 * one.trained)
        assert (three.asked, three.available) == (one.asked, one.available)
    assert (
        made.ledger.rows_in - made.ledger.documents_repeated
        == once.ledger.rows_in - once.ledger.documents_repeated
    )
    assert not verify(tmp_path / "view").problems
    both = sftdata.view(base, output=tmp_path / "both", eval="30%", epochs=2, mix={"*": 1}, write=write)
    assert both[0].shares[0].rows == both[0].ledger.rows_kept
    assert not verify(tmp_path / "both" / "train").problems


def test_evaluation_has_one_epoch(base: Path, tmp_path: Path) -> None:
    train, held_out = sftdata.view(base, output=tmp_path / "both", eval="20%", epochs=2)
    assert train.ledger.documents_repeated
    assert not held_out.ledger.documents_repeated


@pytest.mark.parametrize(
    "settings",
    [
        {"steps_for": "2x2"},
        {"order": "length"},
        {"pack_over": "slice"},
    ],
    ids=str,
)
def test_what_cannot_be_had_anew_is_refused(base: Path, tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(UsageError, match="epochs=2 with ") as caught:
        view(tmp_path / "view", base, epochs=2, **settings)
    assert caught.value.fix.endswith(" out, or --epochs.")
    view(tmp_path / "without", base, epochs=2)
    view(tmp_path / "epochs", base, **settings)


def test_a_view_of_epochs_is_packed_like_any_other(base: Path, tmp_path: Path) -> None:
    view(tmp_path / "epochs", base, epochs=2, write=False)
    made = view(tmp_path / "view", tmp_path / "epochs", max_length=64, write=False)
    assert "epochs" not in made.settings.get("view", {})
    assert not verify(tmp_path / "view").problems


@pytest.mark.parametrize(("batch", "accumulation", "ranks"), [(1, 1, 1), (2, 2, 2), (4, 1, 2), (1, 1, 8)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_after_epoch_walks_part_after_part(
    batch: int, accumulation: int, ranks: int, shuffle: bool
) -> None:
    schedule, step = Epochs(39, 3, seed=5, shuffle=shuffle), batch * accumulation * ranks
    length, seen = schedule.steps_per_epoch(step), np.zeros(39, np.int64)
    for epoch in range(7):
        taken = []
        for rank in range(ranks):
            order = Order(schedule, batch_size=batch, accumulation=accumulation, rank=rank, ranks=ranks)
            order.set_epoch(epoch)
            taken += [row for rows in order for row in rows if row != FILLER]
        part = epoch % 3
        assert sorted(taken) == list(range(13 * part, 13 * part + 13))
        for number in range(length):
            assert np.array_equal(schedule.seen(epoch * length + number, step)[0], seen)
            rows = schedule.rows(epoch * length + number, epoch * length + number + 1, step)
            np.add.at(seen, rows[rows != FILLER], 1)
