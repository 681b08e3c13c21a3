"""Rows and batches: what a model gets is what the set holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sftdata.set.opened import open_set
from sfttrain.data import Collator, Row, TrainingRows
from sfttrain.schedule import FILLER
from tests.train_sets import make_set
from tests.waiting import steps


def _row(*lengths: int, start: int = 10) -> Row:
    ids = np.arange(start, start + sum(lengths), dtype=np.int32)
    return Row(ids, ids.copy(), np.array(lengths, np.int32))


def test_rows_of_several_sets_stand_one_after_the_other(tmp_path: Path) -> None:
    sets = [open_set(make_set(tmp_path / name, rows=rows, seed=rows)) for name, rows in (("a", 5), ("b", 3))]
    rows = TrainingRows(sets)
    assert rows.sizes == [5, 3]
    assert len(rows) == 8
    for index in range(8):
        expected = sets[0][index] if index < 5 else sets[1][index - 5]
        assert np.array_equal(rows[index].input_ids, expected.input_ids)
        assert np.array_equal(rows[index].labels, expected.labels)


def test_an_unpacked_set_hands_out_every_document_once(tmp_path: Path) -> None:
    opened = open_set(make_set(tmp_path / "set", rows=9))
    expected = [document for row in opened for document in row.documents()]
    rows = TrainingRows([opened], unpack=True)
    assert len(rows) == len(expected)
    for found, document in zip((rows[index] for index in range(len(rows))), expected, strict=True):
        assert np.array_equal(found.input_ids, document.input_ids)
        assert np.array_equal(found.labels, document.labels)
        assert found.seq_lengths.tolist() == [len(document.input_ids)]


@pytest.mark.parametrize("unpack", [False, True])
def test_every_token_is_told_its_source(tmp_path: Path, unpack: bool) -> None:
    opened = open_set(make_set(tmp_path / "set", rows=9, sources=3))
    rows = TrainingRows([opened], unpack=unpack, by_source=True)
    assert rows.sources == [source.name for source in opened.manifest.sources]
    own = {}
    for number, source in enumerate(opened.manifest.sources):
        own |= dict.fromkeys(range(source.first_id, source.first_id + source.rows), number)
    documents = [document for row in opened for document in row.documents()]
    found = np.concatenate(
        [_without_padding(rows[index], opened[index] if not unpack else None) for index in range(len(rows))]
    )
    assert found.tolist() == [own[document.example_id] for document in documents for _ in document.input_ids]


def _without_padding(row: Row, packed: Any) -> Any:
    """Sources of the tokens of a row's documents."""
    assert row.source is not None
    if packed is None:
        return row.source
    return row.source[np.repeat(packed.examples >= 0, packed.seq_lengths)]


@pytest.mark.parametrize("flatten", [False, True])
def test_a_row_of_two_untrained_tokens_is_no_filler(tmp_path: Path, flatten: bool) -> None:
    short, fills = _row(2), TrainingRows([open_set(make_set(tmp_path / "set", rows=3))])[FILLER]
    short.labels[:] = -100
    ids = Collator(flatten)([_row(3), fills, short])["input_ids"]
    assert ids.tolist() == ([[10, 11, 12, 10, 11]] if flatten else [[10, 11, 12], [10, 11, 0]])
    assert Collator(flatten)([fills, fills])["input_ids"].tolist() == [[0, 0]]


@pytest.mark.parametrize("flatten", [False, True])
def test_labels_of_a_set_without_weights_weigh_one_beside_a_set_with_them(flatten: bool) -> None:
    plain, weighted = _row(3), _row(4)._replace(loss_weights=np.array([0, 0.5, 0.25, 2], np.float32))
    plain.labels[1] = -100
    batch = Collator(flatten)([plain, weighted])
    wanted = [0.0 if flatten else 1.0, 0.0, 1.0] + ([] if flatten else [0.0])
    trained = batch["labels"] != -100
    assert batch["loss_weights"][trained].tolist() == [1.0, 0.5, 0.25, 2.0]
    assert batch["loss_weights"].shape == batch["labels"].shape
    assert batch["loss_weights"].flatten()[1].item() == wanted[1]
    if not flatten:
        assert batch["loss_weights"][0].tolist() == wanted


def test_a_filler_row_trains_nothing(tmp_path: Path) -> None:
    row = TrainingRows([open_set(make_set(tmp_path / "set"))])[FILLER]
    assert set(row.labels.tolist()) == {-100}


def test_a_batch_never_holds_an_attention_mask() -> None:
    for flatten in (False, True):
        batch = Collator(flatten)([_row(3, 4), _row(7)])
        assert "attention_mask" not in batch
        assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))


def test_positions_restart_at_every_document() -> None:
    batch = Collator(flatten=False)([_row(3, 2), _row(5)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14]] * 2


def test_shorter_rows_are_padded_behind_their_last_document() -> None:
    batch = Collator(flatten=False)([_row(2), _row(4)])
    assert batch["input_ids"].tolist() == [[10, 11, 0, 0], [10, 11, 12, 13]]
    assert batch["labels"].tolist() == [[-100, 11, -100, -100], [-100, 11, 12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


def test_a_flattened_batch_tells_where_documents_end() -> None:
    batch = Collator(flatten=True)([_row(3, 2), _row(4)])
    assert batch["input_ids"].shape == (1, 9)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]


def test_no_document_is_predicted_from_the_one_before() -> None:
    labels = Collator(flatten=True)([_row(3), _row(2)])["labels"][0].tolist()
    assert labels == [-100, 11, 12, -100, 11]


def test_a_row_of_a_thousand_shards_costs_few_steps(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", rows=1000, shards=1000, max_length=16)
    assert len(TrainingRows([open_set(folder)])[999].input_ids) == 16
    assert steps(lambda: TrainingRows([open_set(folder)])[999]) < 30_000  # an index beside each


@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_rows_read_together_make_the_batch_of_rows_read_one_by_one(
    tmp_path: Path, unpack: bool, flatten: bool
) -> None:
    settings = {"a": {"packed": True, "shards": 3}, "b": {"packed": False}}
    sets = [open_set(make_set(tmp_path / name, rows=9, **more)) for name, more in settings.items()]
    rows, collate = TrainingRows(sets, unpack, places=True), Collator(flatten)
    for indices in ([8, 2, 5], [len(rows) - 1, 0, len(rows) - 4, 8], [FILLER, 4, FILLER], [FILLER, FILLER]):
        together, apart = collate(rows.__getitems__(indices)), collate([rows[index] for index in indices])
        assert together.keys() == apart.keys()
        for name, column in apart.items():
            if name == "documents":
                continue
            found = together[name]
            assert torch.equal(found, column) if isinstance(column, torch.Tensor) else found == column, name
        if indices != [FILLER, FILLER]:
            both: list[Any] = [together["documents"], apart["documents"]]
            for name in ("places", "tokens", "trained"):
                assert np.array_equal(*(getattr(documents, name) for documents in both))


def test_rows_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    row = TrainingRows([open_set(make_set(tmp_path / "set"))])[0]
    assert not row.input_ids.flags.owndata
    assert not row.input_ids.flags.writeable
