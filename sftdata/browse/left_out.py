"""The rows that are not in a set: rejected, filtered or dropped, each with its reason."""

from __future__ import annotations

from itertools import islice
from urllib.parse import parse_qs, urlencode

from sftdata.browse.catalog import Catalog
from sftdata.errors import UsageError, place
from sftdata.show.sides import Lost, read_lost

A_PAGE = 50


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
    rows = [_placed(catalog, one) for one in islice(lost, (page - 1) * A_PAGE, page * A_PAGE + 1)]
    more = urlencode({**({"why": why} if why else {}), "page": page + 1}) if len(rows) > A_PAGE else ""
    return {"counts": counts, "why": why, "page": page, "rows": rows[:A_PAGE], "more": more}


def _placed(catalog: Catalog, lost: Lost) -> tuple[Lost, str, int | None]:
    """Return a row, its place, and the id of its document, which may be beside the rows of the set."""
    sources = catalog.shards.manifest.sources
    source = next((one for one in sources if one.name == lost.file), None)
    unit = "line" if source is None else source.unit
    where = place(lost.file, lost.record, unit, lost.line if unit != "line" else None)
    if source is None or not 1 <= lost.record <= source.rows:
        return lost, where, None
    example_id = source.first_id + lost.record - 1
    return lost, where, example_id if catalog.state[example_id] else None
