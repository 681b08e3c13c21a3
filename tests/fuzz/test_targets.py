"""A short, repeatable walk through every fuzz target; `make fuzz` walks on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_a_target_holds(target: Callable[[bytes], None]) -> None:
    walk = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    walk(given(st.binary(max_size=40))(target))()
