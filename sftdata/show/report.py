"""`sftdata stats --html`: a whole set on one page that can be mailed, printed and read on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from sftdata.shardset.manifest import Manifest
from sftdata.show.audit import Finding, audit_set
from sftdata.show.charts import CHARTS_CSS, histogram, legend, ribbons, spread, stacked_bar
from sftdata.show.escape import visible
from sftdata.show.html import VIEW_CSS, view_fragment
from sftdata.show.page import make_page
from sftdata.show.shown import ShownSet
from sftdata.show.stats import Part, Stats, measure
from sftdata.show.view import View

EXAMPLES, MOST_SOURCES = 3, 40

REPORT_CSS = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin-top: 20px; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 14px; }
.figures b { display: block; font-size: 23px; letter-spacing: -.02em; line-height: 1.25; } .figures span { color: var(--soft); font-size: 12.5px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; } th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12.5px; }
td, th { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: middle; } tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; } td.bar-cell { width: 30%; min-width: 64px; padding-right: 0; } .scroll { overflow-x: auto; }
.finding { border-left: 4px solid var(--context); padding: 2px 0 2px 14px; margin: 14px 0 0; } .finding.defect { border-color: var(--bad); }
.finding p { margin: 2px 0; font-size: 14px; } .finding b small { font-weight: 600; font-size: 11.5px; text-transform: uppercase;
  letter-spacing: .05em; margin-right: 8px; color: var(--soft); } .finding.defect b small { color: var(--bad); }
.clean { color: var(--trained); font-weight: 600; margin: 0; }
details { margin-top: 10px; font-size: 13.5px; } summary { cursor: pointer; color: var(--soft); } pre { overflow: auto; font-size: 12px; white-space: pre-wrap; }
.notes { padding-left: 18px; margin: 6px 0 0; font-size: 13.5px; } .examples .doc { max-height: 330px; overflow: auto; }
@media (max-width: 560px) { td, th { padding-right: 9px; } .narrow-off { display: none; } .figures b { font-size: 20px; }
  .figures { grid-template-columns: 1fr 1fr; } }
"""


def make_report(shards: ShownSet) -> str:
    """Return the report on a set as one self-contained page: no network, no script."""
    stats, manifest = measure(shards.manifest), shards.manifest
    name = _safe(shards.folder.resolve().name)
    sections = (
        _section("From rows to trained tokens", "What came in, what is trained, and what was lost on the way.", _flow(stats)),
        _section("Lengths", "Examples by their tokens before any cut; eight bars for each doubling.", _lengths(stats, manifest)),
        _section("Sources", "Tokens of each source in the set, trained and context.", _sources(stats)),
        _section("Audit", "Supervision that nobody meant.", _audit(audit_set(shards))),
        _section("Examples", "As stored: colours are the labels in the shards.", _examples(shards)),
        _section("How it was made", "Settings, and what was decided for the user.", _made(stats, manifest)),
    )
    tokenizer = f"tokenizer <code>{_safe(manifest.tokenizer.name)}</code>"
    header = f'<header><h1>{name}</h1><p class="soft">digest <code>{stats.digest[:16]}</code> · {tokenizer}</p>{_figures(stats)}</header>'
    return make_page(f"{name}: report", f"{header}<main>{''.join(sections)}</main>", CHARTS_CSS + REPORT_CSS + VIEW_CSS)


def notebook_summary(shards: ShownSet) -> str:
    """Return the figures of a set and their flow for the output cell of a notebook."""
    colours = "--trained:#1f9d57;--context:#8aa3b8;--padding:#d5dad6;--lost:#d9822b;--bad:#c8403a;--rail:transparent"
    stats = measure(shards.manifest)
    body = f"<b>{_safe(str(shards.folder))}</b> · {_safe(_shape(stats))}{_flow(stats)}"
    return f'<style>{CHARTS_CSS}</style><div style="max-width:760px;{colours}">{body}</div>'


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
    return (
        _stage("rows in", stats.rows)
        + ribbons([("kept", (0.0, rows[read - 1][1] if read else 0.0), (0.0, 1.0 if read else 0.0))])
        + _stage("tokens in", stats.tokens)
        + ribbons([*trained, *context])
        + _stage("slots in packed rows", stats.slots)
    )


def _stage(name: str, parts: Sequence[Part]) -> str:
    whole = sum(part.count for part in parts)
    return f'<div class="flow-name"><span>{name}</span><b>{whole:,}</b></div>{stacked_bar(parts)}{legend(parts)}'


