"""The rows that are not in a set: rejected, filtered or dropped, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from urllib.parse import parse_qs, urlencode

from sftdata.browse.catalog import Catalog
from sftdata.errors import UsageError, place
from sftdata.show.sides import Lost, read_lost

A_PAGE = 50
_LONGEST = 2_000  # characters shown of a row


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not in the set, or only beside its rows.

    Attributes:
        place: in its file.
        why: code or reason.
        said, fix: in words; "" where the reason says it all.
        tokens: its length; None where it was not tokenized.
        row: as it stands, where it is recorded, cut after some characters.
        example_id: of its document, which is in the set, beside its rows; None where there is none.
    """

    place: str
    why: str
    said: str
    fix: str
    tokens: int | None
    row: str
    example_id: int | None


def left_out(catalog: Catalog, asked: str) -> dict[str, object]:
    """Return what a page of such rows shows.

    Args:
        asked: query of the page: `why`, a code or a reason, and `page`.

    Raises:
        UsageError: the query asks for nothing of the kind.
        IntegrityError: a list is damaged.
    """
    ledger = catalog.shards.manifest.ledger
    given = {name: values[-1] for name, values in parse_qs(asked).items()}
    kinds = {
        "rejected": ledger.rows_rejected, "dropped": ledger.rows_dropped, "filtered": ledger.rows_filtered
    }  # fmt: skip
    counts = [(kind, why, count) for kind, own in kinds.items() for why, count in sorted(own.items())]
    why, number = given.get("why", ""), given.get("page", "1")
    if given.keys() - {"why", "page"} or not number.isdecimal() or len(number) > 9 or not int(number):
        raise UsageError("The address cannot be read.", "follow a link of the page.")
    if why and why not in [one for _, one, _ in counts]:
        raise UsageError(f"why: nothing was left out for {why}.", "see the reasons on the page.")
    page = int(number)
    lost = (one for one in read_lost(catalog.shards.folder) if why in ("", one.code or one.reason))
    rows = [_shown(catalog, one) for one in islice(lost, (page - 1) * A_PAGE, page * A_PAGE + 1)]
    more = urlencode({**({"why": why} if why else {}), "page": page + 1}) if len(rows) > A_PAGE else ""
    return {"counts": counts, "why": why, "page": page, "rows": rows[:A_PAGE], "more": more}


def _shown(catalog: Catalog, line: Lost) -> LeftOut:
    sources = catalog.shards.manifest.sources
    source = next((one for one in sources if one.name == line.file), None)
    unit = "line" if source is None else source.unit
    where = place(line.file, line.record, unit, line.line if unit != "line" else None)
    example_id = None
    if source is not None and 1 <= line.record <= source.rows:
        example_id = source.first_id + line.record - 1
        example_id = example_id if catalog.state[example_id] else None
    row = bytes(line.row).decode(errors="replace")
    row = row if len(row) <= _LONGEST else f"{row[:_LONGEST]}…"
    said = (line.reason, line.fix) if line.code else ("", "")
    return LeftOut(where, line.code or line.reason, *said, line.tokens, row, example_id)
