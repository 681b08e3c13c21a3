"""Write the pages that the code knows: docs/cli.md, python.md, errors.md, audit.md, the table of formats.md."""

from __future__ import annotations

import ast
import contextlib
import html
import inspect
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import sftdata.cli
import sfttrain.cli
from sftdata import config
from sftdata.errors import read_codes
from sftdata.read.formats import FORMATS, LINE
from sftdata.show.findings import KINDS

DOCS = Path(__file__).resolve().parent
COMMANDS = re.compile(r"^  (?P<name>[a-z]+)  +\S", re.MULTILINE)
SLOT = re.compile(r"\{(\w+)\}")
# What mends a finding where that depends on the set: the finding itself says which.
WAYS = {
    "turn-end-not-a-stop": "--eos-token 'TOKEN', or TOKEN in eos_token_id of the tokenizer's generation_config.json, as it says",
    "no-trained-end": "--eos-token with the token that it names; for rows of ids, ids and labels that end in it",
    "control-token-in-answer": "clean the rows; leave out --trust-control-tokens, or give rendered chats as messages, as it says",
    "eos-not-in-generation-config": "TOKEN in eos_token_id of the tokenizer's generation_config.json, or --eos-token, as it says",
}
PLAIN = {"what": "an answer or a text", "origin": ""}  # slots that are words of the sentence
TABLE = re.compile(r"(?<=<!-- table: formats, by docs/make_reference.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def help_of(package: str, *command: str) -> str:
    """Return what `--help` of a command prints on 100 columns."""
    main = sfttrain.cli.main if package == "sfttrain" else sftdata.cli.main
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
    ):
        main([*command, "--help"])
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip() + "\n"


