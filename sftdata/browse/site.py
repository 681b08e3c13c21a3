"""The pages of `sftdata browse`, by their addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sftdata.batches import Int64, PackedRows
from sftdata.browse.background import Background
from sftdata.browse.catalog import Catalog
from sftdata.browse.facets import filters_of, lengths_of, shares_of, sources_of
from sftdata.browse.query import STATES, Query
from sftdata.browse.reading import Reader, part_of
from sftdata.browse.selection import Selection, select
from sftdata.errors import SftError, UsageError
from sftdata.pages import render
from sftdata.set.ledger import read_counted
from sftdata.show.choice import spell
from sftdata.show.findings import COUNTED
from sftdata.show.report import make_report
from sftdata.show.view import ShownSet, View
from sftdata.views.recipe import drop_line

if TYPE_CHECKING:
    from sftdata.show.audit import Glance
    from sftdata.show.diff import Diff

A_PAGE = 50  # documents
LISTED = 1_000_000  # documents of a list for --drop, at most
_HERE = Path(__file__).parent
_KEPT = 4  # selections: a byte a document each
_HTML = "text/html; charset=utf-8"
_PAGES = ("findings", "left-out", "report")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with."""

    status: int
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def page(cls, text: str, status: int = 200, *, again: bool = False) -> Answer:
        """Return a page; `again` lets it load itself anew until what it shows is done."""
        headers = {"Refresh": "2"} if again else {}
        return cls(status, text.encode(errors="backslashreplace"), _HTML, headers)

    @classmethod
    def file(cls, name: str, text: str) -> Answer:
        """Return a text to be saved as a file."""
        return cls(200, text.encode(), headers={"Content-Disposition": f'attachment; filename="{name}"'})


