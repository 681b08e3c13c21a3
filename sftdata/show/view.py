"""What is trained, as one value: the text of each token with the label that is stored for it.

Everything here comes from ids and labels; nothing is rendered or masked a second time. terminal.py and
pages/view.html.jinja show it; `ShownSet` is what `sftdata.open` returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from sftdata.batches import IGNORE_INDEX, Int32, Int64, Reject
from sftdata.errors import UsageError
from sftdata.pages import macro, render
from sftdata.set.ledger import REJECTS_NAME
from sftdata.set.manifest import read_manifest
from sftdata.set.opened import PackedRow, ShardSet
from sftdata.show.stats import notebook_summary
from sftdata.vocabulary import Vocabulary, read_vocabulary

SAMPLED, SAMPLED_ROWS = 3, 12  # documents in a sample, and packed rows that it is taken from


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest tokens that are whole characters, all trained or none.

    Attributes:
        text: as the data has it, not escaped for any face.
        ids: token ids.
        trained: their labels are their ids.
        special: an added token, such as `<|im_end|>`, and not text that spells one.
    """

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class DocumentView:
    """A stretch of one example.

    Attributes:
        origin: file and line, or row; empty where unknown.
        example_id: the input row, -1 where it has no number yet.
        start: position of its first token in the packed row.
        pieces: in order.
    """

    origin: str
    example_id: int
    start: int
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def tokens_trained(self) -> int:
        """Tokens with a label."""
        return sum(len(piece.ids) for piece in self.pieces if piece.trained)

    def turns(self) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """Yield who speaks, and the pieces of that turn."""
        for turn in find_turns(self.pieces):
            yield turn.role, self.pieces[turn.start : turn.stop]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        ids = [token_id for piece in self.pieces for token_id in piece.ids]
        labels = [
            token_id if piece.trained else IGNORE_INDEX for piece in self.pieces for token_id in piece.ids
        ]
        pieces = [asdict(piece) | {"role": role} for role, turn in self.turns() for piece in turn]
        place = {"origin": self.origin, "example_id": self.example_id, "start": self.start}
        return place | {"input_ids": ids, "labels": labels, "pieces": pieces}


@dataclass(frozen=True, slots=True)
class View:
    """One or more documents to look at.

    Attributes:
        title: what they are, as `row 7 of shards`.
        documents: in the order of the packed row.
        padding: tokens of padding after them.
    """

    title: str
    documents: tuple[DocumentView, ...]
    padding: int = 0

    def _repr_html_(self) -> str:
        return str(macro("documents.html.jinja", "cell")(self))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        documents = [document.to_json() for document in self.documents]
        return {"title": self.title, "documents": documents, "padding": self.padding}


def view_page(view: View, *, ids: bool = False) -> str:
    """Return a view as one self-contained page; hovering over a token shows its id.

    Args:
        ids: write the token ids beside each piece as well.
    """
    return render("view.html.jinja", name=view.title or "examples", view=view, ids=ids)


def view_row(
    row: tuple[Int32, Int32, Int32, Int64],
    vocabulary: Vocabulary,
    place: Callable[[int], str],
    title: str = "",
) -> View:
    """Lay the text over a packed row.

    Args:
        row: input_ids and labels, int32[T]; seq_lengths, int32[S]; example ids, int64[S], -1 for padding.
        vocabulary: of the tokenizer that made the ids.
        place: gives the place of an example id, in words.
    """
    input_ids, labels, seq_lengths, example_ids = row
    documents, start, padding = [], 0, 0
    for length, example_id in zip(seq_lengths.tolist(), example_ids.tolist(), strict=True):
        stop = start + length
        if example_id < 0:
            padding += length
        else:
            pieces = tuple(_pieces(input_ids[start:stop], labels[start:stop], vocabulary))
            documents.append(DocumentView(place(example_id), example_id, start, pieces))
        start = stop
    return View(title, tuple(documents), padding)


def view_example(input_ids: Int32, labels: Int32, vocabulary: Vocabulary, origin: str = "") -> DocumentView:
    """Lay the text over one example that is in no shard yet."""
    return DocumentView(origin, -1, 0, tuple(_pieces(input_ids, labels, vocabulary)))


