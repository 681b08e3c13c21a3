"""Fuzz for some minutes: `python -m tests.fuzz MINUTES [TARGET...]`, with random edits of sound inputs.

What fails is printed with the bytes that do it, as a line for a regression test.
"""

from __future__ import annotations

import random
import re
import sys
import time
import traceback
from collections.abc import Callable

from tests.fuzz.targets import TARGETS

Target = Callable[[bytes], None]


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    chosen = [target for target in TARGETS if target.__name__ in sys.argv[2:] or len(sys.argv) < 3]
    return sum(walk(target, minutes * 60 / len(chosen)) for target in chosen)


def walk(target: Target, seconds: float) -> int:
    """Run one target until the time is up; return how many different failures it had."""
    rng, until, runs, failed = random.Random(time.time_ns()), time.monotonic() + seconds, 0, set()
    while time.monotonic() < until:
        data = rng.randbytes(rng.choice((1, 2, 6, 10, 14, 22, 40)))
        begun = time.monotonic()
        runs += 1
        try:
            target(data)
            if time.monotonic() - begun > 10:
                raise TimeoutError("ten seconds for one input")
        except Exception:
            where = traceback.format_exc()
            if (key := "".join(re.findall(r"line \d+", where))) not in failed:
                failed.add(key)
                print(f"{target.__name__}({data!r})\n{where}", flush=True)
    print(f"{target.__name__}: {runs} inputs, {len(failed)} failures", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
