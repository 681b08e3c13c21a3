"""Fixtures and rules shared by all tests: real data and tokenizers made here, the quick and the long suite, offline habits."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.forked import pytest_runtest_protocol  # noqa: F401  a hook

settings.register_profile("long", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("long"), max_examples=25)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["SFTTRAIN_CACHE"] = ""  # tests replace what is proven; those of the cache name a folder

# What the quick suite leaves out. The other marks need a GPU, the internet or half an hour; `slow` alone is the long suite.
LONG = ("slow", "gpu", "network", "torture")


def pytest_configure(config: pytest.Config) -> None:
    """Let the quick suite try fewer examples of each property."""
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "long")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move whatever needs the folder of real data to the long suite."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "shared_data" in fixtures or ("home" in fixtures and not _is_made(item)):
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what the quick suite left out, so that nobody takes a file's quick tests for all of them."""
    left_out = terminalreporter.stats.get("deselected", ())
    slow = sum(item.get_closest_marker("slow") is not None for item in left_out)
    if slow:
        terminalreporter.write_line(
            f"{slow} tests of the long suite left out; -m 'not gpu and not network and not torture' runs them"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a quick test that skips: whoever has only this project is told nothing by a test that does not run."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not any(map(item.get_closest_marker, LONG)):
        report.outcome = "failed"
        report.longrepr = f"a test of the quick suite never skips: {report.longrepr}"
    return report


def _is_made(item: pytest.Item) -> bool:
    """Whether the tokenizer or template that the test's `name` names is one made here."""
    return str(item.callspec.params["name"]).startswith("made")  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, chat templates and datasets, named by SFTDATA_TEST_DATA."""
    folder = os.environ.get("SFTDATA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SFTDATA_TEST_DATA does not name the folder of real tokenizers, templates and datasets")
    return Path(folder)


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write without waiting for the disk: no set that is made here has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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
    return request.getfixturevalue("made_data" if _is_made(request.node) else "shared_data")
