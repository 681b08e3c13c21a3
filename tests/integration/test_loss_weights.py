"""Weights of messages: from the rows to a column of the set, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sftdata
from sftdata.errors import DataError, UsageError
from sftdata.set.opened import open_set
from sftdata.set.shards import read_shard, write_shard
from sftdata.set.verify import verify

pytestmark = pytest.mark.slow

TOKENIZER = str(Path(__file__).parents[2] / "examples" / "tokenizer")
WEIGHTS: list[list[Any]] = [
    [0.5, None],
    [0, 2.5],
    [1, 0.25],
    [None, None],
    [True, 0.125],
    [0.75, False],
    [3, 1.5],
]


def _rows(switches: list[list[Any]], key: str = "weight") -> list[dict[str, Any]]:
    rows = []
    for number, (first, second) in enumerate(switches):
        messages = [
            {"role": "user", "content": f"Question {number}, ça va? 蔬菜"},
            {"role": "assistant", "content": f"Ünïcode answer {number} " + "and more " * number, key: first},
            {"role": "user", "content": "Again"},
            {"role": "assistant", "content": "Short.", key: second},
        ]
        rows.append(
            {
                "messages": [
                    {name: value for name, value in one.items() if value is not None} for one in messages
                ]
            }
        )
    return rows


def _prepare(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {"tokenizer": TOKENIZER, "output": folder / "set", "max_length": 128, "workers": 1} | settings
    return sftdata.prepare(folder / "rows.jsonl", **settings)


def _by_example(folder: Path) -> dict[int, tuple[list[int], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Ids, whether trained, and weights of each example, its stretches joined."""
    found: dict[int, list[Any]] = {}
    for row in open_set(folder):
        ends = np.cumsum(row.seq_lengths)
        for start, stop, example in zip(ends - row.seq_lengths, ends, row.examples.tolist(), strict=True):
            weights = row.loss_weights[start:stop] if row.loss_weights is not None else np.zeros(stop - start)
            part = (row.input_ids[start:stop].tolist(), row.labels[start:stop] != -100, weights)
            before = found.setdefault(example, [[], np.zeros(0, bool), np.zeros(0)])
            found[example] = [
                before[0] + part[0],
                np.append(before[1], part[1]),
                np.append(before[2], part[2]),
            ]
    return {example: tuple(columns) for example, columns in found.items()}


@pytest.mark.feature("losses")
@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("boundary", ["split", "merge"])
def test_every_trained_token_weighs_what_its_message_weighs(
    tmp_path: Path, packing: str, boundary: str
) -> None:
    shape = {"packing": packing, "boundary": boundary}
    _prepare(tmp_path / "weighted", _rows(WEIGHTS), loss_weights=True, **shape)
    found = _by_example(tmp_path / "weighted" / "set")
    wanted = {example: np.zeros(len(columns[0])) for example, columns in found.items()}
    for place in (0, 1):  # each turn trained alone, by switches: its labels say which tokens it owns
        alone = [[int(place == 0), int(place == 1)] for _ in WEIGHTS]
        _prepare(tmp_path / f"turn{place}", _rows(alone, "train"), **shape)
        for example, (ids, trained, _) in _by_example(tmp_path / f"turn{place}" / "set").items():
            if example >= 0:
                own = WEIGHTS[example][place]
                assert ids == found[example][0]
                wanted[example] += trained * float(1 if own is None else own)
    for example, (_, trained, weights) in found.items():
        assert weights.tolist() == wanted[example].tolist()
        assert ((weights > 0) == trained).all()