def _pieces(input_ids: Int32, labels: Int32, vocabulary: Vocabulary) -> Iterator[Piece]:
    """Cut a document where labels change, then at whole characters."""
    trained = labels != IGNORE_INDEX
    edges = (
        np.flatnonzero(np.diff(trained, prepend=~trained[:1], append=~trained[-1:])).tolist()
        if len(trained)
        else []
    )
    for start, stop in pairwise(edges):
        yield from _stretch(input_ids[start:stop].tolist(), bool(trained[start]), vocabulary)


def _stretch(ids: Sequence[int], trained: bool, vocabulary: Vocabulary) -> Iterator[Piece]:
    first, held = 0, b""
    for index, token_id in enumerate(ids):
        special = vocabulary.is_visible_token(token_id)
        if special and held:
            yield Piece(held.decode(errors="backslashreplace"), tuple(ids[first:index]), trained, False)
            first, held = index, b""
        held += vocabulary.bytes_of(token_id)
        # Bytes that cannot become a character, however many follow, are spelled out rather than held forever.
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


_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "inst": "user", "assistant": "assistant",
    "/inst": "assistant", "model": "assistant", "bot": "assistant", "gpt": "assistant", "chatbot": "assistant", "ai": "assistant",
    "tool": "tool", "tools": "tool", "observation": "tool", "ipython": "tool", "function": "tool",
    "tool_results": "tool", "system_prompt": "system", "/tool_results": "assistant",
}  # fmt: skip
_NAME = re.compile(r"/?[a-z]+(?:_[a-z]+)*")
_BRACKETS = re.compile(r"^[^\w/]+|\W+$")
_SHOWN = 9  # characters of a role that the template names otherwise


class Spoken(Protocol):
    """What a piece of a view tells about who speaks."""

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def trained(self) -> bool: ...  # noqa: D102

    @property
    def special(self) -> bool: ...  # noqa: D102


class Turn(NamedTuple):
    """A stretch of pieces under one role.

    Attributes:
        role: of who speaks; `prompt`, `answer` or `text` where no header says it.
        start, stop: half-open, counted in pieces.
    """

    role: str
    start: int
    stop: int


def find_turns(pieces: Sequence[Spoken]) -> list[Turn]:
    """Return the turns of a document, end to end; the first begins at its first piece."""
    if not pieces:
        return []
    found = list(_headers(pieces)) or list(_stretches(pieces))
    first, role = found[0]
    if all(piece.special or not piece.text.strip() for piece in pieces[:first]):  # a BOS
        found[0] = (0, role)
    else:
        found.insert(0, (0, "prompt"))
    return [Turn(role, start, stop) for (start, role), (stop, _) in pairwise([*found, (len(pieces), "")])]


def _headers(pieces: Sequence[Spoken]) -> Iterator[tuple[int, str]]:
    """Yield (piece, role) of each control token that is a header, or that begins one: `<|user|>`, `<|im_start|>user`."""
    openers: set[str] = set()
    for index, piece in enumerate(pieces):
        if not piece.special:
            continue
        own = _ROLES.get(_word(piece.text))
        if own:
            yield index, own
            continue
        name = _name_after(pieces, index + 1)
        if name in _ROLES:
            openers.add(piece.text)
            yield index, _ROLES[name]
        elif name and piece.text in openers:  # a role of the user's own
            yield index, name[:_SHOWN]


def _word(token: str) -> str:
    """Return the name within a control token.

    >>> _word("<|user|>"), _word("[/INST]"), _word("<｜Assistant｜>"), _word("<|USER_TOKEN|>")
    ('user', '/inst', 'assistant', 'user')
    """
    return _BRACKETS.sub("", token.lower()).removesuffix("_token")


def _name_after(pieces: Sequence[Spoken], index: int) -> str:
    """Return the rest of the line after a control token, as far as the next one."""
    text = ""
    while index < len(pieces) and not pieces[index].special and "\n" not in text and len(text) <= 2 * _SHOWN:
        text += pieces[index].text
        index += 1
    line = text.partition("\n")[0].strip().lower()
    return line if _NAME.fullmatch(line) else ""


