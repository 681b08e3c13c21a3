"""Plan a view: settings and indexes in, rows out, as arrays; only documents that are cut are read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sftdata.batches import EXAMPLES, Bool, Int64
from sftdata.choosing import SIDES, refuse_idle
from sftdata.errors import DataError, UsageError
from sftdata.limit import KEPT, REASONS, Policy, left_over, refuse_cutting
from sftdata.output import StoreUrl, counted
from sftdata.set.ledger import Ledger, distinct, read_counted
from sftdata.set.manifest import SourceInfo, first_passes, in_first_pass, read_manifest, tell_apart
from sftdata.settings import flag_of
from sftdata.views.bases import Base, Store, open_bases, open_store, read_documents, vision_of
from sftdata.views.order import (
    Dealt,
    Names,
    Stretches,
    ViewSlice,
    pack_slices,
    pack_whole,
    read_steps,
    refuse_unlike,
)
from sftdata.views.recipe import ViewConfig
from sftdata.views.select import (
    Choice,
    Limited,
    cap_sources,
    filter_documents,
    limit_documents,
    mix_sources,
    refuse_stray,
    split_off,
)

_LIMITING = ("rows_cut", "rows_without_ending")  # counters that the over-long policy sets


@dataclass(frozen=True, slots=True, eq=False)
class ViewPlan:
    """A view, down to the place of every token.

    Attributes:
        config: the settings.
        output: folder of the set, or its URL.
        bases: the sets it is made of.
        store: the files that hold their tokens.
        choice: its documents.
        kept, rest: stretches in rows, and beside them.
        slices: in the order of the shards.
        sources: those of the bases, and again for each further pass over them.
        settings: of the manifest.
        ledger: what became of rows and tokens, packing aside.
        notes: what is said of it, one sentence each.
        passing: the bases go away when the view is made, so that it does not name them.
    """

    config: ViewConfig
    output: Path | StoreUrl
    bases: tuple[Base, ...]
    store: Store
    choice: Choice
    kept: Stretches
    rest: Stretches
    slices: tuple[ViewSlice, ...]
    sources: tuple[SourceInfo, ...]
    settings: dict[str, object]
    ledger: Ledger
    notes: tuple[str, ...]
    passing: bool = False

    @property
    def row_length(self) -> int | None:
        """Tokens of every row; None where rows keep their own length."""
        return None if self.settings["packing"] == "none" else self.config.max_length


def plan_views(config: ViewConfig) -> tuple[ViewPlan, ...]:
    """Plan a view, or the two sides of a split.

    Raises:
        UsageError: a base or a setting cannot be used.
        DataError: nothing is left, or a document is over-long and the policy is "error".
        IntegrityError: a base is damaged.
    """
    bases = open_bases(config.sets)
    config = _filled(config, bases)
    store = open_store(bases, whole=config.write)
    choice = Choice.of(read_documents(bases, store), sources_of(bases))
    filter_documents(choice, config, bases[0].manifest)
    refuse_stray(choice, bases)
    limited = limit_documents(choice, _limit(config), config.overlong or "truncate")
    cap_sources(choice, config, limited)
    sides = split_off(choice, config) if config.eval is not None else {"": choice}
    if config.mix:
        mix_sources(sides.get("train", choice), config, limited)
    sides.get("train", choice).repeat(config.epochs)
    plain = config.model_copy(update={"steps_for": None, "model": None, "epochs": 1})
    return tuple(
        _plan(plain if side == "eval" else config, side, bases, store, sides[side], limited) for side in sides
    )


def _filled(config: ViewConfig, bases: Sequence[Base]) -> ViewConfig:
    """Return the settings with those of the first base where none are given."""
    refuse_idle(config, shuffled=config.reorders or config.epochs > 1)
    base = bases[0]
    settings = base.manifest.settings
    given = {
        name: getattr(config, name) or settings.get(name) for name in ("max_length", "overlong", "packing")
    }
    if given["max_length"] is None:
        given["max_length"] = base.manifest.max_length
    if given["packing"] == "wrapped":
        if config.overlong not in (None, "truncate"):
            raise UsageError(
                f"--overlong {config.overlong} beside --packing wrapped: one cut stream has room for"
                " any document.",
                "leave --overlong out.",
            )
        given["overlong"] = "truncate"
    filled = config.model_copy(update=given)
    if vision_of([base.manifest for base in bases]) is not None:
        refuse_cutting(filled.packing, filled.overlong)
    refuse_unlike(filled)
    return filled


def _limit(config: ViewConfig) -> int | None:
    """Return the most tokens of a piece; the one cut stream of `wrapped` has room for any."""
    return None if config.packing == "wrapped" else config.max_length


def sources_of(bases: Sequence[Base]) -> tuple[SourceInfo, ...]:
    """Return the sources of all bases, by names that tell them apart."""
    names = tell_apart([(base.folder, base.manifest.sources) for base in bases])
    return tuple(
        msgspec.structs.replace(source, name=name, first_id=source.first_id + base.first_id)
        for base, own in zip(bases, names, strict=True)
        for source, name in zip(base.manifest.sources, own, strict=True)
    )


def _plan(
    config: ViewConfig, side: str, bases: tuple[Base, ...], store: Store, choice: Choice, limited: Limited
) -> ViewPlan:
    sources, first_ids = _passes(choice)
    output, dealt = config.output / side, read_steps(config)
    kept, rest = _stretches(config, choice, limited, first_ids)
    if not len(kept):
        raise _nothing_left(output, choice, limited)
    by_slice = config.pack_over == "slice" or (
        config.pack_over == "auto" and len(bases) == 1 and not config.selects and config.reorders is False
    )
    if by_slice:
        kept, rest, slices = pack_slices(config, choice, kept, rest)
    else:
        kept, rest, slices = pack_whole(config, choice, kept, rest, dealt)
    return ViewPlan(
        config=config,
        output=output,
        bases=bases,
        store=store,
        choice=choice,
        kept=kept,
        rest=rest,
        slices=slices,
        sources=sources,
        settings=_settings(config, bases, side, by_slice, dealt),
        ledger=_ledger(config, bases, choice, limited, kept, rest),
        notes=(
            *choice.notes,
            *_layout_notes(config, bases),
            *(dealt[1] if dealt else ()),
            *_epochs_note(config, slices),
        ),
    )


def _layout_notes(config: ViewConfig, bases: Sequence[Base]) -> Iterator[str]:
    """Say which orders of the bases are not kept: a view has its own."""
    own = config.selection()
    for base in bases:
        before = base.manifest.settings.get("view", {})
        lost = [flag_of(given) for name, given in _LAID_OUT.items() if name in before and given not in own]
        if lost:
            yield f"{base.folder}: was laid out by {', '.join(lost)}; its rows are packed anew, without."


def _epochs_note(config: ViewConfig, slices: Sequence[ViewSlice]) -> tuple[str, ...]:
    if config.epochs == 1:
        return ()
    rows = sum(len(part.packs) for part in slices) // config.epochs
    what = "the mixture" if config.mix else "every document"
    return (
        f"{counted(config.epochs, 'epoch')} of {counted(rows, 'row')}: {what} once in each, packed anew.",
    )


def _nothing_left(output: Path | StoreUrl, choice: Choice, limited: Limited) -> DataError:
    """Return the refusal of a view that holds nothing: what became of all documents, and what would help."""
    left_out = {step: count for step, (count, _) in choice.left_out().items()}
    reason = limited.pieces.reason[choice.times[limited.pieces.example] > 0]
    dropped = {name: int((reason == code).sum()) for code, name in enumerate(REASONS, start=1)}
    gone = {name: count for name, count in (left_out | dropped).items() if count}
    helps = {
        "a larger --max-length, or another --overlong": gone.keys() & {*REASONS[1:]},
        "choose another share for --eval": gone.keys() & {*SIDES},
        "loosen the filters": left_out.keys() - {*SIDES},
    }
    said = ", ".join(f"{name} {count:,}" for name, count in gone.items())
    return DataError(
        f"{output}: no document is left. Of {len(choice.documents):,}: {said or 'none there'}.",
        f"{', or '.join(fix for fix, steps in helps.items() if steps) or 'name sets that train something'}.",
    )


# ------------------------------------------------------------------------------------------ stretches


def _passes(choice: Choice) -> tuple[tuple[SourceInfo, ...], Int64]:
    """List sources again that are gone through again; return all, and first ids by pass, int64[P, S]."""
    most = int(choice.times.max(initial=1))
    sources = list(choice.sources)
    names = {source.name for source in sources}
    roots = [sources[first].name for first in first_passes(sources)]
    firsts = np.full((max(most, 1), len(sources)), -1, np.int64)
    firsts[0] = [source.first_id for source in sources]
    free = sum(source.rows for source in sources)
    for number in range(1, most):
        for index in np.unique(choice.source[choice.times > number]).tolist():
            source = choice.sources[index]
            numbered = (f"{roots[index]}#{place}" for place in itertools.count(number + 1))
            name = next(name for name in numbered if name not in names)  # a mixture has such names already
            names.add(name)
            sources.append(msgspec.structs.replace(source, name=name, first_id=free))
            firsts[number, index] = free
            free += source.rows
    return tuple(sources), firsts


def _stretches(
    config: ViewConfig, choice: Choice, limited: Limited, firsts: Int64
) -> tuple[Stretches, Stretches]:
    """Return what rows are made of, and what is left over, of every document each time it is taken."""
    kept, lengths = limited.pieces.kept(), choice.documents.lengths
    pieces = limited.pieces
    broken = pieces.take((pieces.reason != KEPT) | (pieces.lengths < lengths[pieces.example]))
    first = np.diff(broken.example, prepend=-1) != 0
    chosen, example = broken.example[first], np.cumsum(first) - 1
    policy: Policy = config.overlong or "truncate"
    rest, reasons = left_over(lengths[chosen], replace(broken, example=example), policy)
    nothing = np.broadcast_to(np.array("", object), len(kept))
    return (
        _repeated(choice, kept.example, kept.start, kept.stop, nothing, firsts),
        _repeated(choice, chosen[rest.example], rest.start, rest.stop, np.array(reasons, object), firsts),
    )


def _repeated(
    choice: Choice, document: Int64, start: Int64, stop: Int64, reason: Names, firsts: Int64
) -> Stretches:
    """Give each stretch its id, once for each time its document is taken, pass after pass."""
    if len(firsts) == 1 and choice.times[document].all():  # ids ascend with the documents
        ids = choice.documents.ids
        each = len(document) == len(ids) and bool((np.diff(document, prepend=-1) == 1).all())
        return Stretches(document, ids if each else ids[document], start, stop, reason)
    parts = []
    for number in range(len(firsts)):
        taken = np.flatnonzero(choice.times[document] > number)
        source = choice.source[document[taken]]
        ids = choice.documents.ids[document[taken]] - firsts[0, source] + firsts[number, source]
        parts.append(Stretches(document[taken], ids, start[taken], stop[taken], reason[taken]))
    joined = Stretches.join(parts)
    return joined.take(np.argsort(joined.id, kind="stable"))


# ------------------------------------------------------------------------------- settings and ledger


def _settings(
    config: ViewConfig, bases: Sequence[Base], side: str, by_slice: bool, dealt: Dealt | None
) -> dict[str, object]:
    """Return the settings of the manifest: those of `prepare` that all bases share, and the view's own."""
    settings = _shared([base.manifest.settings for base in bases])
    settings |= {
        "max_length": config.max_length, "overlong": config.overlong, "packing": config.packing,
        "loss_weights": any(base.manifest.weighted for base in bases),
    }  # fmt: skip
    if visions := [base.manifest.settings["vision"] for base in bases if base.manifest.pictured]:
        settings["vision"] = _shared(visions)
    view = named_selection(config, side, by_slice=by_slice)
    if any(base.before for base in bases):
        view["pictures"] = [base.before for base in bases]
    if dealt is not None:
        view["steps"] = msgspec.to_builtins(dealt[0])
    chosen_before = settings.pop("view", None) is not None
    if view or len(bases) > 1 or chosen_before:
        settings["view"] = view | {"bases": [base.manifest.digest for base in bases]}
    return settings