class SetPages:
    """The pages of one set.

    Args:
        shards: the set.
        frame: of its pages: the set beside it, if any.
    """

    def __init__(self, shards: ShownSet, frame: Mapping[str, object]) -> None:
        self.shards = shards
        self._shown = {**frame, "name": shards.folder.resolve().name}
        self._selected: dict[str, Selection] = {}
        self._audited: Glance | None = None
        self._whole = _Counted(shards.folder, shards.manifest)  # of its own: nothing is shared with pages
        self._audit = Background(self._audit_all)

    @cached_property
    def catalog(self) -> Catalog:
        """Every document, read when a page first asks for it."""
        return Catalog(self.shards)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.catalog)

    def answer(self, top: str, path: Sequence[str], asked: str) -> Answer:
        """Return a page.

        Args:
            top: address of all pages.
            path: of this one, below its set.
            asked: its query.

        Raises:
            SftError: there is no such page, or it cannot be made.
        """
        frame = self._shown | {"top": top, "root": f"{top}/{self._shown['which']}"}
        if len(path) == 1 and path[0] in _PAGES:
            show: Callable[[str, Mapping[str, object]], Answer] = {
                "findings": self._findings, "left-out": self._left_out, "report": self._report
            }[path[0]]  # fmt: skip
            return show(asked, frame)
        query = Query.read(self.shards.folder, asked)
        match path:
            case [""]:
                return Answer.page(self._documents(query, frame))
            case ["document", number] if number.isdecimal():
                return Answer.page(self._document(int(number), query, frame))
            case ["row", number] if number.isdecimal():
                return Answer.page(self._row(int(number), query, frame))
            case ["recipe.yaml"]:
                return Answer.file("recipe.yaml", query.as_yaml())
            case ["list.txt"]:
                return Answer.file("list.txt", "".join(self._list(query)))
        raise no_such_page(path)

    def _select(self, query: Query) -> Selection:
        """Return the documents of a query, but for its text; the last few selections are kept."""
        key = query.link(text=None)
        if key not in self._selected:
            finding = query.text("finding")
            chosen = select(self.catalog, query, self._ids_of(finding) if finding else None)
            while len(self._selected) >= _KEPT:
                del self._selected[next(iter(self._selected))]
            self._selected[key] = chosen
        return self._selected[key]

    # ---------------------------------------------------------------------------------------------- documents

    def _documents(self, query: Query, frame: Mapping[str, object]) -> str:
        chosen, text, manifest = self._select(query), query.text("text"), self.shards.manifest
        page = max(query.number("page"), 1)
        sources, count = sources_of(chosen, query, manifest.sources)
        found = None
        if text:
            after = query.number("after") if query.text("after") else -1
            found = self._reader.search(chosen, text, after, A_PAGE)
        return render(
            _HERE / "list.html.jinja",
            query=query,
            chosen=chosen,
            total=int(np.count_nonzero(self.catalog.state)),
            found=found,
            lines=found.lines if found else self._reader.lines(chosen.ids((page - 1) * A_PAGE, A_PAGE)),
            page=page,
            pages=-(-len(chosen) // A_PAGE),
            states=STATES,
            filters=list(filters_of(query)),
            lengths=lengths_of(chosen, query, manifest.max_length),
            shares=shares_of(chosen, query),
            sources=sources,
            all_sources=count,
            audited=self.audited() if query.text("finding") else None,
            **frame,
        )

    def _document(self, example_id: int, query: Query, frame: Mapping[str, object]) -> str:
        view, rows = self._reader.document(example_id)
        chosen = self._select(query)
        rank = chosen.rank(example_id)
        return self._view(
            view, f"document/{example_id}", query, frame, tab="", rows=rows, carried=query.link(),
            before=chosen.ids(rank - 1, 1) if rank else [],
            behind=[one for one in chosen.ids(rank, 2) if one != example_id][:1],
            place=f"{rank + 1:,} of {len(chosen):,}", up=query.to_page(rank // A_PAGE + 1),
        )  # fmt: skip

    def _row(self, number: int, query: Query, frame: Mapping[str, object]) -> str:
        view, last = self.shards.view(number), len(self.shards) - 1
        return self._view(
            view, f"row/{number}", query, frame, tab="row/0", rows=None, carried="",
            before=range(number)[-1:], behind=range(number, last)[:1] and [number + 1],
            place=f"pack {number:,}; the last is {last:,}", up="",
        )  # fmt: skip

    def _view(self, view: View, at: str, query: Query, frame: Mapping[str, object], **more: object) -> str:
        part = max(query.number("part"), 1)
        view, parts = part_of(view, part)
        return render(
            _HERE / "shown.html.jinja", view=view, at=at, query=query, part=part, parts=parts, **more, **frame
        )

    def _list(self, query: Query) -> Iterator[str]:
        """Yield the lines of a list for --drop.

        Raises:
            UsageError: it would not be what is asked for, or it is too long.
        """
        chosen, sources = self._select(query), self.shards.manifest.sources
        if query.text("text"):
            raise UsageError("text: a search ends page by page; it lists nothing.", "take the filter away.")
        if len(chosen) > LISTED:
            raise UsageError(
                f"{len(chosen):,} documents; a list names {LISTED:,} at most.",
                "save a recipe, or narrow it down.",
            )
        names = [source.name for source in sources]
        for first, last, index in self.catalog.sources:
            unique = names.count(names[index]) == 1
            for example_id in (np.flatnonzero(chosen.mask[first:last]) + first).tolist():
                row = example_id - first + 1
                yield f"{drop_line(names[index], row, example_id) if unique else example_id}\n"

    # ---------------------------------------------------------------------------------------------- the audit

    def audited(self, *, every: bool = False) -> Glance:
        """Return the findings of a glance at the set; of all of it once that was asked for and is done."""
        from sftdata.show.audit import glance

        if self._audited is None:
            self._audited = glance(self.shards.folder, self.shards.manifest)
        ask = every and self._audited.looked < self._audited.documents
        whole = self._audit.ask() if ask else self._audit.look()
        if whole is not None and whole is not self._audited:
            self._audited = whole
            self._selected.clear()
        return self._audited

    def _audit_all(self) -> Glance:
        from sftdata.show.audit import Glance, audit_set

        documents, self._whole.seen = self.shards.manifest.ledger.documents, 0
        return Glance(audit_set(self._whole), documents, documents)

    @cached_property
    def _counted(self) -> dict[str, Int64]:
        """The example ids of all findings that `prepare` counted, by code."""
        listed = read_counted(self.shards.folder)
        return {code: listed[name] for name, code in COUNTED.items() if name in listed}

    def _ids_of(self, code: str) -> Int64:
        """Return the example ids of a finding, as far as they are known.

        Raises:
            UsageError: nothing of the kind was found.
        """
        found = next((one for one in self.audited().findings if one.code == code), None)
        if found is None:
            raise UsageError(f"finding: no {code} was found in this set.", "see its findings.")
        ids = self._counted.get(code, found.ids)
        there: Int64 = ids[ids < len(self.catalog)]
        return there

    def _findings(self, asked: str, frame: Mapping[str, object]) -> Answer:
        audited = self.audited(every=asked == "every=1")
        linked = {one.code: self._ids_of(one.code) for one in audited.findings}
        done = min(self._whole.seen / max(len(self.shards), 1), 1) if self._audit.at_work else None
        page = render(
            _HERE / "findings.html.jinja",
            audited=audited, linked=linked, place=self.shards.place, done=done, **frame,
        )  # fmt: skip
        return Answer.page(page, again=done is not None)

    # ----------------------------------------------------------------------------------------- the set itself

    def _left_out(self, asked: str, frame: Mapping[str, object]) -> Answer:
        from sftdata.browse.left_out import left_out

        return Answer.page(render(_HERE / "left_out.html.jinja", **left_out(self.catalog, asked), **frame))

    def _report(self, asked: str, frame: Mapping[str, object]) -> Answer:
        around = {name: value for name, value in frame.items() if name != "name"}
        findings = self.audited().findings
        return Answer.page(make_report(self.shards, findings, _HERE / "set_report.html.jinja", **around))


class _Counted(ShownSet):
    """A set that counts its rows as they are gone through."""

    seen = 0

    def batches(self) -> Iterator[PackedRows]:
        """Yield the columns of the set, one record batch after the other."""
        for batch in super().batches():
            yield batch
            self.seen += len(batch)


class Site:
    """One set, or two beside each other.

    Args:
        sets: opened.
    """

    def __init__(self, sets: Sequence[ShownSet]) -> None:
        self._names = [shards.folder.resolve().name for shards in sets]
        self._sets = [
            SetPages(shards, {"which": which, "names": self._names})
            for which, shards in enumerate(sets, start=1)
        ]
        self._diff = Background(self._compare)

    def warm(self) -> None:
        """Read what the first page needs; what is wrong with it, that page says."""
        with suppress(SftError):
            for pages in self._sets:
                _ = pages.catalog

    def answer(self, top: str, path: str, asked: str) -> Answer:
        """Return the answer to a request for a path below `top`, with its query."""
        try:
            return self._answer(top, path.split("/"), asked)
        except SftError as error:
            status = 404 if isinstance(error, UsageError) else 500
            return self._page("error", top, "sftdata", status, error=error)

    def _page(self, template: str, top: str, name: str, status: int = 200, **shown: object) -> Answer:
        """Return a page that is of no one set; what is shown as None is being worked out."""
        frame = {"top": top, "root": f"{top}/1", "which": 0, "names": self._names, "name": name, **shown}
        page = render(_HERE / f"{template}.html.jinja", **frame)
        return Answer.page(page, status, again=None in shown.values())

    def _answer(self, top: str, path: list[str], asked: str) -> Answer:
        match path:
            case [""]:
                return Answer(302, b"", headers={"Location": f"{top}/1/"})
            case ["keys.js"]:
                return Answer(200, (_HERE / "keys.js").read_bytes(), "text/javascript; charset=utf-8")
            case ["diff"] if len(self._sets) == 2:
                return self._difference(top)
            case [number, *rest] if number in ("1", "2")[: len(self._sets)] and rest:
                return self._sets[int(number) - 1].answer(top, rest, asked)
        raise no_such_page(path)

    def _compare(self) -> Diff:
        from sftdata.show.diff import diff

        a, b = (pages.shards.folder for pages in self._sets)
        return diff(a, b)

    def _difference(self, top: str) -> Answer:
        found = self._diff.ask()
        settings = {name: [*map(spell, values)] for name, values in found.settings.items()} if found else {}
        parts, name = found.parts() if found else (), " → ".join(self._names)
        return self._page("diff", top, name, found=found, parts=parts, settings=settings)


def no_such_page(path: Sequence[str]) -> UsageError:
    """Return the error of an address that leads nowhere."""
    return UsageError(f"/{'/'.join(path)}: no such page.", "go back, or follow a link of this one.")
