"""Views of what is trained: the text of each token with the label stored for it.

They come from ids and labels alone; nothing is rendered or masked a second time. terminal.py and
pages/view.html.jinja display them; `sftdata.open` returns a `ShownSet`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import overload

import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32, Reject, offsets_of
from sftdata.errors import UsageError
from sftdata.pages import macro, render
from sftdata.set.ledger import REJECTS_NAME, read_lines
from sftdata.set.local import file_of, local_folder, named
from sftdata.set.manifest import read_manifest
from sftdata.set.opened import ShardSet
from sftdata.set.rows import PackedRow
from sftdata.show.pictures import CONTINUED, ShownPicture, picture_runs, shown_pictures
from sftdata.show.stats import notebook_summary
from sftdata.vocabulary import Vocabulary, read_vocabulary
from sftdata.wording import keywords_of, know

SAMPLED, SAMPLED_ROWS = 3, 12  # documents in a sample, and the packed rows they are taken from

# Words in the control tokens of turn headers.
_ROLES = {
    "system": "system", "developer": "developer", "system_prompt": "system",
    "user": "user", "human": "user", "inst": "user",
    "assistant": "assistant", "/inst": "assistant", "model": "assistant", "bot": "assistant",
    "gpt": "assistant", "chatbot": "assistant", "ai": "assistant", "/tool_results": "assistant",
    "tool": "tool", "tools": "tool", "observation": "tool", "ipython": "tool", "function": "tool",
    "tool_results": "tool",
}  # fmt: skip
_NAME = re.compile(r"/?[a-z]+(?:_[a-z]+)*")
_BRACKETS = re.compile(r"^[^\w/]+|\W+$")
_LONGEST_ROLE = 9  # characters shown of a role that is not in `_ROLES`


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest tokens that form whole characters, all of them trained or none.

    Attributes:
        text: not escaped.
        ids: token ids.
        trained: their labels are their ids.
        special: an added token, such as `<|im_end|>`, not text that spells one.
        picture: that begins here; its text is a box with the size.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    picture: ShownPicture | None = None

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        return {"text": self.text, "ids": list(self.ids), "trained": self.trained, "special": self.special}


@dataclass(frozen=True, slots=True)
class DocumentView:
    """A stretch of one example.

    Attributes:
        origin: file and line, or row; empty if unknown.
        example_id: the input row, -1 if it has no number yet.
        start: position of its first token in the packed row.
        pieces: in order.
        shown: the numbers of those that are on the page; None for all.
    """

    origin: str
    example_id: int
    start: int
    pieces: tuple[Piece, ...]
    shown: range | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def tokens_trained(self) -> int:
        """The number of trained tokens."""
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)

    def turns(self) -> list[tuple[str, Sequence[Piece]]]:
        """Return the role and the shown pieces of each turn that has some."""
        turns = find_turns(self.pieces)
        if self.shown is None:
            return turns
        parts, start = [], 0
        for role, pieces in turns:
            parts.append((role, pieces[max(self.shown.start - start, 0) : max(self.shown.stop - start, 0)]))
            start += len(pieces)
        return [one for one in parts if one[1]]

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        ids = [token_id for piece in self.pieces for token_id in piece.ids]
        labels = [
            token_id if piece.trained else IGNORE_INDEX for piece in self.pieces for token_id in piece.ids
        ]
        pieces = [piece.to_json() | {"role": role} for role, turn in self.turns() for piece in turn]
        place = {"origin": self.origin, "example_id": self.example_id, "start": self.start}
        return place | {"input_ids": ids, "labels": labels, "pieces": pieces}


@dataclass(frozen=True, slots=True)
class View:
    """One or more documents to look at.

    Attributes:
        title: such as `row 7 of shards`.
        documents: in the order of the packed row.
        padding: tokens of padding after them.
    """

    title: str
    documents: tuple[DocumentView, ...]
    padding: int = 0

    def _repr_html_(self) -> str:
        return str(macro("documents.html.jinja", "cell")(self))

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        documents = [document.to_json() for document in self.documents]
        return {"title": self.title, "documents": documents, "padding": self.padding}


def view_page(view: View, *, ids: bool = False) -> str:
    """Return a view as one self-contained page; hovering over a token shows its id.

    Args:
        ids: print the token ids beside each piece as well.
    """
    return render("view.html.jinja", name=view.title or "examples", view=view, ids=ids)


def view_example(
    input_ids: Int32, labels: Int32, vocabulary: Vocabulary,
    origin: str = "", example_id: int = -1, start: int = 0,
    pictures: Sequence[ShownPicture] = (), image_id: int = -1,
) -> DocumentView:  # fmt: skip
    """Lay the text of its tokens over an example; without a number it is one that is in no set."""
    pieces: list[Piece] = []
    for first, stop, number, begins in picture_runs(input_ids, image_id, [one.tokens for one in pictures]):
        if number < 0:
            pieces += _pieces(input_ids[first:stop], labels[first:stop], vocabulary)
        else:
            box = pictures[number].label if begins else CONTINUED
            ids = tuple(input_ids[first:stop].tolist())
            pieces.append(Piece(box, ids, False, True, pictures[number] if begins else None))
    return DocumentView(origin, example_id, start, tuple(pieces))


def _pieces(input_ids: Int32, labels: Int32, vocabulary: Vocabulary) -> Iterator[Piece]:
    """Cut a document where labels change, then at whole characters."""
    trained = labels != IGNORE_INDEX
    edges = np.flatnonzero(np.diff(trained, prepend=~trained[:1], append=~trained[-1:]))
    for start, stop in pairwise(edges.tolist() if len(trained) else []):
        yield from _stretch(input_ids[start:stop].tolist(), bool(trained[start]), vocabulary)


def _stretch(ids: Sequence[int], trained: bool, vocabulary: Vocabulary) -> Iterator[Piece]:
    first, held = 0, b""
    for index, token_id in enumerate(ids):
        special = vocabulary.is_visible_token(token_id)
        if special and held:
            yield Piece(held.decode(errors="backslashreplace"), tuple(ids[first:index]), trained, False)
            first, held = index, b""
        held += vocabulary.bytes_of(token_id)
        # Bytes that no following byte can complete are escaped; others wait for the next token.
        if not _is_open(held):
            yield Piece(
                held.decode(errors="backslashreplace"), tuple(ids[first : index + 1]), trained, special
            )
            first, held = index + 1, b""
    if first < len(ids):
        yield Piece(held.decode(errors="backslashreplace"), tuple(ids[first:]), trained, False)


def _is_open(raw: bytes) -> bool:
    """Say whether bytes end inside a character that more bytes would complete."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def find_turns(pieces: Sequence[Piece]) -> list[tuple[str, Sequence[Piece]]]:
    """Return the role and the pieces of each turn, from the headers that the chat template wrote.

    Only control tokens count, so text that spells a header is not taken for one. A role is `prompt`,
    `answer` or `text` where no header names it.
    """
    if not pieces:
        return []
    starts = list(_headers(pieces)) or list(_stretches(pieces))
    first, role = starts[0]
    if all(piece.special or not piece.text.strip() for piece in pieces[:first]):  # a BOS
        starts[0] = (0, role)
    else:
        starts.insert(0, (0, "prompt"))
    ends = pairwise([*starts, (len(pieces), "")])
    return [(role, pieces[start:stop]) for (start, role), (stop, _) in ends]


