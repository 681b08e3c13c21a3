"""Small runs of `prepare` to break: in this process, in a forked child, or as a command with workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sftdata
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.manifest import partial_folder, read_manifest
from sftdata.set.verify import verify
from tests.torture.faults import Fault, Tap
from tests.waiting import HANGS

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "examples" / "tokenizer")
SMALL = ("--max-length", "64", "--max-rejects", "50%", "--set", "slice_bytes=20000")
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "bright",
    "stars",
    "look",
    "on",
)
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tests.torture.runs", "sftdata.pipeline", "sftdata.views.write", "tokenizers", "pyarrow", "jinja2"]
)


def write_chats(path: Path, rows: int, seed: int = 5) -> Path:
    """Write seeded chats, every tenth of them broken, so that there are rejects to lose as well."""
    rng = random.Random(seed)
    with path.open("w") as lines:
        for number in range(rows):
            turns = [
                {
                    "role": role if number % 10 else "bot",
                    "content": " ".join(rng.choices(WORDS, k=rng.randint(2, 30))),
                }
                for role in ("user", "assistant")
            ]
            lines.write(json.dumps({"messages": turns}) + "\n")
    return path


def settings(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    basic = {
        "max_length": 64,
        "slice_bytes": 2000,
        "max_rejects": "50%",
        "engine": "tokenizers",
        "workers": 1,
    }
    return {"inputs": data, "tokenizer": TOKENIZER, "output": output} | basic | more


def prepare(data: Path, output: Path, **more: Any) -> Any:
    return sftdata.prepare(**settings(data, output, **more))


def content(folder: Path) -> dict[str, bytes]:
    """Return every file of a set."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def forked(given: dict[str, Any], fault: Fault, function: str = "prepare") -> int:
    """Run `prepare` or `view` in a child that is forked warm; return its exit code, negative when a signal ended it."""
    child = _forks.Process(target=_run_forked, args=(given, fault, function))
    child.start()
    child.join(HANGS)
    assert child.exitcode is not None, "the run hangs"
    return child.exitcode


def _run_forked(given: dict[str, Any], fault: Fault, function: str) -> None:
    Tap(str(Path(given["output"]).parent), fault).install()
    getattr(sftdata, function)(**given)


class Command:
    """`sftdata prepare` as a command of its own process group, workers included, with a fault or without."""

    def __init__(
        self, data: Path, output: Path, workers: int, fault: Fault | None = None, flags: Sequence[str] = SMALL,
        folder: Path | None = None, **more: str,
    ) -> None:  # fmt: skip
        flags = [*flags, "--workers", str(workers)]
        path = os.pathsep.join([str(Path(__file__).parent / "inject"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path} | more
        if fault:
            environment["SFT_FAULT"] = json.dumps(asdict(fault) | {"folder": str(output.parent)})
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sftdata",
                "prepare",
                str(data),
                "-t",
                TOKENIZER,
                "-o",
                str(output),
                *flags,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.process.pid, signal.SIGKILL)

    def finish(self, timeout: float = HANGS) -> tuple[int, str]:
        """Return the exit code and what was said."""
        _, said = self.process.communicate(timeout=timeout)
        return self.process.returncode, said


def look(folder: Path) -> str | None:
    """Return the digest of the set that a reader finds, None where it finds none; whatever it accepts must be whole.

    Raises:
        IntegrityError: a set was accepted that is not whole.
    """
    try:
        manifest = read_manifest(folder)
    except UsageError:
        return None
    problems = verify(folder).problems
    if (
        problems and manifest.digest == read_manifest(folder).digest
    ):  # else it was replaced while it was verified
        raise IntegrityError(problems[0])
    return manifest.digest


def watch(command: Command, folder: Path, done: int) -> set[str | None]:
    """Poll a folder as a reader would until the command ends or has finished so many slices; return what was found."""
    found = {look(folder)}
    while command.process.poll() is None and slices_done(folder) < done:
        found.add(look(folder))
        time.sleep(0.002)
    return found


def slices_done(output: Path) -> int:
    """Return how many slices of an unfinished set are recorded as finished."""
    return len(list(partial_folder(output).glob("slices/[0-9]*[0-9].json")))
