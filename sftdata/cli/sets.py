"""Commands on finished sets, and those that explain codes and print the environment."""

from __future__ import annotations

import locale
import os
import platform
import re
import shutil
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from sftdata.choosing import folders_of
from sftdata.cli.flags import Folder, Json, Map, SetOrRows, Split, Tokenizer, rows_of, with_settings
from sftdata.errors import DataError, IntegrityError, read_codes
from sftdata.output import Meter, counted, local_output, print_json, print_line
from sftdata.views.recipe import ViewConfig

if TYPE_CHECKING:
    from sftdata.set.export import Target
    from sftdata.show.foreign import Rows
    from sftdata.show.view import ShownSet

VIEW_GROUPS = {
    "sets": "what it is made of",
    "sources": "which documents",
    "eval": "split and mix",
    "max_length": "how it is laid out",
}
VARIABLES = (
    "HF_HUB_OFFLINE", "NO_COLOR", "OMP_NUM_THREADS", "PYTHONHASHSEED", "RAYON_NUM_THREADS",
    "TOKENIZERS_PARALLELISM", "TZ",
)  # fmt: skip


def audit(
    folder: SetOrRows,
    tokenizer: Tokenizer = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DIR", help="Evaluation set; report the prompts it shares."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if there is a defect.")] = False,
    split: Split = None,
    map: Map = None,
    as_json: Json = False,
) -> None:
    """Look for unintended supervision: answers without an end, cut answers, double BOS, typed control tokens.

    Example: sftdata audit shards --strict
    Example: sftdata audit prepared -t Qwen/Qwen2.5-0.5B-Instruct
    """
    from sftdata.show.audit import audit_set
    from sftdata.show.foreign import open_against

    rows = rows_of(tokenizer, split, map)
    shards = _opened(folder, rows)
    other = None if against is None else open_against(against, rows)
    findings = audit_set(shards, other, every=as_json)
    defects = [finding for finding in findings if finding.severity == "defect"]
    if as_json:
        results = [finding.to_json() for finding in findings]
        print_json({"folder": str(folder), "clean": not defects, "findings": results})
    elif findings:
        from sftdata.show.terminal import make_console, print_findings

        print_findings(findings, make_console())
        print_line(f"sftdata explain {findings[0].code} says more.", err=True)
    else:
        print_line(f"{folder}: nothing found.")
    if strict and defects:
        names = ", ".join(finding.code for finding in defects)
        raise DataError(f"{folder}: there are defects ({names}).", "see above, or audit without --strict.")


def _opened(path: str | Path, rows: Rows | None) -> ShownSet:
    """Open a set, or rows of another tool, and say on stderr what these were taken for."""
    from sftdata.show.foreign import ForeignSet, open_either

    shards = open_either(path, rows)
    if isinstance(shards, ForeignSet):
        for line in shards.evidence:
            print_line(f"{path}: {line}", err=True)
    else:
        shards.require_bases()
    return shards


def inspect(
    folder: SetOrRows,
    tokenizer: Tokenizer = None,
    row: Annotated[int, typer.Option("--row", help="Packed row to show; -1 is the last.")] = 0,
    example: Annotated[
        int | None,
        typer.Option("--example", min=0, help="Show this input row instead, wherever it is packed."),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show token ids.")] = False,
    as_json: Json = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write an HTML page instead.")
    ] = None,
    split: Split = None,
    map: Map = None,
) -> None:
    """Show what is trained: trained tokens in green and underlined, with file and line of each document.

    Example: sftdata inspect shards --row 3
    """
    shards = _opened(folder, rows_of(tokenizer, split, map))
    view = shards.view(row) if example is None else shards.view_example(example)
    if html is not None:
        from sftdata.pages import write_page
        from sftdata.show.view import view_page

        write_page(html, view_page(view, ids=ids))
        print_line(f"Wrote {html}.", err=True)
    elif as_json:
        print_json(view.to_json())
    else:
        from sftdata.show.terminal import print_view

        print_view(view, ids=ids)


