"""A small set and a tiny model, for tests of the trainer that need no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train_sets import make_set


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", rows=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.train_runs import tiny_llama  # with torch, which most tests here do without

    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")
