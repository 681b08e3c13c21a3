"""Fuzz for some minutes: `python -m tests.fuzz MINUTES [TARGET...]`.

Where atheris is installed it leads the walk by what code is reached; else edits are drawn at random.
"""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
import time

from tests.fuzz.failures import Failures, Target
from tests.fuzz.targets import TARGETS


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    chosen = [target for target in TARGETS if target.__name__ in sys.argv[2:] or len(sys.argv) < 3]
    guided = importlib.util.find_spec("atheris") is not None
    if not guided:
        print("atheris is not installed (pip install -e '.[fuzz]'): the walk is random.", flush=True)
    return sum((lead if guided else walk)(target, minutes * 60 / len(chosen)) for target in chosen)


def walk(target: Target, seconds: float) -> int:
    """Run one target on random bytes until the time is up; return how many different failures it had."""
    rng, until, failures = random.Random(time.time_ns()), time.monotonic() + seconds, Failures(target)
    while time.monotonic() < until:
        failures.run(rng.randbytes(rng.choice((1, 2, 6, 10, 14, 22, 40))))
    print(f"{target.__name__}: {failures.runs} inputs, {len(failures)} failures", flush=True)
    return len(failures)


def lead(target: Target, seconds: float) -> int:
    """Run one target under atheris, in a process of its own; return how many different failures it had."""
    command = [sys.executable, "-m", "tests.fuzz.guided", target.__name__, str(max(int(seconds), 1))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    failures = len(re.findall(rf"^{target.__name__}\(", done.stdout, re.M))
    ran = re.search(r"Done (\d+) runs", done.stderr)
    print(done.stdout, end="", flush=True)
    if not ran:  # out of memory, out of time, or a crash below Python
        print(done.stderr[-4000:], flush=True)
    print(
        f"{target.__name__}: {ran.group(1) if ran else 'broken off'} inputs, {failures} failures", flush=True
    )
    return max(failures, not ran)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
