"""The files of the log of documents: read to the last whole batch, cut at a step, and never with a step twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftdata.blame.log import (
    DocumentLosses,
    TrainedSet,
    cut_after,
    log_batch,
    log_path,
    log_schema,
    read_log,
)
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.opened import open_set
from tests.train_sets import make_set

SETS = [TrainedSet("a" * 64, "/data/a", "../a"), TrainedSet("b" * 64, "/data/b", "../b")]


def columns(steps: list[int], which: int = 0) -> DocumentLosses:
    """Documents of these steps; each example id is its step."""
    count = np.array(steps)
    return DocumentLosses(
        count.astype(np.int32), np.full(len(steps), which, np.int16), count * 2, count, (count + 5).astype(np.int32),
        count.astype(np.int32), count.astype(np.int32), count.astype(np.float32), (count / 2).astype(np.float32),
    )  # fmt: skip


def write(run: Path, begin: int, rank: int, batches: list[list[int]], sets: list[TrainedSet] = SETS) -> Path:
    path = log_path(run, begin, rank)
    path.parent.mkdir(exist_ok=True, parents=True)
    schema = log_schema(sets)
    parts = [schema.serialize(), *(log_batch(columns(steps), schema).serialize() for steps in batches)]
    path.write_bytes(b"".join(map(bytes, parts)))
    return path


def test_what_ranks_and_legs_wrote_is_read_by_step(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, [[1, 1, 2], [3]])
    write(tmp_path, 0, 1, [[1, 2], [3, 3]])
    write(tmp_path, 3, 0, [[4, 5]], [SETS[1]])
    sets, found = read_log(tmp_path)
    assert sets == tuple(SETS)
    assert found.step.tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 4, 5]
    assert found.set.tolist() == [0] * 8 + [1, 1]
    assert found.loss.tolist() == [step / 2 for step in found.step.tolist()]


def test_of_a_file_that_a_kill_cut_short_the_whole_batches_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "whole", 0, 0, [[1, 2], [3, 4], [5]])
    raw, counts = path.read_bytes(), set()
    cut = log_path(tmp_path / "cut", 0, 0)
    cut.parent.mkdir(parents=True)
    for length in range(0, len(raw) + 1, 7):
        cut.write_bytes(raw[:length])
        try:
            steps = read_log(tmp_path / "cut")[1].step.tolist()
        except UsageError:
            steps = []
        assert steps == [1, 2, 3, 4, 5][: len(steps)]
        counts.add(len(steps))
    assert counts >= {0, 2, 4}


@settings(max_examples=40)
@given(st.data())
def test_a_log_that_is_cut_and_gone_on_with_holds_every_step_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Legs of random length, each from some step before the end of the last, whose end a kill tore off."""
    run, step = tmp_path_factory.mktemp("run"), 0
    for _ in range(data.draw(st.integers(1, 4))):
        step = data.draw(st.integers(0, step))
        cut_after(run, step)
        length = data.draw(st.integers(1, 6))
        for rank in range(data.draw(st.integers(1, 3))):
            steps = list(range(step + 1, step + length + 1))
            size = data.draw(st.integers(1, 3))
            path = write(run, step, rank, [steps[at : at + size] for at in range(0, length, size)])
            if data.draw(st.booleans()):
                path.write_bytes(path.read_bytes() + b"\xff\xff\xff\xff\x40")
        step += length
        found = read_log(run)[1]
        per_rank = {rank: sorted(_steps_of(run, rank)) for rank in range(3)}
        assert all(steps == sorted({*steps}) for steps in per_rank.values())
        assert per_rank[0] == list(range(1, step + 1))
        assert len(found) == sum(map(len, per_rank.values()))


def _steps_of(run: Path, rank: int) -> list[int]:
    import pyarrow as pa

    steps: list[int] = []
    for path in (run / "documents").glob(f"*-rank-{rank}.arrows"):
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            try:
                for batch in reader:
                    steps += batch.column("step").to_pylist()
            except (pa.ArrowInvalid, OSError):
                pass
    return steps


def test_what_an_earlier_process_still_writes_reaches_no_file_of_the_log(tmp_path: Path) -> None:
    path = write(tmp_path, 0, 0, [[1, 2], [3]])
    with path.open("ab") as stale:
        cut_after(tmp_path, 2)
        stale.write(bytes(log_batch(columns([4]), log_schema(SETS)).serialize()))
    assert read_log(tmp_path)[1].step.tolist() == [1, 2]


def test_a_log_cut_at_the_start_is_gone(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, [[1]])
    cut_after(tmp_path, 0)
    assert not (tmp_path / "documents").exists()
    with pytest.raises(UsageError, match="holds no losses of documents.*--log-documents"):
        read_log(tmp_path)


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_tokens_are_summed_by_document_as_one_by_one(tmp_path: Path, weighted: bool) -> None:
    """Documents without a trained token among them, and a loss that is no number, which stays in its own."""
    import torch

    from sfttrain.data import BatchDocuments
    from sfttrain.documents import DocumentLog

    opened = open_set(make_set(tmp_path / "set"))
    rng, log = np.random.default_rng(1), DocumentLog(tmp_path, [opened], 0)
    wanted: list[tuple[int, float, float]] = []
    for step in (1, 1, 2, 3):
        counts = np.array([3, 0, 1, 0, 0, 4])
        losses, weights = rng.random(8).astype(np.float32), rng.random(8).astype(np.float32)
        losses[4] = np.nan if step == 2 else losses[4]
        ends = np.cumsum(counts)
        for end, count in zip(ends, counts, strict=True):
            part = slice(end - count, end)
            scale = weights[part].astype(float) if weighted else np.ones(count)
            wanted.append((step, float(scale.sum()), float((losses[part].astype(float) * scale).sum())))
        documents = BatchDocuments(
            np.zeros((6, 4), np.int64), counts + 2, counts, weights if weighted else None
        )
        log.add(step, documents, torch.from_numpy(losses))
        if step == 2:
            log.flush()
    log.close()
    log.close()
    found = read_log(tmp_path)[1]
    assert found.step.tolist() == [step for step, _, _ in wanted]
    np.testing.assert_allclose(found.weight, [weight for _, weight, _ in wanted], rtol=1e-6)
    np.testing.assert_allclose(found.loss, [loss for _, _, loss in wanted], rtol=1e-6)
    assert np.isnan(found.loss).sum() == 1


def test_a_write_that_a_signal_cut_is_written_over(tmp_path: Path) -> None:
    import torch

    from sfttrain.data import BatchDocuments
    from sfttrain.documents import DocumentLog

    log = DocumentLog(tmp_path, [open_set(make_set(tmp_path / "set"))], 0)
    one = BatchDocuments(np.zeros((1, 4), np.int64), np.array([5]), np.array([2]), None)
    log.add(1, one, torch.ones(2))
    log.flush()
    with log_path(tmp_path, 0, 0).open("ab") as torn:
        torn.write(b"\xff\xff\xff\xff\x40")
    log.add(2, one, torch.ones(2))
    log.close()
    assert read_log(tmp_path)[1].step.tolist() == [1, 2]


def test_a_stranger_in_the_folder_is_named(tmp_path: Path) -> None:
    import pyarrow as pa

    path = write(tmp_path, 0, 0, [[1]])
    schema = pa.schema([("x", pa.int8())])
    path.write_bytes(
        bytes(schema.serialize())
        + bytes(pa.record_batch([pa.array([1], pa.int8())], schema=schema).serialize())
    )
    with pytest.raises(IntegrityError, match="is no log of documents"):
        read_log(tmp_path)
