"""Walk one target as atheris leads, towards code that no input has reached yet: `python -m tests.fuzz.guided TARGET SECONDS`."""

from __future__ import annotations

import sys

from tests.fuzz.failures import Failures


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["sftdata"]):  # what is imported later is not watched
        from tests.fuzz.targets import TARGETS

    name, seconds = sys.argv[1:3]
    failures = Failures(next(target for target in TARGETS if target.__name__ == name))
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-max_len=64", "-rss_limit_mb=4096", "-timeout=60"],
        failures.run,
    )
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
