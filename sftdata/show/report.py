"""`sftdata stats --html`: a whole set on one page that can be mailed, printed and read on a phone."""

from __future__ import annotations

import json

from sftdata.pages import render
from sftdata.shardset.ledger import Ledger
from sftdata.show.audit import audit_set
from sftdata.show.charts import flow_of, histogram_of
from sftdata.show.shown import ShownSet
from sftdata.show.stats import Stats, measure
from sftdata.show.view import DocumentView, View

EXAMPLES, LOOKED_INTO, MOST_SOURCES = 3, 12, 40


def make_report(shards: ShownSet) -> str:
    """Return the report on a set as one self-contained page: no network, no script."""
    stats, manifest = measure(shards.manifest), shards.manifest
    return render(
        "report.html.jinja",
        name=shards.folder.resolve().name,
        stats=stats,
        manifest=manifest,
        figures=_figures(stats),
        flow=flow_of(stats),
        lengths=histogram_of(stats.lengths, stats.max_length),
        overlong=manifest.settings.get("overlong", ""),
        lost=_lost(manifest.ledger),
        examples=max(sum(found.examples for found in stats.lengths), 1),
        sources=sorted(stats.sources, key=lambda source: (-source.tokens, source.name)),
        most_sources=MOST_SOURCES,
        findings=audit_set(shards),
        view=View("", tuple(_choose(shards))),
        settings=json.dumps(manifest.settings, indent=2, ensure_ascii=False, sort_keys=True),
    )


def _figures(stats: Stats) -> tuple[tuple[str, str], ...]:
    rows = sum(part.count for part in stats.rows)
    length = f"packed rows of {stats.max_length:,}" if stats.max_length else "rows of their own length"
    return (
        (f"{stats.rows_packed:,}", length),
        (f"{sum(part.count for part in stats.slots if part.kind != 'padding'):,}", "tokens"),
        (f"{stats.trained_share:.1%}", "of them trained"),
        (f"{stats.fill:.1%}", "of the slots filled"),
        (f"{stats.rows[0].count / max(rows, 1):.1%}", f"of {rows:,} rows kept"),
    )


def _lost(ledger: Ledger) -> list[str]:
    """Return what became of over-long rows, in words."""
    counters = {"rows cut": "rows_cut", "of them without their ending": "rows_without_ending"}
    counts = {name: ledger.counters.get(counter, 0) for name, counter in counters.items()}
    counts["tokens lost"] = sum(ledger.tokens_cut.values())
    return [f"{count:,} {name}" for name, count in counts.items() if count]


def _choose(shards: ShownSet) -> list[DocumentView]:
    """Choose a document from each of a few sources, from rows that lie all over the set."""
    chosen: dict[str, DocumentView] = {}
    rest: list[DocumentView] = []
    for row in range(0, len(shards), max(1, len(shards) // LOOKED_INTO)):
        for document in shards.view(row).documents[:EXAMPLES]:
            source = shards.origin(document.example_id)[0]
            rest.append(document) if source in chosen else chosen.setdefault(source, document)
    return [*chosen.values(), *rest][:EXAMPLES]
