"""Run a target and print each different failure once, with the bytes that cause it, as a line for a regression test."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable

Target = Callable[[bytes], None]
SLOW = 10  # CPU seconds for one input


class Failures:
    """A target that is gone on with after it failed."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.runs = 0
        self._seen: set[str] = set()

    def run(self, data: bytes) -> None:
        begun = time.process_time()
        self.runs += 1
        try:
            self.target(data)
            if time.process_time() - begun > SLOW:
                raise TimeoutError(f"{SLOW} CPU seconds for one input")
        except Exception:
            where = traceback.format_exc()
            if (key := "".join(re.findall(r"line \d+", where))) not in self._seen:
                self._seen.add(key)
                print(f"{self.target.__name__}({data!r})\n{where}", flush=True)

    def __len__(self) -> int:
        return len(self._seen)
