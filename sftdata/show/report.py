"""`sftdata stats --html`: a whole set on one page that can be mailed, printed and read on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from sftdata.outlet import visible
from sftdata.shardset.manifest import Manifest
from sftdata.show.audit import audit_set
from sftdata.show.charts import histogram, legend, ribbons, spread, stacked_bar
from sftdata.show.findings import Finding
from sftdata.show.html import view_fragment
from sftdata.show.page import make_page, read_style
from sftdata.show.shown import ShownSet
from sftdata.show.stats import Part, Reach, SourceShare, Stats, measure
from sftdata.show.view import DocumentView, View

EXAMPLES, LOOKED_INTO, MOST_SOURCES = 3, 12, 40


def make_report(shards: ShownSet) -> str:
    """Return the report on a set as one self-contained page: no network, no script."""
    stats, manifest = measure(shards.manifest), shards.manifest
    name = _safe(shards.folder.resolve().name)
    sections = (
        _section(
            "From rows to trained tokens",
            "What came in, what is trained, and what was lost on the way.",
            _flow(stats),
        ),
        _section(
            "Lengths",
            "Examples by their tokens before any cut; eight bars for each doubling.",
            _lengths(stats, manifest),
        ),
        _section("Sources", "Tokens of each source in the set, trained and context.", _sources(stats)),
        _section("Audit", "Supervision that nobody meant.", _audit(audit_set(shards))),
        _section("Examples", "As stored: colours are the labels in the shards.", _examples(shards)),
        _section("How it was made", "Settings, and what was decided for the user.", _made(stats, manifest)),
    )
    tokenizer = f"tokenizer <code>{_safe(manifest.tokenizer.name)}</code>"
    made = f'<p class="soft">digest <code>{stats.digest[:16]}</code> · {tokenizer}</p>'
    header = f"<header><h1>{name}</h1>{made}{_figures(stats)}</header>"
    return make_page(
        f"{name}: report", f"{header}<main>{''.join(sections)}</main>", "charts", "report", "view"
    )


def notebook_summary(shards: ShownSet) -> str:
    """Return the figures of a set and their flow for the output cell of a notebook."""
    colours = "--trained:#1f9d57;--context:#8aa3b8;--padding:#d5dad6;--lost:#d9822b;--bad:#c8403a;--rail:transparent"
    stats = measure(shards.manifest)
    body = f"<b>{_safe(str(shards.folder))}</b> · {_safe(_shape(stats))}{_flow(stats)}"
    return f'<style>{read_style("charts")}</style><div style="max-width:760px;{colours}">{body}</div>'


def _section(title: str, lead: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{lead}</p>{body}</section>"


def _figures(stats: Stats) -> str:
    rows = sum(part.count for part in stats.rows)
    length = f"packed rows of {stats.max_length:,}" if stats.max_length else "rows of their own length"
    figures = (
        (f"{stats.rows_packed:,}", length),
        (f"{sum(part.count for part in stats.slots if part.kind != 'padding'):,}", "tokens"),
        (f"{stats.trained_share:.1%}", "of them trained"),
        (f"{stats.fill:.1%}", "of the slots filled"),
        (f"{stats.rows[0].count / max(rows, 1):.1%}", f"of {rows:,} rows kept"),
    )
    return f'<div class="figures">{"".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in figures)}</div>'


def _shape(stats: Stats) -> str:
    length = f"of {stats.max_length:,} tokens" if stats.max_length else "of their own length"
    return f"{stats.rows_packed:,} packed rows {length}, {stats.fill:.1%} full, {stats.trained_share:.1%} of tokens trained"


def _flow(stats: Stats) -> str:
    rows, tokens, slots = (spread(parts) for parts in (stats.rows, stats.tokens, stats.slots))
    # Rows kept or dropped have tokens; rejected and filtered rows were never tokenized.
    read = sum(part.kind in ("kept", "lost") for part in stats.rows)
    trained = [("trained", tokens[0], slots[0])]
    context = [
        ("context", tokens[i], slots[j])
        for i, above in enumerate(stats.tokens)
        for j, below in enumerate(stats.slots)
        if above.kind == below.kind == "context"
    ]
    read_rows = ("kept", (0.0, rows[read - 1][1] if read else 0.0), (0.0, 1.0 if read else 0.0))
    stages = (("rows in", stats.rows), ("tokens in", stats.tokens), ("token slots", stats.slots))
    bars = [_stage(name, parts) for name, parts in stages]
    flow = f"{bars[0]}{ribbons([read_rows])}{bars[1]}{ribbons([*trained, *context])}{bars[2]}"
    legends = "".join(legend(name, parts) for name, parts in stages)
    return f'<div class="flow">{flow}</div><div class="legends">{legends}</div>'


def _stage(name: str, parts: Sequence[Part]) -> str:
    return f'<div class="name">{name}<b>{sum(part.count for part in parts):,}</b></div>{stacked_bar(parts)}'


def _lengths(stats: Stats, manifest: Manifest) -> str:
    examples = max(sum(found.examples for found in stats.lengths), 1)
    ledger = manifest.ledger
    told = {"rows cut": "rows_cut", "of them without their ending": "rows_without_ending"}
    lost = [
        f"{ledger.counters[counter]:,} {name}"
        for name, counter in told.items()
        if ledger.counters.get(counter)
    ]
    lost += [f"{count:,} tokens lost" for count in [sum(ledger.tokens_cut.values())] if count]
    policy = _safe(str(manifest.settings.get("overlong", "")))
    outcome = f"<p>Over-long rows (<code>{policy}</code>): {', '.join(lost) or 'none'}.</p>" if policy else ""
    head = '<tr><th>at least</th><th class="n">examples</th><th class="n">share</th><th></th></tr>'
    rows = "".join(_reach(found, examples, stats.max_length) for found in stats.reach)
    table = (
        f"<details open><summary>How many are so long</summary><table>{head}{rows}</table></details>"
        if rows
        else ""
    )
    return histogram(stats.lengths, stats.max_length) + outcome + table


def _reach(found: Reach, examples: int, max_length: int | None) -> str:
    kind = "lost" if max_length and found.tokens >= max_length else "context"
    parts = (Part("as long", kind, found.examples), Part("shorter", "padding", examples - found.examples))
    return (
        f'<tr><td class="k">{found.tokens:,} tokens</td><td class="n">{found.examples:,}</td>'
        f'<td class="n">{found.examples / examples:.1%}</td><td class="chart">{stacked_bar(parts, thin=True)}</td></tr>'
    )


def _sources(stats: Stats) -> str:
    whole = max(sum(source.tokens for source in stats.sources), 1)
    ranked = sorted(stats.sources, key=lambda source: (-source.tokens, source.name))
    rows = "".join(_source(source, whole, ranked[0].tokens) for source in ranked[:MOST_SOURCES])
    more = (
        f'<p class="soft">and {len(ranked) - MOST_SOURCES:,} more</p>' if len(ranked) > MOST_SOURCES else ""
    )
    counts = '<th class="n wide">rows</th><th class="n wide">tokens</th>'
    head = f'<tr><th>source</th>{counts}<th class="n">share</th><th class="n">trained</th><th></th></tr>'
    return f"<table>{head}{rows}</table>{more}"


def _source(source: SourceShare, whole: int, most: int) -> str:
    parts = (
        Part("trained", "trained", source.tokens_trained),
        Part("context", "context", source.tokens - source.tokens_trained),
    )
    bar = f'<div style="width:{max(source.tokens / max(most, 1), 0.01):.2%}">{stacked_bar(parts, thin=True)}</div>'
    return (
        f'<tr><td>{_safe(source.name)}</td><td class="n wide">{source.rows:,}</td><td class="n wide">{source.tokens:,}</td>'
        f'<td class="n">{source.tokens / whole:.1%}</td><td class="n">{source.tokens_trained / max(source.tokens, 1):.1%}</td>'
        f'<td class="chart">{bar}</td></tr>'
    )


def _audit(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="clean">✓ Nothing found.</p>'
    return "".join(_finding(finding) for finding in findings)


def _finding(finding: Finding) -> str:
    places = f'<p class="soft">{_safe(", ".join(finding.examples))}</p>' if finding.examples else ""
    return (
        f'<div class="finding {finding.severity}"><b><small>{finding.severity}</small>{finding.code}</b>'
        f"<p>{finding.amount}: {_safe(finding.message)}.</p>"
        f'<p class="soft">Mend: {_safe(finding.fix)}</p>{places}</div>'
    )


def _examples(shards: ShownSet) -> str:
    return f'<div class="examples">{view_fragment(View("", tuple(_choose(shards))))}</div>'


def _choose(shards: ShownSet) -> list[DocumentView]:
    """Choose a document from each of a few sources, from rows that lie all over the set."""
    chosen: dict[str, DocumentView] = {}
    rest: list[DocumentView] = []
    for row in range(0, len(shards), max(1, len(shards) // LOOKED_INTO)):
        for document in shards.view(row).documents[:EXAMPLES]:
            source = shards.origin(document.example_id)[0]
            rest.append(document) if source in chosen else chosen.setdefault(source, document)
    return [*chosen.values(), *rest][:EXAMPLES]


def _made(stats: Stats, manifest: Manifest) -> str:
    notes = "".join(f"<li>{_safe(note)}</li>" for note in stats.notes)
    counted = "".join(
        f"<li>{_safe(name.replace('_', ' '))}: {count:,}</li>" for name, count in stats.counters.items()
    )
    settings = json.dumps(manifest.settings, indent=2, ensure_ascii=False, sort_keys=True)
    shards = "".join(_shard_rows(manifest))
    columns = "".join(f'<th class="n">{name}</th>' for name in ("rows", "tokens", "bytes"))
    head = f"<tr><th>shard</th>{columns}</tr>"
    return (
        f'<ul class="notes">{notes}{counted}</ul>'
        f"<details><summary>Settings</summary><pre>{_safe(settings)}</pre></details>"
        f"<details><summary>Shards: {len(manifest.shards):,}</summary><table>{head}{shards}</table></details>"
    )


def _shard_rows(manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        yield (
            f'<tr><td>{shard.name}</td><td class="n">{shard.rows:,}</td><td class="n">{shard.tokens:,}</td>'
            f'<td class="n">{shard.bytes:,}</td></tr>'
        )


def _safe(text: str) -> str:
    return escape(visible(text))
