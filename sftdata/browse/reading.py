"""The text of documents that a page shows: a line of each, all of one, or those that hold a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32, offsets_of
from sftdata.browse.catalog import BESIDE, IN_ROWS, Catalog, Stretch
from sftdata.browse.selection import Selection
from sftdata.errors import IntegrityError, UsageError
from sftdata.set.index import RestRows, slice_number
from sftdata.set.local import named
from sftdata.set.rows import SetFiles
from sftdata.show.pictures import ShownPicture, shown_pictures
from sftdata.show.view import DocumentView, View, view_example
from sftdata.vocabulary import Vocabulary

PART = 16_384  # tokens of a document, or of a pack, on one page
SEARCHED = 2_000_000  # tokens that one page looks through for a text: about half a second
_TOGETHER = 256  # documents read at a time in a search
_HEAD, _ANSWER = 48, 40  # tokens of a line: of the beginning, and from the first trained one
_BEFORE, _BEHIND = 70, 170  # characters around a text that was found
_FATES = {IN_ROWS: "", BESIDE: "dropped", IN_ROWS | BESIDE: "cut"}


def part_of(view: View, number: int) -> tuple[View, int]:
    """Return one part of a view, counted from 1, of about `PART` tokens; and how many parts there are.

    Raises:
        UsageError: there is no such part.
    """
    low, high = (number - 1) * PART, number * PART
    documents, start = [], 0
    for document in view.documents:
        edges = start + offsets_of([len(piece.ids) for piece in document.pieces])[:-1]
        first, last = np.searchsorted(edges, [low, high]).tolist()
        if last > first:
            documents.append(replace(document, shown=range(first, last)))
        start += document.tokens
    whole = max(-(-start // PART), 1)
    if number > whole:
        raise UsageError(f"part: found {number}; there are {whole}.", "follow a link of the page.")
    return View(view.title, tuple(documents), view.padding if number == whole else 0), whole


@dataclass(frozen=True, slots=True)
class Line:
    """A document in a list.

    Attributes:
        example_id, place: of it.
        tokens, trained: of it.
        fate: `cut` or `dropped`, or "".
        parts: some of its text, control tokens left out, in stretches of one kind: `t` where trained, `hit`
            where it is the text that was looked for, else "".
    """

    example_id: int
    place: str
    tokens: int
    trained: int
    fate: str
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """What one page of a search found.

    Attributes:
        lines: documents that hold the text.
        looked: selected documents looked through so far, by all pages.
        after: example id of the last one; None at the end.
    """

    lines: list[Line]
    looked: int
    after: int | None


class Reader:
    """Read documents of a catalogue."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog, self.shards = catalog, catalog.shards
        manifest = self.shards.manifest
        self._files = SetFiles(self.shards.folder, manifest)
        self._first_row: dict[int | None, int] = {}
        row = 0
        for shard in manifest.shards:
            self._first_row[slice_number(shard.name)] = row
            row += shard.rows
        self._rest: tuple[int, list[RestRows]] = (-1, [])
        self._spelled = cache(self.shards.vocabulary.bytes_of)
        self._image_id = -1 if manifest.vision is None else manifest.vision.image_id

    def row_of(self, place: Stretch) -> int:
        """Return the number, in the set, of the row that holds a stretch.

        Raises:
            IntegrityError: there is no such row.
        """
        if place.slice not in self._first_row:
            raise IntegrityError(
                f"{named(self.shards.folder)}: slice {place.slice} has no rows.", "run `sftdata verify`."
            )
        return self._first_row[place.slice] + place.row

    # ------------------------------------------------------------------------------------------- one document

    def document(self, example_id: int) -> tuple[View, list[int]]:
        """Return all stretches of a document, those in no row with the reason, and the rows that hold some.

        Raises:
            UsageError: the set does not have it.
        """
        if not (0 <= example_id < len(self.catalog) and self.catalog.state[example_id]):
            raise UsageError(
                f"{named(self.shards.folder)}: no document {example_id}.",
                "it was rejected or left out: see `Left out`.",
            )
        documents, rows = [], []
        for place in self.catalog.stretches([example_id])[example_id]:
            if place.rest:
                documents.append(self._beside(place))
                continue
            row = self.row_of(place)
            rows.append(row)
            documents += [
                one for one in self.shards.view(row).documents
                if one.example_id == example_id and one.start == place.start
            ]  # fmt: skip
        return View("", tuple(documents)), list(dict.fromkeys(rows))

    def _beside(self, place: Stretch) -> DocumentView:
        """Return a stretch that is in no row, with its reason in place of the name of its source."""
        rest, row = self._rest_row(place)
        ids, labels = self._read(place)
        origin = f"{self.shards.place(place.example_id)}, in no row: {rest.reasons[row]}"
        return view_example(
            ids, labels, self.shards.vocabulary, origin, place.example_id, place.offset,
            self._pictures(place.slice, rest, row), self._image_id,
        )  # fmt: skip

    def _pictures(self, number: int, rest: RestRows, row: int) -> Sequence[ShownPicture]:
        """Return the pictures of a row of the rest of a slice."""
        vision, stored = self.shards.manifest.vision, self._files.pictures(number)
        if vision is None or stored is None or rest.images is None or rest.image_counts is None:
            return ()
        first, last = offsets_of(rest.image_counts)[row : row + 2].tolist()
        return shown_pictures(stored, rest.images[first:last].tolist(), self.shards.folder / vision.images)

    def _rest_row(self, place: Stretch) -> tuple[RestRows, int]:
        """Return the record batch of the rest that holds a stretch, and its number there."""
        if self._rest[0] != place.slice:
            self._rest = place.slice, self._files.rest(place.slice)
        row = place.row
        for batch in self._rest[1]:
            if row < len(batch):
                return batch, row
            row -= len(batch)
        raise IntegrityError(
            f"{named(self.shards.folder)}: the rest of slice {place.slice} ends early.",
            "run `sftdata verify`.",
        )

    def _read(self, place: Stretch) -> tuple[Int32, Int32]:
        """Return ids and labels of a stretch."""
        if place.rest:
            rest, row = self._rest_row(place)
            tokens = slice(rest.row_offsets[row], rest.row_offsets[row + 1])
            return rest.input_ids[tokens], rest.labels[tokens]
        packed = self.shards[self.row_of(place)]
        tokens = slice(place.start, place.start + place.length)
        return packed.input_ids[tokens], packed.labels[tokens]

    # ----------------------------------------------------------------------------------------- many documents

    def lines(self, ids: Sequence[int]) -> list[Line]:
        """Return a line for each of these documents."""
        places = self.catalog.stretches(ids)
        return [self._line(example_id, self._excerpt(places[example_id])) for example_id in ids]

    def _line(self, example_id: int, parts: tuple[tuple[str, str], ...]) -> Line:
        catalog = self.catalog
        return Line(
            example_id,
            self.shards.place(example_id),
            int(catalog.length[example_id]),
            int(catalog.trained[example_id]),
            _FATES[int(catalog.state[example_id])],
            parts,
        )

    def _excerpt(self, places: Sequence[Stretch]) -> tuple[tuple[str, str], ...]:
        """Return how a document begins, and how its first answer does."""
        ids, labels = self._read(places[0])
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        answer = int(trained[0]) if len(trained) else 0
        if answer <= _HEAD:
            shown = slice(0, answer + _ANSWER)
            return _parts(ids[shown], labels[shown], self.shards.vocabulary)
        head, tail = slice(0, _HEAD), slice(answer, answer + _ANSWER)
        begin, end = (_parts(ids[part], labels[part], self.shards.vocabulary) for part in (head, tail))
        return (*begin, (" … ", ""), *end)

    def search(self, selection: Selection, text: str, after: int, most: int) -> Found:
        """Look for a text, whatever its case, in selected documents behind an example id; see `SEARCHED`.

        Args:
            after: -1 to begin with the first.
            most: documents to find before it stops.
        """
        wanted, pattern = text.casefold(), re.compile(re.escape(text), re.IGNORECASE)
        first = looked = selection.rank(after + 1)
        lines: list[Line] = []
        seen = 0
        while looked < len(selection) and seen < SEARCHED and len(lines) < most:
            ids = selection.ids(looked, _TOGETHER)
            for example_id, whole in zip(ids, self._texts(ids), strict=True):
                looked, after = looked + 1, example_id
                seen += int(self.catalog.length[example_id])
                if wanted in whole.casefold():
                    lines.append(self._line(example_id, _around(whole, pattern)))
                if seen >= SEARCHED or len(lines) == most:
                    break
        assert looked > first or first == len(selection)
        return Found(lines, looked, after if looked < len(selection) else None)

    def _texts(self, ids: Sequence[int]) -> Iterator[str]:
        """Yield the whole text of documents, what is in no row included."""
        places = self.catalog.stretches(ids)
        for example_id in ids:
            tokens = [token for place in places[example_id] for token in self._read(place)[0].tolist()]
            yield b"".join(map(self._spelled, tokens)).decode(errors="replace")


def _parts(ids: Int32, labels: Int32, vocabulary: Vocabulary) -> tuple[tuple[str, str], ...]:
    """Return the text of some tokens in stretches of one kind, control tokens left out."""
    pieces = [one for one in view_example(ids, labels, vocabulary).pieces if not one.special]
    runs = groupby(pieces, key=lambda one: one.trained)
    return tuple(("".join(one.text for one in own), "t" if trained else "") for trained, own in runs)


def _around(text: str, pattern: re.Pattern[str]) -> tuple[tuple[str, str], ...]:
    """Return the first place of a text that was found, and what stands around it."""
    hit = pattern.search(text)
    start, stop = hit.span() if hit else (0, 0)  # a letter that only folds to others, as ß to ss
    first, last = max(start - _BEFORE, 0), stop + _BEHIND
    before, behind = "… " if first else "", " …" if last < len(text) else ""
    parts = (before + text[first:start], ""), (text[start:stop], "hit"), (text[stop:last] + behind, "")
    return tuple(part for part in parts if part[0])
