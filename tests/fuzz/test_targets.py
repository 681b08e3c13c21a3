"""A short, repeatable walk through every fuzz target, and what longer ones found; `make fuzz` walks on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, rows
from tests.torture.runs import ROOT

FOUND = [
    (rows, b"-\x01*-\x16-"),  # how a damaged array was split depended on the size of the first block
    # Where a damaged element ended depended on how much of the stream was held, with a line cap below 64 KiB.
    (rows, bytes.fromhex("4112c652a50f2fce37956abc752d998c35ed94aaa7b0ce0c35bfa6e1be4acadafe1754389debf6cf")),
    (rows, b"\x01\x0c\x05\x1b\xc0M\xd1\\\xb7x\xf9G\xd57"),  # the same, where the whole stream was held
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_a_target_holds(target: Callable[[bytes], None]) -> None:
    walk = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    walk(given(st.binary(max_size=40))(target))()


@pytest.mark.parametrize(("target", "data"), FOUND)
def test_what_was_found_is_mended(target: Callable[[bytes], None], data: bytes) -> None:
    target(data)


@pytest.mark.slow
def test_without_atheris_the_walk_is_random_and_says_so() -> None:
    hidden = "import sys; sys.argv[1:] = ['0.02', 'masks']\n"
    hidden += "import importlib.util as u; find = u.find_spec\n"
    hidden += "hide = lambda name, package: None if name == 'atheris' else find(name, package)\n"
    hidden += "u.find_spec = lambda name, package=None: hide(name, package)\n"
    hidden += "from tests.fuzz.__main__ import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", hidden],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    first, last = done.stdout.splitlines()
    assert "the walk is random" in first
    assert last.endswith(" inputs, 0 failures")