def _stretches(pieces: Sequence[Spoken]) -> Iterator[tuple[int, str]]:
    """Yield prompts and answers by what is trained; a text that is trained from its first or second piece on is a text."""
    changes = [i for i, piece in enumerate(pieces) if not i or piece.trained != pieces[i - 1].trained]
    if len(changes) <= 2 and changes[-1] <= 1 and pieces[-1].trained:
        yield 0, "text"
        return
    for index in changes:
        yield index, "answer" if pieces[index].trained else "prompt"


@dataclass(frozen=True, slots=True, eq=False)
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
    """A `ShardSet` whose rows, examples and sums can be looked at."""

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or a list of rows for a slice."""
        row = super().__getitem__(index)
        if isinstance(row, list):
            return row
        columns = (row.input_ids, row.labels, row.seq_lengths, row.examples, row.loss_weights)
        return ShownRow(*columns, self, range(len(self))[index])

    def view(self, number: int) -> View:
        """Return row `number` with its text laid over the stored ids and labels.

        Raises:
            UsageError: there is no such row.
        """
        if not -len(self) <= number < len(self):
            raise UsageError(
                f"{self.folder}: row {number}; the set has rows 0 to {len(self) - 1}.",
                "--row with one of these.",
            )
        row = super().__getitem__(number)
        columns = (row.input_ids, row.labels, row.seq_lengths, row.examples)
        return view_row(
            columns, self.vocabulary, self.place, f"row {range(len(self))[number]} of {self.folder}"
        )

    def view_example(self, example_id: int) -> View:
        """Return all stretches of one example, from whichever rows they lie in.

        Raises:
            UsageError: the set does not hold it; says why where that is known.
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
        where = f"row {', '.join(map(str, rows[:8]))}{', …' if len(rows) > 8 else ''}"
        return View(f"example {example_id} in {where} of {self.folder}", tuple(documents))

    def sample(self) -> View:
        """Return a document from each of a few sources, from rows that lie all over the set."""
        chosen: dict[str, DocumentView] = {}
        rest: list[DocumentView] = []
        for row in range(0, len(self), max(1, len(self) // SAMPLED_ROWS)):
            for document in self.view(row).documents[:SAMPLED]:
                source = self.origin(document.example_id)[0]
                rest.append(document) if source in chosen else chosen.setdefault(source, document)
        return View("", (*chosen.values(), *rest)[:SAMPLED])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the set's own tokenizer."""
        found = read_vocabulary(self.folder / "tokenizer")
        self.refuse_replaced()
        eos = self.manifest.tokenizer.eos_id
        return found if eos is None else replace(found, stop_ids=found.stop_ids | {eos})

    def _rows_of(self, example_id: int) -> list[int]:
        rows, first = [], 0
        for batch in self.batches():
            found = np.flatnonzero(batch.example_ids == example_id)
            rows += (
                first + np.unique(np.searchsorted(batch.segment_offsets, found, side="right") - 1)
            ).tolist()
            first += len(batch)
        return rows

    def _why_absent(self, example_id: int) -> tuple[str, str]:
        try:
            origin, where = self.origin(example_id), self.place(example_id)
        except KeyError:
            last = max((source.first_id + source.rows for source in self.manifest.sources), default=0) - 1
            return (
                f"{self.folder}: example {example_id}; its sources hold examples 0 to {last}.",
                "--example with one of these.",
            )
        reject = next((found for found in self._rejects() if (found.file, found.record) == origin), None)
        if reject is not None:
            return f"{where}: rejected ({reject.code}): {reject.reason}.", reject.fix
        dropped = (
            ", ".join(sorted(self.manifest.ledger.rows_dropped | self.manifest.ledger.rows_filtered))
            or "blank"
        )
        return (
            f"{where}: read, but not in the set ({dropped}).",
            "`sftdata stats` counts the rows that were left out.",
        )

    def _rejects(self) -> list[Reject]:
        path = self.folder / REJECTS_NAME
        lines = path.read_bytes().splitlines() if path.is_file() else []
        return [msgspec.json.decode(line, type=Reject) for line in lines]

    def _repr_html_(self) -> str:
        return notebook_summary(str(self.folder), self.manifest)


def open_shown(folder: str | Path) -> ShownSet:
    """Open a finished set to look at it.

    Raises:
        UsageError: the folder is not a finished set.
        IntegrityError: its manifest is damaged.
    """
    folder = Path(folder)
    return ShownSet(folder, read_manifest(folder))