def browse(
    a: Folder,
    b: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Another one, to look at both and at what differs.")
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port on this machine; 0: any that is free.")
    ] = 0,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Look through a set in the browser: filter, search, read documents with their masks, follow findings.

    The page is for this machine only, and for who has its address. Ctrl-C ends it.

    Example: sftdata browse shards
    Example: sftdata browse monday tuesday --port 8000 --no-open
    """
    from sftdata.browse.server import serve
    from sftdata.browse.site import Site
    from sftdata.show.view import open_shown

    shown = [open_shown(folder) for folder in (a, b) if folder is not None]
    for opened in shown:
        opened.require_bases()
    site = Site(shown)
    serve(site, port, show=show, tell=lambda line: print_line(line, err=True))


def stats(
    folder: SetOrRows,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write an HTML report instead, audit included."),
    ] = None,
    split: Split = None,
    map: Map = None,
) -> None:
    """Show what became of every row and token: ledger, lengths, fill, and each source's contribution.

    Example: sftdata stats shards --html report.html
    """
    from sftdata.set.steps import measure_balance
    from sftdata.show.stats import measure, stats_json

    shards = _opened(folder, rows_of(tokenizer, split, map))
    if html is not None:
        from sftdata.pages import write_page
        from sftdata.show.audit import audit_set
        from sftdata.show.report import make_report

        write_page(html, make_report(shards, audit_set(shards)))
        print_line(f"Wrote {html}.", err=True)
    elif as_json:
        print_json(stats_json(shards.manifest, measure_balance(shards)))
    else:
        from sftdata.show.terminal import make_console, print_stats

        print_stats(measure(shards.manifest, measure_balance(shards)), str(folder), make_console())


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A finished set, or its URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    limit: Annotated[int, typer.Option("--limit", min=0, help="Documents to show of each kind.")] = 3,
    as_json: Json = False,
) -> None:
    """Show which documents, tokens and labels came, went or changed from one set to another.

    Exits with 0 if nothing differs, with 1 if anything does.

    Example: sftdata diff monday tuesday
    Example: sftdata diff base view --json --limit 100
    """
    from sftdata.show.diff import diff as run

    found = run(a, b, limit)
    if as_json:
        print_json(found.to_json())
    elif found.equal:
        print_line(
            f"{a} and {b} are equal: {counted(found.documents.a, 'document')},"
            f" {counted(found.tokens.a, 'token')}."
        )
    else:
        from sftdata.show.terminal import make_console, print_diff

        print_diff(found, make_console())
    if not found.equal:
        raise typer.Exit(1)


@with_settings(*(name for name in ViewConfig.model_fields if name != "sets"), model=ViewConfig)
def view(
    config: ViewConfig,
    init: Annotated[
        bool, typer.Option("--init", help="Print the settings as a commented file; make nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a set of documents of finished sets: select, split, mix, limit, pack. Nothing is tokenized.

    Example: sftdata view shards -o longer --max-length 8192
    Example: sftdata view chats code -o both --mix 'chats.jsonl=70' --mix '*.py.jsonl=30' --eval 2%
    """
    from sftdata.cli.rows import RunLog, commented, summary_lines
    from sftdata.views.write import make_view

    if init:
        title = "# Settings of a view. Make it: sftdata view THIS_FILE.\n"
        typer.echo(title + commented(config, VIEW_GROUPS), nl=False)
        return
    with RunLog() as log:
        manifests = make_view(config, log.progress, log.note)
    folders = folders_of(config.output, config.eval)
    if as_json:
        made = {str(folder): made.to_json() for folder, made in zip(folders, manifests, strict=True)}
        print_json(made if config.eval is not None else manifests[0].to_json())
        return
    for folder, manifest in zip(folders, manifests, strict=True):
        for line in summary_lines(manifest, folder):
            print_line(line, err=True)


_QUICKLY = {
    "reading": "",
    "hash": ", tokens by the hashes that the store keeps",
    "size": ", tokens by their size alone",
}


