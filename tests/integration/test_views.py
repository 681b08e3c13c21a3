"""Views of sets: the law that a view is what `prepare` would have made, and the laws of what it chooses."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest

from sftdata.errors import DataError
from sftdata.set.verify import verify
from tests.view_sets import KINDS, Settings, contents, layouts, prepare, view, write_inputs

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Path], Settings]]:
    """Inputs of eight kinds."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def assert_view_is_what_prepare_makes(
    tmp_path: Path, inputs: tuple[list[Path], Settings], bases: list[Settings], targets: list[Settings]
) -> None:
    files, settings = inputs
    made = [tmp_path / f"base-{number}" for number in range(len(bases))]
    for folder, base in zip(made, bases, strict=True):
        with suppress(DataError):  # nothing is left of this input with these settings
            prepare(folder, files, **settings, **base)
    made = [folder for folder in made if folder.exists()]
    assert made
    for number, target in enumerate(targets):
        folder, expected = tmp_path / f"made-{number}", None
        with suppress(DataError):
            expected = prepare(folder, files, **settings, **target)
        for base in made:
            output, what = tmp_path / f"{base.name}-{number}", f"{base.name} -> {target}"
            if expected is None:
                with pytest.raises(DataError, match="no document is left"):
                    view(output, base, **target)
                continue
            found = view(output, base, **target)
            assert found.ledger.to_json() == expected.ledger.to_json(), what
            assert contents(output) == contents(folder), what
            assert found.settings == expected.settings, what
            assert found.digest == expected.digest, what
            assert not verify(output).problems, what


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_what_prepare_makes_with_its_settings(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], kind: str
) -> None:
    rng = random.Random(kind)
    every = layouts(40, 150, 1000)
    assert_view_is_what_prepare_makes(tmp_path, inputs[kind], rng.sample(every, 2), rng.sample(every, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_any_set_is_what_prepare_makes_with_any_settings(
    tmp_path: Path, inputs: dict[str, tuple[list[Path], Settings]], kind: str
) -> None:
    every = layouts(40, 150, 1000)
    assert_view_is_what_prepare_makes(tmp_path, inputs[kind], random.Random(kind).sample(every, 8), every)
