"""Fixtures shared by all tests: where the real data lies, and offline habits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, chat templates and datasets, named by SFTDATA_TEST_DATA."""
    folder = os.environ.get("SFTDATA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SFTDATA_TEST_DATA does not name the folder of real tokenizers, templates and datasets")
    return Path(folder)