def commands(*command: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield a command with its help, then all commands under it."""
    text = help_of(*command)
    yield command, text
    for found in COMMANDS.finditer(text.partition("\nCommands:\n")[2]):
        yield from commands(*command, found["name"])


def cli_page() -> str:
    """Return docs/cli.md."""
    parts = [
        "# The command line\n",
        "What `--help` prints, written by `make docs`. Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 internal\n"
        "error, 2 wrong usage, 3 the data cannot make a set, 4 bytes that do not match their manifest, 130 interrupted.\n"
        "`--debug` anywhere shows the traceback of an error.\n",
    ]
    for package in ("sftdata", "sfttrain"):
        for command, text in commands(package):
            parts.append(f"{'#' * min(len(command) + 1, 3)} {' '.join(command)}\n\n```text\n{text}```\n")
    return "\n".join(parts)


WRITTEN_IN = {
    "sftdata": ("__init__.py", "meter.py", "batches.py", "errors.py"),
    "sfttrain": ("__init__.py", "iterative.py"),
}
PYTHON = """# The Python interface

All that is public; [versioning](versioning.md) says what may change. This page is written by `make docs` from
the source. The settings are those of [the command line](cli.md), by the same names.

```python
import sftdata

seen = sftdata.preview("examples/conversations.jsonl", tokenizer="examples/tokenizer", max_length=256)
print(seen.projected(batch_size=8))
manifest = sftdata.prepare(
    "examples/conversations.jsonl",
    tokenizer="examples/tokenizer",
    output="chats",
    max_length=256,
    on_note=print,
    on_progress=lambda progress: print(f"{progress.done}/{progress.total}, {progress.tokens:,} tokens"),
)
assert sftdata.verify("chats").ok
for finding in sftdata.audit("chats"):
    print(finding.code, finding.count)
```
"""


def definitions(package: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield each public function and class of a package, with its head and docstring as they are written."""
    for path in WRITTEN_IN[package.__name__]:
        source = (DOCS.parent / package.__name__ / path).read_text("utf-8")
        found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        for node in sorted(found, key=lambda node: isinstance(node, ast.ClassDef)):
            if node.name in package.__all__:
                yield node.name, "\n".join(source.splitlines()[node.lineno - 1 : node.body[0].end_lineno])


def settings_table(keywords: type) -> str:
    """Return the settings that are keywords of a function, with their types there."""
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in ast.walk(ast.parse(inspect.getsource(keywords))):
        if isinstance(field, ast.AnnAssign):
            name, kind = ast.unparse(field.target), ast.unparse(field.annotation).replace("|", "\\|")
            setting = config.PrepareConfig.model_fields[name]
            default = setting.get_default(call_default_factory=True)
            lines.append(f"| `{name}` | `{kind}` | `{default!r}` | {setting.description} |")
    return "\n".join(lines) + "\n"


def python_page() -> str:
    """Return docs/python.md."""
    parts = [PYTHON]
    for package in (sftdata, sfttrain):
        parts.append(f"## {package.__name__}\n")
        for name, head in definitions(package):
            parts.append(f"### {package.__name__}.{name}\n\n```py\n{head}\n```\n")
    parts.append(f"## Settings of prepare, preview and stream\n\n{settings_table(config.RowSettings)}")
    parts.append(f"## Settings of prepare and preview\n\n{settings_table(config.PrepareSettings)}")
    return "\n".join(parts)


def errors_page() -> str:
    """Return docs/errors.md."""
    text = (DOCS.parent / "sftdata/codes.md").read_text("utf-8")
    return (
        "# Codes\n\n"
        f"Each of the {len(read_codes())} codes that a reject, the ledger or an audit may name.\n"
        "`sftdata explain CODE` prints its paragraph. This page is written by `make docs` from `sftdata/codes.md`.\n\n"
        f"{re.sub('^### (.+)$', lambda found: f'### `{found[1]}`', text, flags=re.MULTILINE)}"
    )


def audit_page() -> str:
    """Return docs/audit.md."""
    lines = [
        "# The audit\n",
        "What a set would teach that nobody meant. `sftdata prepare` ends with it (of a large set, evenly spaced shards of about",
        "2 million tokens in all), `sftdata audit DIR` reads the whole set, `sftdata stats DIR --html FILE` shows it on a page;",
        "`--against EVALUATION` looks for prompts that two sets share. Each finding comes with its count, its share, up to three",
        "places as file and line, and what mends it. Nothing is changed.",
        "`--strict` exits with 3 when there is a defect. A *defect* makes the model learn something else than meant; a *note* is",
        "harmless here, but worth knowing. This page is written by `make docs` from the table in `sftdata/show/findings.py`.\n",
        "```bash\nsftdata prepare examples/conversations.jsonl -t examples/tokenizer -o chats --max-length 256\n"
        "sftdata audit chats --strict\n```\n",
        "| finding | kind | what was found | what mends it |\n|---|---|---|---|",
    ]
    for code, kind in KINDS.items():
        shown = (kind.message, WAYS.get(code, kind.fix))
        cells = (
            SLOT.sub(lambda slot: PLAIN.get(slot[1], slot[1].upper()), html.escape(text, quote=False))
            for text in shown
        )
        lines.append(
            f"| [`{code}`](errors.md#{code}) | {kind.severity}, counted by {kind.of} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def formats_table() -> str:
    """Return the table of row formats."""
    lines = [
        "| format | what it is | columns it needs (or their other names) | columns it also takes |",
        "|---|---|---|---|",
    ]
    for entry in FORMATS.values():
        needed = ", ".join(
            " or ".join(f"`{name}`" for name in column.spellings if name != LINE) or "the line itself"
            for column in entry.columns
            if column.required
        )
        taken = ", ".join(f"`{column.spellings[0]}`" for column in entry.columns if not column.required)
        lines.append(f"| `{entry.name}` | {entry.about} | {needed} | {taken or '·'} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Return path -> text of every page, as it should be."""
    formats = DOCS / "formats.md"
    table = TABLE.sub(lambda _: formats_table(), formats.read_text("utf-8"))
    return {
        DOCS / "cli.md": cli_page(),
        DOCS / "python.md": python_page(),
        DOCS / "errors.md": errors_page(),
        DOCS / "audit.md": audit_page(),
        formats: table,
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