def _headers(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    """Yield index and role of each control token that begins a header: `<|user|>`, `<|im_start|>user`."""
    openers: set[str] = set()
    for index, piece in enumerate(pieces):
        if not piece.special:
            continue
        if role := _ROLES.get(_word(piece.text)):
            yield index, role
            continue
        name = _name_after(pieces, index + 1)
        if name in _ROLES:
            openers.add(piece.text)
            yield index, _ROLES[name]
        elif name and piece.text in openers:  # a role that the data brings
            yield index, name[:_LONGEST_ROLE]


def _word(token: str) -> str:
    """Return the name within a control token.

    >>> _word("<|user|>"), _word("[/INST]"), _word("<｜Assistant｜>"), _word("<|USER_TOKEN|>")
    ('user', '/inst', 'assistant', 'user')
    """
    return _BRACKETS.sub("", token.lower()).removesuffix("_token")


def _name_after(pieces: Sequence[Piece], index: int) -> str:
    """Return the rest of the line after a control token, up to the next one, if it can be a role."""
    text = ""
    while (
        index < len(pieces)
        and not pieces[index].special
        and "\n" not in text
        and len(text) <= 2 * _LONGEST_ROLE
    ):
        text += pieces[index].text
        index += 1
    line = text.partition("\n")[0].strip().lower()
    return line if _NAME.fullmatch(line) else ""


def _stretches(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    """Yield index and role of prompts and answers, by label; `text` if all but a first piece is trained."""
    changes = [i for i, piece in enumerate(pieces) if not i or piece.trained != pieces[i - 1].trained]
    if len(changes) <= 2 and changes[-1] <= 1 and pieces[-1].trained:
        yield 0, "text"
        return
    for index in changes:
        yield index, "answer" if pieces[index].trained else "prompt"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ShownRow(PackedRow):
    """A packed row that knows its set.

    Attributes:
        shards: the set.
        number: of the row in it.
    """

    shards: ShownSet
    number: int

    def _repr_html_(self) -> str:
        return self.shards.view(self.number)._repr_html_()


class ShownSet(ShardSet):
    """A `ShardSet` with views of its rows and examples, and a summary in notebooks."""

    @overload
    def __getitem__(self, index: int) -> ShownRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...

    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        """Return a row, or a list of rows for a slice."""
        if isinstance(index, slice):
            return super().__getitem__(index)
        row = super().__getitem__(index)
        columns = {field.name: getattr(row, field.name) for field in fields(PackedRow)}
        return ShownRow(**columns, shards=self, number=self._number(index))

    def view(self, number: int) -> View:
        """Return row `number` with its text laid over the stored ids and labels.

        Raises:
            UsageError: there is no such row.
        """
        if not -len(self) <= number < len(self):
            raise UsageError(
                f"{named(self.folder)}: row {number}; the set has rows 0 to {len(self) - 1}.",
                "--row with one of these.",
            )
        row = self[number]
        edges = offsets_of(row.seq_lengths).tolist()
        image_id = -1 if self.manifest.vision is None else self.manifest.vision.image_id
        documents = [
            view_example(
                row.input_ids[start:stop], row.labels[start:stop], self.vocabulary,
                self.place(example_id), example_id, start, pictures, image_id,
            )
            for example_id, (start, stop), pictures in zip(
                row.examples.tolist(), pairwise(edges), self._pictures(row), strict=True
            )
            if example_id >= 0
        ]  # fmt: skip
        padding = len(row.input_ids) - sum(document.tokens for document in documents)
        return View(f"row {row.number} of {named(self.folder)}", tuple(documents), padding)

    def _pictures(self, row: ShownRow) -> Sequence[Sequence[ShownPicture]]:
        """Return the pictures of each segment of a row."""
        stored = self.stored_pictures(row.number)
        if stored is None or row.image_counts is None or row.images is None or self.manifest.vision is None:
            return [()] * len(row.seq_lengths)
        folder, edges = self.folder / self.manifest.vision.images, offsets_of(row.image_counts).tolist()
        found = shown_pictures(stored, row.images.tolist(), folder)
        return [found[first:last] for first, last in pairwise(edges)]

    def view_example(self, example_id: int) -> View:
        """Return all stretches of one example, from any row.

        Raises:
            UsageError: the set does not hold it; the message gives the reason, if it is recorded.
        """
        rows = self._rows_of(example_id)
        if not rows:
            raise UsageError(*self._why_absent(example_id))
        documents = [
            document
            for number in rows
            for document in self.view(number).documents
            if document.example_id == example_id
        ]
        numbers = f"{', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}"
        return View(f"example {example_id} in row {numbers} of {named(self.folder)}", tuple(documents))

    def sample(self) -> View:
        """Return a document from each of a few sources, from rows spread over the set."""
        chosen: dict[str, DocumentView] = {}
        rest: list[DocumentView] = []
        for row in range(0, len(self), max(1, len(self) // SAMPLED_ROWS)):
            for document in self.view(row).documents[:SAMPLED]:
                source = self.origin(document.example_id)[0]
                rest.append(document) if source in chosen else chosen.setdefault(source, document)
        return View("", (*chosen.values(), *rest)[:SAMPLED])

    def found_at(self, code: str, example_id: int) -> str:
        """Return the place of an example that a finding is about."""
        return self.place(example_id)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the files of the tokenizer are."""
        return self.folder / "tokenizer"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the set's tokenizer; its EOS counts as a stop token."""
        vocabulary = read_vocabulary(self.tokenizer_folder)
        self.refuse_replaced()
        eos = self.manifest.tokenizer.eos_id
        return vocabulary if eos is None else replace(vocabulary, stop_ids=vocabulary.stop_ids | {eos})

    def _rows_of(self, example_id: int) -> list[int]:
        rows, first = [], 0
        for batch in self.batches():
            segments = np.flatnonzero(batch.example_ids == example_id)
            row = np.searchsorted(batch.segment_offsets, segments, side="right") - 1
            rows += (first + np.unique(row)).tolist()
            first += len(batch)
        return rows

    def _why_absent(self, example_id: int) -> tuple[str, str]:
        try:
            origin, place = self.origin(example_id), self.place(example_id)
        except KeyError:
            last = max((source.first_id + source.rows for source in self.manifest.sources), default=0) - 1
            return (
                f"{named(self.folder)}: example {example_id}; its sources hold examples 0 to {last}.",
                "--example with one of these.",
            )
        for reject in read_lines(file_of(self.folder, REJECTS_NAME), Reject):
            if (reject.file, reject.record) == origin:
                return f"{place}: rejected ({reject.code}): {reject.reason.rstrip('.')}.", reject.fix
        ledger = self.manifest.ledger
        reasons = ", ".join(sorted(ledger.rows_dropped | ledger.rows_filtered)) or "blank"
        fix = "`sftdata stats` counts the rows that were left out."
        return f"{place}: read, but not in the set ({reasons}).", fix

    def _repr_html_(self) -> str:
        return notebook_summary(self)


def open_shown(folder: str | PathLike[str]) -> ShownSet:
    """Open a finished set to look at it.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: its manifest is damaged.
    """
    folder = local_folder(folder)
    return ShownSet(folder, read_manifest(folder))


know(
    lambda: (keywords_of(ShownSet.view), keywords_of(ShownSet.view_example)),
    {"--row": "number", "--example": "example_id"},
)