def verify(
    folder: Folder,
    sha256: Annotated[
        bool,
        typer.Option("--sha256", help="Compare sha256 too: proof against forgery, several times slower."),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Read no tokens: look at the size of their files, and at hashes that a store keeps.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a set against its manifest, and recount its ledger from its rows.

    Example: sftdata verify shards
    """
    from sftdata.set.verify import verify as run

    report = run(folder, sha256=sha256, quick=quick)
    problems = counted(len(report.problems), "problem")
    if as_json:
        result = {
            "folder": str(folder),
            "ok": report.ok,
            "digest": report.digest,
            "problems": report.problems,
        }
        print_json(
            result
            | {
                "files": report.files,
                "bytes": report.bytes,
                "rows": report.rows,
                "tokens_by": report.tokens_by,
            }
        )
    else:
        for problem in report.problems:
            print_line(problem)
        digests = "xxh3-128 and sha256" if sha256 else "xxh3-128"
        verdict = "as the manifest says" if report.ok else problems
        print_line(
            f"{folder}: {verdict}: {counted(report.files, 'file')},"
            f" {counted(report.bytes, 'byte')} by {digests}"
            f"{_QUICKLY[report.tokens_by]};"
            f" {counted(report.rows, 'row')} counted again; digest {report.digest[:12]}"
        )
    if not report.ok:
        raise IntegrityError(
            f"{folder}: {problems}, listed above.",
            "do what each of them says.",
        )


def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="datasets, token-rows, verl, nemo-rl, tinker or megatron-bridge: who reads it.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to be made.")],
    as_json: Json = False,
) -> None:
    """Write a set as other trainers read tokenized rows: no token and no label is gained or lost.

    Example: sftdata export shards --to megatron-bridge -o packed
    """
    from sftdata.set.export import export as run

    made = run(folder, local_output(output), cast("Target", to))
    if as_json:
        print_json({"folder": str(output)} | made.to_json())
        return
    print_line(
        f"{output}: {counted(made.rows, 'row')}, {counted(made.tokens, 'token')},"
        f" {made.tokens_trained:,} of them trained."
    )
    if made.left_out:
        print_line(
            f"Left out: {counted(made.left_out, 'piece')} of documents without a trained token.", err=True
        )
    if made.unmarked:
        print_line(
            f"{counted(made.unmarked, 'trained token')} after an EOS: {to} takes no loss there.", err=True
        )


def push(
    folder: Folder,
    to: Annotated[
        str,
        typer.Argument(metavar="URL", help="hf://datasets/USER/NAME, or a folder of s3://, gs:// or az://."),
    ],
    as_json: Json = False,
) -> None:
    """Copy a set to the Hub or to an object store; what is there already is not sent again.

    Example: sftdata push shards hf://datasets/user/name
    """
    from sftdata.set.push import push as run

    meter = Meter("{done}/{total} files")
    try:
        pushed = run(folder, to, lambda done, total: meter.show(done, total, ""))
    finally:
        meter.close()
    if as_json:
        print_json(pushed)
    else:
        print_line(
            f"{pushed.url}: {counted(pushed.files, 'file')}, {counted(pushed.bytes, 'byte')},"
            f" {pushed.sent:,} of the files sent now;"
            f" digest {pushed.digest[:12]}"
        )


def _complete(start: str) -> list[str]:
    return [code for code in read_codes() if code.startswith(start)]


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE", help="Code of a reject, an audit finding or a counter.", autocompletion=_complete
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain a code and what to do about it; without one, list them all.

    Example: sftdata explain spans-unproven
    """
    from sftdata.errors import explain as run

    codes = read_codes()
    if code is not None:
        text = run(code)
        name = text.partition(" ")[0]
        if as_json:
            print_json({"code": name, "kind": codes[name][0], "text": codes[name][1]})
        else:
            width = min(shutil.get_terminal_size().columns, 100)
            print(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False))
    elif as_json:
        print_json({name: {"kind": kind, "text": text} for name, (kind, text) in codes.items()})
    else:
        for name, (kind, _) in codes.items():
            print_line(f"{name:<30}{kind.lower()}")


def env(as_json: Json = False) -> None:
    """Print versions, machine and relevant environment variables; no paths, no secrets.

    Example: sftdata env --json
    """
    environment = _environment()
    if as_json:
        print_json(environment)
        return
    for name, value in environment.items():
        if not isinstance(value, dict):
            print_line(f"{name:<24}{value}")
            continue
        for key, part in value.items():
            print_line(f"{name + ' ' + key:<40}{part if part is not None else 'not installed'}")


def _environment() -> dict[str, object]:
    """Return JSON data for a bug report, without paths, user names or secrets."""
    from sftdata.version import __version__
    from sftdata.workers import usable_cores

    return {
        "sftdata": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": {"usable": usable_cores(), "all": os.cpu_count()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "encoding": {"files": sys.getfilesystemencoding(), "locale": locale.getpreferredencoding(False)},
        "packages": {name: _version(name) for name in sorted(_dependencies())},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _dependencies() -> set[str]:
    """Return the names of the dependencies, with those of all extras but `dev`."""
    lines = [line for line in requires("sftdata") or [] if "extra == 'dev'" not in line.replace('"', "'")]
    return {name[0] for line in lines if (name := re.match(r"[\w.-]+", line))} - {"sftdata"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
