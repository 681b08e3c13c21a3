"""The first thing a run does: start the process that takes longest to get ready, before anything else is imported.

The leader of the workers imports the pipeline and loads the tokenizer's engine while this process imports what it needs itself,
reads the input through and plans.
"""

from __future__ import annotations

from pathlib import Path

from sftdata.config import FAST_ENGINE_MIN_BYTES, PrepareConfig
from sftdata.engine.local import Workers, usable_cores
from sftdata.sources.inputs import expand_inputs

_PIPELINE = "sftdata.pipeline"


def start_workers(config: PrepareConfig) -> Workers:
    """Return the workers of a run; starts their leader early when the input is large.

    Raises:
        UsageError: an input that is not there.
    """
    worth_it = (config.overwrite or not config.output.exists()) and _input_bytes(
        config
    ) >= FAST_ENGINE_MIN_BYTES
    return Workers(config.workers or usable_cores(), warm=_PIPELINE if worth_it else None)


def _input_bytes(config: PrepareConfig) -> int:
    """Return the size of the local input files, before any of them is read."""
    return sum(Path(path).stat().st_size for path in expand_inputs(config.inputs)[0] if Path(path).is_file())
