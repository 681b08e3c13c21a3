"""What looking at ten million documents costs: to open the set, to filter it, and how much memory that takes.

    python benchmarks/browse.py [--documents 10000000] [--folder DIR] [--runs 5] [--json]

The set is an index alone: that of a few thousand documents of synthetic text, over and over under further ids, each slice
with the same tokens behind it (hard links). Each run is a process of its own. Times are of the processor, imports aside, and
of the clock; memory is the most that the process held; of all runs, the median and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

import sftdata
from sftdata.set.index import INDEX, beside_name, read_index, slice_number, write_index
from sftdata.set.ledger import Ledger
from sftdata.set.manifest import Manifest, SourceInfo, write_manifest
from sftdata.set.slices import SLICES_NAME

ROOT = Path(__file__).resolve().parents[1]
ONCE = 65_536  # documents that are written; a slice has 7,000, as many as 8 MiB of chats hold
SOURCES = 12
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "was",
    "on",
    "are",
    "as",
    "with",
    "they",
    "at",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="keep the set here, and use it if it is there")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--visit", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.visit is not None:
        print(json.dumps(visit(options.visit)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "many"
        if not folder.is_dir():
            make_set(folder, -(-options.documents // ONCE), Path(scratch))
        runs = [
            json.loads(subprocess.check_output([sys.executable, __file__, "--visit", str(folder)], text=True))
            for _ in range(options.runs)
        ]
    found = {
        name: [middle_and_most(one) for one in zip(*(run[name] for run in runs), strict=True)]
        for name in runs[0]
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, ((cpu, most), *rest) in found.items():
        clock = "".join(f"; by the clock {median:.2f} s, {longest:.2f} s" for median, longest in rest)
        print(f"{name:36}{cpu:.2f}, at most {most:.2f}{clock}")


def middle_and_most(values: tuple[float, ...]) -> tuple[float, float]:
    return statistics.median(values), max(values)


def make_set(folder: Path, times: int, scratch: Path) -> None:
    """Write a few slices as `prepare` does, and their indexes again and again, for further documents."""
    draw = random.Random(7)
    rows = scratch / "chats.jsonl"
    with rows.open("w") as sink:
        for _ in range(ONCE):
            turns = [
                {"role": role, "content": " ".join(draw.choices(WORDS, k=int(draw.lognormvariate(3, 1)) + 1))}
                for role in ("user", "assistant")
            ]
            sink.write(json.dumps({"messages": turns}) + "\n")
    made = sftdata.prepare(
        rows, tokenizer=str(ROOT / "examples/tokenizer"), output=folder, max_length=256, workers=1
    )
    files = [file for file in made.files if file.name != SLICES_NAME]
    (folder / SLICES_NAME).unlink()
    own = [
        (number, file) for file in (*made.shards, *files) if (number := slice_number(file.name)) is not None
    ]
    count = 1 + max(number for number, _ in own)
    indexes = {number: read_index(folder / beside_name(INDEX, number)) for number in range(count)}
    shards = list(made.shards)
    for time_ in range(1, times):
        for number, file in own:
            name = file.name.replace(f"{number:05d}", f"{number + time_ * count:05d}")
            if file.name.startswith(INDEX):
                index = indexes[number]
                moved = replace(index, example_ids=index.example_ids + time_ * ONCE)
                files.append(write_index(folder / name, moved))
                continue
            os.link(folder / file.name, folder / name)
            (shards if file in made.shards else files).append(msgspec.structs.replace(file, name=name))
    write_manifest(folder, many_times(made, times, tuple(shards), tuple(files)))


def many_times(made: Manifest, times: int, shards: Any, files: Any) -> Manifest:
    """Return the manifest of the same slices so many times, from a dozen sources."""
    ledger = made.ledger
    for name in Ledger.__struct_fields__:
        value = getattr(ledger, name)
        if isinstance(value, int) and name != "max_length":
            setattr(ledger, name, value * times)
        elif isinstance(value, dict) and name not in ("sources", "examples"):
            setattr(ledger, name, {key: count * times for key, count in value.items()})
    total = times * ONCE
    edges = [total * number // SOURCES for number in range(SOURCES + 1)]
    sources = tuple(
        SourceInfo(name=f"chats-{number:02}.jsonl", bytes=9, xxh3="0" * 32, rows=last - first, first_id=first)
        for number, (first, last) in enumerate(pairwise(edges))
    )
    whole = next(iter(ledger.sources.values()))
    ledger.sources = {
        source.name: type(whole)(
            rows=whole.rows * times // SOURCES, tokens=whole.tokens * times // SOURCES,
            tokens_trained=whole.tokens_trained * times // SOURCES,
        )
        for source in sources
    }  # fmt: skip
    return msgspec.structs.replace(made, shards=shards, files=files, sources=sources, ledger=ledger)


PAGES = {
    "opened: the first page": "",
    "filter: length": "min_tokens=64&max_tokens=127",
    "filter: trained share": "min_trained=25%25",
    "filter: source, length and share": "sources=chats-0*&min_tokens=20&max_trained=50%25",
    "filter: cut": "state=cut",
    "filter: a finding": "finding={code}",
    "the last page": "page=190000",
    "search: a page without a hit": "text=there+is+none",
}


def visit(folder: Path) -> dict[str, list[float]]:
    """Look at pages, as a browser would; return what each took, in seconds, and the memory of all in MiB."""
    from sftdata.browse.site import Site
    from sftdata.show.view import open_shown

    found, site, code = {"imports, of this script too": [time.process_time()]}, None, ""
    for name, query in PAGES.items():
        if "{code}" in query:  # a set of other words has other ones
            code = next(one.code for one in site._sets[0].audited().findings if len(one.ids))
        began = time.process_time(), time.perf_counter()
        site = site or Site([open_shown(folder)])
        answer = site.answer("/top", "1/", query.format(code=code))
        assert answer.status == 200, answer.body[-300:]
        found[name] = spent(*began)
    return found | {"memory, MiB": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]}


def spent(began: float, clock: float) -> list[float]:
    return [time.process_time() - began, time.perf_counter() - clock]


if __name__ == "__main__":
    main()
