"""What a running command tells its user, on stderr: notes, progress and the summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sftdata.meter import Meter, Progress
from sftdata.outlet import json_visible, one_line
from sftdata.shardset.manifest import Manifest

if TYPE_CHECKING:
    from sftdata.show.findings import Finding


def print_json(data: Any) -> None:
    """Print data to stdout as indented JSON."""
    try:
        text = msgspec.json.format(msgspec.json.encode(data), indent=2).decode()
    except UnicodeEncodeError:  # half a character, as in a file name that is not UTF-8
        text = json.dumps(msgspec.to_builtins(data), indent=2, ensure_ascii=False)
    sys.stdout.write(json_visible(text) + "\n")


def print_line(text: str, *, err: bool = False) -> None:
    """Print one line to stdout, or to stderr; what would break or redraw it is spelled out."""
    print(one_line(text), file=sys.stderr if err else sys.stdout)


class Talk:
    """What `prepare` says while it runs, and when it is done."""

    def __init__(self) -> None:
        self._meter = Meter("{done}/{total} slices")
        self._built = False

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.close()

    def say(self, sentence: str) -> None:
        """Print one sentence."""
        self._meter.say(sentence)

    def progress(self, now: Progress) -> None:
        """Show how far the run has come."""
        self._built = True
        speed = now.tokens / self._meter.seconds
        figures = f"{now.tokens:,} tokens, {speed:,.0f} a second, {now.rejected:,} rows rejected"
        self._meter.show(now.done, now.total, figures)

    def summary(self, manifest: Manifest, folder: Path) -> None:
        """Say what became of every row and token, and what was found in a set that has just been made."""
        for line in summary_lines(manifest, folder):
            self.say(line)
        if not self._built:
            self.say(f"  audit   `sftdata audit {folder}` looks for unintended supervision")
            return
        from sftdata.show.audit import glance
        from sftdata.show.summary import print_findings
        from sftdata.show.terminal import make_console

        seen = glance(folder, manifest)
        found = "; ".join(counted(seen.findings)) or "nothing found"
        part = seen.looked < seen.documents
        rest = (
            f" in {seen.looked:,} of {seen.documents:,} documents; `sftdata audit {folder}` reads all"
            if part
            else ""
        )
        self.say(f"  audit   {found}{rest}")
        print_findings(seen.findings, make_console(sys.stderr), indent="    ")


def counted(findings: list[Finding]) -> Iterator[str]:
    """Yield how many kinds of defects and of notes there are."""
    for severity in ("defect", "note"):
        kinds = sum(finding.severity == severity for finding in findings)
        if kinds:
            yield f"{kinds} kind{'' if kinds == 1 else 's'} of {severity}s"


def summary_lines(manifest: Manifest, folder: Path) -> list[str]:
    """Return the summary of a set: the ledger in words."""
    ledger = manifest.ledger
    slots = ledger.tokens + ledger.tokens_padding
    lost = {**ledger.rows_rejected, **ledger.rows_filtered, **ledger.rows_dropped}
    cut = sum(ledger.tokens_cut.values())
    lines = [
        f"{folder}: {ledger.rows_packed:,} rows of {manifest.max_length or 'their own'} tokens in {len(manifest.shards)} shards"
        f" ({ledger.tokens / max(slots, 1):.1%} full), digest {manifest.digest[:12]}",
        f"  rows    {ledger.rows_in:,} in = {ledger.rows_kept:,} kept"
        + "".join(f" + {count:,} {name}" for name, count in sorted(lost.items())),
        f"  tokens  {ledger.tokens_in:,} in = {ledger.tokens_trained:,} trained + {ledger.tokens_context:,} context"
        f" + {cut:,} cut + {ledger.tokens_in_dropped_rows:,} in dropped rows",
    ]
    told = {name: count for name, count in sorted(ledger.counters.items()) if count}
    if told:
        lines.append(
            "  counted " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in told.items())
        )
    if sum(ledger.rows_rejected.values()):
        code = max(ledger.rows_rejected, key=lambda name: ledger.rows_rejected[name])
        fix = f"{folder / 'rejects.jsonl'}: fix the rows there and prepare that file too; sftdata explain {code}"
        lines.append(f"  rejects {fix}")
    return lines