def test_weights_follow_tokens_through_a_cut_and_do_not_depend_on_workers(tmp_path: Path) -> None:
    rows = _rows([pair for pair in WEIGHTS for _ in range(40)])
    digests = set()
    for workers in (1, 2):
        settings = {
            "loss_weights": True,
            "max_length": 24,
            "overlong": "split",
            "slice_bytes": 4096,
            "workers": workers,
        }
        manifest = _prepare(tmp_path / str(workers), rows, **settings)
        digests.add(manifest.digest)
        assert verify(tmp_path / str(workers) / "set").ok
        for row in open_set(tmp_path / str(workers) / "set"):
            assert ((row.loss_weights > 0) == (row.labels != -100)).all()
            assert row.loss_weights.dtype == np.float32
    assert len(digests) == 1
    assert manifest.ledger.tokens_trained == sum(info.tokens_trained for info in manifest.shards)


def test_a_document_alone_keeps_its_weights(tmp_path: Path) -> None:
    from sfttrain.data import TrainingRows

    _prepare(tmp_path, _rows(WEIGHTS), loss_weights=True)
    opened = open_set(tmp_path / "set")
    rows = TrainingRows([opened], unpack=True)
    found = [rows[index] for index in range(len(rows))]
    known = _by_example(tmp_path / "set")
    assert len(found) == len(WEIGHTS)
    for row in found:
        assert row.loss_weights is not None
        (weights,) = [weights for ids, _, weights in known.values() if ids == row.input_ids.tolist()]
        assert row.loss_weights.tolist() == weights.tolist()


def test_without_the_setting_there_is_no_column_and_the_rejected_row_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="weight is 0.5; expected 0 or 1.*loss_weights=True"):
        _prepare(tmp_path / "a", _rows(WEIGHTS))
    _prepare(tmp_path / "b", _rows([[1, 0]]))
    assert "loss_weights" not in open_set(tmp_path / "b" / "set").arrow().column_names
    _prepare(tmp_path / "c", _rows([[1, 0]]), loss_weights=True)
    (row,) = open_set(tmp_path / "c" / "set")
    assert set(row.loss_weights[row.labels != -100].tolist()) == {1.0}


@pytest.mark.parametrize("weight", [-0.5, 1e39, 1e-50, "0.5", "NaN", [1]])
def test_a_weight_that_float32_cannot_hold_is_a_rejected_row(tmp_path: Path, weight: Any) -> None:
    with pytest.raises(DataError, match="fractional-weight"):
        _prepare(tmp_path / "a", _rows([[weight, 1], [1, 1]]), loss_weights=True)


@pytest.mark.parametrize("settings", [{"train_on": "all"}, {"response_template": "<|im_start|>assistant"}])
def test_weights_of_turns_and_masks_without_turns_are_not_mixed(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="loss_weights=True weighs turns"):
        _prepare(tmp_path / "a", _rows(WEIGHTS), loss_weights=True, **settings)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_verify_finds_a_weight_that_is_none(tmp_path: Path, wrong: float) -> None:
    from dataclasses import replace

    manifest = _prepare(tmp_path / "a", _rows(WEIGHTS), loss_weights=True)
    (batch,) = read_shard(tmp_path / "a" / "set" / "shard-00000.arrow", manifest.max_length, weighted=True)
    weights = batch.loss_weights.copy()
    weights[np.flatnonzero(batch.labels != -100)[0]] = wrong
    from sftdata.set.laws import broken_laws

    assert not list(broken_laws(batch, manifest))
    (found,) = broken_laws(replace(batch, loss_weights=weights), manifest)
    assert "above 0 and finite where trained" in found[1]
    write_shard(
        tmp_path / "a" / "set" / "shard-00000.arrow",
        replace(batch, loss_weights=weights),
        manifest.max_length,
    )
    assert not verify(tmp_path / "a" / "set").ok


def test_a_stream_brings_the_weights_along() -> None:
    rows = list(sftdata.stream(_rows(WEIGHTS), tokenizer=TOKENIZER, max_length=64, loss_weights=True))
    assert {0.5, 2.5, 0.25, 0.125, 0.75, 3.0, 1.5, 1.0} <= {
        float(one) for row in rows for one in row["loss_weights"]
    }
    assert all(((row["loss_weights"] > 0) == (row["labels"] != -100)).all() for row in rows)
