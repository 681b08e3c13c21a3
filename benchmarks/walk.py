"""Count the files of the package that one chat row runs through, from `prepare` to the shard.

    python -m benchmarks.walk [--list]

A function counts when it is called; what runs while modules are imported does not (a first run warms them up).
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import sftdata

PACKAGE = Path(sftdata.__file__).parent
TOKENIZER = PACKAGE.parent / "examples" / "tokenizer"
ROW = {"messages": [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "Yes."}]}


def walk(folder: Path) -> Counter[tuple[str, str]]:
    """Prepare one row twice; return the calls of the second time, by file and function."""
    data = folder / "row.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    calls: Counter[tuple[str, str]] = Counter()

    def record(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            calls[str(Path(path).relative_to(PACKAGE)), frame.f_code.co_qualname] += 1

    for number in range(2):
        if number:
            threading.setprofile(record)
            sys.setprofile(record)
        sftdata.prepare(data, tokenizer=str(TOKENIZER), output=folder / f"set-{number}", workers=1)
    sys.setprofile(None)
    threading.setprofile(None)
    return calls


def main() -> None:
    """Print how many files and functions run; with --list, which."""
    with tempfile.TemporaryDirectory() as folder:
        calls = walk(Path(folder))
    files = Counter(file for file, _ in calls.elements())
    print(f"{len(files)} files, {len(calls)} functions, {calls.total()} calls")
    if "--list" in sys.argv:
        for file in sorted(files):
            names = sorted(name for other, name in calls if other == file)
            print(f"{file}: {', '.join(names)}")


if __name__ == "__main__":
    main()
