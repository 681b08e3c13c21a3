"""Fixtures shared by all tests: where the real data and the tokenizers made here lie, and offline habits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, chat templates and datasets, named by SFTDATA_TEST_DATA."""
    folder = os.environ.get("SFTDATA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SFTDATA_TEST_DATA does not name the folder of real tokenizers, templates and datasets")
    return Path(folder)


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `shared_data`, of tokenizers and chat templates that the tests make themselves."""
    from tests.made_templates import write_templates
    from tests.made_tokenizers import write_tokenizers

    folder = tmp_path_factory.mktemp("made")
    write_tokenizers(folder)
    write_templates(folder)
    return folder


@pytest.fixture
def home(request: pytest.FixtureRequest) -> Path:
    """The folder of the tokenizer or template that the test's `name` names; skips where it is a real one that is not there."""
    made = request.node.callspec.params["name"].startswith("made")
    return request.getfixturevalue("made_data" if made else "shared_data")
