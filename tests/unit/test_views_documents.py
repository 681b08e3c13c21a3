"""Reading stretches of documents out of blocks: against lists, token by token."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from sftdata.errors import IntegrityError
from sftdata.views.documents import Documents, Located, join_segments

Token = tuple[int, bool, float]


class Block(NamedTuple):
    """A record batch of one row."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray | None

    @property
    def row_offsets(self) -> np.ndarray:
        return np.array([0, len(self.input_ids)])


def scattered(seed: int, weighted: bool) -> tuple[list[list[Token]], Documents]:
    """Draw documents, cut them into segments, and scatter these over three blocks that lack first labels."""
    rng = random.Random(seed)
    documents = [
        [
            (rng.randrange(1000), rng.random() < 0.5, rng.choice((0.5, 1.0, 2.0)))
            for _ in range(rng.choice(sizes))
        ]
        for sizes in [(0, 1, 2, 30)] * 40
    ]
    blocks: list[list[tuple[int, int, float]]] = [[], [], []]
    segments = []
    for number, document in enumerate(documents):
        cuts = sorted(
            {0, len(document), *(rng.randrange(len(document) + 1) for _ in range(rng.randrange(3)))}
        )
        for start, stop in pairwise(cuts) if document else [(0, 0)]:
            block = rng.randrange(3)
            piece = document[start:stop]
            first = bool(piece) and piece[0][1]
            segments.append(
                (10 * number, block, len(blocks[block]), len(piece), start, sum(t for _, t, _ in piece[1:]), first,
                 piece[0][2] if piece else 1.0)
            )  # fmt: skip
            blocks[block] += [
                (token, token if trained and place else -100, weight if trained and place else 0.0)
                for place, (token, trained, weight) in enumerate(piece)
            ]
    rng.shuffle(segments)
    columns = [np.array(column) for column in zip(*segments, strict=True)]
    count = len(segments)
    located = Located(
        *columns[:7], columns[7].astype(np.float32),
        np.zeros(count, np.int32), np.ones((count, 2), np.uint64), np.ones(count, np.uint64),
    )  # fmt: skip
    held = tuple(
        Block(
            np.array([token for token, _, _ in block], np.int32),
            np.array([label for _, label, _ in block], np.int32),
            np.array([weight for _, _, weight in block], np.float32) if weighted else None,
        )
        for block in blocks
    )
    return documents, join_segments(located, held, "made")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_stretch_of_every_document_reads_as_it_was(seed: int, weighted: bool) -> None:
    documents, found = scattered(seed, weighted)
    assert found.ids.tolist() == [10 * number for number in range(len(documents))]
    assert found.lengths.tolist() == list(map(len, documents))
    assert found.trained.tolist() == [sum(t for _, t, _ in document[1:]) for document in documents]
    rng = random.Random(seed)
    asked = []
    for _ in range(60):
        which = rng.randrange(len(documents))
        start, stop = sorted(rng.randrange(len(documents[which]) + 1) for _ in range(2))
        asked.append((which, start, stop))
    batch = found.read(*(np.array(column) for column in zip(*asked, strict=True)))
    weights = batch.weights().tolist()
    for index, (which, start, stop) in enumerate(asked):
        here = slice(int(batch.offsets[index]), int(batch.offsets[index + 1]))
        expected = documents[which][start:stop]
        assert batch.input_ids[here].tolist() == [token for token, _, _ in expected]
        assert batch.trained[here].tolist() == [trained for _, trained, _ in expected]
        told = [weight if trained else 0.0 for _, trained, weight in expected]
        assert weights[here] == (told if weighted else [float(trained) for _, trained, _ in expected])


def test_a_gap_between_segments_is_refused() -> None:
    one = np.array([0, 0])
    located = Located(
        one, one, one, np.array([3, 2]), np.array([0, 4]), one, one.astype(bool), one.astype(np.float32),
        one, np.ones((2, 2), np.uint64), np.ones(2, np.uint64),
    )  # fmt: skip
    with pytest.raises(IntegrityError, match=r"here: the segments of example 0 leave a gap, or overlap\."):
        join_segments(located, (), "here")
