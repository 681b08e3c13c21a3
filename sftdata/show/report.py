"""The page that shows the numbers of a set, its findings and some documents (pages/report.html.jinja)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sftdata.output import counted
from sftdata.pages import render
from sftdata.set.ledger import Ledger
from sftdata.set.steps import measure_balance
from sftdata.show.findings import Finding
from sftdata.show.stats import MOST_SOURCES, Stats, flow_of, histogram_of, measure
from sftdata.show.view import ShownSet


def make_report(
    shards: ShownSet, findings: Sequence[Finding], template: str | Path = "report.html.jinja", **more: object
) -> str:
    """Return the report on a set as one self-contained page: no network, no script.

    Args:
        template: that extends the report, with what it needs beside.
    """
    stats, manifest = measure(shards.manifest, measure_balance(shards)), shards.manifest
    return render(
        template,
        name=shards.folder.resolve().name,
        stats=stats,
        manifest=manifest,
        figures=_figures(stats),
        flow=flow_of(stats),
        lengths=histogram_of(stats.lengths, stats.max_length),
        overlong=manifest.settings.get("overlong", ""),
        lost=_lost(manifest.ledger),
        examples=max(sum(span.examples for span in stats.lengths), 1),
        sources=sorted(stats.sources, key=lambda source: (-source.tokens, source.name)),
        most_sources=MOST_SOURCES,
        findings=findings,
        view=shards.sample(),
        settings=json.dumps(manifest.settings, indent=2, ensure_ascii=False, sort_keys=True),
        **more,
    )


def _figures(stats: Stats) -> tuple[tuple[str, str], ...]:
    rows = sum(part.count for part in stats.rows)
    length = f"packed rows of {stats.max_length:,}" if stats.max_length else "rows of their own length"
    return (
        (f"{stats.rows_packed:,}", length),
        (f"{sum(part.count for part in stats.slots if part.kind != 'padding'):,}", "tokens"),
        (f"{stats.trained_share:.1%}", "of them trained"),
        (f"{stats.fill:.1%}", "of the slots filled"),
        (f"{stats.rows[0].count / max(rows, 1):.1%}", f"of {counted(rows, 'row')} kept"),
    )


def _lost(ledger: Ledger) -> list[str]:
    """Return the losses to over-long rows, in words."""
    counters = {"rows cut": "rows_cut", "of them without their ending": "rows_without_ending"}
    counts = {name: ledger.counters.get(counter, 0) for name, counter in counters.items()}
    counts["tokens lost"] = sum(ledger.tokens_cut.values())
    return [f"{count:,} {name}" for name, count in counts.items() if count]
