"""Plan a view: settings and indexes in, rows out, as arrays; only documents that are cut are read."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sftdata.batches import EXAMPLES, Bool, Int64, PackPlan, offsets_of, positions_of
from sftdata.choosing import refuse_idle
from sftdata.errors import DataError, UsageError
from sftdata.limit import KEPT, REASONS, Policy, left_over
from sftdata.pack import Strategy, plan_packs
from sftdata.set.ledger import Ledger, read_counted
from sftdata.set.manifest import SourceInfo, read_manifest
from sftdata.views.bases import Base, open_bases, read_documents
from sftdata.views.choose import draw
from sftdata.views.recipe import ViewConfig
from sftdata.views.select import (
    Choice,
    Limited,
    cap_sources,
    filter_documents,
    limit_documents,
    mix_sources,
    split_off,
)

Names = npt.NDArray[np.object_]
SHARD_TOKENS = 1 << 22  # of a shard where packing goes over the whole view
_LIMITING = ("rows_cut", "rows_without_ending")  # counters that the over-long policy sets


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Stretches of documents, each with the id that it has in the view.

    Attributes:
        document: int64[K], index of the document.
        id: int64[K], example id in the view.
        start, stop: int64[K], tokens of that document, half-open.
        reason: object[K], why it is in no row: of `REASONS`, or the policy that cut it; empty where it is
            in one.
    """

    document: Int64
    id: Int64
    start: Int64
    stop: Int64
    reason: Names

    def __len__(self) -> int:
        return len(self.id)

    def take(self, which: Int64 | Bool) -> Stretches:
        """Return some of them."""
        return Stretches(*(getattr(self, name)[which] for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class ViewSlice:
    """What becomes one shard, and what lies beside it.

    Attributes:
        index: number of the shard.
        packs: rows; `example` indexes the view's kept stretches.
        rest: int64[R], indices of the view's stretches that are in no row.
    """

    index: int
    packs: PackPlan
    rest: Int64


@dataclass(frozen=True, slots=True, eq=False)
class ViewPlan:
    """A view, down to the place of every token.

    Attributes:
        config: the settings.
        output: folder of the set.
        bases: the sets it is made of.
        choice: its documents.
        kept, rest: stretches in rows, and beside them.
        slices: in the order of the shards.
        sources: those of the bases, and again for each further pass over them.
        settings: of the manifest.
        ledger: what became of rows and tokens, packing aside.
        notes: what was decided or realised, one sentence each.
    """

    config: ViewConfig
    output: Path
    bases: tuple[Base, ...]
    choice: Choice
    kept: Stretches
    rest: Stretches
    slices: tuple[ViewSlice, ...]
    sources: tuple[SourceInfo, ...]
    settings: dict[str, object]
    ledger: Ledger
    notes: tuple[str, ...]

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
    config = _filled(config, bases[0])
    choice = Choice.of(read_documents(bases), _sources(bases))
    filter_documents(choice, config)
    limited = limit_documents(choice, _limit(config), config.overlong or "truncate")
    cap_sources(choice, config, limited)
    sides = split_off(choice, config) if config.eval is not None else {"": choice}
    if config.mix:
        mix_sources(sides.get("train", choice), config, limited)
    return tuple(_plan(config, config.output / side, bases, sides[side], limited) for side in sides)


def _filled(config: ViewConfig, base: Base) -> ViewConfig:
    """Return the settings with those of a base where none are given."""
    refuse_idle(config, shuffled=config.order == "shuffled")
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
    if config.order == "shuffled" and config.pack_over == "slice":
        raise UsageError(
            "--order shuffled: rows are shuffled over the whole view; --pack-over is slice.",
            "--pack-over view.",
        )
    return config.model_copy(update=given)


def _limit(config: ViewConfig) -> int | None:
    """Return the most tokens of a piece; the one cut stream of `wrapped` has room for any."""
    return None if config.packing == "wrapped" else config.max_length


def _sources(bases: Sequence[Base]) -> tuple[SourceInfo, ...]:
    """Return the sources of all bases; those of the same name get their set's name before it.

    Sets of the same name, as `a/train` and `b/train`, get as many folders before theirs as it takes.
    """
    listed = [(base, source) for base in bases for source in base.manifest.sources]
    plain = Counter(source.name for _, source in listed)
    deepest = max(len(base.folder.resolve().parts) for base in bases)
    for depth in range(1, deepest + 1):
        names = [
            Path(*base.folder.resolve().parts[-depth:], source.name).as_posix()
            if plain[source.name] > 1
            else source.name
            for base, source in listed
        ]
        if len({*names}) == len(names):
            break
    return tuple(
        msgspec.structs.replace(source, name=name, first_id=source.first_id + base.first_id)
        for name, (base, source) in zip(names, listed, strict=True)
    )


def _plan(
    config: ViewConfig, output: Path, bases: tuple[Base, ...], choice: Choice, limited: Limited
) -> ViewPlan:
    sources, first_ids = _passes(choice)
    kept, rest = _stretches(config, choice, limited, first_ids)
    if not len(kept):
        fix = "loosen the filters." if choice.left_out() else "a larger --max-length, or another --overlong."
        if config.eval is not None:
            fix = "choose another share for --eval, or loosen the filters."
        raise DataError(f"{output}: no document is left. {_reasons(choice, limited)}", fix)
    by_slice = config.pack_over == "slice" or (
        config.pack_over == "auto" and len(bases) == 1 and not config.selects and config.order == "as-is"
    )
    kept, rest, slices = (_pack_slices if by_slice else _pack_whole)(config, choice, kept, rest)
    return ViewPlan(
        config=config,
        output=output,
        bases=bases,
        choice=choice,
        kept=kept,
        rest=rest,
        slices=slices,
        sources=sources,
        settings=_settings(config, bases, output.name if config.eval else "", by_slice),
        ledger=_ledger(config, bases, choice, limited, kept, rest),
        notes=choice.shares,
    )


def _reasons(choice: Choice, limited: Limited) -> str:
    """Say what became of all documents of a view that holds none."""
    gone = {step: count for step, (count, _) in choice.left_out().items()}
    reason = limited.pieces.reason[choice.times[limited.pieces.example] > 0]
    gone |= {name: int((reason == code).sum()) for code, name in enumerate(REASONS, start=1)}
    said = ", ".join(f"{name} {count:,}" for name, count in gone.items() if count)
    return f"Of {len(choice.documents):,}: {said or 'none there'}."


# ------------------------------------------------------------------------------------------ stretches


def _passes(choice: Choice) -> tuple[tuple[SourceInfo, ...], Int64]:
    """List sources again that are gone through again; return all, and first ids by pass, int64[P, S]."""
    most = int(choice.times.max(initial=1))
    sources = list(choice.sources)
    names = {source.name for source in sources}
    firsts = np.full((max(most, 1), len(sources)), -1, np.int64)
    firsts[0] = [source.first_id for source in sources]
    free = sum(source.rows for source in sources)
    for number in range(1, most):
        for index in np.unique(choice.source[choice.times > number]).tolist():
            source = choice.sources[index]
            numbered = (f"{source.name}#{place}" for place in itertools.count(number + 1))
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
        return Stretches(document, choice.documents.ids[document], start, stop, reason)
    parts = []
    for number in range(len(firsts)):
        taken = np.flatnonzero(choice.times[document] > number)
        source = choice.source[document[taken]]
        ids = choice.documents.ids[document[taken]] - firsts[0, source] + firsts[number, source]
        parts.append(Stretches(document[taken], ids, start[taken], stop[taken], reason[taken]))
    joined = Stretches(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Stretches.__slots__)
    )
    return joined.take(np.argsort(joined.id, kind="stable"))


# -------------------------------------------------------------------------------------------- packing

Packed = tuple[Stretches, Stretches, tuple[ViewSlice, ...]]


def _pack_slices(config: ViewConfig, choice: Choice, kept: Stretches, rest: Stretches) -> Packed:
    """Pack each slice of the bases apart, as `prepare` did: in the order of the ids."""
    shard = choice.documents.shard
    kept, rest = (part.take(np.argsort(shard[part.document], kind="stable")) for part in (kept, rest))
    numbers = np.union1d(shard[kept.document], shard[rest.document])
    edges = np.append(np.searchsorted(shard[kept.document], numbers), len(kept))
    others = np.append(np.searchsorted(shard[rest.document], numbers), len(rest))
    slices = []
    for place, number in enumerate(numbers.tolist()):
        first, last = int(edges[place]), int(edges[place + 1])
        packs = _packs(config, kept.stop[first:last] - kept.start[first:last])
        moved = PackPlan(packs.offsets, packs.example + first, packs.start, packs.stop)
        slices.append(ViewSlice(number, moved, np.arange(others[place], others[place + 1])))
    return kept, rest, tuple(slices)


def _pack_whole(config: ViewConfig, choice: Choice, kept: Stretches, rest: Stretches) -> Packed:
    """Pack all documents together, and cut the rows into shards of about `SHARD_TOKENS`."""
    packs = _packs(config, kept.stop - kept.start)
    if config.order == "shuffled":
        rows = np.arange(len(packs), dtype=np.uint64)
        packs = _reordered(packs, np.argsort(draw(rows, config.seed, "order"), kind="stable"))
    ends = offsets_of(packs.stop - packs.start)[packs.offsets]
    if config.packing != "none":
        ends = np.arange(len(packs) + 1) * (config.max_length or 1)
    first_rows = np.unique(np.searchsorted(ends[:-1], np.arange(0, ends[-1], SHARD_TOKENS)))
    first_rows = first_rows[first_rows < len(packs)]
    last_rows = np.append(first_rows[1:], len(packs))
    # What is left over of a document lies beside its first row; documents in no row are spread over all.
    beside = _first_rows(packs, kept.id, rest.id)
    nowhere = np.flatnonzero(beside == len(packs))
    beside[nowhere] = np.arange(len(nowhere)) * len(packs) // max(len(nowhere), 1)
    shard = np.searchsorted(first_rows, beside, side="right") - 1
    slices = []
    for index, (first, last) in enumerate(zip(first_rows.tolist(), last_rows.tolist(), strict=True)):
        here = slice(packs.offsets[first], packs.offsets[last])
        part = PackPlan(
            packs.offsets[first : last + 1] - packs.offsets[first],
            packs.example[here],
            packs.start[here],
            packs.stop[here],
        )
        slices.append(ViewSlice(index, part, np.flatnonzero(shard == index)))
    return kept, rest, tuple(slices)


def _packs(config: ViewConfig, lengths: Int64) -> PackPlan:
    strategy: Strategy = config.packing or "bfd"
    longest = int(lengths.max(initial=1))
    return plan_packs(lengths, longest if strategy == "none" else config.max_length or longest, strategy)


def _reordered(packs: PackPlan, order: Int64) -> PackPlan:
    """Return the same rows in another order."""
    count = np.diff(packs.offsets)[order]
    which = positions_of(packs.offsets[:-1][order], count)
    return PackPlan(offsets_of(count), packs.example[which], packs.start[which], packs.stop[which])


def _first_rows(packs: PackPlan, ids: Int64, asked: Int64) -> Int64:
    """Return the first row of each example id asked for, int64[R]; the number of rows where there is none.

    Args:
        ids: int64[K], ascending, of the stretches that are packed.
    """
    if not len(asked):
        return asked
    row = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    first_row = np.full(len(ids), len(packs))
    first_row[packs.example[::-1]] = row[::-1]  # of several the last one written stays: the first row
    first = np.flatnonzero(np.diff(ids, prepend=-1))
    lowest, distinct = np.minimum.reduceat(first_row, first), ids[first]
    place = np.minimum(np.searchsorted(distinct, asked), len(distinct) - 1)
    return np.where(distinct[place] == asked, lowest[place], len(packs))


# ------------------------------------------------------------------------------- settings and ledger


def _settings(config: ViewConfig, bases: Sequence[Base], side: str, by_slice: bool) -> dict[str, object]:
    """Return the settings of the manifest: those of `prepare` that all bases share, and the view's own."""
    first, *others = (base.manifest.settings for base in bases)
    settings: dict[str, object] = {
        key: value
        for key, value in first.items()
        if all(other.get(key, _ABSENT) == value for other in others)
    }
    settings |= {
        "max_length": config.max_length, "overlong": config.overlong, "packing": config.packing,
        "loss_weights": any(base.manifest.weighted for base in bases),
    }  # fmt: skip
    view: dict[str, object] = config.selection()
    view.pop("pack_over", None)
    if config.drop is not None:  # lists and sets are named by what they hold
        view["drop"] = hashlib.sha256(config.drop.read_bytes()).hexdigest()
    if config.exclude:
        view["exclude"] = [read_manifest(Path(folder)).digest for folder in config.exclude]
    if not by_slice:
        view["pack_over"] = "view"
    if view or others:
        view["bases"] = [base.manifest.digest for base in bases]
        settings["view"] = view | ({"side": side} if side else {})
    return settings


_ABSENT = object()


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
    repeats = np.maximum(choice.times - 1, 0)
    ledger.rows_in += int(repeats.sum())
    ledger.tokens_in += int((repeats * lengths).sum())
    ledger.documents_repeated = int(repeats.sum())
    for step, (count, tokens) in choice.left_out().items():
        ledger.documents_left_out[step] = ledger.documents_left_out.get(step, 0) + count
        ledger.tokens_left_out += tokens
    ledger.rows_kept = len(np.unique(kept.id))
    stays, sizes = np.isin(rest.id, kept.id), rest.stop - rest.start
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
    return ledger


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
            counters={name: count for name, count in counters.items() if count and name not in _LIMITING},
            examples=examples,
            lengths=dict(old.lengths) if everything else {},
        )
    )
