"""The lists beside the shards of a view: rejects of the bases, dropped rows, rows behind counters."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from sftdata.batches import Dropped
from sftdata.set.ledger import (
    COUNTED_NAME,
    DROPPED_NAME,
    REJECTS_NAME,
    counted_rows,
    encode_lines,
    read_counted,
)
from sftdata.set.local import file_of
from sftdata.set.manifest import SourceInfo
from sftdata.views.bases import Base
from sftdata.views.plan import ViewPlan


def lists_of(plan: ViewPlan) -> dict[str, bytes]:
    """Return the lines of each list."""
    rejects = b"".join(_rejects(base, renamed) for base, renamed in _renamed(plan))
    dropped = dict(_carried(plan)) | dict(_dropped(plan))
    return {
        REJECTS_NAME: rejects,
        DROPPED_NAME: encode_lines(dropped[number] for number in sorted(dropped)),
        COUNTED_NAME: _counted(plan),
    }


def _renamed(plan: ViewPlan) -> Iterator[tuple[Base, dict[str, SourceInfo]]]:
    """Yield each base, and its sources as the view has them, by the names they have there."""
    sources = iter(plan.choice.sources)
    for base in plan.bases:
        yield base, {old.name: next(sources) for old in base.manifest.sources}


def _rejects(base: Base, here: Mapping[str, SourceInfo]) -> bytes:
    """Return the rejects of a base, each with the name that its source has in the view."""
    if all(name == source.name for name, source in here.items()):
        return file_of(base.folder, REJECTS_NAME).read_bytes()
    lines = []
    for line in map(bytes.decode, file_of(base.folder, REJECTS_NAME).read_bytes().splitlines(keepends=True)):
        file, end = _DECODER.raw_decode(line, len(_FILE))
        name = here[file].name if file in here else file
        lines.append(f"{_FILE}{msgspec.json.encode(name).decode()}{line[end:]}".encode())
    return b"".join(lines)


_DECODER, _FILE = json.JSONDecoder(), '{"file":'


def _carried(plan: ViewPlan) -> Iterator[tuple[int, Dropped]]:
    """Yield the rows that the bases dropped before they were tokenized, with their ids in the view."""
    known = plan.choice.documents.ids
    for base, here in _renamed(plan):
        for line in file_of(base.folder, DROPPED_NAME).read_bytes().splitlines():
            row = msgspec.json.decode(line, type=Dropped)
            source = here[row.file]
            number = source.first_id + row.record - 1
            place = int(np.searchsorted(known, number))
            if place == len(known) or known[place] != number:
                yield number, msgspec.structs.replace(row, file=source.name)


def _dropped(plan: ViewPlan) -> Iterator[tuple[int, Dropped]]:
    """Yield the documents that the limit takes out whole, with their ids."""
    rest, lengths = plan.rest, plan.choice.documents.lengths
    gone = rest.take(~np.isin(rest.id, plan.kept.id))
    firsts = [source.first_id for source in plan.sources]
    for number, document, reason in zip(gone.id.tolist(), gone.document.tolist(), gone.reason, strict=True):
        source = plan.sources[bisect_right(firsts, number) - 1]
        record = number - source.first_id + 1
        line, tokens = record if source.unit == "line" else None, int(lengths[document])
        yield number, Dropped(file=source.name, line=line, record=record, reason=reason, tokens=tokens)


def _counted(plan: ViewPlan) -> bytes:
    """Return the rows behind each counter that are still there."""
    if len(plan.bases) == 1 and not plan.config.selects:
        path = file_of(plan.bases[0].folder, COUNTED_NAME)
        return path.read_bytes() if path.is_file() else b""
    taken = plan.choice.documents.ids[plan.choice.times > 0]
    lines = b""
    for base in plan.bases:
        rows = {name: ids + base.first_id for name, ids in read_counted(base.folder).items()}
        lines += encode_lines(counted_rows({name: ids[np.isin(ids, taken)] for name, ids in rows.items()}))
    return lines
