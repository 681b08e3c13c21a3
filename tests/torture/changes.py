"""Random changes to everything a run reads and writes, while it runs: the right set, or a refusal, never a mixture.

`python -m tests.torture.changes [ROUNDS] [SEED]` runs the long version and prints what came of it.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sftdata.set.manifest import read_manifest
from sftdata.set.verify import verify
from tests.torture.runs import TOKENIZER, Command

FLAGS = (
    "--max-length",
    "256",
    "--max-rejects",
    "0",
    "--set",
    "slice_bytes=40000",
    "--set",
    "engine=tokenizers",
)
WORDS = {"old": "alpha", "new": "bravo"}
ROWS = 1500
SLOW = "import time\ndef f(row):\n    time.sleep(0.0005)\n"  # so that there is a middle to change things in
FORMATTERS = {
    "old": f"{SLOW}    return row\n",
    "new": f"{SLOW}    return {{**row, 'completion': row['completion'].upper()}}\n",
}


def rows_of(version: str) -> list[dict[str, str]]:
    return [{"prompt": f"{number:05}", "completion": f"{WORDS[version]} " * 20} for number in range(ROWS)]


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(rows), sink, row_group_size=100, compression="none", use_dictionary=False
    )
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": lambda rows: json.dumps(rows).encode(),
    "csv": lambda rows: (
        b"prompt,completion\n" + b"".join(f"{r['prompt']},{r['completion']}\n".encode() for r in rows)
    ),
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows), mtime=0),
    "parquet": as_parquet,
}


class Ground:
    """A folder with one input, a formatter, a tokenizer and an output, each in one of two versions.

    Args:
        kind: of the input.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        folder.mkdir()
        self.input, self.output = folder / f"rows.{kind}", folder / "set"
        self.formatter, self.tokenizer = folder / "forms.py", folder / "tok"
        self.bytes = {version: KINDS[kind](rows_of(version)) for version in WORDS}
        self.tokenizers = {"old": folder / "tok-old", "new": folder / "tok-new"}
        for path in (*self.tokenizers.values(), self.tokenizer):
            shutil.copytree(TOKENIZER, path)
        raw = json.loads((self.tokenizers["new"] / "tokenizer.json").read_text())
        vocabulary = raw["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
        (self.tokenizers["new"] / "tokenizer.json").write_text(json.dumps(raw))
        self.put("old", "old", "old")

    def put(self, data: str, formatter: str, tokenizer: str) -> None:
        """Let the input, the formatter and the tokenizer be these versions."""
        self.input.write_bytes(self.bytes[data])
        self.formatter.write_text(FORMATTERS[formatter])
        self.set_tokenizer(tokenizer)

    def set_tokenizer(self, version: str) -> None:
        shutil.copy(self.tokenizers[version] / "tokenizer.json", self.folder / "coming")
        os.replace(self.folder / "coming", self.tokenizer / "tokenizer.json")

    def command(self, workers: int, *more: str) -> Command:
        flags = [*FLAGS, "-t", str(self.tokenizer), "--formatter", "forms:f", *more]
        return Command(self.input, self.output, workers, flags=flags, folder=self.folder)

    def digests(self) -> dict[str, str]:
        """Return the digest of every combination of versions, each made with nothing changing: digest -> version of the input."""
        found = {}
        for versions in product(WORDS, FORMATTERS, self.tokenizers):
            self.put(*versions)
            code, said = self.command(1).finish()
            assert code == 0, said
            found[read_manifest(self.output).digest] = versions[0]
            shutil.rmtree(self.output)
        assert len(found) == 8
        self.put("old", "old", "old")
        return found


def overwrite(ground: Ground, version: str) -> None:
    before = ground.input.stat()
    with ground.input.open("r+b") as file:
        file.write(ground.bytes[version])
        file.truncate()
    os.utime(ground.input, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(ground: Ground, version: str) -> None:
    (ground.folder / "coming").write_bytes(ground.bytes[version])
    os.replace(ground.folder / "coming", ground.input)


def truncate(ground: Ground, _: str) -> None:
    os.truncate(ground.input, len(ground.bytes["old"]) // 2)


def flicker(ground: Ground, version: str) -> None:
    """Be another for a moment, and the old one again."""
    now = ground.input.read_bytes()
    overwrite(ground, version)
    time.sleep(0.02)
    with ground.input.open("r+b") as file:
        file.write(now)
        file.truncate()


def reform(ground: Ground, version: str) -> None:
    ground.formatter.write_text(FORMATTERS[version])


def retokenize(ground: Ground, version: str) -> None:
    ground.set_tokenizer(version)


def vanish(ground: Ground, _: str) -> None:
    ground.input.unlink(missing_ok=True)


def drop_output(ground: Ground, _: str) -> None:
    shutil.rmtree(ground.output, ignore_errors=True)
    shutil.rmtree(ground.output.with_name("set.partial"), ignore_errors=True)


def second_run(ground: Ground, _: str) -> None:
    code, said = ground.command(1).finish()
    assert code in (0, 1, 2, 3, 4), said
    assert "Internal error" not in said, said


OFTEN = (overwrite, flicker, reform)
ACTIONS = (*OFTEN, *OFTEN, exchange, truncate, retokenize, vanish, drop_output, second_run)


def play(folder: Path, rounds: int, seed: int) -> Counter[str]:
    """Play rounds on every kind of input; return how they ended.

    Raises:
        AssertionError: a set is a mixture, `verify` passes on it, or a run ends in other than one line.
    """
    rng, ends = random.Random(seed), Counter[str]()
    grounds = [Ground(folder / kind.replace(".", "-"), kind) for kind in KINDS][: max(1, rounds // 12)]
    known = [ground.digests() for ground in grounds]
    for number in range(rounds):
        index = number % len(grounds)
        ends[play_one(grounds[index], known[index], rng)] += 1
        if number % 20 == 19:
            print(f"{number + 1} rounds: {dict(ends)}", flush=True)
    return ends


def play_one(ground: Ground, known: dict[str, str], rng: random.Random) -> str:
    """Begin a run, change something at a random moment, and hold what came of it against every version there is."""
    drop_output(ground, "")
    ground.put(*rng.choices(list(WORDS), k=3))
    command = ground.command(rng.choice((1, 1, 2)))
    slices = ground.output.with_name("set.partial") / "slices"
    wanted, began = rng.choice((0, 0, 1, 2, 4)), time.monotonic()
    while command.process.poll() is None and len(list(slices.glob("*[0-9].json"))) < wanted:
        time.sleep(0.002)
    time.sleep(rng.random() * (0.6 if not wanted else 0.05))
    actions = sorted(rng.sample(ACTIONS, k=rng.choice((1, 1, 2))), key=lambda action: action is vanish)
    for action in actions:
        action(ground, rng.choice(list(WORDS)))
    code, said = command.finish()
    what = f"{ground.kind}, {[action.__name__ for action in actions]} after {time.monotonic() - began:.2f} s: {said}"
    assert "Internal error" not in said, what
    assert "Traceback" not in said, what
    assert code in (0, 1, 2, 3, 4), what
    made = ground.output.exists()
    if made:
        assert not verify(ground.output).problems, what
        manifest = read_manifest(ground.output)
        cut = (
            truncate in actions and manifest.sources[0].bytes == len(ground.bytes["old"]) // 2
        )  # before it was planned
        assert manifest.digest in known or cut, f"a set of no version: {what}"
    # The same command, with nothing changing any more, ends in the set of what lies there now, or says why not.
    if not ground.input.exists() or ground.input.read_bytes() not in ground.bytes.values():
        ground.input.write_bytes(ground.bytes["old"])
    again, said = ground.command(1, "--overwrite").finish()
    assert again == 0, f"{what}\nthen: {said}"
    assert ground.bytes[known[read_manifest(ground.output).digest]] == ground.input.read_bytes(), what
    assert not verify(ground.output).problems, what
    return "a set" if code == 0 else f"refused with {code}"


def main() -> None:
    rounds, seed = (
        int(sys.argv[at]) if len(sys.argv) > at else default for at, default in ((1, 300), (2, 0))
    )
    memory, began = Path("/dev/shm"), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="changes-", dir=memory if memory.is_dir() else None))
    try:
        ends = play(folder, rounds, seed)
    finally:
        shutil.rmtree(folder)
    print(
        f"{rounds} rounds in {time.monotonic() - began:.0f} s: {', '.join(f'{ends[end]} {end}' for end in sorted(ends))}"
    )


if __name__ == "__main__":
    main()
