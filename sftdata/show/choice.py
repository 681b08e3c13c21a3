"""How a set was chosen from others, in words and numbers: split, shares, repeats, what each step left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sftdata.output import counted, one_line
from sftdata.set.ledger import PICTURES, SourceCounts
from sftdata.set.manifest import Manifest, first_passes
from sftdata.set.shares import MEASURES, realised
from sftdata.set.steps import Balance

_HASH = re.compile(r"[0-9a-f]{32,}")
_LONGEST = 60  # characters shown of a setting
_SETTINGS = {"source": "sources", "train": "eval"}  # of steps that have another name
# Settings that stand in the sentence of another, or are no choice.
_BESIDE = {
    "bases", "side", "eval", "mix", "mix_by", "passes", "total", "seed", "exclude_by", "order", "bands",
    "window", "steps",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShareOf:
    """What one source, or one part of a mixture, has of a set.

    Attributes:
        name: of the source, or as `--mix` names it.
        asked: its part of the mixture, 0 to 1, of what `by` says; None where no share was asked for.
        by: what the asked share counts.
        rows, tokens, trained: its part of the whole, 0 to 1.
        passes: how often its documents are gone through; None where no share was asked for.
    """

    name: str
    asked: float | None
    by: str
    rows: float
    tokens: float
    trained: float
    passes: float | None


def shares_of(manifest: Manifest) -> tuple[ShareOf, ...]:
    """Return the parts of a mixture, or else of each source, all passes over it together."""
    if manifest.shares:
        parts = {by: realised(manifest.shares, by) for by in MEASURES}
        return tuple(
            ShareOf(
                share.name,
                share.asked,
                share.by,
                rows=parts["rows"][index],
                tokens=parts["tokens"][index],
                trained=parts["trained"][index],
                passes=share.passes,
            )
            for index, share in enumerate(manifest.shares)
        )
    names = [source.name for source in manifest.sources]
    firsts = {name: names[first] for name, first in zip(names, first_passes(manifest.sources), strict=True)}
    counts: dict[str, SourceCounts] = {}
    for name, own in manifest.ledger.sources.items():
        counted = counts.setdefault(firsts.get(name, name), SourceCounts())
        counted.rows += own.rows
        counted.tokens += own.tokens
        counted.tokens_trained += own.tokens_trained
    rows, tokens = (max(sum(getattr(own, by) for own in counts.values()), 1) for by in ("rows", "tokens"))
    trained = max(sum(own.tokens_trained for own in counts.values()), 1)
    return tuple(
        ShareOf(
            name,
            asked=None,
            by="",
            rows=own.rows / rows,
            tokens=own.tokens / tokens,
            trained=own.tokens_trained / trained,
            passes=None,
        )
        for name, own in counts.items()
    )


def tell_shares(manifest: Manifest, most: int = 8) -> Iterator[str]:
    """Yield what each part of a mixture, or each source, has of a set, in words; none where there is but one.

    Args:
        most: parts that are named; the largest by trained tokens.
    """
    shares = shares_of(manifest)
    if len(shares) < 2 and not manifest.shares:
        return
    for share in sorted(shares, key=lambda one: -one.trained)[:most]:
        parts = ", ".join(f"{getattr(share, by):.1%} of {by}" for by in MEASURES if by != share.by)
        if share.asked is None:
            yield f"{share.name}: {parts}"
        else:
            got = f"{getattr(share, share.by):.3%} of {share.by}"
            yield f"{share.name}: {share.asked:.3%} asked, {got} taken ({parts}), {share.passes:.2f} passes"
    if len(shares) > most:
        yield f"and {len(shares) - most:,} more"


def counters_of(manifest: Manifest) -> dict[str, int]:
    """Return what was counted; where documents were left out or repeated, only what is known of the others.

    A view counts anew what has a list of the rows behind it; what has none counts all rows of its sets.
    """
    ledger = manifest.ledger
    chosen = ledger.documents_left_out or ledger.documents_repeated
    known = {*ledger.examples, "rows_cut", "rows_without_ending"}
    pictures = {name: count for name in PICTURES if (count := getattr(ledger, name))}
    return pictures | {
        name: count
        for name, count in sorted(ledger.counters.items())
        if count and (name in known or not chosen)
    }


def choices_of(manifest: Manifest, balance: Balance | None = None) -> tuple[tuple[str, str], ...]:
    """Return what was chosen and what it left out, one sentence for each step; none for a plain set.

    Args:
        balance: of a set in steps of equal work, as its rows say.
    """
    view = manifest.settings.get("view") or {}
    return (*_choices(manifest, view), *_order(view, balance))


def _order(view: Mapping[str, Any], balance: Balance | None) -> Iterator[tuple[str, str]]:
    """Yield the order of the rows, where it is another than that of the documents."""
    if order := view.get("order"):
        beside = {"bands": " bands", "window": " shards a window"}
        more = "".join(f", {view[name]}{words}" for name, words in beside.items() if name in view)
        yield "order", f"{order}{more}"
    if balance is not None:
        yield (
            "steps",
            f"{balance.steps:,} of {balance.ranks} x {counted(balance.rows, 'row')}: the busiest rank has"
            f" {balance.mean:.3f} times the mean work, {balance.shuffled:.3f} if rows were shuffled,"
            f" {balance.worst:.3f} in the worst step{balance.incomplete}",
        )


def _choices(manifest: Manifest, view: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ledger = manifest.ledger
    left_out = dict(ledger.documents_left_out)
    if manifest.bases:
        bases = ", ".join(f"{base.path} ({base.digest[:12]})" for base in manifest.bases)
        yield "made of", f"{bases}; by index: the tokens are there" if manifest.by_index else bases
    if "side" in view:
        other = "eval" if view["side"] == "train" else "train"
        drawn = f"{view.get('eval')} of the prompts are drawn for eval, with seed {view.get('seed', 0)}"
        beside = f"{counted(left_out.pop(other, 0), 'document')} in {other}"
        yield "split", f"this is {view['side']}: {drawn}; {beside}"
    for name, value in view.items():
        if name not in _BESIDE:
            steps = [step for step in left_out if _setting(step) == name]
            gone = sum(left_out.pop(step) for step in steps)
            said = f"list {spell(value)}" if name == "drop" else spell(value)
            yield _words(name, view), said + _gone(gone)
    if "mix" in view:
        gone = left_out.pop("mix", 0)
        total = f", {view['total']}" if view.get("total") else ""
        most = view.get("passes", 1)
        passes = f", at most {most:g} pass{'es' * (most != 1)}"
        by = view.get("mix_by", "trained")
        yield "mix", f"by {by}{' tokens' * (by == 'trained')}{total}{passes}{_gone(gone)}"
    for step, gone in sorted(left_out.items()):
        yield _words(_setting(step), view), f"in a set it is made of{_gone(gone)}"
    if ledger.documents_repeated:
        yield "repeated", f"{ledger.documents_repeated:,} of {ledger.rows_in:,} documents are there again"
    if ledger.tokens_left_out:
        yield "left out", f"{ledger.tokens_left_out:,} of {ledger.tokens_in:,} tokens, by all steps together"


def _gone(documents: int) -> str:
    return f": {counted(documents, 'document')} left out" if documents else ""


def _setting(step: str) -> str:
    """Return the setting behind a step of the ledger.

    >>> [_setting(step) for step in ("dedup-row", "exclude-prompt", "min-tokens", "source")]
    ['dedup', 'exclude', 'min_tokens', 'sources']
    """
    name = step.partition("-")[0] if step.startswith(("dedup-", "exclude-")) else step.replace("-", "_")
    return _SETTINGS.get(name, name)


def _words(name: str, view: Mapping[str, Any]) -> str:
    return f"exclude by {view.get('exclude_by', 'prompt')}" if name == "exclude" else name.replace("_", " ")


def spell(value: object) -> str:
    """Return a setting as it is written, on one line; hashes and long texts are shortened.

    >>> spell({"b": 1.0, "a": ["f" * 64, None]})
    'b=1, a=ffffffffffff, —'
    """
    if isinstance(value, dict):
        return ", ".join(f"{key}={spell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(spell, value)) or "none"
    text = f"{value:g}" if isinstance(value, float) else "—" if value is None else str(value)
    if _HASH.fullmatch(text):
        return text[:12]
    return one_line(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
