"""Run `prepare` on every real data file with five real tokenizers and write what came of it to docs/compatibility.md.

    SFTDATA_TEST_DATA=DATA python docs/make_compatibility.py [--only SUBSTRING] [--json]

Where a run is refused, the first flag that the message offers after "Fix:" is set and the run repeated, until there is a set that
`verify` passes. Nothing is mended that the message does not name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sftdata
from sftdata.errors import SftError
from sftdata.set.verify import verify
from sftdata.sources.source import open_source
from sftdata.wording import in_a_shell

TOKENIZERS = ("qwen2.5-instruct", "llama-3.2-instruct", "mistral-7b-instruct", "phi-3-mini", "gpt2")
PAGE = Path(__file__).with_name("compatibility.md")
MAX_FIXES = 3
FLAG = re.compile(r"--([a-z][a-z-]*) ([^\s,()]+)")

# Placeholders in an offered fix that only who knows the data can fill in.
CHOICES: dict[str, dict[str, Any]] = {
    "dirty/gorilla_huggingface_api_nulls_mixed.jsonl": {
        "map": {"prompt": "description", "completion": "api_call"}
    },
    "tools/bfcl_v4_live_multiple.jsonl.gz": {"formatter": "make_compatibility:answer"},
    "tools/bfcl_v4_live_simple_jsonl_named.json": {"formatter": "make_compatibility:answer"},
}
# The Hub ids that messages give as examples, as found in the data folder.
HUB = {"Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-instruct"}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a question of the function-calling benchmark, which comes without one, into a conversation with an answer."""
    return {
        "messages": [*row["question"][0], {"role": "assistant", "content": f"{row['function'][0]['name']}()"}]
    }


@dataclass
class Outcome:
    """What became of one file with one tokenizer.

    Attributes:
        refusals: the messages on the way.
        fixes: the settings that each of them offered, and the next run had.
        format: row format as detected.
        rows, kept, cut, rejected, dropped: rows, of the ledger.
        trained: share of the tokens.
        problems: what `verify` found, or the last refusal.
    """

    file: str
    tokenizer: str
    refusals: list[str] = field(default_factory=list)
    fixes: list[dict[str, Any]] = field(default_factory=list)
    format: str = ""
    rows: int = 0
    kept: int = 0
    cut: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    trained: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """What the last run had; a later fix stands before an earlier one."""
        return {name: value for fix in self.fixes for name, value in fix.items()}


def data_files(data: Path) -> list[Path]:
    """Return every file of rows that is text; those with pictures have a table of their own."""
    files = (path for path in (data / "datasets").rglob("*") if path.is_file())
    return sorted(path for path in files if "vision" not in path.relative_to(data).parts)


@in_a_shell()  # the page says what the command says
def run(data: Path, path: Path, tokenizer: str) -> Outcome:
    """Prepare one file with one tokenizer, do what refusals say, and verify the set."""
    outcome = Outcome(path.relative_to(data / "datasets").as_posix(), tokenizer)
    while True:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "set"
            try:
                manifest = sftdata.prepare(
                    path,
                    tokenizer=str(data / "tokenizers" / tokenizer),
                    output=output,
                    workers=1,
                    **outcome.settings,
                )
            except SftError as error:
                message, fix = said(str(error), path, data, output), offered(str(error), outcome.file, data)
                if len(outcome.refusals) == MAX_FIXES or not fix:
                    outcome.problems = [message]
                    return outcome
                outcome.refusals.append(message)
                outcome.fixes.append(fix)
                continue
            outcome.problems = verify(output).problems
        ledger = manifest.ledger
        outcome.format = (
            "by formatter" if "formatter" in outcome.settings else ", ".join(manifest.settings["formats"])
        )
        outcome.rows, outcome.kept, outcome.cut = (
            ledger.rows_in,
            ledger.rows_kept,
            ledger.counters.get("rows_cut", 0),
        )
        outcome.rejected, outcome.dropped = dict(ledger.rows_rejected), dict(ledger.rows_dropped)
        outcome.trained = ledger.tokens_trained / ledger.tokens
        return outcome


def said(message: str, path: Path, data: Path, output: Path) -> str:
    """Return a message without what differs from file to file: its path, line and counts."""
    for name, stands_for in (
        (str(path), "FILE"),
        (path.name, "FILE"),
        (str(output), "DIR"),
        (f"{data}/tokenizers/", ""),
    ):
        message = message.replace(name, stands_for)
    return re.sub(r"(?<![\w.-])\d+(?![\w%]|\.\d)", "N", message)


def offered(message: str, file: str, data: Path) -> dict[str, Any]:
    """Return the first setting that a message offers; {} when it offers none."""
    if any(f"--{name}" in message.partition("Fix:")[2] for name in CHOICES.get(file, ())):
        return CHOICES[file]
    found = FLAG.search(message.partition("Fix:")[2])
    if not found:
        return {}
    name, value = found[1].replace("-", "_"), found[2].rstrip(".")
    if name.startswith("map"):
        key, _, column = value.partition("=")
        return {name: {key: column}}
    return {name: str(data / "tokenizers" / HUB[value]) if value in HUB else value}


# ------------------------------------------------------------------------------------------------ the page

INTRODUCTION = """\
# Every real file, every tokenizer

What `sftdata prepare FILE -t TOKENIZER -o DIR` makes of real data files, unchanged from public repositories,
with default settings. `docs/make_compatibility.py` writes this page; a test holds it against the folder of
data.

A cell shows how many rows are kept, the share of their tokens that is trained, and how many rows are cut at
`max_length`, which is the default, 1024 tokens. A number in brackets refers to a refusal below: the run was
repeated with the first flag that the message offers, and the cell shows that result. `verify` passes every
set. Rows that are not kept are in the last table.

gpt2 has no chat template: instructions go through the Alpaca prompt template there. The Hub id that messages
give as an example is taken from the data folder, and `make_compatibility:answer` adds the answers that a
benchmark's questions lack.
"""


