"""Choose the row format of an input from a sample of its rows, with evidence; refuse what is ambiguous.

Every sampled row gets one verdict; the most frequent verdict decides, so that neither the first row nor the
order matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from sftdata.batches import Reject
from sftdata.errors import UsageError, did_you_mean, nearest, without_secrets
from sftdata.formats.fields import Fields
from sftdata.formats.table import FORMATS, LINE, Format, rename
from sftdata.formats.unsupported import (
    BAD_MEDIA,
    BY_COLUMNS,
    OWN_KEYS,
    PREFERENCE,
    UNJUDGED,
    UNSUPPORTED,
    UNWANTED,
    explain_odd_value,
    is_unanswered_preference,
)
from sftdata.output import counted
from sftdata.pictures.rows import COLUMNS as PICTURES
from sftdata.pictures.rows import Evidence, gather_evidence, may_hold_media, without_pictures
from sftdata.sources.chunks import SourcePlan
from sftdata.sources.jsonrows import JsonObject
from sftdata.sources.source import read_chunk
from sftdata.wording import shell_quote

Reading = tuple[str, tuple[tuple[str, str], ...]]
"""A format, and where it finds its columns: (canonical column, column in the data)."""


@dataclass(frozen=True, slots=True)
class Detection:
    """What the rows are, and why.

    Attributes:
        format: name in FORMATS.
        columns: canonical column -> column in the data, as most rows have it.
        evidence: lines to show.
        sampled, matched, total: rows looked at, rows of that format among them, records of the input.
        alternatives: what the other sampled rows are, and how many.
        sources: path, container and compression of each source.
        pictures: of the sampled rows of that format; None where they have none.
        rows: the sampled rows of that format, the user's columns under their canonical names.
    """

    format: str
    columns: dict[str, str]
    evidence: tuple[str, ...]
    sampled: int
    matched: int
    total: int
    alternatives: tuple[tuple[str, int], ...]
    sources: tuple[dict[str, str], ...]
    pictures: Evidence | None = None
    rows: tuple[JsonObject, ...] = field(default=(), repr=False)

    def to_json(self) -> JsonObject:
        """Return plain JSON data, the rows aside."""
        alternatives = [{"reading": name, "rows": rows} for name, rows in self.alternatives]
        own = asdict(replace(self, rows=(), pictures=None))
        del own["rows"], own["pictures"]
        return own | {
            "evidence": list(self.evidence),
            "alternatives": alternatives,
            "sources": list(self.sources),
            **({} if self.pictures is None else {"pictures": self.pictures.to_json()}),
        }


@dataclass(slots=True)
class _Verdicts:
    """The sampled rows by what they are."""

    readings: dict[tuple[Reading, ...], list[JsonObject]] = field(default_factory=dict)
    unsupported: dict[str, list[JsonObject]] = field(default_factory=dict)
    unknown: list[JsonObject] = field(default_factory=list)
    media: bool = False

    def add(self, row: JsonObject, readings: tuple[Reading, ...], *, named: bool, media: bool) -> None:
        """Judge one row by its readings, or by what it lacks.

        Args:
            named: the user says which format it has.
            media: it may hold pictures, films or sound.
        """
        self.media |= media
        if media and BAD_MEDIA.fits(row):
            self.unsupported.setdefault(BAD_MEDIA.name, []).append(row)
        elif (
            not named
            and readings
            and UNWANTED.fits(row)
            and UNJUDGED.isdisjoint(name for name, _ in readings)
        ):
            self.unsupported.setdefault(UNWANTED.name, []).append(row)
        elif not named and is_unanswered_preference(row):
            self.unsupported.setdefault(PREFERENCE.name, []).append(row)
        elif readings:
            self.readings.setdefault(readings, []).append(row)
        elif kind := next((kind for kind in UNSUPPORTED.values() if kind.fits(row)), None):
            self.unsupported.setdefault(kind.name, []).append(row)
        else:
            self.unknown.append(row)

    def counts(self) -> dict[str, int]:
        """Return rows per verdict; rows with several readings count under all their names at once."""
        counts: Counter[str] = Counter()
        for readings, rows in self.readings.items():
            counts[name_of(readings)] += len(rows)
        counts.update({name: len(rows) for name, rows in self.unsupported.items()})
        counts.update({"no known format": len(self.unknown)} if self.unknown else {})
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def name_of(readings: tuple[Reading, ...]) -> str:
    """Name what a row reads as: a format, or several that all fit."""
    return " or ".join(name if len(readings) == 1 else describe((name, names)) for name, names in readings)


def describe(reading: Reading) -> str:
    """Name a format with the columns that it would use, as `alpaca (instruction, output)`."""
    name, names = reading
    required = {column.name for column in FORMATS[name].columns if column.required}
    return f"{name} ({', '.join(actual for canonical, actual in names if canonical in required)})"


def detect(
    plans: Sequence[SourcePlan], *, format: str | None = None, columns: Mapping[str, str] | None = None
) -> Detection:
    """Detect the one format of some planned sources.

    Args:
        format: what the user says it is: checked against the rows, not detected.
        columns: canonical column = column in the data, as the user maps them.

    Raises:
        UsageError: two readings fit, none does, or the rows are of a kind that cannot be trained on.
    """
    columns = columns or {}
    _check_names(format, columns)
    rows, unreadable = _sample(plans)
    where = without_secrets(plans[0].source.path) if len(plans) == 1 else f"{len(plans)} sources"
    if not rows:
        bad = unreadable[0] if unreadable else None
        first = f" (record {bad.line or bad.record}: {bad.reason.rstrip('.')})" if bad else ""
        fix = bad.fix if bad else "give a file that holds rows."
        raise UsageError(f"{where}: no row could be read{first}.", fix)
    _check_columns(where, columns, rows)
    verdicts = _Verdicts()
    entries = [entry for entry in FORMATS.values() if format in (None, entry.name)]
    # By the columns of a row and which of them are null; most rows have the same.
    possible: dict[tuple[tuple[str, bool], ...], list[tuple[Format, dict[str, str]]]] = {}
    for row in rows:
        original = rename(row, columns)
        media = may_hold_media(original)
        renamed = without_pictures(original) if media else original
        shape = tuple((name, value is None) for name, value in renamed.items())
        if shape not in possible:
            possible[shape] = [
                (entry, names) for entry in entries for names in entry.candidates(renamed, columns)
            ]
        found = [
            (entry.name, tuple(names.items()))
            for entry, names in possible[shape]
            if entry.fits(Fields(renamed, names))
        ]
        verdicts.add(original, tuple(found), named=format is not None, media=media)
    counts = verdicts.counts()
    # One answer that is not wanted says what the column means, however few of them are in the sample.
    winner = UNWANTED.name if UNWANTED.name in counts else next(iter(counts))
    if winner not in FORMATS:
        share = f"{counts[winner]} of {len(rows)} sampled rows"
        raise _refuse(where, winner, share, verdicts, format, columns)
    return _settle(winner, counts, verdicts, plans, unreadable)


def _sample(plans: Sequence[SourcePlan]) -> tuple[list[JsonObject], list[Reject]]:
    """Return rows from all over the input, and those of them that could not be read."""
    rows: list[JsonObject] = []
    unreadable: list[Reject] = []
    for plan in plans:
        for chunk in plan.samples:
            batch, bad = read_chunk(chunk, plan.max_line_bytes)
            rows += [{LINE: row} if isinstance(row, str) else row for row in batch.rows]
            unreadable += bad
    return rows, unreadable


def _settle(
    winner: str,
    counts: dict[str, int],
    verdicts: _Verdicts,
    plans: Sequence[SourcePlan],
    unreadable: list[Reject],
) -> Detection:
    """Return the detection of a format that most rows have."""
    found: Counter[tuple[str, str]] = Counter()
    kept: list[JsonObject] = []
    for readings, rows in verdicts.readings.items():
        if name_of(readings) == winner:
            found.update(dict.fromkeys(readings[0][1], len(rows)))
            kept += rows
    order = [column.name for column in FORMATS[winner].columns]
    shown = sorted(found.items(), key=lambda item: (order.index(item[0][0]), -item[1], item[0][1]))
    columns: dict[str, str] = {}
    for (canonical, actual), _ in shown:
        columns.setdefault(canonical, actual)
    sampled, total = sum(counts.values()), sum(plan.records for plan in plans)
    where = ", ".join(f"{actual or 'a line'} in {rows}" for (_, actual), rows in shown)
    share = f"{counts[winner]} of {counted(sampled, 'sampled row')}, of {counted(total, 'record')}"
    evidence = [f"{winner} ({FORMATS[winner].about}): {share}: {where}."]
    others = tuple((name, rows) for name, rows in counts.items() if name != winner)
    evidence += [
        f"{counted(rows, 'sampled row')} read as {name}; such rows are rejected." for name, rows in others
    ]
    evidence += [f"{counted(len(unreadable), 'sampled row')} could not be read."] if unreadable else []
    pictures = gather_evidence(kept if verdicts.media else ())
    evidence += pictures.lines
    sources = tuple(
        {
            "path": without_secrets(plan.source.path),
            "container": plan.source.container,
            "compression": plan.source.compression,
        }
        for plan in plans
    )
    return Detection(
        winner, columns, tuple(evidence), sampled, counts[winner], total, others, sources,
        pictures if pictures.ways else None, tuple(kept),
    )  # fmt: skip


def _refuse(
    where: str, winner: str, share: str, verdicts: _Verdicts, format: str | None, columns: Mapping[str, str]
) -> UsageError:
    """Return the error that says why the rows cannot be used and which flag settles it."""
    kinds = UNSUPPORTED | {BAD_MEDIA.name: BAD_MEDIA, UNWANTED.name: UNWANTED}
    ambiguous = next((readings for readings in verdicts.readings if name_of(readings) == winner), None)
    if ambiguous:
        what = f"{where}: {len(ambiguous)} readings fit {share}: {' and '.join(map(describe, ambiguous))}."
        return UsageError(what, f"choose one with {' or '.join(_settling_flags(ambiguous))}.")
    # Several objects that each look like a table by columns are rows with odd values.
    one_table = winner != BY_COLUMNS or len(verdicts.unsupported[winner]) == 1
    named = format or (columns and winner == OWN_KEYS)  # these rows have the columns as they are mapped
    if winner in kinds and one_table and not (named and winner != BAD_MEDIA.name):
        reason, fix = kinds[winner].explain(verdicts.unsupported[winner])
        return UsageError(f"{where}: {share}: {reason}.", fix)
    rows = [row for group in (verdicts.unknown, *verdicts.unsupported.values()) for row in group]
    if odd := explain_odd_value(rows, [FORMATS[format]] if format else FORMATS.values(), columns):
        return UsageError(f"{where}: {share}: {odd[0]}.", odd[1])
    counts = Counter(name for row in rows for name in row)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    found = f"{share} have the columns {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"
    if format:
        required = (column for column in FORMATS[format].columns if column.required)
        needed = ", ".join(" or ".join(column.spellings) for column in required)
        what = f"{where}: {found}; {format} needs {needed}."
        return UsageError(what, "name them with --map, or choose another --format.")
    fix = (
        "name columns, as --map question=COLUMN --map answer=COLUMN,"
        " or convert rows with --formatter module:function."
    )
    return UsageError(f"{where}: no known row format fits: {found}.", fix)


def _settling_flags(readings: tuple[Reading, ...]) -> list[str]:
    formats = list(dict.fromkeys(name for name, _ in readings))
    if len(formats) > 1:
        return [f"--format {name}" for name in formats]
    variants = [dict(names) for _, names in readings]
    column = next(
        column
        for column in FORMATS[formats[0]].columns
        if len({names.get(column.name) for names in variants}) > 1
    )
    return [
        f"--map {column.spellings[0]}={shell_quote(name)}"
        for name in dict.fromkeys(names[column.name] for names in variants)
    ]


def _check_names(format: str | None, columns: Mapping[str, str]) -> None:
    """Refuse formats and canonical columns that do not exist."""
    spellings = {
        name for entry in FORMATS.values() for column in entry.columns for name in column.spellings if name
    }.union(PICTURES)
    for flag, name, known in [
        ("--format", format, set(FORMATS)),
        *(("--map", name, spellings) for name in columns),
    ]:
        if name is not None and name not in known:
            kind = "format" if flag == "--format" else "column of any format"
            fix = did_you_mean(name, known, f"choose one of {', '.join(sorted(known))}.")
            raise UsageError(f"{flag} {name}: no such {kind}.", fix)


def _check_columns(where: str, columns: Mapping[str, str], rows: Sequence[JsonObject]) -> None:
    """Refuse a mapping from a column that no sampled row has."""
    present = {name for row in rows for name in row}
    for canonical, actual in columns.items():
        if actual not in present:
            near = nearest(actual, present)
            fix = f"the columns are {', '.join(sorted(present)[:12])}."
            fix = f"did you mean --map {canonical}={shell_quote(near)}?" if near else fix
            what = f"{where}: --map {canonical}={actual}: no sampled row has a column {actual!r}."
            raise UsageError(what, fix)