def _lengths(stats: Stats, manifest: Manifest) -> str:
    examples = max(sum(found.examples for found in stats.lengths), 1)
    ledger = manifest.ledger
    told = {"rows cut": "rows_cut", "of them without their ending": "rows_without_ending"}
    lost = [f"{ledger.counters[counter]:,} {name}" for name, counter in told.items() if ledger.counters.get(counter)]
    lost += [f"{count:,} tokens lost" for count in [sum(ledger.tokens_cut.values())] if count]
    policy = _safe(str(manifest.settings.get("overlong", "")))
    outcome = f"<p>Over-long rows (<code>{policy}</code>): {', '.join(lost) or 'none'}.</p>" if policy else ""
    rows = "".join(
        f'<tr><td class="n">{found.tokens:,}</td><td class="n">{found.examples:,}</td><td class="n">{found.examples / examples:.1%}</td>'
        f'<td class="bar-cell">{stacked_bar((Part("longer", "lost", found.examples), Part("shorter", "padding", examples - found.examples)), thin=True)}</td></tr>'
        for found in stats.reach
    )
    head = '<tr><th class="n">tokens, at least</th><th class="n">examples</th><th class="n">share</th><th></th></tr>'
    table = f"<details open><summary>How many are at least so long</summary><table>{head}{rows}</table></details>" if rows else ""
    return histogram(stats.lengths, stats.max_length) + outcome + table


def _sources(stats: Stats) -> str:
    whole = max(sum(source.tokens for source in stats.sources), 1)
    ranked = sorted(stats.sources, key=lambda source: (-source.tokens, source.name))
    most = max((source.tokens for source in ranked), default=1)
    lines = []
    for source in ranked[:MOST_SOURCES]:
        parts = (
            Part("trained", "trained", source.tokens_trained),
            Part("context", "context", source.tokens - source.tokens_trained),
        )
        bar = f'<div style="width:{max(source.tokens / max(most, 1), 0.01):.2%}">{stacked_bar(parts, thin=True)}</div>'
        lines.append(
            f'<tr><td>{_safe(source.name)}</td><td class="n narrow-off">{source.rows:,}</td><td class="n narrow-off">{source.tokens:,}</td>'
            f'<td class="n">{source.tokens / whole:.1%}</td><td class="n">{source.tokens_trained / max(source.tokens, 1):.1%}</td>'
            f'<td class="bar-cell">{bar}</td></tr>'
        )
    more = f'<p class="soft">and {len(ranked) - MOST_SOURCES:,} more</p>' if len(ranked) > MOST_SOURCES else ""
    head = (
        '<tr><th>source</th><th class="n narrow-off">rows</th><th class="n narrow-off">tokens</th><th class="n">share</th>'
        '<th class="n">trained</th><th></th></tr>'
    )
    return f"<table>{head}{''.join(lines)}</table>{more}"


def _audit(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="clean">✓ Nothing found.</p>'
    return "".join(_finding(finding) for finding in findings)


def _finding(finding: Finding) -> str:
    share = f" ({finding.share:.1%})" if finding.share is not None else ""
    places = f'<p class="soft">{_safe(", ".join(finding.examples))}</p>' if finding.examples else ""
    return (
        f'<div class="finding {finding.severity}"><b><small>{finding.severity}</small>{finding.code}</b>'
        f"<p>{finding.count:,} {finding.of}{share}: {_safe(finding.message)}.</p>"
        f'<p class="soft">Mend: {_safe(finding.fix)}</p>{places}</div>'
    )


def _examples(shards: ShownSet) -> str:
    rows = sorted({0, len(shards) // 2, len(shards) - 1}) if len(shards) else []
    documents = tuple(document for row in rows[:EXAMPLES] for document in shards.view(row).documents[:1])
    return f'<div class="examples">{view_fragment(View("", documents))}</div>'


def _made(stats: Stats, manifest: Manifest) -> str:
    notes = "".join(f"<li>{_safe(note)}</li>" for note in stats.notes)
    counted = "".join(f"<li>{_safe(name.replace('_', ' '))}: {count:,}</li>" for name, count in stats.counters.items())
    settings = json.dumps(manifest.settings, indent=2, ensure_ascii=False, sort_keys=True)
    shards = "".join(_shard_rows(manifest))
    head = '<tr><th>shard</th><th class="n">rows</th><th class="n">tokens</th><th class="n narrow-off">trained</th><th class="n">bytes</th></tr>'
    return (
        f'<ul class="notes">{notes}{counted}</ul>'
        f"<details><summary>Settings</summary><pre>{_safe(settings)}</pre></details>"
        f"<details><summary>{len(manifest.shards):,} shards</summary><table>{head}{shards}</table></details>"
    )


def _shard_rows(manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        yield (
            f'<tr><td>{shard.name}</td><td class="n">{shard.rows:,}</td><td class="n">{shard.tokens:,}</td>'
            f'<td class="n narrow-off">{shard.tokens_trained:,}</td><td class="n">{shard.bytes:,}</td></tr>'
        )


def _safe(text: str) -> str:
    return escape(visible(text))