def _shared(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that all of several have alike."""
    first, *others = several
    return {
        key: value
        for key, value in first.items()
        if all(other.get(key, _ABSENT) == value for other in others)
    }


def named_selection(config: ViewConfig, side: str, *, by_slice: bool) -> dict[str, object]:
    """Return the settings that choose documents as a manifest has them: lists and sets go by what they hold.

    Args:
        side: of a split; empty where there is none.
        by_slice: whether packing keeps to the slices of the base.
    """
    view = config.selection()
    for name in ("pack_over", "steps_for", "model"):
        view.pop(name, None)
    if config.drop is not None:
        view["drop"] = hashlib.sha256(config.drop.read_bytes()).hexdigest()
    if config.exclude:
        view["exclude"] = [read_manifest(Path(folder)).digest for folder in config.exclude]
    return view | ({} if by_slice else {"pack_over": "view"}) | ({"side": side} if side else {})


_ABSENT = object()
_LAID_OUT = {
    "order": "order",
    "steps": "steps_for",
    "epochs": "epochs",
    "pad_to_multiple_of": "pad_to_multiple_of",
}


def _ledger(
    config: ViewConfig,
    bases: Sequence[Base],
    choice: Choice,
    limited: Limited,
    kept: Stretches,
    rest: Stretches,
) -> Ledger:
    """Return what became of rows and tokens, packing aside."""
    ledger, lengths = Ledger(), choice.documents.lengths
    for base in bases:
        _carry(ledger, base, choice, everything=not config.selects)
    repeated = np.flatnonzero(choice.times > 1)
    repeats = choice.times[repeated] - 1
    ledger.rows_in += int(repeats.sum())
    ledger.documents_repeated = int(repeats.sum()) + _count_again(bases, choice)
    ledger.tokens_in += int((repeats * lengths[repeated]).sum())
    for step, (count, tokens) in choice.left_out().items():
        ledger.documents_left_out[step] = ledger.documents_left_out.get(step, 0) + count
        ledger.tokens_left_out += tokens
    ledger.rows_kept = _count_different(kept.id)
    stays, sizes = _among(rest.id, kept.id), rest.stop - rest.start
    for name in REASONS:
        gone = int(((rest.reason == name) & ~stays).sum())
        if gone:
            ledger.rows_dropped[name] = ledger.rows_dropped.get(name, 0) + gone
    cut = stays & (rest.reason == config.overlong)
    ledger.tokens_in_dropped_rows += int(sizes[~cut].sum())
    if cut.any():
        ledger.tokens_cut[str(config.overlong)] = int(sizes[cut].sum())
    counts = (len(np.unique(rest.id[cut])), int(choice.times[limited.unended].sum()))
    ledger.counters |= {name: count for name, count in zip(_LIMITING, counts, strict=True) if count}
    if config.selects:
        ledger.count_lengths(np.repeat(lengths, choice.times))
    if choice.documents.pictures is not None:
        _count_pictures(ledger, choice, choice.documents.pictures.counts, kept)
    return ledger


def _count_pictures(ledger: Ledger, choice: Choice, counts: Int64, kept: Stretches) -> None:
    """Add what became of the pictures of documents, int64[N] each: no document is in two pieces."""
    stays, in_rows = int((counts * choice.times).sum()), int(counts[kept.document].sum())
    ledger.pictures_in += int((counts * np.maximum(choice.times - 1, 0)).sum())
    ledger.pictures_left_out += int(counts[~choice.stays].sum())
    ledger.pictures_kept = in_rows
    ledger.pictures_in_dropped_rows = stays - in_rows


def _count_again(bases: Sequence[Base], choice: Choice) -> int:
    """Count the documents taken of which another pass, of those that the bases hold, is taken too."""
    if not any(base.manifest.ledger.documents_repeated for base in bases):
        return 0
    taken = in_first_pass(choice.sources, choice.documents.ids[choice.times > 0])
    return len(taken) - len(distinct(taken))


def _count_different(ids: Int64) -> int:
    """Count the different values, most often in order already."""
    ordered = ids if (ids[1:] >= ids[:-1]).all() else np.sort(ids)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + (len(ids) > 0)


def _among(ids: Int64, others: Int64) -> Bool:
    """bool[R]: ids that are among the others; memory and time follow the ids, which are few."""
    few = np.unique(ids)
    found: Bool = np.isin(ids, few[np.isin(few, others)] if len(few) else few)
    return found


def _carry(ledger: Ledger, base: Base, choice: Choice, *, everything: bool) -> None:
    """Add what a base counted of its rows before any was limited.

    Where rows are left out or repeated, a counter counts the rows behind it that are there, if they are
    listed; lengths are counted anew.
    """
    old = base.manifest.ledger
    counters, examples = dict(old.counters), {n: list(ids) for n, ids in old.examples.items()}
    if not everything:
        taken = choice.documents.ids[choice.times > 0] - base.first_id
        listed = {name: ids[np.isin(ids, taken)] for name, ids in read_counted(base.folder).items()}
        counters |= {name: len(ids) for name, ids in listed.items()}
        examples = {name: ids[:EXAMPLES].tolist() for name, ids in listed.items() if len(ids)}
    examples = {name: [number + base.first_id for number in ids] for name, ids in examples.items()}
    ledger.merge(
        Ledger(
            rows_in=old.rows_in,
            rows_rejected=dict(old.rows_rejected),
            rows_filtered=dict(old.rows_filtered),
            tokens_in=old.tokens_in,
            documents_left_out=dict(old.documents_left_out),
            tokens_left_out=old.tokens_left_out,
            pictures_in=old.pictures_in,
            pictures_in_rejected_rows=old.pictures_in_rejected_rows,
            pictures_left_out=old.pictures_left_out,
            counters={name: count for name, count in counters.items() if count and name not in _LIMITING},
            examples=examples,
            lengths=dict(old.lengths) if everything else {},
        )
    )