# Held by tests/integration/test_pictures.py::test_a_public_file_makes_a_set_or_is_refused_with_a_fix_that_works.
PICTURES = """
## Files with pictures

With the tokenizer of qwen2.5-instruct, the chat template of Qwen2-VL, and `--processor` naming a folder of the
family Qwen2.5-VL. The pictures of most files are not public: `--images DIR` is what the refusal offers, and names
a folder of pictures made under their names.

| file | format | rows | pictures | refusal, and the fix |
|---|---|--:|--:|---|
| `vision/lf_mllm_demo.json` | messages | 6 | 8 | |
| `vision/lf_v1_multimodal_demo.jsonl` | messages | 24 | 32 | image-missing: `--images DIR` |
| `vision/llava_instruct_100.json` | sharegpt | 100 | 100 | image-missing: `--images DIR` |
| `vision/llava_tables_252.jsonl` | sharegpt | 252 | 252 | image-missing: `--images DIR` |
| `vision/qwen_vl_single_images.json` | sharegpt | 3 | 3 | image-missing: `--images DIR` |
| `vision/qwen_vl_video.json` | | 0 | 0 | video-row: rows with films are left out |
"""


def write_page(data: Path, outcomes: list[Outcome]) -> str:
    """Return the page as Markdown."""
    notes: dict[str, int] = {}
    for outcome in outcomes:
        for refusal in outcome.refusals:
            notes.setdefault(refusal, len(notes) + 1)
    lines = [
        INTRODUCTION,
        "| file | container | format | rows | " + " | ".join(TOKENIZERS) + " |",
        "|---|---|---|--:|" + "---|" * 5,
    ]
    for file in dict.fromkeys(outcome.file for outcome in outcomes):
        row = [outcome for outcome in outcomes if outcome.file == file]
        source = open_source(str(data / "datasets" / file))
        container = (
            source.container if source.compression == "none" else f"{source.container}, {source.compression}"
        )
        cells = [
            f"`{file}`",
            container,
            row[0].format,
            f"{row[0].rows:,}",
            *(cell(outcome, notes) for outcome in row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "## Refusals, and the fix they offer",
        "",
        "Messages that differ only in numbers and names are listed once.",
        "",
        "| | message | run again with |",
        "|--:|---|---|",
    ]
    lines += [
        f"| {number} | {escape(message)} | {taken(message, outcomes)} |" for message, number in notes.items()
    ]
    lines += [
        "",
        "## Rows that are not kept",
        "",
        "| file | tokenizer | rejected | dropped |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *losses(outcomes)]) + "\n" + PICTURES


def cell(outcome: Outcome, notes: dict[str, int]) -> str:
    """Say in a few characters what became of one run."""
    if outcome.problems:
        return f"**FAILS** {escape(outcome.problems[0])}"
    marks = "".join(f" [{notes[refusal]}]" for refusal in outcome.refusals)
    return result(outcome) + marks


def result(outcome: Outcome) -> str:
    """Say what a set came to."""
    cut = f" · {outcome.cut:,} cut" if outcome.cut else ""
    return f"{outcome.kept:,} · {outcome.trained:.0%}{cut}"


def taken(message: str, outcomes: list[Outcome]) -> str:
    """Return the flag that a message's fix was taken as."""
    fixes = [dict(zip(outcome.refusals, outcome.fixes, strict=True)).get(message, {}) for outcome in outcomes]
    flags: dict[str, None] = {}
    for name, value in (item for fix in fixes for item in fix.items()):
        values = (
            [f"{key}={column}" for key, column in value.items()] if isinstance(value, dict) else [str(value)]
        )
        flags[" ".join(f"`--{name.replace('_', '-')} {Path(text).name}`" for text in values)] = None
    return " or ".join(flags)


def losses(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield a line for every run that lost rows; runs of a file that lost the same share a line."""
    lost: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        counts = [
            ", ".join(f"{count} {name}" for name, count in sorted(rows.items()))
            for rows in (outcome.rejected, outcome.dropped)
        ]
        if any(counts):
            lost.setdefault((outcome.file, counts[0], counts[1]), []).append(outcome.tokenizer)
    for (file, rejected, dropped), tokenizers in lost.items():
        named = "all" if len(tokenizers) == len(TOKENIZERS) else ", ".join(tokenizers)
        yield f"| `{file}` | {named} | {rejected} | {dropped} |"


def escape(text: str) -> str:
    """Make a message safe inside a Markdown table."""
    return re.sub(r"([|<*_\[\]`])", r"\\\1", text)


def main() -> int:
    """Run what is asked for; write the page when that is everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="only files with this in their path; prints instead of writing the page"
    )
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON lines")
    arguments = parser.parse_args()
    data = Path(os.environ["SFTDATA_TEST_DATA"])
    outcomes = []
    for path in data_files(data):
        for tokenizer in TOKENIZERS if arguments.only in path.as_posix() else ():
            outcomes.append(run(data, path, tokenizer))
            print(
                path.name,
                tokenizer,
                len(outcomes[-1].refusals),
                outcomes[-1].problems or "ok",
                file=sys.stderr,
                flush=True,
            )
    if arguments.json:
        sys.stdout.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
    elif arguments.only:
        sys.stdout.write(write_page(data, outcomes))
    else:
        PAGE.write_text(write_page(data, outcomes), "utf-8")
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
